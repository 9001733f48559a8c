"""The head's last GEMM fused with sampling: a program a tile of the vocabulary, then one a row.

The product is taken transposed, weights (BLOCK_V, K) times activations (K, ROWS), so that the wide
side fills the tensor cores however few rows there are; the weights are read once for 64 rows. The
order of a logit's sum does not depend on the batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.finish_step import finish_launch, launch_finish_step
from kernels.gpu.guide_inputs import launch_guide_inputs
from kernels.gpu.launch import BYTES, DecodeShape, Launch
from kernels.gpu.sampling import (
    DRAWN_NOISE,
    FIELDS,
    NO_NOISE,
    guide,
    gumbel_noise,
    signed,
    store_partials,
    ticket_words,
)
from kernels.state import Draw, StepState

BLOCK_V = 128  # 128 tiles for 16,384 codes: a wave of an H200's 132 multiprocessors

# What is multiplied: one set of activations, both branches, or high and low part of one set.
ONE, BRANCHES, PARTS = 0, 1, 2
_BRANCHES, _PARTS = tl.constexpr(BRANCHES), tl.constexpr(PARTS)


@triton.jit(do_not_specialize=["seed", "step_offset", "rows", "tiles"])
def _head_partials_kernel(
    # scratch
    partials_ptr,
    # inputs
    first_ptr,
    stride_first,
    second_ptr,
    stride_second,
    weight_ptr,
    stride_weight,
    bias_ptr,
    sample_ids_ptr,
    step_ptr,
    seed,  # a number, or a pointer to one
    step_offset,
    cfg_weight,
    temperature,
    # shapes
    rows,
    vocab,
    width,
    tiles,
    # constants
    KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NOISE: tl.constexpr,
    SEED_ON_DEVICE: tl.constexpr,
    EVEN: tl.constexpr,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Groups of rows that share a tile of weights run side by side and find it in L2.
    group, tile = tl.program_id(0), tl.program_id(1)
    row = (group * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    use_row = row < rows
    entry = tile * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, BLOCK_K)
    # Rows and entries beyond the end repeat the last one: no masks, and their results are dropped.
    read_row = tl.minimum(row, rows - 1)
    read_entry = tl.minimum(entry, vocab - 1).to(tl.int64)
    weights = weight_ptr + read_entry[:, None] * stride_weight + k[None, :]
    first = first_ptr + read_row[None, :] * stride_first + k[:, None]
    second = second_ptr + read_row[None, :] * stride_second + k[:, None]
    acc = tl.zeros((BLOCK, ROWS), tl.float32)
    acc_second = tl.zeros((BLOCK, ROWS), tl.float32)
    for start in range(0, width, BLOCK_K):
        if EVEN:
            w = tl.load(weights)
            a = tl.load(first)
        else:
            w = tl.load(weights, mask=k[None, :] < width - start, other=0.0)
            a = tl.load(first, mask=k[:, None] < width - start, other=0.0)
        if WIDEN:
            w, a = w.to(tl.float32), a.to(tl.float32)
        acc = tl.dot(w, a, acc, input_precision="ieee")
        if KIND != 0:
            if EVEN:
                b = tl.load(second)
            else:
                b = tl.load(second, mask=k[:, None] < width - start, other=0.0)
            if WIDEN:
                b = b.to(tl.float32)
            if KIND == _BRANCHES:
                acc_second = tl.dot(w, b, acc_second, input_precision="ieee")
            else:
                acc = tl.dot(w, b, acc, input_precision="ieee")
            second += BLOCK_K
        weights += BLOCK_K
        first += BLOCK_K
    cond = tl.trans(acc)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + read_entry).to(tl.float32)[None, :]
        cond += bias
    guided = cond
    if KIND == _BRANCHES:
        uncond = tl.trans(acc_second)
        if HAS_BIAS:
            uncond += bias
        guided = guide(cond, uncond, cfg_weight)
    if temperature != 1.0:
        cond = tl.div_rn(cond, temperature)
        guided = tl.div_rn(guided, temperature)
    score = guided
    if NOISE:
        if SEED_ON_DEVICE:
            seed = tl.load(seed)
        sample_ids = tl.load(sample_ids_ptr + read_row)
        step = step_offset + tl.load(step_ptr)
        score += gumbel_noise(seed, step, sample_ids, tile * BLOCK, BLOCK)
    store_partials(
        partials_ptr,
        row,
        use_row,
        tile,
        tiles,
        vocab,
        cond,
        guided,
        score,
        KIND == _BRANCHES,
        BLOCK,
    )


def gemm_config(rows: int, element_size: int, kind: int) -> tuple[int, int, int, int]:
    """Rows of a program, columns of K a stage, warps, stages.

    fp32 takes no tensor cores and more registers: 32 rows at most. Few rows of a text head take two
    stages: with more, greedy drawing puts 24 bytes on the stack of sm_100.
    """
    group = min(128 // element_size, max(16, triton.next_power_of_2(rows)))
    num_warps = 8 if group * element_size >= 128 else 4
    num_stages = 2 if element_size == 4 and num_warps == 4 and kind == ONE else 4
    return group, 128 // element_size, num_warps, num_stages


def workspace_sizes(rows: int, vocab: int, width: int, element_size: int) -> tuple[int, int, int]:
    """32-bit words of tickets, partials, and high and low parts of guided activations."""
    parts = triton.cdiv(2 * rows * width * element_size, 4)
    return ticket_words(0), rows * FIELDS * triton.cdiv(vocab, BLOCK_V), parts


def launch_head_sample(
    cond: Tensor,
    uncond: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    draw: Draw,
    state: StepState,
) -> None:
    """See kernels.head_sample."""
    (rows, width), vocab = cond.shape, len(weight)
    sizes = workspace_sizes(rows, vocab, width, cond.element_size())
    workspace, seed = state.workspace, draw.seed
    if workspace is None:
        workspace = state.tokens.new_zeros(sum(sizes), dtype=torch.int32)
    tickets, partials, parts = workspace[: sum(sizes)].split(sizes)
    partials = partials.view(torch.float32)
    first, second, kind = cond, cond if uncond is None else uncond, ONE
    if uncond is not None and state.logprobs is None:
        high, low = parts.view(cond.dtype)[: 2 * rows * width].view(2, rows, width)
        launch_guide_inputs(high, low, cond, uncond, draw.cfg_weight)
        first, second, kind = high, low, PARTS
    elif uncond is not None:
        kind = BRANCHES
    tiles = triton.cdiv(vocab, BLOCK_V)
    group, block_k, num_warps, num_stages = gemm_config(rows, cond.element_size(), kind)
    _head_partials_kernel[(triton.cdiv(rows, group), tiles)](
        partials,
        first,
        first.stride(0),
        second,
        second.stride(0),
        weight,
        weight.stride(0),
        weight if bias is None else bias,
        state.sample_ids,
        state.step,
        signed(seed) if isinstance(seed, int) else seed,
        draw.first_step,
        draw.cfg_weight,
        draw.temperature,
        rows,
        vocab,
        width,
        tiles,
        KIND=kind,
        HAS_BIAS=bias is not None,
        NOISE=NO_NOISE if draw.greedy else DRAWN_NOISE,
        SEED_ON_DEVICE=not isinstance(seed, int),
        EVEN=width % block_k == 0,
        # The interpreter multiplies the bit patterns of bf16 operands (triton issue 11584).
        WIDEN=not cond.is_cuda and cond.dtype == torch.bfloat16,
        ROWS=group,
        BLOCK=BLOCK_V,
        BLOCK_K=block_k,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    launch_finish_step(
        partials,
        tickets,
        state,
        tiles=tiles,
        has_cond=kind == BRANCHES,
        paired=uncond is not None,
    )


def launches(shape: DecodeShape) -> list[Launch]:
    """Image heads for both distributions and for the guided one alone, and the text head.

    Bytes are those of device memory. Weights are read once for each group of 64 rows; activations
    (1 MB for 128 rows of 4096) are read by every tile but stay in L2, and are counted once. So are
    weights: groups run side by side.
    """
    rows, dtype = shape.rows // 2, shape.dtype
    size = BYTES[dtype]
    result = []
    for name, vocab, width, kind in (
        ("image", shape.image_vocab, shape.head_width, BRANCHES),
        ("image guided", shape.image_vocab, shape.head_width, PARTS),
        ("text", shape.text_vocab, shape.hidden, ONE),
    ):
        image = kind != ONE
        group, block_k, num_warps, num_stages = gemm_config(rows, size, kind)
        tiles = triton.cdiv(vocab, BLOCK_V)
        sets = 2 if image else 1
        fields = FIELDS if kind == BRANCHES else FIELDS - 3
        partials = rows * fields * tiles * 4
        least = size * (vocab * width + vocab * image + sets * rows * width) + rows * 8
        for noise in (DRAWN_NOISE, NO_NOISE):
            result.append(
                Launch(
                    name=f"head_sample {name}" + ("" if noise else " greedy"),
                    kernel=_head_partials_kernel,
                    signature=_HEAD_SIGNATURE | dict.fromkeys(_OPERANDS, f"*{dtype}"),
                    constexprs={
                        "KIND": kind,
                        "HAS_BIAS": image,
                        "NOISE": noise,
                        "SEED_ON_DEVICE": True,
                        "EVEN": width % block_k == 0,
                        "WIDEN": False,
                        "ROWS": group,
                        "BLOCK": BLOCK_V,
                        "BLOCK_K": block_k,
                    },
                    divisible=(
                        *_OPERANDS,
                        "partials_ptr",
                        "sample_ids_ptr",
                        "step_ptr",
                        "seed",
                        "stride_first",
                        "stride_second",
                        "stride_weight",
                        "width",
                    ),
                    num_warps=num_warps,
                    num_stages=num_stages,
                    grid=(triton.cdiv(rows, group), tiles),
                    bytes_moved=least + partials,
                    bytes_least=least,
                    flops=2 * vocab * width * rows * sets,
                    tensor_cores=dtype != "fp32",
                    # The bias and the rest are a number an entry or a row.
                    narrow_ok=("partials_ptr", "bias_ptr", "sample_ids_ptr", "step_ptr", "seed"),
                )
            )
        result.append(
            finish_launch(
                shape,
                tiles,
                image=image,
                has_cond=kind == BRANCHES,
                has_logprobs=kind != PARTS,
            )
        )
    return result


_OPERANDS = ("first_ptr", "second_ptr", "weight_ptr", "bias_ptr")
_HEAD_SIGNATURE = {
    "partials_ptr": "*fp32",
    "stride_first": "i32",
    "stride_second": "i32",
    "stride_weight": "i32",
    "sample_ids_ptr": "*i64",
    "step_ptr": "*i32",
    "seed": "*i64",
    "step_offset": "i32",
    "cfg_weight": "fp32",
    "temperature": "fp32",
    "rows": "i32",
    "vocab": "i32",
    "width": "i32",
    "tiles": "i32",
}
