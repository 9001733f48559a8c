"""AdamW on split weights: one pass, a program for BLOCK elements."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import DecodeShape, Launch
from kernels.gpu.sampling import signed
from kernels.reference.adamw import TAG
from kernels.state import AdamW

BLOCK, NUM_WARPS = 1024, 4  # eight elements a thread: 128 bits of the narrowest operand
_TAG = tl.constexpr(TAG)


@triton.jit
def _stochastic(x, noise):
    """fp32 -> the bits of bf16 (int16), rounded up with the probability of what is cut off."""
    bits = x.to(tl.int32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    rounded = tl.where(finite, bits + noise, bits) >> 16
    return tl.where(x == x, rounded, 0x7FC0).to(tl.int16)


@triton.jit
def _wide(half):
    """The bits of bf16 (int16) -> fp32."""
    return (half.to(tl.int32) << 16).to(tl.float32, bitcast=True)


# An argument of 1 would else become a constant, and every stream a compilation.
@triton.jit(do_not_specialize=("seed", "step", "stream"))
def _adamw_step_kernel(
    weight_ptr,
    low_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    grad_scale_ptr,
    count,
    keep,
    mean_rate,
    square_keep,
    square_rate,
    root,
    size,
    eps,
    seed,
    step,
    stream,
    # constants
    SPLIT: tl.constexpr,
    HALF_MOMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    at = first + tl.arange(0, BLOCK)
    inside = at < count
    scale = tl.load(grad_scale_ptr)
    g = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32) * scale
    m = tl.load(exp_avg_ptr + at, mask=inside, other=0)
    v = tl.load(exp_avg_sq_ptr + at, mask=inside, other=0)
    w = tl.load(weight_ptr + at, mask=inside, other=0)
    if SPLIT:
        low = tl.load(low_ptr + at, mask=inside, other=0)
        w = ((w.to(tl.int32) << 16) + low.to(tl.int32)).to(tl.float32, bitcast=True)
    if HALF_MOMENTS:
        m, v = _wide(m), _wide(v)
    m = m + (g - m) * mean_rate
    v = v * square_keep + (g * g) * square_rate
    denominator = tl.div_rn(tl.sqrt_rn(v), tl.full(v.shape, root, tl.float32)) + eps
    w = w * keep - tl.div_rn(m, denominator) * size
    if HALF_MOMENTS:
        blocks = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
        zero = tl.zeros(blocks.shape, tl.uint32)
        w0, w1, w2, w3 = tl.philox(
            seed, blocks, zero + step.to(tl.uint32), zero + stream.to(tl.uint32), zero + _TAG
        )
        words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
        tl.store(exp_avg_ptr + at, _stochastic(m, (words & 0xFFFF).to(tl.int32)), mask=inside)
        tl.store(exp_avg_sq_ptr + at, _stochastic(v, (words >> 16).to(tl.int32)), mask=inside)
    else:
        tl.store(exp_avg_ptr + at, m, mask=inside)
        tl.store(exp_avg_sq_ptr + at, v, mask=inside)
    if SPLIT:
        # Ties away from zero; a NaN's payload must not carry over.
        bits = tl.where(w == w, w.to(tl.int32, bitcast=True), 0x7FC00000)
        upper = (bits + 0x8000) >> 16
        tl.store(weight_ptr + at, upper.to(tl.int16), mask=inside)
        tl.store(low_ptr + at, (bits - (upper << 16)).to(tl.int16), mask=inside)
    else:
        tl.store(weight_ptr + at, w, mask=inside)


def launch_adamw(
    weight: Tensor,
    grad: Tensor,
    low: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    settings: AdamW,
    grad_scale: float | Tensor,
    stream: int,
) -> None:
    """See kernels.adamw. bf16 goes in as bits, but for the gradient."""
    if not isinstance(grad_scale, Tensor):
        grad_scale = torch.full((), grad_scale, dtype=torch.float32, device=weight.device)
    half = exp_avg.dtype == torch.bfloat16
    moments = [t.view(torch.int16) if half else t for t in (exp_avg, exp_avg_sq)]
    count = weight.numel()
    _adamw_step_kernel[(triton.cdiv(count, BLOCK),)](
        weight if low is None else weight.view(torch.int16),
        weight if low is None else low,  # not read
        grad,
        *moments,
        grad_scale,
        count,
        *settings.constants,
        signed(settings.seed),
        settings.step,
        stream,
        SPLIT=low is not None,
        HALF_MOMENTS=half,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,
    )


def launches(shape: DecodeShape) -> list[Launch]:
    """A feed-forward weight's step: fp32, or bf16 with either kind of moments.

    grad_scale is one number, read by every program and counted once.
    """
    if shape.dtype == "fp16":
        return []
    split, count = shape.dtype == "bf16", shape.hidden * shape.intermediate
    result = []
    for half in (False, True) if split else (False,):
        weight = "*i16" if split else "*fp32"
        moment = "*i16" if half else "*fp32"
        pointers = {
            "weight_ptr": weight,
            "low_ptr": weight,
            "grad_ptr": f"*{shape.dtype}",
            "exp_avg_ptr": moment,
            "exp_avg_sq_ptr": moment,
            "grad_scale_ptr": "*fp32",
        }
        numbers = ("keep", "mean_rate", "square_keep", "square_rate", "root", "size", "eps")
        size = 4 if shape.dtype == "fp32" else 2
        # Weight and moments are read and written, the gradient read, the low half as the weight.
        traffic = count * (3 * size + 2 * 2 * (2 if half else 4) + (4 if split else 0))
        launch = Launch(
            name=f"adamw, {'bf16' if half else 'fp32'} moments",
            kernel=_adamw_step_kernel,
            signature=pointers
            | {"count": "i32"}
            | dict.fromkeys(numbers, "fp32")
            | {"seed": "i64", "step": "i32", "stream": "i32"},
            constexprs={"SPLIT": split, "HALF_MOMENTS": half, "BLOCK": BLOCK},
            divisible=("count", *pointers),
            num_warps=NUM_WARPS,
            grid=(triton.cdiv(count, BLOCK),),
            bytes_moved=traffic,
            bytes_least=traffic,
            fp_fusion=False,
            narrow_ok=("grad_scale_ptr",),
        )
        result.append(launch)
    return result
