"""Guided sampling in one pass over the logits: a program a tile of the vocabulary."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import BYTES, DecodeShape, Launch
from kernels.gpu.sampling import (
    DRAWN_NOISE,
    FIELDS,
    NO_NOISE,
    TICKETS,
    is_last,
    merge_partials,
    sample_tile,
    signed,
    ticket_words,
)
from kernels.state import Draw

TILE = 2048  # entries of a program: 16 a thread, so 8 loads of 128 bits in flight for bf16 pairs


@triton.jit(do_not_specialize=["seed", "step", "rows", "tiles"])
def _cfg_sample_kernel(
    # outputs
    ids_ptr,
    logprobs_ptr,
    guided_logprobs_ptr,
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
    seed,
    step,
    cfg_weight,
    temperature,
    # shapes
    rows,
    vocab,
    tiles,
    # constants
    GUIDED: tl.constexpr,
    HAS_KEPT: tl.constexpr,
    NOISE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    group, tile = tl.program_id(0), tl.program_id(1)
    row = (group * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    use_row = row < rows
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
        use_row,
        tile,
        tiles,
        vocab,
        cfg_weight,
        temperature,
        seed,
        step,
        GUIDED,
        HAS_KEPT,
        NOISE,
        BLOCK,
    )
    if is_last(tickets_ptr + TICKETS + group, tiles):
        token, logprob, guided_logprob = merge_partials(
            partials_ptr, row, use_row, tiles, GUIDED, TILES
        )
        tl.store(ids_ptr + row, token, mask=use_row)
        tl.store(logprobs_ptr + row, logprob, mask=use_row)
        tl.store(guided_logprobs_ptr + row, guided_logprob, mask=use_row)


def tile_config(vocab: int) -> tuple[int, int, int]:
    """Rows of a program, vocabulary entries of a program, warps.

    A row wider than a tile has a program a tile, so that 8 rows already fill a GPU; narrow rows
    share a program. Nothing depends on the number of rows: results are batch-invariant.
    """
    block = min(TILE, max(16, triton.next_power_of_2(vocab)))
    return TILE // block, block, 4


def merge_block(tiles: int) -> int:
    """Width of a merge over tiles: at least a thread each, and so the same code for most models."""
    return max(128, triton.next_power_of_2(tiles))


def workspace_size(rows: int, vocab: int) -> int:
    """32-bit words of scratch: the tickets, which every launch leaves at 0, then the partials."""
    group, block, _ = tile_config(vocab)
    return ticket_words(triton.cdiv(rows, group)) + rows * FIELDS * triton.cdiv(vocab, block)


def launch_cfg_sample(
    cond: Tensor,
    uncond: Tensor | None,
    kept: Tensor | None,
    draw: Draw,
    sample_ids: Tensor,
    step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See kernels.cfg_sample. kept: tempered guided logits, -inf where excluded; None: all."""
    rows, vocab = cond.shape
    ids = torch.empty(rows, dtype=torch.int64, device=cond.device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=cond.device)
    guided_logprobs = torch.empty_like(logprobs)
    if rows == 0:
        return ids, logprobs, guided_logprobs
    group, block, num_warps = tile_config(vocab)
    tiles, groups = triton.cdiv(vocab, block), triton.cdiv(rows, group)
    tickets = torch.zeros(workspace_size(rows, vocab), dtype=torch.int32, device=cond.device)
    # A pointer that its constant switches off is never read: any tensor will do.
    second = cond if uncond is None else uncond
    _cfg_sample_kernel[(groups, tiles)](
        ids,
        logprobs,
        guided_logprobs,
        tickets[ticket_words(groups) :].view(torch.float32),
        tickets,
        cond,
        cond.stride(0),
        second,
        second.stride(0),
        logprobs if kept is None else kept,
        sample_ids.contiguous(),
        signed(int(draw.seed)),
        draw.first_step + step,
        draw.cfg_weight,
        draw.temperature,
        rows,
        vocab,
        tiles,
        GUIDED=uncond is not None,
        HAS_KEPT=kept is not None,
        NOISE=NO_NOISE if draw.greedy else DRAWN_NOISE,
        ROWS=group,
        BLOCK=block,
        TILES=merge_block(tiles),
        num_warps=num_warps,
    )
    return ids, logprobs, guided_logprobs


