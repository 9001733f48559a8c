"""AdamW on split weights, an operation a line; see kernels.adamw."""

import torch
from torch import Tensor

from kernels.philox import philox
from kernels.state import AdamW

TAG = 0x41644D57  # counter word 3 of the noise: no sampling has it


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 -> the upper half in bf16, rounded to nearest, ties away from zero, and the rest.

    Away from zero, because the rest is then -32768 to 32767: with ties to even it may be 32768.
    """
    master = torch.where(master.isnan(), torch.nan, master)  # its payload must not carry over
    bits = master.view(torch.int32)
    upper = (bits + 0x8000) >> 16
    low = bits - (upper << 16)
    return upper.to(torch.int16).view(torch.bfloat16), low.to(torch.int16)


def master(weight: Tensor, low: Tensor) -> Tensor:
    """The fp32 number whose halves these are."""
    return ((weight.view(torch.int16).int() << 16) + low.int()).view(torch.float32)


def stochastic_bf16(x: Tensor, noise: Tensor) -> Tensor:
    """fp32 -> bf16, up with the probability of what is cut off.

    Args: noise: int32 in 0 .. 65535, of x's shape.
    """
    bits = x.view(torch.int32)
    rounded = torch.where(x.isfinite(), bits + noise, bits) >> 16
    rounded = torch.where(x.isnan(), 0x7FC0, rounded)
    return rounded.to(torch.int16).view(torch.bfloat16)


def noise(count: int, seed: int, step: int, stream: int) -> tuple[Tensor, Tensor]:
    """Two int32 (count,) in 0 .. 65535: the halves of Philox word i % 4 of counter i // 4."""
    blocks = torch.arange((count + 3) // 4)
    one = torch.ones((), dtype=torch.int64)
    drawn = philox(seed, blocks, one * step, one * stream, one * TAG)
    words = torch.stack([w.expand(len(blocks)) for w in drawn], 1).flatten()[:count]
    return (words & 0xFFFF).int(), (words >> 16).int()


def adamw(
    weight: Tensor,
    grad: Tensor,
    low: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    settings: AdamW,
    grad_scale: float | Tensor = 1.0,
    stream: int = 0,
) -> None:
    """See kernels.adamw."""
    keep, mean_rate, square_keep, square_rate, root, size, eps = settings.constants
    w = weight if low is None else master(weight, low)
    g = grad.float() * grad_scale
    m, v = exp_avg.float(), exp_avg_sq.float()
    m = m + (g - m) * mean_rate
    v = v * square_keep + (g * g) * square_rate
    # PyTorch's fp32 sqrt may be off by a unit in the last place; by way of fp64 it is not.
    denominator = v.double().sqrt().float() / root + eps
    w = w * keep - (m / denominator) * size
    if exp_avg.dtype == torch.float32:
        exp_avg.copy_(m), exp_avg_sq.copy_(v)
    else:
        first, second = noise(m.numel(), settings.seed, settings.step, stream)
        exp_avg.copy_(stochastic_bf16(m, first.view(m.shape).to(m.device)))
        exp_avg_sq.copy_(stochastic_bf16(v, second.view(v.shape).to(v.device)))
    if low is None:
        weight.copy_(w)
    else:
        upper, rest = split(w)
        weight.copy_(upper), low.copy_(rest)
