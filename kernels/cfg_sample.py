"""Guided sampling: guidance, temperature, Gumbel-max and both log-probs in one call."""

import torch
from torch import Tensor

from kernels import reference
from kernels.philox import gumbel


def cfg_sample(
    cond: Tensor,
    uncond: Tensor | None,
    *,
    cfg_weight: float,
    temperature: float,
    seed: int,
    sample_ids: Tensor,
    step: int,
    top_k: int = 0,
    top_p: float = 1.0,
    greedy: bool = False,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one token a row from the guided distribution.

    guided = uncond + cfg_weight * (cond - uncond), then temperature, then top-k, then top-p.
    The draw is a pure function of (logits, seed, sample id, step).

    Args:
        cond: (B, V) logits of any floating dtype; strided views are welcome.
        uncond: (B, V), or None for unguided sampling.
        cfg_weight: guidance weight; 1 is unguided.
        temperature: > 0; applies to both returned log-probs.
        seed: 64-bit key of the noise.
        sample_ids: (B,) int64, one identity a sample, whatever else is in the batch.
        step: position of the token in its sample.
        top_k: 0 is off. Ties with the k-th are kept.
        top_p: 1 is off.
        greedy: take the most probable token; no noise.
        noise: (B, V) fp32 Gumbel noise drawn ahead with `kernels.philox.gumbel` for these
            sample ids and this step; saves drawing it here.
    Returns: ids (B,) int64; log-prob of the id under softmax(cond / temperature), (B,) fp32 nats;
        under softmax(guided / temperature) without top-k/top-p, (B,) fp32 nats. A row whose
        logits are NaN or all -inf has a non-finite log-prob.
    Raises: ValueError naming the argument.
    Source: Gumbel-max trick; classifier-free guidance, arXiv:2207.12598.
    """
    if cond.ndim != 2:
        raise ValueError(f"cond: wanted (B, V), got {tuple(cond.shape)}")
    if uncond is not None and uncond.shape != cond.shape:
        raise ValueError(f"uncond: wanted {tuple(cond.shape)}, got {tuple(uncond.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature: wanted > 0, got {temperature}")
    if top_k < 0:
        raise ValueError(f"top_k: wanted >= 0, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: wanted (0, 1], got {top_p}")
    if sample_ids.shape != cond.shape[:1]:
        raise ValueError(f"sample_ids: wanted ({len(cond)},), got {tuple(sample_ids.shape)}")
    if greedy:
        noise = None
    elif noise is None:
        steps = torch.tensor([step], device=cond.device)
        noise = gumbel(seed, sample_ids, steps, cond.shape[1])[0]
    return reference.cfg_sample(
        cond,
        uncond,
        noise,
        cfg_weight=cfg_weight,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
