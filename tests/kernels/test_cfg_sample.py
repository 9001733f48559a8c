"""Ops against known answers, frequencies and plain fp64 maths."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import cfg_sample, linear_grpo_loss, linear_logprobs, reference
from kernels.philox import gumbel, philox
from kernels.state import Draw

FP64 = torch.float64


def sample(cond: Tensor, uncond: Tensor | None = None, **overrides):
    """cfg_sample with every argument defaulted."""
    arguments = {
        "cfg_weight": 1.0 if uncond is None else 5.0,
        "temperature": 1.0,
        "seed": 7,
        "sample_ids": torch.arange(len(cond)),
        "step": 0,
    }
    return cfg_sample(cond, uncond, **(arguments | overrides))


# Philox and Gumbel


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [  # Random123's kat_vectors for philox4x32-10
        (0, (0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (2**64 - 1, (2**32 - 1,) * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            0x299F31D0A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(key, counter, expected):
    words = philox(key, *(torch.tensor([c]) for c in counter))
    assert " ".join(f"{int(w):08x}" for w in words) == expected


def test_gumbel_layout_is_the_contract():
    """Word i of counter (v // 4, step, id low, id high) belongs to vocabulary index 4 * c0 + i."""
    seed, sample_id, step = 2**40 + 3, 2**33 + 5, 11
    noise = gumbel(seed, torch.tensor([sample_id]), torch.tensor([step]), 7)
    assert noise.shape == (1, 1, 7) and noise.dtype == torch.float32
    for v in range(7):
        counter = (v // 4, step, sample_id & 0xFFFFFFFF, sample_id >> 32)
        word = int(philox(seed, *(torch.tensor([c]) for c in counter))[v % 4])
        expected = -math.log(-math.log(((word >> 9) + 0.5) / 2**23))
        assert float(noise[0, 0, v]) == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_gumbel_moments():
    noise = gumbel(1, torch.arange(250), torch.arange(8), 501)
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(np.euler_gamma, abs=0.006)  # 5 sigma
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.02)
    a, b = noise[0].flatten() - np.euler_gamma, noise[1].flatten() - np.euler_gamma
    assert abs((a * b).mean().item()) < 0.025  # steps are uncorrelated


# Sampling


def chi_square(ids: Tensor, probs: Tensor) -> float:
    expected = probs.double() * len(ids)
    observed = torch.bincount(ids, minlength=len(probs)).double()
    return ((observed - expected) ** 2 / expected).sum().item()


@pytest.mark.parametrize(
    ("guided", "temperature", "top_k"),
    [(False, 1.0, 0), (True, 1.0, 0), (True, 2.5, 0), (True, 2.5, 6)],
)
def test_frequencies_match_softmax(guided, temperature, top_k):
    torch.manual_seed(0)
    cond, uncond = torch.randn(2, 16).mul(0.4)
    logits = (uncond + 3.0 * (cond - uncond) if guided else cond).double() / temperature
    if top_k:
        logits[logits < logits.topk(top_k).values[-1]] = -math.inf
    rows = 200_000
    ids, _, _ = sample(
        cond.expand(rows, -1),
        uncond.expand(rows, -1) if guided else None,
        cfg_weight=3.0,
        temperature=temperature,
        top_k=top_k,
        seed=123,
        step=5,
    )
    kept = logits.isfinite()
    assert kept[ids].all()
    compact = kept.cumsum(0) - 1
    # 99.99% quantile of chi-square with 15 degrees of freedom; fewer have a lower one
    assert chi_square(compact[ids], logits[kept].softmax(0)) < 44.3


def test_draw_depends_on_seed_sample_and_step_only():
    torch.manual_seed(1)
    cond, uncond = torch.randn(2, 64, 33)
    ids, logprobs, guided = sample(cond, uncond, temperature=3.0, step=4)
    order = torch.randperm(64)[:20]
    again = sample(cond[order], uncond[order], temperature=3.0, step=4, sample_ids=order)
    for whole, part in zip((ids, logprobs, guided), again, strict=True):
        assert torch.equal(whole[order], part)
    noise = gumbel(7, torch.arange(64), torch.tensor([4]), 33)[0]
    draw = Draw(cfg_weight=5.0, temperature=3.0)
    assert torch.equal(ids, reference.cfg_sample(cond, uncond, noise, draw)[0])
    for change in ({"seed": 8}, {"step": 5}, {"sample_ids": torch.arange(64) + 2**32}):
        other = sample(cond, uncond, **({"temperature": 3.0, "step": 4} | change))[0]
        assert (other != ids).any(), change


def test_top_k_support_is_exact():
    torch.manual_seed(2)
    logits = torch.randn(24).mul(0.3)
    for k in (1, 3, 24, 100):
        ids = sample(logits.expand(6000, -1), top_k=k)[0]
        expected = logits.topk(min(k, 24)).indices
        assert set(ids.tolist()) == set(expected.tolist()), k
    tied = torch.tensor([0.0, 1.0, 1.0, 1.0, -1.0])
    assert set(sample(tied.expand(500, -1), top_k=2)[0].tolist()) == {1, 2, 3}


def test_top_p_support_is_exact():
    probs = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2])
    logits = probs.log().expand(4000, -1)
    for p, support in ((0.3, {1}), (0.6, {1, 3}), (0.8, {1, 3, 4}), (0.9, {1, 2, 3, 4})):
        assert set(sample(logits, top_p=p)[0].tolist()) == support, p
    assert set(sample(logits, top_p=1e-9)[0].tolist()) == {1}
    # top-k comes first: of 0.4 and 0.25, renormalised, the first alone reaches 0.6
    assert set(sample(logits, top_k=2, top_p=0.6)[0].tolist()) == {1}


