"""Every op as plain maths in PyTorch: the oracle for the kernels, and today's path on every device.

Each function computes in fp32, or in fp64 when given fp64, and is differentiable where the op is.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.state import Draw

# exp(x) is continued by its tangent above this, so that a log-prob difference of 80 nats gives a
# finite loss whose gradient still points the right way.
EXPONENT_CAP = 20.0


def as_float(x: Tensor) -> Tensor:
    """fp64 stays, everything else becomes fp32."""
    return x if x.dtype == torch.float64 else x.float()


def guide(cond: Tensor, uncond: Tensor | None, cfg_weight: float) -> Tensor:
    """uncond + cfg_weight * (cond - uncond); cond alone where there is no uncond."""
    if uncond is None:
        return cond
    return torch.add(uncond, cond - uncond, alpha=cfg_weight)


def tempered(cond: Tensor, uncond: Tensor | None, draw: Draw) -> tuple[Tensor, Tensor]:
    """Conditional and guided logits in fp32 (fp64 for fp64), over the temperature."""
    cond = as_float(cond)
    guided = guide(cond, None if uncond is None else as_float(uncond), draw.cfg_weight)
    if draw.temperature != 1.0:
        cond, guided = cond / draw.temperature, guided / draw.temperature
    return cond, guided


def keep_top(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set to -inf what top-k, then top-p, exclude.

    Top-k keeps the k largest and whatever ties with the k-th. Top-p keeps the smallest set of the
    most probable entries whose probability reaches top_p; at least one, ties broken by index.
    """
    if 0 < top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probs = ordered.softmax(-1)
        excluded = probs.cumsum(-1) - probs >= top_p
        excluded[..., 0] = False
        logits = logits.masked_fill(
            torch.zeros_like(excluded).scatter(-1, order, excluded), -torch.inf
        )
    return logits


def cfg_sample(
    cond: Tensor,
    uncond: Tensor | None,
    noise: Tensor | None,
    draw: Draw,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gumbel-max draw from the guided distribution; noise None is greedy. See kernels.cfg_sample."""
    cond, guided = tempered(cond, uncond, draw)
    kept = keep_top(guided, draw.top_k, draw.top_p)
    ids = (kept if noise is None else kept + noise).argmax(-1)
    guided_logprobs = log_softmax_at(guided, ids)
    logprobs = guided_logprobs if uncond is None else log_softmax_at(cond, ids)
    return ids, logprobs, guided_logprobs


def log_softmax_at(logits: Tensor, targets: Tensor) -> Tensor:
    """log softmax(logits) at targets: (..., V), (...,) -> (...,)."""
    # Not logit - logsumexp: at logits of 1e4 that difference is off by 3e-4 nats in fp32.
    return logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]


def linear_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float
) -> Tensor:
    """(hidden @ weight.T + bias) / temperature in fp32 (fp64 for fp64)."""
    logits = F.linear(as_float(hidden), as_float(weight), None if bias is None else as_float(bias))
    return logits if temperature == 1.0 else logits / temperature


def capped_exp(x: Tensor) -> Tensor:
    """exp(x) up to EXPONENT_CAP, its tangent there beyond it."""
    return x.clamp(max=EXPONENT_CAP).exp() * (1 + F.relu(x - EXPONENT_CAP))


def grpo_token_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor | None,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    beta: float,
    dual_clip: float | None = None,
    sequence_ids: Tensor | None = None,
    counted: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-token clipped surrogate plus beta times the k3 estimate of KL(policy || reference).

    Source: GRPO, arXiv:2402.03300; k3: Schulman, "Approximating KL divergence" (2020);
    sequence-level ratios: GSPO-token, arXiv:2507.18071; dual clip: arXiv:1912.09729.

    Args: (N,) each; sequence_ids (N,) int64 makes the ratio one a sequence, the mean over its
        `counted` tokens (N,) bool; None: all.
    Returns: loss (N,), kl (N,), clipped (N,) bool: tokens whose gradient the clip removed.
    """
    delta = logprobs - old_logprobs
    if sequence_ids is not None:
        count = int(sequence_ids.max()) + 1 if len(sequence_ids) else 0
        included = torch.ones_like(delta) if counted is None else counted.to(delta.dtype)
        zeros = torch.zeros(count, dtype=delta.dtype, device=delta.device)
        sizes = zeros.index_add(0, sequence_ids, included).clamp(min=1)
        means = zeros.index_add(0, sequence_ids, delta.detach() * included) / sizes
        delta = means[sequence_ids] + logprobs - logprobs.detach()
    ratio = capped_exp(delta)
    clipped_ratio = ratio.clamp(1 - clip_low, 1 + clip_high)
    clipped = clipped_ratio * advantages < ratio * advantages
    # Not torch.minimum: at the edge of the clip it and clamp would each halve the gradient.
    surrogate = torch.where(clipped, clipped_ratio, ratio) * advantages
    if dual_clip is not None:
        too_low = (advantages < 0) & (ratio > dual_clip)
        surrogate = torch.where(too_low, dual_clip * advantages, surrogate)
        clipped = clipped | too_low
    if ref_logprobs is None:
        return -surrogate, torch.zeros_like(logprobs), clipped
    gap = ref_logprobs - logprobs
    kl = capped_exp(gap) - gap - 1
    return -surrogate + beta * kl, kl, clipped