def launches(shape: DecodeShape) -> list[Launch]:
    """Guided draws of image tokens and plain ones of text, with noise, top-k/top-p, greedy."""
    rows = shape.rows // 2
    result = []
    for vocab, name, guided in (
        (shape.image_vocab, "guided", True),
        (shape.text_vocab, "text", False),
    ):
        for variant, noise, has_kept in (
            ("", DRAWN_NOISE, False),
            (" greedy", NO_NOISE, False),
            (" top", DRAWN_NOISE, True),
        ):
            inputs, scratch = logit_traffic(rows, vocab, shape.dtype, guided, has_kept)
            inputs += rows * 24
            result.append(
                Launch(
                    name=f"cfg_sample {name}{variant}",
                    kernel=_cfg_sample_kernel,
                    signature=LOGITS
                    | dict.fromkeys(("cond_ptr", "uncond_ptr"), f"*{shape.dtype}")
                    | {
                        "ids_ptr": "*i64",
                        "logprobs_ptr": "*fp32",
                        "guided_logprobs_ptr": "*fp32",
                        "seed": "i64",
                        "step": "i32",
                    },
                    constexprs=tile_constants(vocab)
                    | {"GUIDED": guided, "HAS_KEPT": has_kept, "NOISE": noise},
                    divisible=(
                        "ids_ptr",
                        "logprobs_ptr",
                        "guided_logprobs_ptr",
                        *aligned(vocab),
                    ),
                    num_warps=tile_config(vocab)[2],
                    grid=tile_grid(rows, vocab),
                    bytes_moved=inputs + scratch,
                    bytes_least=inputs,
                    narrow_ok=(
                        "ids_ptr",
                        "logprobs_ptr",
                        "guided_logprobs_ptr",
                        *narrow(vocab),
                    ),
                )
            )
    return result


# What launches of the kernels over logits have in common.

LOGITS = {
    "partials_ptr": "*fp32",
    "tickets_ptr": "*i32",
    "stride_cond": "i32",
    "stride_uncond": "i32",
    "kept_ptr": "*fp32",
    "sample_ids_ptr": "*i64",
    "cfg_weight": "fp32",
    "temperature": "fp32",
    "rows": "i32",
    "vocab": "i32",
    "tiles": "i32",
}


def logit_traffic(
    rows: int, vocab: int, dtype: str, guided: bool, has_kept: bool
) -> tuple[int, int]:
    """Bytes of logits that are read, and of partials that are written and read."""
    entry = BYTES[dtype] * (2 if guided else 1) + 4 * has_kept
    _, block, _ = tile_config(vocab)
    fields = FIELDS if guided else FIELDS - 3  # without those of the conditional distribution
    return rows * vocab * entry, 2 * rows * triton.cdiv(vocab, block) * fields * 4


def tile_constants(vocab: int) -> dict[str, int]:
    group, block, _ = tile_config(vocab)
    return {"ROWS": group, "BLOCK": block, "TILES": merge_block(triton.cdiv(vocab, block))}


def tile_grid(rows: int, vocab: int) -> tuple[int, int]:
    group, block, _ = tile_config(vocab)
    return triton.cdiv(rows, group), triton.cdiv(vocab, block)


def aligned(vocab: int) -> tuple[str, ...]:
    """Arguments that are multiples of 16: strides too, where the vocabulary is one."""
    pointers = tuple(f"{name}_ptr" for name in SHARED_POINTERS)
    return (*pointers, "vocab", "stride_cond", "stride_uncond") if vocab % 16 == 0 else pointers


def narrow(vocab: int) -> tuple[str, ...]:
    """Pointers with a few numbers a row; the logits too, where rows cannot all be aligned."""
    few = ("partials_ptr", "tickets_ptr", "sample_ids_ptr")
    return few if vocab % 16 == 0 else (*few, "cond_ptr", "uncond_ptr", "kept_ptr")


SHARED_POINTERS = ("partials", "tickets", "cond", "uncond", "kept", "sample_ids")
