"""Guided sampling: guidance, temperature, Gumbel-max and both log-probs in one call."""

import torch
from torch import Tensor

from kernels import reference
from kernels.dispatch import use_triton
from kernels.philox import gumbel
from kernels.state import Draw

MOST_ENTRIES = 1 << 24  # a vocabulary index must be exact in fp32


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one token a row from the guided distribution.

    guided = uncond + cfg_weight * (cond - uncond), then temperature, then top-k, then top-p.
    The draw is a pure function of (logits, seed, sample id, step).

    Args:
        cond: (B, V) logits; strided views are welcome. On CUDA bf16, fp16 or fp32 with a last
            stride of 1; elsewhere any floating dtype.
        uncond: (B, V), or None for unguided sampling.
        cfg_weight: guidance weight; 1 is unguided.
        temperature: > 0; applies to both returned log-probs.
        seed: 64-bit key of the noise.
        sample_ids: (B,) int64, one identity a sample, whatever else is in the batch.
        step: position of the token in its sample.
        top_k: 0 is off. Ties with the k-th are kept.
        top_p: 1 is off.
        greedy: take the most probable token; no noise.
    Returns: ids (B,) int64; log-prob of the id under softmax(cond / temperature), (B,) fp32 nats;
        under softmax(guided / temperature) without top-k/top-p, (B,) fp32 nats. A row whose
        logits are NaN or all -inf has a non-finite log-prob.
    Raises: ValueError naming the argument.
    Numerics: fp32; the first of equal scores wins. Batch-invariant. Traffic: read the logits once;
        top-k and top-p sort a copy of the guided ones.
    Source: Gumbel-max trick; classifier-free guidance, arXiv:2207.12598.
    """
    draw = Draw(
        cfg_weight=cfg_weight,
        temperature=temperature,
        seed=seed,
        first_step=step,
        top_k=top_k,
        top_p=top_p,
        greedy=greedy,
    )
    check_logits(cond, uncond)
    check_sampling(len(cond), draw, sample_ids)
    return draw_tokens(cond, uncond, draw, sample_ids)


def draw_tokens(
    cond: Tensor, uncond: Tensor | None, draw: Draw, sample_ids: Tensor, step: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """`cfg_sample` of what has been checked, at noise step `draw.first_step + step`."""
    if use_triton(cond):
        from kernels.gpu.cfg_sample import launch_cfg_sample

        kept = kept_logits(cond, uncond, draw)
        return launch_cfg_sample(cond, uncond, kept, draw, sample_ids, step)
    noise = None
    if not draw.greedy:
        steps = torch.tensor([draw.first_step + step], device=cond.device)
        noise = gumbel(int(draw.seed), sample_ids, steps, cond.shape[1])[0]
    return reference.cfg_sample(cond, uncond, noise, draw)


def check_logits(cond: Tensor, uncond: Tensor | None) -> None:
    """Raise ValueError naming the logits that cannot be sampled from."""
    if cond.ndim != 2 or not 0 < cond.shape[1] < MOST_ENTRIES:
        raise ValueError(f"cond: wanted (B, V), 0 < V < 2**24, got {tuple(cond.shape)}")
    if uncond is not None and (uncond.shape, uncond.device) != (cond.shape, cond.device):
        raise ValueError(
            f"uncond: wanted {tuple(cond.shape)} on {cond.device}, "
            f"got {tuple(uncond.shape)} on {uncond.device}"
        )
    if not use_triton(cond):
        return
    for name, logits in (("cond", cond), ("uncond", uncond)):
        if logits is None:
            continue
        if logits.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"{name}: wanted bf16, fp16 or fp32, got {logits.dtype}")
        if logits.stride(1) != 1 and logits.shape[1] > 1:
            raise ValueError(f"{name}: wanted a last stride of 1, got {logits.stride()}")


def check_sampling(rows: int, draw: Draw, sample_ids: Tensor) -> None:
    """Raise ValueError naming the argument."""
    if not draw.temperature > 0:
        raise ValueError(f"temperature: wanted > 0, got {draw.temperature}")
    if draw.top_k < 0:
        raise ValueError(f"top_k: wanted >= 0, got {draw.top_k}")
    if not 0 < draw.top_p <= 1:
        raise ValueError(f"top_p: wanted (0, 1], got {draw.top_p}")
    if sample_ids.shape != (rows,):
        raise ValueError(f"sample_ids: wanted ({rows},), got {tuple(sample_ids.shape)}")
    if sample_ids.dtype != torch.int64 or not sample_ids.is_contiguous():
        raise ValueError(
            f"sample_ids: wanted contiguous int64, got {sample_ids.dtype} "
            f"of strides {sample_ids.stride()}"
        )


def kept_logits(cond: Tensor, uncond: Tensor | None, draw: Draw) -> Tensor | None:
    """What the kernels sample from under top-k and top-p: the reference's own support.

    Sorted with torch, without waiting for the device. None where nothing is excluded, and for
    greedy draws.
    """
    if draw.greedy or (draw.top_p == 1.0 and not 0 < draw.top_k < cond.shape[1]):
        return None
    return reference.keep_top(
        reference.tempered(cond, uncond, draw)[1], draw.top_k, draw.top_p
    ).contiguous()
