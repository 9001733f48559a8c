"""AdamW on 16-bit weights that loses nothing: the fp32 weight, split in two.

A bf16 weight is the upper half of an fp32 number, rounded; `low` is the rest, as a signed number of
units of fp32's last place. Together they are the fp32 weight exactly. The model computes with the
upper halves, the optimizer with both: 2 bytes a weight more than bf16, 2 less than a master copy.
"""

import torch
from torch import Tensor

from kernels.dispatch import C_WEIGHTS, use_c, use_triton
from kernels.reference import adamw as reference
from kernels.state import AdamW

MOMENTS = (torch.float32, torch.bfloat16)


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 weights -> (bf16, int16): what the model sees, and what it lacks."""
    return reference.split(master)


def master(weight: Tensor, low: Tensor) -> Tensor:
    """The inverse of `split`: bf16 and int16 of one shape -> fp32, exactly."""
    return reference.master(weight, low)


@torch.no_grad()
def adamw(
    weight: Tensor,
    grad: Tensor,
    low: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    settings: AdamW,
    *,
    grad_scale: float | Tensor = 1.0,
    stream: int = 0,
) -> None:
    """One step of AdamW, in place, in one pass.

    Args:
        weight: bf16 with `low`, or fp32 without; any shape, contiguous, as are the others.
        grad: bf16 or fp32, of weight's shape; only read.
        low: int16, from `split`, zeros for weights that are bf16 to begin with; None: fp32 weights.
        exp_avg, exp_avg_sq: both fp32, or both bf16, which is then rounded stochastically.
        settings: of the step.
        grad_scale: multiplies the gradient in fp32 first: a number, or a tensor of one fp32 on
            weight's device, which is not read on the host.
        stream: which parameter this is, 32 bits: its noise is another's of no other stream.
    Raises: ValueError naming the argument.
    Numerics: fp32; every operation is rounded once and none is fused with the next, so that every
        device computes the same bits, and bf16 weights with `low` those of fp32 ones:
        g = grad * grad_scale; w = w * keep; m = m + (g - m) * mean_rate;
        v = v * square_keep + (g * g) * square_rate;
        w = w - (m / (sqrt(v) / root + eps)) * size. A gradient that is not finite gives NaN.
        The upper half is rounded to nearest, ties away from zero.
    Traffic: each operand once; with fp32 moments 26 bytes a bf16 weight, 28 an fp32 one; with bf16
        moments 18. One launch.
    Source: arXiv:1711.05101.
    """
    _check(weight, grad, low, exp_avg, exp_avg_sq, grad_scale)
    if weight.numel() == 0:
        return
    if use_triton(weight):
        from kernels.gpu.adamw import launch_adamw

        launch_adamw(weight, grad, low, exp_avg, exp_avg_sq, settings, grad_scale, stream)
    elif use_c(weight, C_WEIGHTS):
        from kernels.cpu.launch import launch_adamw as launch_in_c

        launch_in_c(weight, grad, low, exp_avg, exp_avg_sq, settings, grad_scale, stream)
    else:
        reference.adamw(weight, grad, low, exp_avg, exp_avg_sq, settings, grad_scale, stream)


def _check(
    weight: Tensor,
    grad: Tensor,
    low: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad_scale: float | Tensor,
) -> None:
    if weight.dtype not in C_WEIGHTS:
        raise ValueError(f"weight: wanted bf16 or fp32, got {weight.dtype}")
    if (low is None) != (weight.dtype == torch.float32):
        raise ValueError("low: wanted with bf16 weights, and only then")
    wanted = [
        ("weight", weight, (weight.dtype,)),
        ("grad", grad, C_WEIGHTS),
        ("exp_avg", exp_avg, MOMENTS),
        ("exp_avg_sq", exp_avg_sq, (exp_avg.dtype,)),
    ]
    if low is not None:
        wanted.append(("low", low, (torch.int16,)))
    for name, tensor, dtypes in wanted:
        if tensor.shape != weight.shape or tensor.device != weight.device:
            raise ValueError(
                f"{name}: wanted {tuple(weight.shape)} on {weight.device}, "
                f"got {tuple(tensor.shape)} on {tensor.device}"
            )
        if tensor.dtype not in dtypes:
            raise ValueError(f"{name}: wanted {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: wanted contiguous, got strides {tensor.stride()}")
    if isinstance(grad_scale, Tensor) and (
        grad_scale.numel() != 1
        or grad_scale.dtype != torch.float32
        or grad_scale.device != weight.device
    ):
        raise ValueError(
            f"grad_scale: wanted one fp32 on {weight.device}, got {tuple(grad_scale.shape)} "
            f"{grad_scale.dtype} on {grad_scale.device}"
        )
