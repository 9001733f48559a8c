"""linear_grpo_loss against the formulas written out in plain fp64, values and gradients."""

import math

import pytest
import torch

from kernels import linear_grpo_loss, linear_logprobs
from tests.kernels.grpo_problem import TENSORS, D, N, V, check, old_with_both_clips, problem


def test_on_policy_default_weights():
    output = check({})
    assert output.clip_fraction == 0 and output.kl == 0


def test_clip_on_both_sides():
    old = old_with_both_clips()
    ratio, advantages = (problem()[3] - old).exp(), problem()[2]
    assert ((ratio > 1.3) & (advantages > 0)).any() and ((ratio < 0.9) & (advantages < 0)).any()
    output = check({"old_logprobs": old, "clip_low": 0.1, "clip_high": 0.3})
    assert 0 < output.clip_fraction < 1


def test_kl_and_temperature_and_weights():
    options = {
        "old_logprobs": old_with_both_clips(),
        "ref_logprobs": problem()[3] + torch.linspace(-1.5, 1.5, N),
        "beta": 0.3,
        "temperature": 1.7,
        "token_weights": torch.linspace(0, 1, N),
    }
    assert check(options).kl > 0.01


@pytest.mark.parametrize("cfg_weight", [5.0, 1.0, 0.0])
def test_guided(cfg_weight):
    old = old_with_both_clips(cfg_weight)
    options = {"cfg_weight": cfg_weight, "old_logprobs": old, "clip_low": 0.15}
    assert check(options | {"ref_logprobs": old.flip(0) * 0.1 + old * 0.9, "beta": 0.1}).kl > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sequence_ratio(dtype):
    options = {
        "old_logprobs": old_with_both_clips(),
        "sequence_ids": torch.tensor([0, 0, 0, 1, 1, 4, 4, 4, 4, 2, 2, 2, 2, 2]),
        "ref_logprobs": problem()[3],
        "beta": 0.05,
    }
    assert 0 < check(options, dtype=dtype).clip_fraction < 1


PER_SEQUENCE = torch.tensor([0] * 3 + [1] * 2 + [2] * 4 + [3] * 5)
SIZES = PER_SEQUENCE.bincount()


@pytest.mark.parametrize("guidance", [{}, {"cfg_weight": 3.0}])
@pytest.mark.parametrize(
    "form",
    [
        pytest.param({"token_weights": torch.full((N,), 1 / N)}, id="t2i-r1"),
        pytest.param({"token_weights": 1 / (len(SIZES) * SIZES[PER_SEQUENCE])}, id="grpo"),
        pytest.param({"token_weights": torch.full((N,), 1 / (4 * 9))}, id="dr-grpo"),
        pytest.param({"clip_low": 0.2, "clip_high": 0.28}, id="dapo"),
        pytest.param(
            {"sequence_ids": PER_SEQUENCE, "clip_low": 3e-2, "clip_high": 4e-2}, id="gspo"
        ),
        pytest.param({"dual_clip": 1.5}, id="dual-clip"),
    ],
)
def test_loss_forms(form, guidance):
    old = old_with_both_clips(guidance.get("cfg_weight", 1.0))
    options = {"old_logprobs": old, "ref_logprobs": old + 0.3, "beta": 0.04, **form, **guidance}
    output = check(options)
    assert 0 < output.clip_fraction < 1 and output.kl > 0
    # Masked tokens, one of them at the end, so that the last chunk may have nothing to do.
    weights = form.get("token_weights", torch.full((N,), 1 / N)).clone()
    weights[[0, 4, 6, 11, 12, 13]] = 0
    check(options | {"token_weights": weights})


def test_truncated_importance_sampling_is_a_factor_of_the_advantage():
    """omega * min(r A, clip(r) A) + beta * KL, with omega = min(e^(old - sampled), cap)."""
    tensors, targets, advantages, current = problem()
    old = old_with_both_clips()
    sampled = old + torch.linspace(-1, 1, N)
    omega = (old - sampled).exp().clamp(max=1.3)
    hidden = tensors["hidden"].requires_grad_()
    output = linear_grpo_loss(
        hidden,
        tensors["weight"],
        targets,
        advantages * omega,
        bias=tensors["bias"],
        old_logprobs=old,
        ref_logprobs=current + 0.2,
        beta=0.1,
    )
    output.loss.backward()
    exact = hidden.detach().double().requires_grad_()
    logits = exact @ tensors["weight"].double().T + tensors["bias"]
    logp = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    ratio, gap = (logp - old).exp(), current + 0.2 - logp
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    (-omega * surrogate + 0.1 * (gap.exp() - gap - 1)).mean().backward()
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


