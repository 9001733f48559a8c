"""The end of a decode step in one launch: draw a token a row, gather its embedding, advance."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.cfg_sample import (
    LOGITS,
    aligned,
    logit_traffic,
    merge_block,
    narrow,
    tile_config,
    tile_constants,
    tile_grid,
    workspace_size,
)
from kernels.gpu.finish_step import (
    FINISH_ALIGNED,
    FINISH_NARROW,
    finish_arguments,
    finish_constants,
    finish_signature,
    finish_traffic,
    gather_block,
)
from kernels.gpu.launch import DecodeShape, Launch
from kernels.gpu.sampling import (
    DRAWN_NOISE,
    NO_NOISE,
    TICKETS,
    finish_rows,
    is_last,
    merge_partials,
    sample_tile,
    signed,
    ticket_words,
)
from kernels.state import Draw, StepState

_COUNTS = ["rows", "tiles", "groups", "columns"]


@triton.jit(do_not_specialize=["seed", "eos", "pad", "step_offset", *_COUNTS])
def _sample_step_kernel(
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
    # scratch
    partials_ptr,
    tickets_ptr,
    # inputs
    cond_ptr,
    stride_cond,
    uncond_ptr,
    stride_uncond,
    kept_ptr,
    sample_ids_ptr,
    table_ptr,
    stride_table,
    seed,  # a number, or a pointer to one
    step_offset,
    cfg_weight,
    temperature,
    eos,
    pad,
    # shapes
    rows,
    vocab,
    tiles,
    groups,
    columns,
    width,
    # constants
    GUIDED: tl.constexpr,
    HAS_KEPT: tl.constexpr,
    NOISE: tl.constexpr,
    SEED_ON_DEVICE: tl.constexpr,
    HAS_LOGPROBS: tl.constexpr,
    HAS_GUIDED: tl.constexpr,
    HAS_EOS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    group, tile = tl.program_id(0), tl.program_id(1)
    row = (group * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    use_row = row < rows
    column = tl.load(step_ptr)
    if SEED_ON_DEVICE:
        seed = tl.load(seed)
    read_row = use_row
    if HAS_EOS:  # the logits of a finished row are not read
        read_row = use_row & (tl.load(alive_ptr + row, mask=use_row, other=0) != 0)
    sample_tile(
        partials_ptr,
        cond_ptr,
        stride_cond,
        uncond_ptr,
        stride_uncond,
        kept_ptr,
        sample_ids_ptr,
        row,
        use_row,
        read_row,
        tile,
        tiles,
        vocab,
        cfg_weight,
        temperature,
        seed,
        step_offset + column,
        GUIDED,
        HAS_KEPT,
        NOISE,
        BLOCK,
    )
    if is_last(tickets_ptr + TICKETS + group, tiles):
        token, logprob, guided_logprob = merge_partials(
            partials_ptr, row, use_row, tiles, GUIDED, TILES
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
            column,
            rows,
            groups,
            columns,
            width,
            eos,
            pad,
            GUIDED,
            HAS_LOGPROBS,
            HAS_GUIDED,
            HAS_EOS,
            ROWS,
            BLOCK_D,
        )


def launch_sample_step(
    cond: Tensor,
    uncond: Tensor | None,
    kept: Tensor | None,
    draw: Draw,
    state: StepState,
) -> None:
    """See kernels.sample_step. kept: tempered guided logits, -inf where excluded; None: all."""
    rows, vocab = cond.shape
    group, block, num_warps = tile_config(vocab)
    tiles, groups = triton.cdiv(vocab, block), triton.cdiv(rows, group)
    workspace, seed = state.workspace, draw.seed
    if workspace is None:
        workspace = state.tokens.new_zeros(workspace_size(rows, vocab), dtype=torch.int32)
    partials = workspace[ticket_words(groups) :].view(torch.float32)
    second = cond if uncond is None else uncond
    _sample_step_kernel[(groups, tiles)](
        **finish_arguments(state),
        partials_ptr=partials,
        tickets_ptr=workspace,
        cond_ptr=cond,
        stride_cond=cond.stride(0),
        uncond_ptr=second,
        stride_uncond=second.stride(0),
        kept_ptr=partials if kept is None else kept,
        sample_ids_ptr=state.sample_ids,
        seed=signed(seed) if isinstance(seed, int) else seed,
        step_offset=draw.first_step,
        cfg_weight=draw.cfg_weight,
        temperature=draw.temperature,
        rows=rows,
        vocab=vocab,
        tiles=tiles,
        groups=groups,
        GUIDED=uncond is not None,
        HAS_KEPT=kept is not None,
        NOISE=NO_NOISE if draw.greedy else DRAWN_NOISE,
        SEED_ON_DEVICE=not isinstance(seed, int),
        ROWS=group,
        BLOCK=block,
        TILES=merge_block(tiles),
        BLOCK_D=gather_block(state.table.shape[1]),
        num_warps=num_warps,
    )


def launches(shape: DecodeShape) -> list[Launch]:
    """Image steps (guided) and text steps (with an end of sequence), drawn, greedy and top-k/p.

    The sort that finds what top-k and top-p keep is torch's and not counted; what it keeps is an
    input of the launch.
    """
    rows, width = shape.rows // 2, shape.hidden
    result = []
    for name, vocab, guided, noise, has_kept in (
        ("image", shape.image_vocab, True, DRAWN_NOISE, False),
        ("image greedy", shape.image_vocab, True, NO_NOISE, False),
        ("image top", shape.image_vocab, True, DRAWN_NOISE, True),
        ("text", shape.text_vocab, False, DRAWN_NOISE, False),
        ("text greedy", shape.text_vocab, False, NO_NOISE, False),
    ):
        logits, scratch = logit_traffic(rows, vocab, shape.dtype, guided, has_kept)
        least = logits + finish_traffic(rows, width, shape.dtype, guided)
        result.append(
            Launch(
                name=f"sample_step {name}",
                kernel=_sample_step_kernel,
                signature=LOGITS
                | finish_signature(shape.dtype)
                | dict.fromkeys(("cond_ptr", "uncond_ptr"), f"*{shape.dtype}")
                | {"groups": "i32", "seed": "*i64", "step_offset": "i32"},
                constexprs=tile_constants(vocab)
                | finish_constants(width, image=guided)
                | {
                    "GUIDED": guided,
                    "HAS_KEPT": has_kept,
                    "NOISE": noise,
                    "SEED_ON_DEVICE": True,
                },
                divisible=(*aligned(vocab), *FINISH_ALIGNED, "seed"),
                num_warps=tile_config(vocab)[2],
                grid=tile_grid(rows, vocab),
                bytes_moved=least + scratch,
                bytes_least=least,
                narrow_ok=(*narrow(vocab), *FINISH_NARROW, "seed"),
            )
        )
    return result
