"""The GRPO loss on a linear head as plain maths: all logits at once, gradients by autograd."""

import torch
from torch import Tensor

from kernels import reference
from kernels.grpo_loss import LossOutput


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    *,
    bias: Tensor | None = None,
    uncond_hidden: Tensor | None = None,
    cfg_weight: float | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    beta: float = 0.0,
    temperature: float = 1.0,
    token_weights: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    chunk_rows: int | None = None,
) -> LossOutput:
    """See kernels.linear_grpo_loss. Guidance is applied to the logits; chunk_rows is ignored."""
    logits = reference.linear_logits(hidden, weight, bias, 1.0)
    if uncond_hidden is not None:
        assert cfg_weight is not None
        uncond = reference.linear_logits(uncond_hidden, weight, bias, 1.0)
        logits = reference.guide(logits, uncond, cfg_weight)
    full = (logits / temperature).log_softmax(-1)
    logprobs = full.gather(-1, targets[:, None])[:, 0]
    if token_weights is None:
        token_weights = torch.full_like(logprobs, 1 / max(len(logprobs), 1))
    counted = token_weights != 0
    # A masked token may hold anything: NaN would survive a product with 0, also backwards.
    advantages = torch.where(counted, advantages, 0)
    current = logprobs.detach()
    old = current if old_logprobs is None else torch.where(counted, old_logprobs, current)
    ref = None if ref_logprobs is None else torch.where(counted, ref_logprobs, current)
    loss, kl, clipped = reference.grpo_token_loss(
        logprobs,
        old,
        ref,
        advantages,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        beta=beta,
        sequence_ids=sequence_ids,
        counted=counted,
    )
    with torch.no_grad():
        shares = token_weights / token_weights.sum().clamp(min=torch.finfo(loss.dtype).tiny)
        entropy = -(full.exp() * full).sum(-1)
        means = [(shares * value).sum() for value in (kl, clipped, entropy)]
    return LossOutput((loss * token_weights).sum(), current, *means)
