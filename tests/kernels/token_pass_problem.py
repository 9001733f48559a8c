"""Rows of logits for the pass over them, its results as plain fp64 maths, and the allowed error."""

import math

import torch
from torch import Tensor

from kernels.token_loss import Rows, TokenLoss

RESULTS = ("logprobs", "entropy", "loss", "kl", "clipped", "slopes")
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-9, torch.float16: 2**-11}


def problem(rows: int, vocab: int, device: str, scale: float = 2.0, **overrides):
    """Logits, targets and a loss whose ratios are spread over the clip and beyond it."""
    rng = torch.Generator().manual_seed(31 * rows + vocab)
    logits = torch.randn(rows, vocab, generator=rng) * scale
    targets = torch.randint(vocab, (rows,), generator=rng)
    current = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    terms = {
        "advantages": torch.randn(rows, generator=rng),
        "token_weights": torch.rand(rows, generator=rng) + 0.1,
        "old_logprobs": current - torch.linspace(-0.6, 0.6, rows),
        "ref_logprobs": current + torch.randn(rows, generator=rng) * 0.3,
        "clip_low": 0.2,
        "clip_high": 0.3,
        "dual_clip": None,
        "beta": 0.05,
    } | overrides
    terms = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in terms.items()}
    return logits.to(device), targets.to(device), TokenLoss(**terms)


def tangent_exp(x: Tensor) -> Tensor:
    return torch.where(x > 20, math.exp(20) * (x - 19), x.clamp(max=20).exp())


def plain(
    logits: Tensor, targets: Tensor, terms: TokenLoss, temperature: float, dtype: torch.dtype
) -> Rows:
    """The definition in one dtype, differentiated by autograd."""
    advantages, weights, old, ref = (None if v is None else v.to(dtype) for v in terms[:4])
    counted = weights != 0
    logits = logits.detach().clone().to(dtype).requires_grad_()
    full = (logits / temperature).log_softmax(-1)
    logprobs = full.gather(1, targets[:, None])[:, 0]
    logprobs.retain_grad()
    # A masked token may hold anything: it takes no part in any of this.
    own = [logprobs[counted], advantages[counted]]
    old, ref = (None if v is None else v[counted] for v in (old, ref))
    delta = own[0] - (own[0].detach() if old is None else old)
    ratio = tangent_exp(delta)
    bounded = ratio.clamp(1 - terms.clip_low, 1 + terms.clip_high).detach()
    clipped = bounded * own[1] < ratio * own[1]
    surrogate = torch.where(clipped, bounded, ratio) * own[1]
    if terms.dual_clip is not None:
        deep = (own[1] < 0) & (ratio > terms.dual_clip)
        surrogate = torch.where(deep, terms.dual_clip * own[1], surrogate)
        clipped = clipped | deep
    kl = torch.zeros_like(ratio)
    if ref is not None:
        kl = tangent_exp(ref - own[0]) - (ref - own[0]) - 1
    loss = terms.beta * kl - surrogate
    (loss * weights[counted]).sum().backward()
    spread = [torch.zeros_like(weights).index_put((counted,), v.to(dtype)) for v in
              (loss.detach(), kl.detach(), clipped)]  # fmt: skip
    entropy = -(full.exp() * full.clamp(min=torch.finfo(dtype).min)).sum(-1).detach()
    return Rows(logprobs.detach(), entropy, *spread, logprobs.grad, logits.grad)


def assert_rule(got: Tensor, eager: Tensor, truth: Tensor, rounding: float = 2**-24) -> None:
    """|got - fp64| <= 2 |eager - fp64| + a few roundings of the largest number."""
    assert got.shape == truth.shape and got.isfinite().all()
    error, allowed = (got.double() - truth).abs(), (eager.double() - truth).abs()
    slack = 8 * rounding * truth.abs().max().clamp(min=1e-3)
    assert error.max() <= 2 * allowed.max() + slack


def assert_rows(got: Rows, logits: Tensor, targets: Tensor, terms: TokenLoss, temperature: float):
    """All of a pass against `plain` in fp32 and fp64."""
    eager, truth = (
        plain(logits, targets, terms, temperature, dtype)
        for dtype in (torch.float32, torch.float64)
    )
    for name in RESULTS:
        assert getattr(got, name).dtype == torch.float32
        assert_rule(getattr(got, name), getattr(eager, name), getattr(truth, name))
    assert torch.equal(got.clipped.double(), truth.clipped)
    if got.gradient is not None:
        dtype = got.gradient.dtype
        assert_rule(got.gradient, eager.gradient.to(dtype), truth.gradient, ROUNDING[dtype])
