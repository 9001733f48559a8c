"""How ops cut their work: facts of shapes alone, for the kernels, their callers and the plans."""

import torch
from torch import Tensor

# Bytes of a chunk's logits. More make the GEMMs no faster; a trainable weight, whose gradient is
# read and written once a chunk, is worth a chunk of a quarter of its size.
CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 64 << 20}
VOCAB_TILE = 1024  # columns of one product on a CPU, whose BLAS is a tenth slower on wider ones


def split_tokens(heads: int, kv_heads: int) -> int:
    """Context tokens of one split: a constant of the model's attention, never of the batch.

    The query heads that share a split's tokens write a partial each, so that more of them want
    longer splits to keep the partials at a few percent of the traffic.
    """
    return 256 if heads == kv_heads else 512


def tile_rows(heads: int, kv_heads: int) -> int:
    """Most rows of a prefix tile: its queries are one side of a tensor-core product."""
    repeat = heads // kv_heads
    return block_queries(repeat) // repeat


def block_queries(repeat: int) -> int:
    """Queries of one program, padding included: the M side of its products, a power of two.

    Eight rows of `repeat` heads, as a group of GRPO often is, and at least the 16 of the smallest
    tensor-core product. More than 8 heads nearly fill one by themselves: two rows of them.
    """
    padded = 1 << (repeat - 1).bit_length()
    return max((8 if padded <= 8 else 2) * padded, 16)


def prefix_tiles(row_prefix: Tensor, max_rows: int) -> Tensor:
    """The tile table of decode_attention: runs of rows with one prefix, cut to max_rows.

    Args:
        row_prefix: (R,) integers, the prefix of each row; negative: none.
        max_rows: at most `tile_rows`.
    Returns: (T, 3) int32 on row_prefix's device. Reads row_prefix on the host: for once a rollout.
    Raises: ValueError naming the argument.
    """
    if row_prefix.ndim != 1 or row_prefix.is_floating_point():
        raise ValueError(
            f"row_prefix: wanted (R,) integers, got {tuple(row_prefix.shape)} {row_prefix.dtype}"
        )
    if max_rows < 1:
        raise ValueError(f"max_rows: wanted at least 1, got {max_rows}")
    tiles: list[list[int]] = []
    for row, prefix in enumerate(row_prefix.tolist()):
        if prefix < 0:
            continue
        last = tiles[-1] if tiles else None
        if last and last[2] == prefix and row == last[0] + last[1] and last[1] < max_rows:
            last[1] += 1
        else:
            tiles.append([row, 1, prefix])
    return torch.tensor(tiles, dtype=torch.int32, device=row_prefix.device).view(-1, 3)


def prefix_of_rows(tiles: Tensor, rows: int) -> Tensor:
    """(T, 3) tiles -> (R,) int32, the prefix of each row; 0 for rows in none. Reads tiles."""
    row_prefix = torch.zeros(rows, dtype=torch.int32)
    for first, count, index in tiles.tolist():
        row_prefix[first : first + count] = index
    return row_prefix.to(tiles.device)
