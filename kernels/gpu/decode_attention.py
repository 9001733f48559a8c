"""Attention of one query a row over a shared prefix and a private suffix, split over the context.

Both contexts are cut into splits of a fixed number of tokens. A program takes one split of one
key/value head: of a prefix for a tile of the rows that share it, or of one row's suffix. Its
queries (rows of the tile times the query heads of the kv head) are the M side of two tensor-core
products, padded to 16; the partial result and its log-sum-exp go to the workspace, and a second
launch merges each row's splits in order.

A row's result depends on its own tokens only: the splits start at its token 0, a product's rows
do not mix, a key beyond a row's length weighs exactly 0, and the merge reads no more splits than
the row has. Splits that start beyond a row's length are neither computed nor read.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import BYTES, DecodeShape, Launch
from kernels.state import LayerCache
from kernels.tiling import block_queries, split_tokens, tile_rows

MERGE_SPLITS = 8  # partials that a program of the merge holds at a time


@triton.jit(do_not_specialize=["rows", "tiles", "prefix_splits", "suffix_splits"])
def _decode_attention_kernel(
    # outputs
    partial_ptr,
    lse_ptr,
    # inputs
    q_ptr,
    stride_qr,
    stride_qh,
    keys_ptr,
    values_ptr,
    stride_sr,
    stride_sh,
    stride_st,
    step_ptr,
    prefix_keys_ptr,
    prefix_values_ptr,
    stride_pu,
    stride_ph,
    stride_pt,
    prefix_lengths_ptr,
    tiles_ptr,
    qk_scale,  # times log2(e), so that exp2 serves
    # shapes
    rows,
    tiles,
    prefix_splits,
    suffix_splits,
    # constants
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDEN: tl.constexpr,
):
    REPEAT: tl.constexpr = HEADS // KV_HEADS
    TILE_ROWS: tl.constexpr = BLOCK_M // REPEAT
    program = tl.program_id(0)
    prefix_programs = tiles * KV_HEADS * prefix_splits
    in_prefix = program < prefix_programs
    # Tiles (rows) vary fastest and splits slowest: tiles of one prefix run side by side and share
    # it in L2, and the splits that may be empty come last.
    if in_prefix:
        tile = program % tiles
        kv_head = program // tiles % KV_HEADS
        split = program // (tiles * KV_HEADS)
        slot = split
        first = tl.load(tiles_ptr + 3 * tile)
        count = tl.load(tiles_ptr + 3 * tile + 1)
        prefix = tl.load(tiles_ptr + 3 * tile + 2).to(tl.int64)
        step_length = 0
        context = prefix * stride_pu + kv_head * stride_ph
        k_ptr, v_ptr, stride_t = prefix_keys_ptr + context, prefix_values_ptr + context, stride_pt
    else:
        program -= prefix_programs
        first = program % rows
        kv_head = program // rows % KV_HEADS
        split = program // (rows * KV_HEADS)
        slot = prefix_splits + split
        count = 1
        step_length = tl.load(step_ptr) + 1
        context = first.to(tl.int64) * stride_sr + kv_head * stride_sh
        k_ptr, v_ptr, stride_t = keys_ptr + context, values_ptr + context, stride_st

    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    in_head = d < HEAD_DIM
    start = split * SPLIT
    member = m // REPEAT
    used = (member < TILE_ROWS) & (member < count)
    row = first + member
    lengths = tl.load(prefix_lengths_ptr + row, mask=used & in_prefix, other=0) + step_length
    end = tl.minimum(tl.max(lengths, axis=0), start + SPLIT)
    if start < end:
        at_head = row.to(tl.int64) * HEADS + kv_head * REPEAT + m % REPEAT
        q_at = row.to(tl.int64) * stride_qr + (kv_head * REPEAT + m % REPEAT) * stride_qh
        q_mask = used[:, None] & in_head[None, :]
        q = tl.load(q_ptr + q_at[:, None] + d[None, :], mask=q_mask, other=0.0)
        if WIDEN:
            q = q.to(tl.float32)
        highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for at in range(start, end, BLOCK_N):
            token = at + n
            # Zeros beyond the end: what lies there may be NaN, and 0 * NaN is NaN.
            mask = (token < end)[:, None] & in_head[None, :]
            at_token = token[:, None] * stride_t + d[None, :]
            k = tl.load(k_ptr + at_token, mask=mask, other=0.0)
            if WIDEN:
                k = k.to(tl.float32)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            scores = tl.where(token[None, :] < lengths[:, None], scores, float("-inf"))
            new_highest = tl.maximum(highest, tl.max(scores, axis=1))
            # A row may end before this split begins: then all its scores are -inf.
            shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)
            # Scaled after the difference, which is exact near the maximum however large both are.
            probs = tl.exp2((scores - shift[:, None]) * qk_scale)
            fade = tl.exp2((highest - shift) * qk_scale)
            total = total * fade + tl.sum(probs, axis=1)
            v = tl.load(v_ptr + at_token, mask=mask, other=0.0)
            probs = probs.to(v.dtype)
            if WIDEN:
                probs, v = probs.to(tl.float32), v.to(tl.float32)
            mixed = tl.dot(probs, v, mixed * fade[:, None], input_precision="ieee")
            highest = new_highest

        written = used & (start < lengths)
        # Rows that do not fit would have no result: better that none of the tile has one.
        total = tl.where(count > TILE_ROWS, float("nan"), tl.where(written, total, 1.0))
        at_slot = at_head * (prefix_splits + suffix_splits) + slot
        tl.store(lse_ptr + at_slot, highest * qk_scale + tl.log2(total), mask=written)
        to = partial_ptr + at_slot[:, None] * HEAD_DIM + d[None, :]
        tl.store(to, mixed / total[:, None], mask=written[:, None] & in_head[None, :])


@triton.jit(do_not_specialize=["units", "prefix_splits", "suffix_splits"])
def _merge_splits_kernel(
    # outputs
    out_ptr,
    stride_or,
    # inputs
    partial_ptr,
    lse_ptr,
    prefix_lengths_ptr,
    step_ptr,
    # shapes
    units,
    prefix_splits,
    suffix_splits,
    # constants
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    # A unit is one query head of one row.
    unit = tl.program_id(0) * BLOCK_UNITS + tl.arange(0, BLOCK_UNITS)
    row = (unit // HEADS).to(tl.int64)
    real = unit < units
    in_prefix = tl.cdiv(tl.load(prefix_lengths_ptr + row, mask=real, other=0), SPLIT)
    used = in_prefix + tl.cdiv(tl.load(step_ptr) + 1, SPLIT)
    base = unit.to(tl.int64) * (prefix_splits + suffix_splits)
    d = tl.arange(0, BLOCK_D)

    highest = tl.full([BLOCK_UNITS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_UNITS], tl.float32)
    mixed = tl.zeros([BLOCK_UNITS, BLOCK_D], tl.float32)
    for chunk in range(0, tl.max(used, axis=0), CHUNK):
        # Counted through the row's own splits, so that the order of the sums is its own too.
        index = (chunk + tl.arange(0, CHUNK))[None, :]
        own = in_prefix[:, None]
        slot = base[:, None] + tl.where(index < own, index, index - own + prefix_splits)
        inside = (index < used[:, None]) & real[:, None]
        lse = tl.load(lse_ptr + slot, mask=inside, other=float("-inf"))
        partial = tl.load(
            partial_ptr + slot[:, :, None] * HEAD_DIM + d[None, None, :],
            mask=inside[:, :, None] & (d < HEAD_DIM)[None, None, :],
            other=0.0,
        )
        new_highest = tl.maximum(highest, tl.max(lse, axis=1))
        shift = tl.where(new_highest == float("-inf"), 0.0, new_highest)  # of units past the end
        weights = tl.exp2(lse - shift[:, None])
        fade = tl.exp2(highest - shift)
        total = total * fade + tl.sum(weights, axis=1)
        mixed = mixed * fade[:, None] + tl.sum(weights[:, :, None] * partial, axis=1)
        highest = new_highest
    result = (mixed / tl.where(real, total, 1.0)[:, None]).to(out_ptr.dtype.element_ty)
    at = row * stride_or + (unit % HEADS) * HEAD_DIM
    to = out_ptr + at[:, None] + d[None, :]
    tl.store(to, result, mask=real[:, None] & (d < HEAD_DIM)[None, :])


def config(heads: int, kv_heads: int, head_dim: int, element_size: int) -> dict[str, int]:
    """Tile sizes by constexpr name, from the model's shape alone."""
    block_d = triton.next_power_of_2(head_dim)
    block_m = block_queries(heads // kv_heads)
    return {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "SPLIT": split_tokens(heads, kv_heads),
        "BLOCK_M": block_m,
        # 16 KiB of keys and as much of values in every stage of the pipeline; 64 by 128 scores,
        # or many heads in fp32, would take too many registers.
        "BLOCK_N": min(16384 // (block_d * element_size), 64 if block_m == 64 else 128)
        // (2 if block_m > 16 and element_size == 4 else 1),
    }


def options(constants: dict[str, int], element_size: int) -> dict[str, int]:
    """Warps, no more than load 128 bits a lane of the queries at once, and depth of the pipeline.

    Chosen by their registers: larger tiles and fp32, whose products run without tensor cores,
    need more warps to hold their operands, and no third stage's addresses. But for fp32 on a larger
    tile with two stages ptxas keeps 8 bytes on the stack of sm_90; with three, nothing.
    """
    block_m, block_d = constants["BLOCK_M"], constants["BLOCK_D"]
    most = 8 if block_m == 64 or element_size == 4 else 4
    return {
        "num_warps": min(max(block_m * block_d * element_size // 512, 1), most),
        "num_stages": 3 if (block_m == 16) == (element_size == 2) else 2,
    }


def merge_config(constants: dict[str, int], element_size: int) -> dict[str, int]:
    """Constexprs of the merge: as many units as one warp stores 128 bits a lane of."""
    names = ("HEADS", "HEAD_DIM", "BLOCK_D", "SPLIT")
    units = max(512 // (constants["BLOCK_D"] * element_size), 1)
    return {n: constants[n] for n in names} | {"BLOCK_UNITS": units, "CHUNK": MERGE_SPLITS}


def launch_decode_attention(
    q: Tensor,
    cache: LayerCache,
    scale: float,
    out: Tensor,
    workspace: tuple[Tensor, Tensor],
) -> None:
    """Write the attention of every row into out; see kernels.decode_attention."""
    rows, heads, head_dim = q.shape
    if rows == 0:
        return
    keys, values, tiles, lengths = cache.keys, cache.values, cache.tiles, cache.prefix_lengths
    prefix_keys, prefix_values = cache.prefix_keys, cache.prefix_values
    kv_heads = keys.shape[1]
    constants = config(heads, kv_heads, head_dim, q.element_size())
    prefix_splits = triton.cdiv(prefix_keys.shape[2], constants["SPLIT"])
    suffix_splits = triton.cdiv(keys.shape[2], constants["SPLIT"])
    partial, lse = workspace
    suffix_inputs = (keys, values, *keys.stride()[:3], cache.step)
    prefix_inputs = (prefix_keys, prefix_values, *prefix_keys.stride()[:3], lengths, tiles)
    programs = kv_heads * (len(tiles) * prefix_splits + rows * suffix_splits)
    _decode_attention_kernel[(programs,)](
        *(partial, lse),
        *(q, *q.stride()[:2], *suffix_inputs, *prefix_inputs, scale * math.log2(math.e)),
        *(rows, len(tiles), prefix_splits, suffix_splits),
        **constants,
        # The interpreter multiplies the bit patterns of bf16 operands (triton issue 11584).
        WIDEN=not q.is_cuda and q.dtype == torch.bfloat16,
        **options(constants, q.element_size()),
    )
    merge = merge_config(constants, q.element_size())
    _merge_splits_kernel[(triton.cdiv(rows * heads, merge["BLOCK_UNITS"]),)](
        *(out, out.stride(0)),
        *(partial, lse, cache.prefix_lengths, cache.step),
        *(rows * heads, prefix_splits, suffix_splits),
        **merge,
        num_warps=1,
    )


def launches(shape: DecodeShape) -> list[Launch]:
    """Both launches of a layer at the last step, when all suffix splits are full length.

    Rows: half conditional, `group` of them to a prefix; half unconditional, all on one. Traffic
    counts a prefix once for every tile that reads it and the partials once for each launch; the
    least of the first launch is each key and value once, and of the merge its partials once.
    """
    heads, kv_heads, head_dim = shape.heads, shape.kv_heads, shape.head_dim
    size = BYTES[shape.dtype]
    constants = config(heads, kv_heads, head_dim, size)
    prefix_splits = triton.cdiv(shape.prefix, constants["SPLIT"])
    suffix_splits = triton.cdiv(shape.suffix, constants["SPLIT"])
    half, most = shape.rows // 2, tile_rows(heads, kv_heads)
    groups = triton.cdiv(half, shape.group)
    tiles = groups * triton.cdiv(shape.group, most) + triton.cdiv(half, most)

    token = 2 * kv_heads * head_dim * size
    queries = shape.rows * heads * head_dim * size
    partials = shape.rows * heads * (prefix_splits + suffix_splits) * 4 * (head_dim + 1)
    own = shape.rows * shape.suffix * token
    pointers = ("q_ptr", "keys_ptr", "values_ptr", "prefix_keys_ptr", "prefix_values_ptr")
    strides = tuple(f"stride_{name}" for name in ("qr", "qh", "sr", "sh", "st", "pu", "ph", "pt"))
    floats = ("partial_ptr", "lse_ptr")
    tables = ("step_ptr", "prefix_lengths_ptr", "tiles_ptr")  # one number a row or a tile
    counts = ("rows", "tiles", "prefix_splits", "suffix_splits")
    launched = options(constants, size)
    attend = Launch(
        name="decode_attention",
        kernel=_decode_attention_kernel,
        signature=dict.fromkeys(floats, "*fp32")
        | dict.fromkeys(pointers, f"*{shape.dtype}")
        | dict.fromkeys(strides, "i32")
        | dict.fromkeys(tables, "*i32")
        | {"qk_scale": "fp32", **dict.fromkeys(counts, "i32")},
        constexprs={**constants, "WIDEN": False},
        divisible=(*floats, *pointers, *strides, *tables),
        num_warps=launched["num_warps"],
        num_stages=launched["num_stages"],
        grid=(kv_heads * (tiles * prefix_splits + shape.rows * suffix_splits),),
        bytes_moved=own + tiles * shape.prefix * token + queries + partials,
        bytes_least=own + (groups + 1) * shape.prefix * token + 2 * queries,
        flops=4 * heads * head_dim * shape.rows * (shape.prefix + shape.suffix),
        tensor_cores=shape.dtype != "fp32",
        narrow_ok=("lse_ptr", *tables),
    )
    merge_constants, merged = merge_config(constants, size), queries + partials + 4 * shape.rows
    merge = Launch(
        name="decode_attention merge",
        kernel=_merge_splits_kernel,
        signature={"out_ptr": f"*{shape.dtype}", "stride_or": "i32"}
        | dict.fromkeys(floats, "*fp32")
        | dict.fromkeys(("prefix_lengths_ptr", "step_ptr"), "*i32")
        | dict.fromkeys(("units", "prefix_splits", "suffix_splits"), "i32"),
        constexprs=merge_constants,
        divisible=("out_ptr", "stride_or", *floats, "prefix_lengths_ptr", "step_ptr"),
        num_warps=1,
        grid=(triton.cdiv(shape.rows * heads, merge_constants["BLOCK_UNITS"]),),
        bytes_moved=merged,
        bytes_least=merged,
        narrow_ok=("lse_ptr", "prefix_lengths_ptr", "step_ptr"),
    )
    return [attend, merge]