def test_everything_masked():
    tensors, targets, advantages, _ = problem()
    leaves = {k: t.requires_grad_() for k, t in tensors.items() if k != "uncond_hidden"}
    output = linear_grpo_loss(
        **leaves, targets=targets, advantages=advantages, token_weights=torch.zeros(N)
    )
    output.loss.backward()
    assert all(value == 0 for value in (output.loss, *output[2:]))
    assert not any(leaf.grad.any() for leaf in leaves.values())
    assert output.logprobs.isfinite().all()


def test_zero_advantage_without_kl_has_no_gradient():
    tensors, targets, _, _ = problem()
    hidden = tensors["hidden"].requires_grad_()
    output = linear_grpo_loss(
        hidden, tensors["weight"], targets, torch.zeros(N), old_logprobs=old_with_both_clips()
    )
    output.loss.backward()
    assert output.loss == 0 and output.clip_fraction == 0 and not hidden.grad.any()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("argument", ["old_logprobs", "ref_logprobs", "advantages"])
def test_masked_tokens_may_hold_anything(argument, poison):
    tensors, targets, advantages, current = problem()
    values = {
        "old_logprobs": current - 0.1,
        "ref_logprobs": current + 0.2,
        "advantages": advantages,
    }
    weights = torch.linspace(0.1, 1, N)
    weights[[2, 9]] = 0
    results = []
    for bad in (0.0, poison):
        changed = values[argument].clone()
        changed[[2, 9]] = bad
        hidden = tensors["hidden"].clone().requires_grad_()
        output = linear_grpo_loss(
            hidden,
            tensors["weight"],
            targets,
            **(values | {argument: changed}),
            beta=0.1,
            token_weights=weights,
        )
        output.loss.backward()
        results.append((output, hidden.grad))
    (clean, clean_grad), (dirty, dirty_grad) = results
    torch.testing.assert_close(dirty.loss, clean.loss)
    torch.testing.assert_close(dirty_grad, clean_grad)
    for name in ("kl", "clip_fraction", "entropy"):
        torch.testing.assert_close(getattr(dirty, name), getattr(clean, name))


