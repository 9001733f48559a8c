"""The clipped GRPO loss of one token on the device; kernels.token_loss is the same in PyTorch."""

import triton
import triton.language as tl

from kernels.reference import EXPONENT_CAP

_CAP = tl.constexpr(EXPONENT_CAP)


@triton.jit
def _capped_exp(x):
    """exp(x), continued by its tangent above the cap, and its derivative."""
    over = x > _CAP  # not tl.minimum, which drops a NaN
    slope = tl.exp(tl.where(over, _CAP, x))
    return slope * (1.0 + tl.where(over, x - _CAP, 0.0)), slope


@triton.jit
def token_loss(
    logprob,
    advantage,
    old_ptr,
    ref_ptr,
    clip_lower,
    clip_upper,
    dual_clip,
    beta,
    HAS_OLD: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_DUAL: tl.constexpr,
):
    """Loss, KL, whether the clip removed the gradient, and d loss / d logprob.

    logprob and advantage are values; old_ptr and ref_ptr point at the token's numbers.
    """
    ratio, growth = 1.0, 1.0
    if HAS_OLD:
        ratio, growth = _capped_exp(logprob - tl.load(old_ptr))
    bounded = tl.minimum(tl.maximum(ratio, clip_lower), clip_upper)
    clipped = bounded * advantage < ratio * advantage
    surrogate = tl.where(clipped, bounded, ratio) * advantage
    if HAS_DUAL:
        too_low = (advantage < 0.0) & (ratio > dual_clip)
        surrogate = tl.where(too_low, dual_clip * advantage, surrogate)
        clipped = clipped | too_low
    loss, slope = -surrogate, tl.where(clipped, 0.0, -growth * advantage)
    kl = 0.0
    if HAS_REF:
        gap = tl.load(ref_ptr) - logprob
        grown, growth = _capped_exp(gap)
        kl = grown - gap - 1.0
        loss += beta * kl
        slope += beta * (1.0 - growth)
    return loss, kl, clipped, slope
