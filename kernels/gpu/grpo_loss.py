"""The pass over a chunk of logits that the fused losses share: one program a row.

The end of a row, HELD entries, is read once and stays in registers until the gradient takes its
place. At 16,384 image tokens that is the whole row: read once, written once. What comes before is
streamed twice, first for the softmax's sums, then for the gradient. The second sweep runs
backwards, so that it begins with what was read last and L2 still has: such programs have a
multiprocessor each, and the 132 of an H200 read 37 MB again for text rows of 102,400 logits, where
L2 holds 50 MB. For rows of 184,622 it is 89 MB, and what does not fit comes from memory again.

A 16-bit gradient goes into the back half of its row's own memory: entry j to byte 2V + 2j, never
before byte 4j where its logit was, so that a backward sweep overwrites only what it has read.

Sums are of 2 ** z and z 2 ** z, z = (logit - maximum) * log2(e) / temperature: log-softmax and
entropy follow from them. Moving the maximum so that every z falls by d scales both by 2 ** -d,
after the second has lost d times the first. The first sweep keeps them for each of PART columns: a
step of its loop waits for no other thread.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.launch import BYTES, DecodeShape, Launch
from kernels.gpu.token_loss import token_loss
from kernels.tiling import CHUNK_BYTES
from kernels.token_loss import Rows, TokenLoss

THREADS_MOST = 512  # with 128 registers each: a multiprocessor's

_LOG2_E, _LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
_LOWEST = tl.constexpr(-1e30)  # a maximum before any logit; finite, so that differences are
_VANISHED = tl.constexpr(-150.0)  # 2 ** that is 0 in fp32, and 0 * -inf would be NaN

_A_NUMBER_A_ROW = [
    "logprobs_ptr",
    "entropy_ptr",
    "loss_ptr",
    "kl_ptr",
    "clipped_ptr",
    "slopes_ptr",
    "targets_ptr",
    "chosen_ptr",
    "advantages_ptr",
    "weights_ptr",
    "old_ptr",
    "ref_ptr",
]


@triton.jit
def _stream(source, stop, rate, PARTS: tl.constexpr, PART: tl.constexpr):
    """Maximum, sum of 2 ** z and sum of z * 2 ** z of a row's entries before stop."""
    at = tl.arange(0, PARTS)[:, None] * PART + tl.arange(0, PART)[None, :]
    top = tl.full((PART,), _LOWEST, tl.float32)
    total = tl.zeros((PART,), tl.float32)
    moment = tl.zeros((PART,), tl.float32)
    for first in range(0, stop, PARTS * PART):
        x = tl.load(source + first + at, mask=first + at < stop, other=-float("inf"))
        higher = tl.maximum(top, tl.max(x, 0))
        shift = (top - higher) * rate
        z = (x - higher[None, :]) * rate
        weight = tl.exp2(z)
        moment = tl.exp2(shift) * (moment + shift * total)
        moment += tl.sum(weight * tl.maximum(z, _VANISHED), 0)
        total = tl.exp2(shift) * total + tl.sum(weight, 0)
        top = higher
    peak = tl.max(top, 0)
    shift = (top - peak) * rate
    moment = tl.exp2(shift) * (moment + shift * total)
    return peak, tl.sum(tl.exp2(shift) * total, 0), tl.sum(moment, 0)


