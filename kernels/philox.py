"""Counter-based noise: Philox4x32-10 and the Gumbel variables made from it.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The integers are
those of `tl.philox`, so a Triton kernel and this file draw the same tokens from the same logits.

Counter layout, part of the sampling contract: key = seed (64 bits, low word first); counter =
(vocabulary index // 4, step, sample id low, sample id high); word i of the result belongs to
vocabulary index 4 * c0 + i.
"""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57  # round multipliers
_W0, _W1 = 0x9E3779B9, 0xBB67AE85  # key increments
ROUNDS = 10


def philox(seed: int, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, ...]:
    """Four 32-bit words for each counter.

    Args:
        seed: 64-bit key.
        c0..c3: int64 tensors holding 32-bit words; they broadcast against each other, and
            rounds whose words depend on one axis only are computed on that axis only.
    Returns: four int64 tensors in [0, 2**32).
    """
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(ROUNDS):
        # int64 products wrap, but their low 64 bits are right; the arithmetic shift drags the
        # sign into bits that the mask then removes.
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = _mix(p1, c1, k0), p1, _mix(p0, c3, k1), p0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1 & _MASK, c2, c3 & _MASK


def _mix(product: Tensor, word: Tensor, key: int) -> Tensor:
    """High half of the product ^ word ^ key, as a 32-bit word."""
    high = product >> 32
    high = high.bitwise_xor_(word) if high.shape == word.shape else high ^ word
    return high.bitwise_xor_(key).bitwise_and_(_MASK)


def gumbel(seed: int, sample_ids: Tensor, steps: Tensor, vocab: int) -> Tensor:
    """Standard Gumbel noise for each (step, sample, vocabulary entry).

    Args:
        seed: 64-bit integer.
        sample_ids: (B,) int64, non-negative.
        steps: (T,) int64, non-negative.
        vocab: number of entries V.
    Returns: (T, B, V) fp32 on sample_ids' device: -log(-log(u)), u = (word >> 9 + 1/2) * 2**-23,
        which fp32 holds exactly and which is never 0 or 1.
    """
    device = sample_ids.device
    blocks = torch.arange((vocab + 3) // 4, device=device)
    words = philox(
        seed,
        blocks,
        (steps & _MASK)[:, None, None],
        (sample_ids & _MASK)[:, None],
        (sample_ids >> 32)[:, None],
    )
    noise = torch.empty(
        (len(steps), len(sample_ids), len(blocks), 4), dtype=torch.float32, device=device
    )
    for i, word in enumerate(words):
        noise[..., i] = word >> 9
    noise.add_(0.5).mul_(2.0**-23).log_().neg_().log_().neg_()
    return noise.flatten(2)[..., :vocab]
