"""Guidance on the inputs of a head's last layer, which is linear: two parts for one product."""

import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import BYTES, DecodeShape, Launch
from kernels.gpu.sampling import guide

BLOCK = 1024  # columns of a program


@triton.jit
def _guide_inputs_kernel(
    # outputs
    high_ptr,
    low_ptr,
    # inputs
    cond_ptr,
    stride_cond,
    uncond_ptr,
    stride_uncond,
    cfg_weight,
    # shapes
    width,
    # constants
    BLOCK: tl.constexpr,
):
    """Guided activations as high + low parts of the activations' dtype: 16 bits instead of 8."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    cond = tl.load(cond_ptr + row * stride_cond + column, mask=mask, other=0.0).to(tl.float32)
    uncond = tl.load(uncond_ptr + row * stride_uncond + column, mask=mask, other=0.0)
    mixed = guide(cond, uncond.to(tl.float32), cfg_weight)
    high = mixed.to(high_ptr.dtype.element_ty)
    low = (mixed - high.to(tl.float32)).to(high_ptr.dtype.element_ty)
    tl.store(high_ptr + row * width + column, high, mask=mask)
    tl.store(low_ptr + row * width + column, low, mask=mask)


def launch_guide_inputs(
    high: Tensor, low: Tensor, cond: Tensor, uncond: Tensor, cfg_weight: float
) -> None:
    """high + low = uncond + cfg_weight * (cond - uncond), all (B, K) of one dtype."""
    rows, width = cond.shape
    _guide_inputs_kernel[(rows, triton.cdiv(width, BLOCK))](
        high,
        low,
        cond,
        cond.stride(0),
        uncond,
        uncond.stride(0),
        cfg_weight,
        width,
        BLOCK=BLOCK,
    )


def launches(shape: DecodeShape) -> list[Launch]:
    """The image head's inputs."""
    rows, width, dtype = shape.rows // 2, shape.head_width, shape.dtype
    pointers = ("high_ptr", "low_ptr", "cond_ptr", "uncond_ptr")
    strides = ("stride_cond", "stride_uncond", "width")
    launch = Launch(
        name="guide_inputs",
        kernel=_guide_inputs_kernel,
        signature=dict.fromkeys(pointers, f"*{dtype}")
        | dict.fromkeys(strides, "i32")
        | {"cfg_weight": "fp32"},
        constexprs={"BLOCK": BLOCK},
        divisible=pointers + strides,
        grid=(rows, triton.cdiv(width, BLOCK)),
        bytes_moved=4 * rows * width * BYTES[dtype],
        bytes_least=4 * rows * width * BYTES[dtype],
    )
    return [launch]
