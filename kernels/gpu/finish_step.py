"""The end of a step from partials in memory: a program a row. Shared arguments of such kernels."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.cfg_sample import merge_block
from kernels.gpu.launch import BYTES, DecodeShape, Launch
from kernels.gpu.sampling import FIELDS, finish_rows, merge_partials
from kernels.state import StepState

GATHER = 4096  # values of the embedding that a program copies at a time

FINISH_NARROW = (  # a number a row or less
    "tokens_ptr",
    "logprobs_ptr",
    "guided_logprobs_ptr",
    "step_ptr",
    "error_ptr",
    "alive_ptr",
)
FINISH_ALIGNED = (*FINISH_NARROW, "x_ptr", "table_ptr", "stride_x", "stride_table", "width")


@triton.jit(do_not_specialize=["eos", "pad", "rows", "tiles", "columns"])
def _finish_step_kernel(
    # outputs
    tokens_ptr,
    stride_tokens,
    logprobs_ptr,
    stride_logprobs,
    guided_logprobs_ptr,
    stride_guided,
    x_ptr,
    stride_x,
    # in and out
    step_ptr,
    error_ptr,
    alive_ptr,
    tickets_ptr,
    # inputs
    partials_ptr,
    table_ptr,
    stride_table,
    eos,
    pad,
    # shapes
    rows,
    tiles,
    columns,
    width,
    # constants
    HAS_COND: tl.constexpr,
    PAIRED: tl.constexpr,
    HAS_LOGPROBS: tl.constexpr,
    HAS_GUIDED: tl.constexpr,
    HAS_EOS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    group = tl.program_id(0)  # of one row
    row = (group + tl.arange(0, 1)).to(tl.int64)
    use_row = row < rows
    token, logprob, guided_logprob = merge_partials(
        partials_ptr, row, use_row, tiles, HAS_COND, TILES
    )
    finish_rows(
        tokens_ptr,
        stride_tokens,
        logprobs_ptr,
        stride_logprobs,
        guided_logprobs_ptr,
        stride_guided,
        x_ptr,
        stride_x,
        tickets_ptr,
        error_ptr,
        step_ptr,
        alive_ptr,
        table_ptr,
        stride_table,
        token,
        logprob,
        guided_logprob,
        group,
        row,
        use_row,
        tl.load(step_ptr),
        rows,
        rows,
        columns,
        width,
        eos,
        pad,
        PAIRED,
        HAS_LOGPROBS,
        HAS_GUIDED,
        HAS_EOS,
        1,
        BLOCK_D,
    )


def gather_block(width: int) -> int:
    """Values of an embedding that a program copies at a time."""
    return min(triton.next_power_of_2(width), GATHER)


def finish_arguments(state: StepState) -> dict[str, Any]:
    """What `finish_rows` takes, by the kernels' names.

    A pointer that its constant switches off is never read: any tensor will do.
    """
    tokens, logprobs, guided_logprobs = state.tokens, state.logprobs, state.guided_logprobs
    first = tokens if logprobs is None else logprobs
    second = tokens if guided_logprobs is None else guided_logprobs
    return {
        "tokens_ptr": tokens,
        "stride_tokens": tokens.stride(0),
        "logprobs_ptr": first,
        "stride_logprobs": first.stride(0),
        "guided_logprobs_ptr": second,
        "stride_guided": second.stride(0),
        "x_ptr": state.x,
        "stride_x": state.x.stride(0),
        "step_ptr": state.step,
        "error_ptr": state.error,
        "alive_ptr": tokens if state.alive is None else state.alive.view(torch.uint8),
        "table_ptr": state.table,
        "stride_table": state.table.stride(0),
        "eos": 0 if state.eos is None else state.eos,
        "pad": state.pad,
        "columns": tokens.shape[1],
        "width": state.table.shape[1],
        "HAS_LOGPROBS": logprobs is not None,
        "HAS_GUIDED": guided_logprobs is not None,
        "HAS_EOS": state.eos is not None,
    }


def launch_finish_step(
    partials: Tensor,
    tickets: Tensor,
    state: StepState,
    *,
    tiles: int,
    has_cond: bool,
    paired: bool,
) -> None:
    """Merge the partials (B, FIELDS, tiles) and end the step; see sampling.finish_rows.

    Args:
        has_cond: the partials hold the conditional distribution besides the sampled one.
        paired: x has a second half, for unconditional rows.
    """
    rows = len(state.tokens)
    _finish_step_kernel[(rows,)](
        **finish_arguments(state),
        tickets_ptr=tickets,
        partials_ptr=partials,
        rows=rows,
        tiles=tiles,
        HAS_COND=has_cond,
        PAIRED=paired,
        TILES=merge_block(tiles),
        BLOCK_D=gather_block(state.table.shape[1]),
    )


def finish_signature(dtype: str) -> dict[str, str]:
    numbers = ("tokens", "logprobs", "guided", "x", "table")
    return dict.fromkeys((f"stride_{name}" for name in numbers), "i32") | {
        "tokens_ptr": "*i64",
        "logprobs_ptr": "*fp32",
        "guided_logprobs_ptr": "*fp32",
        "x_ptr": f"*{dtype}",
        "step_ptr": "*i32",
        "error_ptr": "*i64",
        "alive_ptr": "*u8",
        "table_ptr": f"*{dtype}",
        "eos": "i32",
        "pad": "i32",
        "columns": "i32",
        "width": "i32",
    }


def finish_constants(width: int, *, image: bool) -> dict[str, Any]:
    return {
        "HAS_LOGPROBS": True,
        "HAS_GUIDED": image,
        "HAS_EOS": not image,
        "BLOCK_D": gather_block(width),
    }


def finish_traffic(rows: int, width: int, dtype: str, paired: bool) -> int:
    """Bytes of embeddings read and written, tokens, log-probs and sample ids."""
    return rows * width * BYTES[dtype] * (3 if paired else 2) + rows * (8 + 8 + 8)


def finish_launch(
    shape: DecodeShape, tiles: int, *, image: bool, has_cond: bool, has_logprobs: bool
) -> Launch:
    """The launch after a head that left partials of `tiles` tiles."""
    rows = shape.rows // 2
    fields = FIELDS if has_cond else FIELDS - 3  # without those of the conditional distribution
    traffic = rows * fields * tiles * 4 + finish_traffic(rows, shape.hidden, shape.dtype, image)
    return Launch(
        name=f"finish_step {'image' if image else 'text'}" + ("" if has_logprobs else " guided"),
        kernel=_finish_step_kernel,
        signature=finish_signature(shape.dtype)
        | {"tickets_ptr": "*i32", "partials_ptr": "*fp32", "rows": "i32", "tiles": "i32"},
        constexprs=finish_constants(shape.hidden, image=image)
        | {
            "HAS_COND": has_cond,
            "PAIRED": image,
            "HAS_LOGPROBS": has_logprobs,
            "TILES": merge_block(tiles),
        },
        divisible=(*FINISH_ALIGNED, "tickets_ptr", "partials_ptr"),
        grid=(rows,),
        bytes_moved=traffic,
        bytes_least=traffic,
        narrow_ok=(*FINISH_NARROW, "tickets_ptr", "partials_ptr"),
    )
