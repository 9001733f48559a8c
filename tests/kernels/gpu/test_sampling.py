"""cfg_sample's kernel (in the interpreter without a GPU) against the PyTorch path and fp64."""

import math

import pytest
import torch
from torch import Tensor

from kernels import cfg_sample, reference
from kernels.gpu import cfg_sample as gpu_cfg_sample
from kernels.philox import gumbel
from kernels.state import Draw

SEED = 2**40 + 3


@pytest.fixture(autouse=True)
def triton_path(interpreter):
    """Public ops take the kernels on any device."""


@pytest.fixture
def many_rows(device, monkeypatch):
    """Without a GPU 1,024 rows a program: the interpreter's time is a program's overhead."""
    if device == "cpu":
        monkeypatch.setattr(gpu_cfg_sample, "TILE", 1 << 15)


def logits(rows: int, vocab: int, device: str, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(rows * 31 + vocab)
    pair = torch.randn(2, rows, vocab, generator=rng) * scale
    return pair[0].to(device), pair[1].to(device)


def sample(cond: Tensor, uncond: Tensor | None = None, **overrides):
    """The op with every argument defaulted; ids beyond 32 bits."""
    arguments = {
        "cfg_weight": 3.0,
        "temperature": 1.0,
        "seed": SEED,
        "sample_ids": torch.arange(len(cond), device=cond.device) + 2**33,
        "step": 11,
    }
    return cfg_sample(cond, uncond, **(arguments | overrides))


def by_pytorch(cond: Tensor, uncond: Tensor | None = None, **overrides):
    """The reference for `sample`, and the scores that it compared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "0")
        ids = torch.arange(len(cond), device=cond.device) + 2**33
        noise = gumbel(SEED, ids, torch.tensor([11], device=cond.device), cond.shape[1])[0]
        draw = Draw(**({"cfg_weight": 3.0} | overrides))
        return reference.cfg_sample(cond, uncond, None if draw.greedy else noise, draw)


def assert_same(got, expected, rtol: float = 0.0) -> None:
    """The same tokens, and log-probs to 1e-5."""
    assert got[0].dtype == torch.int64 and torch.equal(got[0], expected[0])
    for ours, theirs in zip(got[1:], expected[1:], strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-5)


def test_same_tokens_on_ten_thousand_rows(device, many_rows):
    cond, uncond = logits(10_000, 29, device)
    got, expected = sample(cond, uncond), by_pytorch(cond, uncond)
    differ = (got[0] != expected[0]).nonzero()[:, 0]
    # Two libraries' logarithms may order scores within 1e-6 of each other differently: one draw
    # in a million. The interpreter's numpy and torch agree on these rows.
    assert len(differ) <= (0 if device == "cpu" else 1)
    same = got[0] == expected[0]
    for ours, theirs in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(ours[same], theirs[same], rtol=0, atol=1e-5)
    assert len(got[0].unique()) == 29


@pytest.mark.parametrize("vocab", [1, 2, 5, 64, 1000, 2048, 2049, 6001])
def test_odd_and_power_of_two_vocabularies(vocab, device):
    cond, uncond = logits(3, vocab, device)
    assert_same(sample(cond, uncond, temperature=0.7), by_pytorch(cond, uncond, temperature=0.7))
    one = sample(cond[:1])
    assert_same(one, by_pytorch(cond[:1]))
    assert torch.equal(one[1], one[2])  # unguided: one distribution


def test_rows_beyond_a_group_and_none_at_all(device):
    """16 entries: 128 rows a program."""
    cond, uncond = logits(131, 16, device)
    assert_same(sample(cond, uncond), by_pytorch(cond, uncond))
    assert [len(t) for t in sample(cond[:0], uncond[:0])] == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["interleaved", "stacked", "padded"])
def test_views_of_one_buffer(layout, dtype, device):
    cond, uncond = (t.to(dtype) for t in logits(5, 37, device))
    buffer = torch.full((10, 48), torch.nan, dtype=dtype, device=device)
    views = {
        "interleaved": (buffer[0::2, :37], buffer[1::2, :37]),
        "stacked": (buffer[:5, :37], buffer[5:, :37]),
        "padded": (buffer[:5, 3:40], buffer[5:, 7:44]),
    }[layout]
    views[0].copy_(cond)
    views[1].copy_(uncond)
    got = sample(*views)
    for ours, contiguous in zip(got, sample(cond, uncond), strict=True):
        assert torch.equal(ours, contiguous)
    assert_same(got, by_pytorch(cond.float(), uncond.float()))


def test_results_do_not_depend_on_the_batch(device):
    cond, uncond = logits(40, 70, device)
    whole = sample(cond, uncond)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:7].to(device)
    part = sample(cond[order], uncond[order], sample_ids=order + 2**33)
    for a, b in zip(whole, part, strict=True):
        assert torch.equal(a[order], b)


@pytest.mark.parametrize("change", [{"seed": SEED + 1}, {"seed": SEED + 2**50}, {"step": 12}])
def test_noise_follows_seed_and_step(change, device):
    cond = torch.zeros(64, 50, device=device)
    assert (sample(cond)[0] != sample(cond, **change)[0]).float().mean() > 0.9


def test_seed_is_taken_modulo_two_to_the_64(device):
    cond = torch.zeros(64, 50, device=device)
    assert torch.equal(sample(cond, seed=-5)[0], sample(cond, seed=2**64 - 5)[0])
    assert torch.equal(
        sample(cond, seed=-5)[0],
        gumbel(-5, torch.arange(64) + 2**33, torch.tensor([11]), 50)[0].argmax(-1).to(device),
    )


def test_greedy_and_ties_take_the_first(device):
    cond, uncond = logits(4, 4100, device)
    assert_same(sample(cond, uncond, greedy=True), by_pytorch(cond, uncond, greedy=True))
    tied = torch.zeros(3, 4100, device=device)  # over three tiles
    tied[0, [7, 3000, 4099]] = 1
    tied[1, [2047, 2048]] = 1
    assert sample(tied, greedy=True)[0].tolist() == [7, 2047, 0]


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(1, 1.0), (7, 1.0), (24, 1.0), (0, 0.4), (0, 1e-9), (9, 0.7)]
)
def test_top_k_and_top_p_support_is_exact(top_k, top_p, device, many_rows):
    rng = torch.Generator().manual_seed(5)
    cond, uncond = torch.randn(2, 24, generator=rng).mul(0.3).to(device)
    cond[3], uncond[3] = cond[4], uncond[4]  # a tie
    rows = 2048
    options = {"top_k": top_k, "top_p": top_p, "temperature": 1.5}
    ids, *_ = got = sample(cond.expand(rows, -1), uncond.expand(rows, -1), **options)
    guided = reference.guide(cond, uncond, 3.0)[None] / 1.5
    support = reference.keep_top(guided, top_k, top_p)[0].isfinite().nonzero()[:, 0]
    assert ids.unique().tolist() == support.tolist()
    assert_same(got, by_pytorch(cond.expand(rows, -1), uncond.expand(rows, -1), **options))


def test_unusable_rows_are_marked(device):
    cond, uncond = logits(6, 2100, device)
    cond[1, 2099] = math.nan
    cond[2] = -math.inf
    uncond[3, 5] = math.nan
    cond[4, 7] = math.inf
    cond[5, 7] = -math.inf  # one impossible entry is no fault
    ids, logprobs, guided = sample(cond, uncond)
    usable = logprobs.isfinite() & guided.isfinite()
    assert usable.tolist() == [True, False, False, False, False, True]
    assert ((ids >= 0) & (ids < 2100)).all() and ids[5] != 7
    assert ids.tolist() == by_pytorch(cond, uncond)[0].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_against_fp64(dtype, device):
    rng = torch.Generator().manual_seed(8)
    cond, uncond = torch.randn(2, 16, 300, generator=rng).mul(3e3).clamp(-1e4, 1e4)
    cond[0], uncond[0] = 1e4, -1e4
    cond[1], uncond[1] = -1e4, -1e4
    cond, uncond = cond.to(device, dtype), uncond.to(device, dtype)
    ids, logprobs, guided = sample(cond, uncond, temperature=100.0)
    draw = Draw(cfg_weight=3.0, temperature=100.0)
    exact = reference.tempered(cond.double(), uncond.double(), draw)
    eager = reference.tempered(cond, uncond, draw)
    for ours, truth, plain in zip((logprobs, guided), exact, eager, strict=True):
        truth = reference.log_softmax_at(truth, ids)
        error = (ours - truth).abs()
        allowed = (reference.log_softmax_at(plain, ids) - truth).abs()
        assert error.max() <= 2 * allowed.max() + 1e-5
    peaked = torch.full((2, 300), -1e4, dtype=dtype, device=device)
    peaked[:, 4] = 1e4
    ids, logprobs, guided = sample(peaked, -peaked, temperature=0.01)
    assert ids.tolist() == [4, 4] and logprobs.tolist() == guided.tolist() == [0.0, 0.0]


def test_chi_square_of_a_million_draws(monkeypatch):
    """The PyTorch path, which the tests above tie the kernel to."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    rng = torch.Generator().manual_seed(9)
    cond, uncond = torch.randn(2, 12, generator=rng).mul(0.5)
    counts = torch.zeros(12, dtype=torch.float64)
    rows = 250_000
    for step in range(4):
        arguments = {"sample_ids": torch.arange(rows), "step": step, "seed": 1}
        ids, _, _ = sample(cond.expand(rows, -1), uncond.expand(rows, -1), **arguments)
        counts += torch.bincount(ids, minlength=12)
    expected = (uncond + 3.0 * (cond - uncond)).double().softmax(0) * counts.sum()
    # 99.99% quantile of chi-square with 11 degrees of freedom
    assert ((counts - expected) ** 2 / expected).sum() < 37.4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cond": torch.zeros(3)}, "cond: wanted"),
        ({"cond": torch.zeros(4, 3).T}, "cond: wanted a last stride of 1"),
        ({"cond": torch.zeros(3, 4, dtype=torch.float64)}, "cond: wanted bf16"),
        ({"uncond": torch.zeros(3, 5)}, "uncond: wanted"),
        ({"sample_ids": torch.arange(2)}, "sample_ids: wanted"),
        ({"sample_ids": torch.arange(3).int()}, "sample_ids: wanted"),
        ({"temperature": 0.0}, "temperature: wanted"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"cond": torch.zeros(3, 4)} | change
    with pytest.raises(ValueError, match=message):
        sample(**arguments)
