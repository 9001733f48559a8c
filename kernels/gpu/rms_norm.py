"""RMS norm of decoding rows with the residual sum fused: one program a row, one pass."""

import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import BYTES, DecodeShape, Launch


@triton.jit
def _rms_norm_fwd_kernel(
    out_ptr,
    stride_om,
    residual_out_ptr,
    stride_sm,
    x_ptr,
    stride_xm,
    residual_ptr,
    stride_rm,
    weight_ptr,
    eps,
    # constants
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    x = tl.load(x_ptr + row * stride_xm + columns, mask=inside, other=0.0).to(tl.float32)
    # Read before the reduction, so that its latency hides behind that of x.
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * stride_rm + columns, mask=inside, other=0.0)
        total = (x + residual.to(tl.float32)).to(x_ptr.dtype.element_ty)
        tl.store(residual_out_ptr + row * stride_sm + columns, total, mask=inside)
        x = total.to(tl.float32)
    mean_square = tl.sum(x * x, axis=0) / WIDTH
    normed = (x * tl.rsqrt(mean_square + eps)).to(x_ptr.dtype.element_ty).to(tl.float32)
    y = (weight.to(tl.float32) * normed).to(x_ptr.dtype.element_ty)
    tl.store(out_ptr + row * stride_om + columns, y, mask=inside)


def config(width: int) -> tuple[int, int]:
    """Columns of a program and its warps: eight values a thread, up to 16 warps."""
    block = triton.next_power_of_2(width)
    return block, min(max(block // 256, 1), 16)


def launch_rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None,
    out: Tensor,
    residual_out: Tensor | None,
) -> None:
    """Write the norm into out and x + residual into residual_out; see kernels.rms_norm."""
    rows, width = x.shape
    if rows == 0:
        return
    block, num_warps = config(width)
    has_residual = residual is not None
    # Without a residual its two pointers are never read: any tensor will do.
    residual = x if residual is None else residual
    residual_out = out if residual_out is None else residual_out
    _rms_norm_fwd_kernel[(rows,)](
        out,
        out.stride(0),
        residual_out,
        residual_out.stride(0),
        x,
        x.stride(0),
        residual,
        residual.stride(0),
        weight,
        eps,
        WIDTH=width,
        BLOCK=block,
        HAS_RESIDUAL=has_residual,
        num_warps=num_warps,
    )


def launches(shape: DecodeShape) -> list[Launch]:
    """The first norm of a step has no residual to add; every later one has.

    The weight (a few KiB) is read by every program but counted once: all programs run at the same
    time, and L2 serves it after the first.
    """
    block, num_warps = config(shape.hidden)
    tensors = ("out_ptr", "residual_out_ptr", "x_ptr", "residual_ptr", "weight_ptr")
    strides = ("stride_om", "stride_sm", "stride_xm", "stride_rm")
    result = []
    for has_residual in (False, True):
        passes = 4 if has_residual else 2
        traffic = BYTES[shape.dtype] * shape.hidden * (passes * shape.rows + 1)
        launch = Launch(
            name="rms_norm + residual" if has_residual else "rms_norm",
            kernel=_rms_norm_fwd_kernel,
            signature=dict.fromkeys(tensors, f"*{shape.dtype}")
            | dict.fromkeys(strides, "i32")
            | {"eps": "fp32"},
            constexprs={"WIDTH": shape.hidden, "BLOCK": block, "HAS_RESIDUAL": has_residual},
            divisible=tensors + strides,
            num_warps=num_warps,
            grid=(shape.rows,),
            bytes_moved=traffic,
            bytes_least=traffic,
        )
        result.append(launch)
    return result
