"""Last linear layer of a head fused with sampling: the logits never reach memory."""

import torch
from torch import Tensor

from kernels.cfg_sample import check_sampling
from kernels.dispatch import use_triton
from kernels.philox import gumbel
from kernels.reference import as_float, cfg_sample, guide, linear_logits
from kernels.reference.sampling import finish_step, head_logits
from kernels.sample_step import check_finish
from kernels.state import Draw, StepState


def head_sample(
    cond: Tensor,
    uncond: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    draw: Draw,
    state: StepState,
) -> None:
    """`kernels.sample_step` on logits = input @ weight.T + bias, which stay in registers.

    With uncond and no logprobs wanted, guidance is applied to the inputs: the layer is linear and
    cfg_weight + (1 - cfg_weight) = 1.

    Args:
        cond, uncond: (B, K) inputs of the layer, bf16/fp16/fp32; last stride 1.
        weight: (V, K), same dtype; last stride 1; row slices welcome.
        bias: (V,), same dtype, contiguous, or None.
        draw: how to draw; no top-k or top-p, which need a row's logits at once.
        state: what is read and written; without logprobs the conditional distribution is not
            computed; its workspace is from `head_workspace`, None: a new one.
    Raises: ValueError naming the argument.
    Numerics: fp32 accumulation and fp32 logits, never rounded to the weights' dtype; guided inputs
        keep 16 bits of mantissa as a sum of two parts. Batch-invariant. Traffic: read weight once
        for 64 rows; two launches, three with guided inputs.
    Source: FlashSampling, arXiv:2603.15854.
    """
    check_head(cond, uncond, weight, bias)
    check_sampling(len(cond), draw, state.sample_ids)
    if not draw.all_tokens:
        raise ValueError(f"top_k, top_p: wanted 0 and 1, got {draw.top_k} and {draw.top_p}")
    check_finish(len(cond), len(weight), uncond is not None, draw, state)
    if use_triton(cond):
        from kernels.gpu.head_sample import launch_head_sample

        launch_head_sample(cond, uncond, weight, bias, draw, state)
        return
    uncond_logits = None
    if uncond is not None and state.logprobs is None:
        mixed = guide(as_float(cond), as_float(uncond), draw.cfg_weight)
        logits = linear_logits(mixed, weight, bias, 1.0)
    else:
        logits, uncond_logits = head_logits(cond, uncond, weight, bias)
    noise = None
    if not draw.greedy:
        steps = state.step.long() + draw.first_step
        noise = gumbel(int(draw.seed), state.sample_ids, steps, len(weight))[0]
    finish_step(*cfg_sample(logits, uncond_logits, noise, draw), state)


def head_workspace(cond: Tensor, weight: Tensor) -> Tensor:
    """Scratch for head_sample on inputs and weights of these shapes; see sample_workspace."""
    size = 0
    if use_triton(cond):
        from kernels.gpu.head_sample import workspace_sizes

        size = sum(workspace_sizes(len(cond), len(weight), weight.shape[1], cond.element_size()))
    return torch.zeros(size, dtype=torch.int32, device=cond.device)


def check_head(cond: Tensor, uncond: Tensor | None, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError naming the argument."""
    if cond.ndim != 2 or cond.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(
            f"cond: wanted (B, K) bf16, fp16 or fp32, got {tuple(cond.shape)} {cond.dtype}"
        )
    if weight.ndim != 2 or not 0 < len(weight) < 1 << 24:
        raise ValueError(f"weight: wanted (V, K), 0 < V < 2**24, got {tuple(weight.shape)}")
    for name, tensor, shape in (
        ("uncond", uncond, tuple(cond.shape)),
        ("weight", weight, (len(weight), cond.shape[1])),
        ("bias", bias, (len(weight),)),
    ):
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape or tensor.dtype != cond.dtype:
            raise ValueError(
                f"{name}: wanted {shape} {cond.dtype}, got {tuple(tensor.shape)} {tensor.dtype}"
            )
    for name, tensor in (("cond", cond), ("uncond", uncond), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name}: wanted a last stride of 1, got {tensor.stride()}")