@pytest.mark.parametrize("sequences", [None, torch.arange(N) // 5])
@pytest.mark.parametrize("difference", [80.0, -80.0])
def test_differences_of_80_nats_stay_finite(difference, sequences):
    tensors, targets, advantages, current = problem()
    hidden = tensors["hidden"].requires_grad_()
    output = linear_grpo_loss(
        hidden,
        tensors["weight"],
        targets,
        -advantages.abs(),  # the side on which a large ratio is not clipped
        old_logprobs=current - difference,
        ref_logprobs=current + difference,
        beta=0.1,
        sequence_ids=sequences,
    )
    output.loss.backward()
    assert output.loss.isfinite() and output.kl.isfinite() and hidden.grad.isfinite().all()
    assert (hidden.grad.norm(dim=1) > 0).any()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_exactly_at_the_edge_of_the_clip(sign):
    """At the edge the token is not clipped: full gradient, and none just beyond it."""
    weight, targets = torch.randn(V, D, dtype=torch.float64), torch.tensor([4])
    torch.manual_seed(1)
    base = torch.randn(1, D, dtype=torch.float64)
    logp = (base @ weight.T).log_softmax(-1)[0, 4]
    grads = []
    for shift in (0.0, 1e-9):
        hidden = base.clone().requires_grad_()
        # With clip 0.5 both edges, 0.5 and 1.5, are exact; the ratio is nudged inwards to them.
        edge = 1 + sign * 0.5
        old = logp - math.log(edge) + sign * (1e-12 - shift)
        output = linear_grpo_loss(
            hidden,
            weight,
            targets,
            torch.tensor([sign], dtype=torch.float64),
            old_logprobs=old[None],
            clip_low=0.5,
            clip_high=0.5,
        )
        output.loss.backward()
        grads.append(hidden.grad)
        assert output.loss.item() == pytest.approx(-sign * edge, abs=1e-8)
    current = base.clone().requires_grad_()
    (current @ weight.T).log_softmax(-1)[0, 4].backward()
    torch.testing.assert_close(grads[0], -sign * (1 + sign * 0.5) * current.grad)
    assert not grads[1].any()


def test_ratio_equal_to_the_clip_bound_keeps_its_gradient():
    """clip 0 puts both bounds on the on-policy ratio of exactly 1."""
    tensors, targets, advantages, _ = problem()
    grads = []
    for clip in (0.0, 0.2):
        hidden = tensors["hidden"].clone().requires_grad_()
        output = linear_grpo_loss(
            hidden, tensors["weight"], targets, advantages, clip_low=clip, clip_high=clip
        )
        output.loss.backward()
        grads.append(hidden.grad)
        assert output.clip_fraction == 0
    torch.testing.assert_close(*grads)


def test_gradient_shares_of_the_two_branches():
    tensors, targets, advantages, _ = problem()
    same = tensors["hidden"]
    cond, uncond = same.clone().requires_grad_(), same.clone().requires_grad_()
    plain = same.clone().requires_grad_()
    linear_grpo_loss(
        cond, tensors["weight"], targets, advantages, uncond_hidden=uncond, cfg_weight=5.0
    ).loss.backward()
    linear_grpo_loss(plain, tensors["weight"], targets, advantages).loss.backward()
    torch.testing.assert_close(cond.grad, 5.0 * plain.grad)
    torch.testing.assert_close(uncond.grad, -4.0 * plain.grad)


def test_gradcheck():
    tensors, targets, advantages, current = problem(3)
    inputs = [tensors[n].double().requires_grad_() for n in TENSORS]
    shift = torch.linspace(-0.5, 0.5, N)

    def loss(hidden, uncond, weight, bias):
        return linear_grpo_loss(
            hidden,
            weight,
            targets,
            advantages.double(),
            bias=bias,
            uncond_hidden=uncond,
            cfg_weight=1.5,
            old_logprobs=current.double() + shift,
            ref_logprobs=current.double() - shift,
            beta=0.2,
        ).loss

    assert torch.autograd.gradcheck(loss, inputs)


def test_only_the_loss_carries_a_gradient():
    tensors, targets, advantages, _ = problem()
    output = linear_grpo_loss(
        tensors["hidden"].requires_grad_(), tensors["weight"], targets, advantages
    )
    assert output.loss.requires_grad
    assert not any(value.requires_grad for value in output[1:])


def test_empty_batch():
    hidden = torch.zeros(0, D, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    output = linear_grpo_loss(hidden, torch.randn(V, D), none, torch.zeros(0))
    output.loss.backward()
    assert output.loss == 0 and output.kl == 0 and output.entropy == 0


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("^advantages: wanted", {"advantages": torch.zeros(2)}),
        ("^old_logprobs: wanted", {"old_logprobs": torch.zeros(N, 1)}),
        ("^ref_logprobs: wanted", {"ref_logprobs": torch.zeros(1)}),
        ("^token_weights: wanted", {"token_weights": torch.zeros(N + 1)}),
        ("^sequence_ids: wanted", {"sequence_ids": torch.zeros(3, dtype=torch.int64)}),
        ("^uncond_hidden and cfg_weight: wanted both", {"cfg_weight": 5.0}),
        ("^uncond_hidden and cfg_weight: wanted both", {"uncond_hidden": torch.zeros(N, D)}),
        ("^dual_clip: wanted > 1", {"dual_clip": 1.0}),
        ("^chunk_rows: wanted >= 1", {"chunk_rows": 0}),
        ("^uncond_hidden: wanted", {"uncond_hidden": torch.zeros(1, D), "cfg_weight": 5.0}),
    ],
)
def test_bad_arguments_are_named(message, change):
    tensors, targets, advantages, _ = problem()
    arguments = {"advantages": advantages} | change
    with pytest.raises(ValueError, match=message):
        linear_grpo_loss(tensors["hidden"], tensors["weight"], targets, **arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_rows_without_advantage_get_no_gradient_and_the_others_theirs(dtype):
    """Rows of slope 0 are passed over; the rest are written by index."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(12, 16, dtype=dtype), torch.randn(40, 16, dtype=dtype)
    ids, advantages = torch.arange(12), torch.tensor([1.0, 0, -1, 0] * 3)
    found = []
    for kept in (slice(None), advantages.nonzero()[:, 0]):
        x = hidden[kept].clone().requires_grad_()
        old = linear_logprobs(hidden[kept], weight, ids[kept])
        weights = torch.full((len(x),), 1 / 6)
        linear_grpo_loss(
            x, weight, ids[kept], advantages[kept], old_logprobs=old, token_weights=weights
        ).loss.backward()
        found.append(x.grad)
    assert torch.equal(found[0][advantages != 0], found[1]) and found[1].any()
    assert not found[0][advantages == 0].any()