def test_greedy_takes_the_guided_maximum():
    torch.manual_seed(3)
    cond, uncond = torch.randn(2, 40, 17)
    guided = uncond + 5 * (cond - uncond)
    ids, _, guided_logprobs = sample(cond, uncond, greedy=True)
    assert torch.equal(ids, guided.argmax(-1))
    assert torch.equal(ids, sample(cond, uncond, greedy=True, seed=99, step=3)[0])
    assert (cond.argmax(-1) != ids).any()  # guidance changed something
    torch.testing.assert_close(guided_logprobs, guided.log_softmax(-1).amax(-1))


def test_extreme_logits():
    cond = torch.full((3, 9), -1e4)
    cond[:, 4] = 1e4
    uncond = -cond
    ids, logprobs, guided = sample(cond, uncond, temperature=0.01)
    assert ids.tolist() == [4, 4, 4]
    assert logprobs.tolist() == guided.tolist() == [0.0, 0.0, 0.0]
    # What the condition excludes, a weight of 0 draws all the same.
    ids, logprobs, guided = sample(cond, uncond, cfg_weight=0.0)
    assert (ids != 4).all()
    torch.testing.assert_close(logprobs, torch.full((3,), -2e4))
    # A log-prob is no better than the fp32 spacing of the logits it is made from.
    torch.testing.assert_close(guided, torch.full((3,), -math.log(8)), rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_used_in_fp32(dtype):
    torch.manual_seed(4)
    cond, uncond = torch.randn(2, 50, 30).mul(8).to(dtype)
    low = sample(cond, uncond, temperature=1.3)
    full = sample(cond.float(), uncond.float(), temperature=1.3)
    for got, expected in zip(low, full, strict=True):
        assert torch.equal(got, expected)
    assert low[1].dtype == low[2].dtype == torch.float32


def test_strided_views_equal_contiguous():
    torch.manual_seed(5)
    rows = torch.randn(20, 31)
    columns = torch.randn(31, 20)
    for cond, uncond in ((rows[0::2], rows[1::2]), (columns.T[:10], columns.T[10:])):
        plain = sample(cond.contiguous(), uncond.contiguous())
        viewed = sample(cond, uncond)
        assert torch.equal(viewed[0], plain[0])
        torch.testing.assert_close(viewed[1:], plain[1:])


def test_both_logprobs_against_fp64():
    torch.manual_seed(6)
    cond, uncond = torch.randn(2, 64, 1000).mul(3)
    ids, logprobs, guided = sample(cond, uncond, temperature=0.7, top_k=50, top_p=0.9)
    c, u = cond.double(), uncond.double()
    at = ids[:, None]
    expected = (c / 0.7).log_softmax(-1).gather(1, at)[:, 0]
    expected_guided = ((u + 5 * (c - u)) / 0.7).log_softmax(-1).gather(1, at)[:, 0]
    # fp32 spacing at the largest logit
    assert (logprobs - expected).abs().max() < 1e-5
    assert (guided - expected_guided).abs().max() < 5e-5
    unguided = sample(cond, None)
    assert torch.equal(unguided[1], unguided[2])


def test_rows_without_a_distribution_are_marked():
    cond = torch.zeros(4, 8)
    cond[1, 3] = math.nan
    cond[2] = -math.inf
    ids, logprobs, _ = sample(cond)
    assert logprobs.isfinite().tolist() == [True, False, False, True]
    assert ((ids >= 0) & (ids < 8)).all()


def test_empty_batch_is_sampled():
    ids, logprobs, guided = sample(torch.zeros(0, 5), torch.zeros(0, 5))
    assert ids.shape == logprobs.shape == guided.shape == (0,)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("cond", {"cond": torch.zeros(8)}),
        ("uncond", {"uncond": torch.zeros(2, 7)}),
        ("temperature", {"temperature": 0.0}),
        ("temperature", {"temperature": math.nan}),
        ("top_k", {"top_k": -1}),
        ("top_p", {"top_p": 0.0}),
        ("top_p", {"top_p": 1.5}),
        ("sample_ids", {"sample_ids": torch.arange(3)}),
    ],
)
def test_bad_sampling_arguments_are_named(name, change):
    arguments = {
        "cond": torch.zeros(2, 8),
        "uncond": torch.zeros(2, 8),
        "sample_ids": torch.arange(2),
    }
    with pytest.raises(ValueError, match=f"^{name}: wanted"):
        sample(**(arguments | change))