@triton.jit(do_not_specialize_on_alignment=_A_NUMBER_A_ROW)
def _grpo_rows_kernel(
    # outputs
    logprobs_ptr,
    entropy_ptr,
    loss_ptr,
    kl_ptr,
    clipped_ptr,
    # output with a loss, input without
    slopes_ptr,
    # output, in the memory of the logits
    gradient_ptr,
    stride_gradient,
    # inputs
    logits_ptr,
    targets_ptr,
    chosen_ptr,  # the logits once more, for the one at the target
    advantages_ptr,
    weights_ptr,
    old_ptr,
    ref_ptr,
    temperature,
    scale,
    clip_lower,
    clip_upper,
    dual_clip,
    beta,
    # shapes
    vocab,
    # constants
    HAS_LOSS: tl.constexpr,
    HAS_OLD: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_DUAL: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    FULL: tl.constexpr,
    STREAMED: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    HELD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    source = logits_ptr + row * vocab
    target = tl.load(targets_ptr + row).to(tl.int32)
    chosen = tl.load(chosen_ptr + row * vocab + target)
    rate = _LOG2_E / temperature
    start = 0  # of what is held
    top, total, moment = _LOWEST, 0.0, 0.0
    if STREAMED:
        start = vocab - HELD
        top, total, moment = _stream(source, start, rate, PARTS, PART)
    held_at = start + tl.arange(0, HELD)
    inside = (held_at < vocab) | FULL
    x = tl.load(source + held_at, mask=inside, other=-float("inf"))
    # The maximum is subtracted first: logits of 1e4 over a temperature would lose their differences.
    peak = tl.maximum(top, tl.max(x, 0))
    z = (x - peak) * rate
    held = tl.exp2(z)
    shift = (top - peak) * rate
    moment = tl.exp2(shift) * (moment + shift * total)
    moment += tl.sum(held * tl.maximum(z, _VANISHED), 0)
    total = tl.exp2(shift) * total + tl.sum(held, 0)
    log_total = tl.log(total)
    logprob = (chosen - peak) / temperature - log_total
    tl.store(logprobs_ptr + row, logprob)
    tl.store(entropy_ptr + row, log_total - _LN_2 * moment / total)

    if HAS_LOSS:
        loss, kl, clipped, slope = token_loss(
            logprob,
            tl.load(advantages_ptr + row),
            old_ptr + row,
            ref_ptr + row,
            clip_lower,
            clip_upper,
            dual_clip,
            beta,
            HAS_OLD,
            HAS_REF,
            HAS_DUAL,
        )
        weight = tl.load(weights_ptr + row)
        masked = weight == 0.0
        slope = tl.where(masked, 0.0, slope * weight)
        tl.store(loss_ptr + row, tl.where(masked, 0.0, loss))
        tl.store(kl_ptr + row, tl.where(masked, 0.0, kl))
        tl.store(clipped_ptr + row, tl.where(masked, 0.0, clipped.to(tl.float32)))
        tl.store(slopes_ptr + row, slope)
    if HAS_GRADIENT:
        if not HAS_LOSS:
            slope = tl.load(slopes_ptr + row)
        dtype = gradient_ptr.dtype.element_ty
        sink = gradient_ptr + row * stride_gradient
        gain = slope * scale / temperature
        share = -gain / total
        at_target = gain + tl.exp2((chosen - peak) * rate) * share
        # Whichever thread holds it, what is held and the target's logit are read before this.
        tl.debug_barrier()
        y = tl.where(held_at == target, at_target, held * share)
        tl.store(sink + held_at, y.to(dtype), mask=inside)
        if STREAMED:
            STEP: tl.constexpr = PARTS * PART
            steps = tl.cdiv(start, STEP)
            for done in range(steps):
                at = (steps - 1 - done) * STEP + tl.arange(0, STEP)
                again = tl.load(source + at, mask=at < start, other=-float("inf"))
                if dtype != tl.float32:
                    # 16-bit entries land on logits of this step and of those before it, which
                    # other warps must have read; in fp32 each lands on its own logit.
                    tl.debug_barrier()
                shares = tl.exp2((again - peak) * rate) * share
                entries = tl.where(at == target, at_target, shares)
                tl.store(sink + at, entries.to(dtype), mask=at < start)


def row_config(vocab: int) -> tuple[dict[str, int | bool], int]:
    """Constants of the kernel that follow from the vocabulary, and warps.

    A thread holds 64 values and streams 32 at a time, in loads of 128 bits: two programs fit on a
    multiprocessor at 16,384 entries, and nothing spills. Rows that are not aligned take an address
    a value, so they get half of either.
    """
    values, parts = (64, 8) if vocab % 16 == 0 else (32, 4)
    held = min(max(16, triton.next_power_of_2(vocab)), THREADS_MOST * values)
    num_warps = max(1, held // (32 * values))
    constants = {
        "FULL": vocab >= held,
        "STREAMED": vocab > held,
        "PARTS": parts,
        "PART": 128 * num_warps,
        "HELD": held,
    }
    return constants, num_warps


def launch_grpo_rows(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    loss: TokenLoss | None = None,
    slopes: Tensor | None = None,
    gradient: torch.dtype | None = None,
    scale: float = 1.0,
) -> Rows:
    """Log-probs, entropy, token losses and the logits' gradient; see kernels.logits_pass.

    Args:
        logits: (C, V) fp32, contiguous, before the temperature. With `gradient` overwritten.
        targets: (C,) int64.
        loss, slopes: of these rows, contiguous fp32; one of the two at most.
        gradient: fp32, bf16 or fp16; None: the logits stay.
        scale: factor in the gradient.
    Returns: Rows whose gradient, scale * slope / temperature * (onehot - softmax), is the logits'
        tensor in fp32, and otherwise a (C, V) view of the back halves of its rows.
    """
    assert logits.dtype == torch.float32 and logits.is_contiguous()
    assert loss is None or slopes is None
    assert gradient is None or loss is not None or slopes is not None
    rows, vocab = logits.shape
    logprobs = logits.new_empty(rows)
    entropy = torch.empty_like(logprobs)
    result = Rows(logprobs, entropy, slopes=slopes)
    if loss is not None:
        fields = ("loss", "kl", "clipped", "slopes")
        result = result._replace(**{name: torch.empty_like(logprobs) for name in fields})
    if gradient is not None:
        # Reinterpreted as 16-bit a row has 2V entries.
        view = logits if gradient == torch.float32 else logits.view(gradient)[:, vocab:]
        result = result._replace(gradient=view)
    if rows == 0:
        return result
    constants, num_warps = row_config(vocab)
    dual_clip = None if loss is None else loss.dual_clip

    def given(x: Tensor | None) -> Tensor:
        # A pointer that its constant switches off is never read: any tensor will do.
        return logprobs if x is None else x.contiguous()

    _grpo_rows_kernel[(rows,)](
        logprobs,
        entropy,
        given(result.loss),
        given(result.kl),
        given(result.clipped),
        given(result.slopes),
        logits if result.gradient is None else result.gradient,
        vocab if result.gradient is None else result.gradient.stride(0),
        logits,
        targets.contiguous(),
        logits,
        given(loss and loss.advantages),
        given(loss and loss.token_weights),
        given(loss and loss.old_logprobs),
        given(loss and loss.ref_logprobs),
        float(temperature),
        float(scale),
        1.0 - loss.clip_low if loss else 1.0,
        1.0 + loss.clip_high if loss else 1.0,
        1.0 if dual_clip is None else float(dual_clip),
        float(loss.beta) if loss else 0.0,
        vocab,
        HAS_LOSS=loss is not None,
        HAS_OLD=loss is not None and loss.old_logprobs is not None,
        HAS_REF=loss is not None and loss.ref_logprobs is not None,
        HAS_DUAL=dual_clip is not None,
        HAS_GRADIENT=gradient is not None,
        **constants,
        num_warps=num_warps,
    )
    return result


def launches(shape: DecodeShape) -> list[Launch]:
    """A chunk of each head's rows: losses with their gradient, log-probs alone, their backward.

    `bytes_again` are the second sweep's reads.
    """
    variants = {
        "": ("HAS_LOSS", "HAS_OLD", "HAS_REF", "HAS_GRADIENT"),
        " on-policy": ("HAS_LOSS", "HAS_GRADIENT"),
        " dual clip": ("HAS_LOSS", "HAS_OLD", "HAS_REF", "HAS_DUAL", "HAS_GRADIENT"),
        " log-probs": (),
        " slopes given": ("HAS_GRADIENT",),
    }
    result = []
    for name, vocab in (("image", shape.image_vocab), ("text", shape.text_vocab)):
        constants, num_warps = row_config(vocab)
        rows = CHUNK_BYTES["cuda"] // (4 * vocab) // 16 * 16
        aligned = vocab % 16 == 0
        for variant, chosen in variants.items():
            flags = {flag: flag in chosen for flag in _FLAGS}
            has_gradient, has_loss = flags["HAS_GRADIENT"], flags["HAS_LOSS"]
            entry = 4 + has_gradient * BYTES[shape.dtype]
            # Target, its logit, log-prob, entropy; slope; five more of a loss, old, reference.
            numbers = 20 + 4 * (has_gradient or has_loss) + 20 * has_loss
            numbers += 4 * (flags["HAS_OLD"] + flags["HAS_REF"])
            traffic = rows * (vocab * entry + numbers)
            result.append(
                Launch(
                    name=f"grpo_loss {name}{variant}",
                    kernel=_grpo_rows_kernel,
                    signature=_SIGNATURE | {"gradient_ptr": f"*{shape.dtype}"},
                    constexprs=constants | flags,
                    divisible=_WIDE if aligned else _WIDE[:1],
                    num_warps=num_warps,
                    grid=(rows,),
                    bytes_moved=traffic,
                    bytes_again=has_gradient * rows * 4 * max(0, vocab - constants["HELD"]),
                    bytes_least=traffic,
                    # Rows cannot all be aligned where their length is no multiple of 16.
                    narrow_ok=(*_A_NUMBER_A_ROW, *(() if aligned else _WIDE[:2])),
                )
            )
    return result


_FLAGS = ("HAS_LOSS", "HAS_OLD", "HAS_REF", "HAS_DUAL", "HAS_GRADIENT")
_WIDE = ("logits_ptr", "gradient_ptr", "stride_gradient", "vocab")
_SIGNATURE = (
    dict.fromkeys((*_A_NUMBER_A_ROW, "logits_ptr"), "*fp32")
    | {"targets_ptr": "*i64", "stride_gradient": "i32", "vocab": "i32"}
    | dict.fromkeys(
        ("temperature", "scale", "clip_lower", "clip_upper", "dual_clip", "beta"), "fp32"
    )
)
