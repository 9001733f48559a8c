"""SwiGLU of decoding rows: one program a piece of a row."""

import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import BYTES, DecodeShape, Launch

BLOCK = 1024  # eight values a thread: one 128-bit load of each half in bf16
NUM_WARPS = 4


@triton.jit
def _swiglu_fwd_kernel(
    out_ptr,
    stride_om,
    gate_up_ptr,
    stride_gm,
    # constants
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    gate_ptrs = gate_up_ptr + row * stride_gm + columns
    gate = tl.load(gate_ptrs, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + WIDTH, mask=inside, other=0.0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(gate_up_ptr.dtype.element_ty).to(tl.float32)
    y = (silu * up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * stride_om + columns, y, mask=inside)


def launch_swiglu(gate_up: Tensor, out: Tensor) -> None:
    """Write silu(first half) * second half into out; see kernels.swiglu."""
    rows, width = out.shape
    if out.numel() == 0:
        return
    _swiglu_fwd_kernel[(rows, triton.cdiv(width, BLOCK))](
        out,
        out.stride(0),
        gate_up,
        gate_up.stride(0),
        WIDTH=width,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )


def launches(shape: DecodeShape) -> list[Launch]:
    """One launch a layer."""
    width = shape.intermediate
    traffic = BYTES[shape.dtype] * shape.rows * 3 * width
    return [
        Launch(
            name="swiglu",
            kernel=_swiglu_fwd_kernel,
            signature={
                "out_ptr": f"*{shape.dtype}",
                "stride_om": "i32",
                "gate_up_ptr": f"*{shape.dtype}",
                "stride_gm": "i32",
            },
            constexprs={"WIDTH": width, "BLOCK": BLOCK},
            divisible=("out_ptr", "stride_om", "gate_up_ptr", "stride_gm"),
            num_warps=NUM_WARPS,
            grid=(shape.rows, triton.cdiv(width, BLOCK)),
            bytes_moved=traffic,
            bytes_least=traffic,
        )
    ]
