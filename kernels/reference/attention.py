"""Rotation, append and decode attention as plain maths in PyTorch: the oracle for their kernels.

Each computes in fp32, or in fp64 when given fp64.
"""

import torch
from torch import Tensor

from kernels.reference import as_float


def rotated(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Packed projections -> rotated queries, rotated keys, values.

    Args:
        qkv: (R, (Hq + 2 Hkv) * hd).
        cos, sin: (R, hd / 2), the angles of each row's position.
    Returns: (R, Hq, hd), (R, Hkv, hd), (R, Hkv, hd) of qkv's dtype.
    """
    split = qkv.unflatten(1, (heads + 2 * kv_heads, 2 * cos.shape[1]))
    turned, v = split.split([heads + kv_heads, kv_heads], 1)
    low, high = as_float(turned).chunk(2, -1)
    cos, sin = cos[:, None].to(low.dtype), sin[:, None].to(low.dtype)
    turned = torch.cat((low * cos - high * sin, high * cos + low * sin), -1).to(qkv.dtype)
    return turned[:, :heads], turned[:, heads:], v


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    length: int,
    prefix_keys: Tensor,
    prefix_values: Tensor,
    prefix_lengths: Tensor,
    row_prefix: Tensor,
    scale: float,
) -> Tensor:
    """Softmax attention of one query a row over its prefix, then its suffix.

    Args:
        q: (R, Hq, hd).
        keys, values: (R, Hkv, S, hd), of which the first `length` tokens are attended.
        prefix_keys, prefix_values: (U, Hkv, P, hd).
        prefix_lengths: (R,) how many tokens of its prefix a row attends.
        row_prefix: (R,) its prefix; any where its length is 0.
    Returns: (R, Hq * hd), q's dtype.
    """
    rows, heads, head_dim = q.shape
    kv_heads = keys.shape[1]
    result = torch.empty_like(q)
    for row in range(rows):
        shared, index = int(prefix_lengths[row]), int(row_prefix[row])
        k, v = keys[row, :, :length], values[row, :, :length]
        if shared:
            k = torch.cat((prefix_keys[index, :, :shared], k), 1)
            v = torch.cat((prefix_values[index, :, :shared], v), 1)
        query = as_float(q[row]).view(kv_heads, heads // kv_heads, head_dim)
        probs = (query @ as_float(k).mT * scale).softmax(-1)
        result[row] = (probs @ as_float(v)).view(heads, head_dim)
    return result.view(rows, -1)
