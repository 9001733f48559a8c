"""Clipped GRPO loss on a linear head, guidance-aware."""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels import reference
from kernels.linear_logprobs import check_head


class LossOutput(NamedTuple):
    """What `linear_grpo_loss` returns; only `loss` carries a gradient.

    Attributes:
        loss: scalar, the weighted sum of the token losses.
        logprobs: (N,) fp32 nats of the targets.
        kl, clip_fraction, entropy: scalars, means under the token weights; KL and entropy in nats.
    """

    loss: Tensor
    logprobs: Tensor
    kl: Tensor
    clip_fraction: Tensor
    entropy: Tensor


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
    beta: float = 0.0,
    temperature: float = 1.0,
    token_weights: Tensor | None = None,
    sequence_ids: Tensor | None = None,
) -> LossOutput:
    """sum_i token_weights_i * l_i with the clipped GRPO token loss and k3 KL.

    l = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + beta * (e^d - d - 1),
    r = exp(logp - old), d = ref - logp.

    Args:
        hidden: (N, D) input of the head's last linear layer (conditional branch).
        weight: (V, D).
        targets: (N,) int64.
        advantages: (N,) floating.
        bias: (V,) or None.
        uncond_hidden: (N, D); with cfg_weight, scores the guided distribution. The head is
            linear and the guidance weights sum to one, so the branches are mixed before the
            GEMM: hidden gets cfg_weight and uncond_hidden 1 - cfg_weight of its gradient.
        old_logprobs: (N,) nats of the policy that drew the targets; None: the current ones
            (ratio 1, on-policy).
        ref_logprobs: (N,) nats of the reference policy; None: no KL.
        token_weights: (N,) mask and normaliser in one; None: 1 / N.
        sequence_ids: (N,) int64; given, the ratio is one a sequence (GSPO), over its tokens of
            non-zero weight.
    Raises: ValueError naming the argument.
    """
    check_head(hidden, weight, targets, bias, temperature)
    if (uncond_hidden is None) != (cfg_weight is None):
        raise ValueError("uncond_hidden and cfg_weight: wanted both or neither")
    if uncond_hidden is not None and uncond_hidden.shape != hidden.shape:
        raise ValueError(
            f"uncond_hidden: wanted {tuple(hidden.shape)}, got {tuple(uncond_hidden.shape)}"
        )
    per_token = {
        "advantages": advantages,
        "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs,
        "token_weights": token_weights,
        "sequence_ids": sequence_ids,
    }
    for name, value in per_token.items():
        if value is not None and value.shape != targets.shape:
            raise ValueError(f"{name}: wanted {tuple(targets.shape)}, got {tuple(value.shape)}")
    if uncond_hidden is not None:
        hidden = reference.guide(
            reference.as_float(hidden), reference.as_float(uncond_hidden), cfg_weight
        )
    logits = reference.linear_logits(hidden, weight, bias, temperature)
    logprobs = reference.log_softmax_at(logits, targets)
    old_logprobs = logprobs.detach() if old_logprobs is None else old_logprobs
    if token_weights is not None:
        # A masked token may hold anything: NaN would survive a product with 0, also backwards.
        masked = token_weights == 0
        advantages = advantages.masked_fill(masked, 0)
        old_logprobs = torch.where(masked, logprobs.detach(), old_logprobs)
        if ref_logprobs is not None:
            ref_logprobs = torch.where(masked, logprobs.detach(), ref_logprobs)
    loss, kl, clipped = reference.grpo_token_loss(
        logprobs,
        old_logprobs,
        ref_logprobs,
        advantages,
        clip_low=clip_low,
        clip_high=clip_high,
        beta=beta,
        sequence_ids=sequence_ids,
        counted=None if token_weights is None else token_weights != 0,
    )
    if token_weights is None:
        token_weights = torch.full_like(loss, 1 / max(len(loss), 1))
    loss = loss * token_weights
    with torch.no_grad():
        shares = token_weights / token_weights.sum().clamp(min=torch.finfo(loss.dtype).tiny)
        full = logits.log_softmax(-1)
        entropy = -(full.exp() * full).sum(-1)
        kl_mean, clip_mean = (shares * kl).sum(), (shares * clipped).sum()
        entropy_mean = (shares * entropy).sum()
    return LossOutput(loss.sum(), logprobs.detach(), kl_mean, clip_mean, entropy_mean)
