"""Rotary embedding of queries and keys and the write to the cache, one pass over the projections.

A program takes a block of query heads of one row, and the key and value heads of the same numbers
if there are any. The two halves of a head, which rotate into each other, are two tiles read side
by side.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import BYTES, DecodeShape, Launch
from kernels.state import LayerCache


@triton.jit
def _kv_append_kernel(
    # outputs
    q_ptr,
    stride_qr,
    stride_qh,
    keys_ptr,
    stride_kr,
    stride_kh,
    stride_ks,
    values_ptr,
    stride_vr,
    stride_vh,
    stride_vs,
    # inputs
    qkv_ptr,
    stride_xr,
    cos_ptr,
    sin_ptr,
    first_positions_ptr,
    step_ptr,
    # constants
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    heads = tl.program_id(0) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    columns = tl.arange(0, BLOCK_HALF)
    in_half = columns < HALF
    in_q = (heads < HEADS)[:, None] & in_half[None, :]
    in_kv = (heads < KV_HEADS)[:, None] & in_half[None, :]
    slot = tl.load(step_ptr).to(tl.int64)
    angle = (tl.load(first_positions_ptr + row) + slot) * HALF + columns

    # All loads before the first use, so that their latencies overlap.
    q = qkv_ptr + row * stride_xr + heads[:, None] * (2 * HALF) + columns[None, :]
    k, v = q + HEADS * (2 * HALF), q + (HEADS + KV_HEADS) * (2 * HALF)
    q_low = tl.load(q, mask=in_q, other=0.0).to(tl.float32)
    q_high = tl.load(q + HALF, mask=in_q, other=0.0).to(tl.float32)
    k_low = tl.load(k, mask=in_kv, other=0.0).to(tl.float32)
    k_high = tl.load(k + HALF, mask=in_kv, other=0.0).to(tl.float32)
    v_low = tl.load(v, mask=in_kv, other=0.0)
    v_high = tl.load(v + HALF, mask=in_kv, other=0.0)
    cos = tl.load(cos_ptr + angle, mask=in_half, other=1.0)[None, :]
    sin = tl.load(sin_ptr + angle, mask=in_half, other=0.0)[None, :]

    dtype = qkv_ptr.dtype.element_ty
    to = q_ptr + row * stride_qr + heads[:, None] * stride_qh + columns[None, :]
    tl.store(to, (q_low * cos - q_high * sin).to(dtype), mask=in_q)
    tl.store(to + HALF, (q_high * cos + q_low * sin).to(dtype), mask=in_q)
    to = keys_ptr + row * stride_kr + slot * stride_ks
    to += heads[:, None] * stride_kh + columns[None, :]
    tl.store(to, (k_low * cos - k_high * sin).to(dtype), mask=in_kv)
    tl.store(to + HALF, (k_high * cos + k_low * sin).to(dtype), mask=in_kv)
    to = values_ptr + row * stride_vr + slot * stride_vs
    to += heads[:, None] * stride_vh + columns[None, :]
    tl.store(to, v_low, mask=in_kv)
    tl.store(to + HALF, v_high, mask=in_kv)


def config(heads: int, head_dim: int) -> tuple[int, int, int]:
    """Heads and half-head columns of a program, and warps: 8 values a half and thread."""
    block_half = triton.next_power_of_2(head_dim // 2)
    block_heads = min(triton.next_power_of_2(heads), max(1024 // block_half, 1))
    num_warps = min(max(block_heads * block_half // 256, 1), 4)
    return block_heads, block_half, num_warps


def launch_kv_append(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: LayerCache,
    heads: int,
    out: Tensor,
) -> None:
    """Write the rotated queries into out, keys and values into slot `step`; see kernels.kv_append."""
    keys, values = cache.keys, cache.values
    rows, kv_heads, _, head_dim = keys.shape
    if rows == 0:
        return
    block_heads, block_half, num_warps = config(heads, head_dim)
    _kv_append_kernel[(triton.cdiv(heads, block_heads), rows)](
        out,
        out.stride(0),
        out.stride(1),
        keys,
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        values,
        values.stride(0),
        values.stride(1),
        values.stride(2),
        qkv,
        qkv.stride(0),
        cos,
        sin,
        cache.first_positions,
        cache.step,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HALF=head_dim // 2,
        BLOCK_HEADS=block_heads,
        BLOCK_HALF=block_half,
        num_warps=num_warps,
    )


def launches(shape: DecodeShape) -> list[Launch]:
    """One launch a layer and step. The angles are counted once for every program, as is a scalar
    of `step` and `first_positions` each.
    """
    block_heads, block_half, num_warps = config(shape.heads, shape.head_dim)
    blocks = triton.cdiv(shape.heads, block_heads)
    all_heads = shape.heads + 2 * shape.kv_heads
    moved = 2 * shape.rows * all_heads * shape.head_dim * BYTES[shape.dtype]
    angles = 4 * shape.head_dim  # a cosine and a sine for every pair of columns
    tensors = ("q_ptr", "keys_ptr", "values_ptr", "qkv_ptr")
    strides = (
        *("stride_qr", "stride_qh", "stride_kr", "stride_kh", "stride_ks"),
        *("stride_vr", "stride_vh", "stride_vs", "stride_xr"),
    )
    return [
        Launch(
            name="kv_append",
            kernel=_kv_append_kernel,
            signature=dict.fromkeys(tensors, f"*{shape.dtype}")
            | dict.fromkeys(strides, "i32")
            | {"cos_ptr": "*fp32", "sin_ptr": "*fp32"}
            | {"first_positions_ptr": "*i32", "step_ptr": "*i32"},
            constexprs={
                "HEADS": shape.heads,
                "KV_HEADS": shape.kv_heads,
                "HALF": shape.head_dim // 2,
                "BLOCK_HEADS": block_heads,
                "BLOCK_HALF": block_half,
            },
            divisible=(
                *tensors,
                *strides,
                *("cos_ptr", "sin_ptr", "first_positions_ptr", "step_ptr"),
            ),
            num_warps=num_warps,
            grid=(blocks, shape.rows),
            bytes_moved=moved + shape.rows * blocks * (angles + 8),
            bytes_least=moved + shape.rows * (angles + 4),
            narrow_ok=("first_positions_ptr", "step_ptr"),
        )
    ]