# Linear log-probs


def test_linear_logprobs_values_and_gradients():
    torch.manual_seed(7)
    hidden, weight, bias = torch.randn(9, 5), torch.randn(13, 5), torch.randn(13)
    targets, upstream = torch.randint(13, (9,)), torch.randn(9)
    inputs = [t.requires_grad_() for t in (hidden, weight, bias)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    got = linear_logprobs(inputs[0], inputs[1], targets, bias=inputs[2], temperature=0.8)
    assert got.dtype == torch.float32
    logits = (exact[0] @ exact[1].T + exact[2]) / 0.8
    expected = torch.stack(
        [logits[i, t] - logits[i].exp().sum().log() for i, t in enumerate(targets)]
    )
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    got.backward(upstream)
    expected.backward(upstream.double())
    for g, e in zip(inputs, exact, strict=True):
        torch.testing.assert_close(g.grad.double(), e.grad, rtol=1e-4, atol=1e-5)


def test_linear_logprobs_low_precision_and_row_slices():
    torch.manual_seed(8)
    head = torch.randn(120, 32)
    hidden, targets = torch.randn(40, 32), torch.randint(100, (40,))
    sliced = linear_logprobs(hidden, head[10:110], targets)
    assert torch.equal(sliced, linear_logprobs(hidden, head[10:110].clone(), targets))
    low_hidden, low_weight = hidden.bfloat16(), head[10:110].bfloat16()
    got = linear_logprobs(low_hidden, low_weight, targets)
    truth = (low_hidden.double() @ low_weight.double().T).log_softmax(-1)
    truth = truth.gather(1, targets[:, None])[:, 0]
    eager = (low_hidden @ low_weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert got.dtype == torch.float32
    assert (got - truth).abs().max() <= 2 * (eager - truth).abs().max() + 1e-6
    assert (got - truth).abs().max() < 1e-4  # fp32 logits, whatever the weights' dtype


def test_linear_logprobs_gradcheck():
    torch.manual_seed(9)
    hidden, weight, bias = (
        torch.randn(s, dtype=FP64, requires_grad=True) for s in ((4, 3), (6, 3), (6,))
    )
    targets = torch.tensor([0, 5, 2, 2])
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_logprobs(h, w, targets, bias=b, temperature=1.7),
        (hidden, weight, bias),
    )


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("hidden", {"hidden": torch.zeros(3)}),
        ("weight", {"weight": torch.zeros(7, 5)}),
        ("targets", {"targets": torch.zeros(2, dtype=torch.int64)}),
        ("bias", {"bias": torch.zeros(6)}),
        ("temperature", {"temperature": -1.0}),
    ],
)
def test_bad_head_arguments_are_named(name, change):
    arguments = {
        "hidden": torch.zeros(3, 4),
        "weight": torch.zeros(7, 4),
        "targets": torch.zeros(3, dtype=torch.int64),
    }
    for op, extra in ((linear_logprobs, {}), (linear_grpo_loss, {"advantages": torch.zeros(3)})):
        with pytest.raises(ValueError, match=f"^{name}: wanted"):
            op(**(arguments | extra | change))
