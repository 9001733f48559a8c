"""Root-mean-square norm of decoding rows, with the residual sum before it in the same pass."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import use_c, use_triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_COLUMNS = 16_384  # a row is held in the registers of one program


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """weight * s / sqrt(mean(s^2) + eps) of each row, s = x, or x + residual rounded to its dtype.

    Args:
        x: (R, D) bf16/fp16/fp32, D <= 16,384; last stride 1.
        weight: (D,), x's dtype, contiguous.
        eps: added to the mean square.
        residual: (R, D), x's dtype; last stride 1.
        out: (R, D) to write the norm into; may be x or residual.
        residual_out: (R, D) to write x + residual into; may be x or residual.
    Returns: the norm, (R, D); with a residual, (the norm, x + residual). Not differentiable by
        its kernels: for decoding.
    Raises: ValueError naming the argument.
    Numerics: fp32 from the rounded sum on; the norm is rounded before the weight, as Llama does.
        Batch-invariant. Traffic: read x, residual, weight; write both results.
    Source: RMSNorm, arXiv:1910.07467.
    """
    if x.ndim != 2 or x.dtype not in DTYPES:
        raise ValueError(f"x: wanted (R, D) bf16, fp16 or fp32, got {tuple(x.shape)} {x.dtype}")
    if x.shape[1] > MOST_COLUMNS:
        raise ValueError(f"x: wanted at most {MOST_COLUMNS} columns, got {x.shape[1]}")
    if weight.shape != x.shape[1:] or weight.dtype != x.dtype or not weight.is_contiguous():
        raise ValueError(
            f"weight: wanted contiguous ({x.shape[1]},) {x.dtype}, "
            f"got {tuple(weight.shape)} {weight.dtype} of strides {weight.stride()}"
        )
    if residual is None and residual_out is not None:
        raise ValueError("residual_out: wanted None without a residual")
    check_like("x", x, x)
    check_like("residual", residual, x)
    check_like("out", out, x)
    check_like("residual_out", residual_out, x)
    if use_triton(x) or use_c(x):
        if use_triton(x):
            from kernels.gpu.rms_norm import launch_rms_norm
        else:
            from kernels.cpu.launch import launch_rms_norm

        out = x.new_empty(x.shape) if out is None else out
        if residual is not None and residual_out is None:
            residual_out = x.new_empty(x.shape)
        launch_rms_norm(x, weight, eps, residual, out, residual_out)
        return out if residual_out is None or residual is None else (out, residual_out)
    total = x if residual is None else torch.add(x, residual, out=residual_out)
    if x.dtype == torch.float32:
        normed = F.rms_norm(total, weight.shape, weight, eps)
    else:
        normed = F.rms_norm(total.float(), weight.shape, None, eps).to(x.dtype) * weight
    out = normed if out is None else out.copy_(normed)
    return out if residual is None else (out, total)


def check_like(name: str, tensor: Tensor | None, x: Tensor) -> None:
    """Raise unless `tensor` is None or has x's shape, dtype and device and a last stride of 1."""
    if tensor is None:
        return
    if (tensor.shape, tensor.dtype, tensor.device) != (x.shape, x.dtype, x.device):
        raise ValueError(
            f"{name}: wanted {tuple(x.shape)} {x.dtype} on {x.device}, "
            f"got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
        )
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{name}: wanted a last stride of 1, got strides {tensor.stride()}")
