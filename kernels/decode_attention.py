"""Attention of one query a row over a prefix stored once for its group and a suffix of its own."""

import torch
from torch import Tensor

from kernels.dispatch import use_c, use_triton
from kernels.kv_append import DTYPES, check_index, check_tensor
from kernels.reference import attention as reference_attention
from kernels.tiling import split_tokens, tile_rows

MOST_HEAD_DIM_C = 256  # the C kernel's arrays of a head end there; PyTorch beyond


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    step: Tensor,
    prefix_keys: Tensor,
    prefix_values: Tensor,
    prefix_lengths: Tensor,
    tiles: Tensor,
    *,
    scale: float,
    out: Tensor | None = None,
    workspace: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """softmax(scale * q @ k.T) @ v of each row over its prefix and its suffix tokens 0 .. step.

    The current token is in the cache already (kernels.kv_append). What lies in the cache beyond a
    row's tokens may be anything, NaN included.

    Args:
        q: (R, Hq, hd) bf16/fp16/fp32, hd a multiple of 16; last stride 1.
        keys, values: (R, Hkv, S, hd) of q's dtype, equal strides, last stride 1; Hkv divides Hq.
        step: (1,) int32 on the device, 0 <= step < S; not range-checked on CUDA.
        prefix_keys, prefix_values: (U, Hkv, P, hd), likewise; U or P may be 0.
        prefix_lengths: (R,) int32: how much of its prefix a row attends, at most P; 0 for rows in
            no tile. Not range-checked on CUDA.
        tiles: (T, 3) int32, contiguous: first row, rows, prefix index; made by `prefix_tiles`.
            A row is in one tile at most. A tile of more than `tile_rows` rows gives NaN on CUDA.
        scale: > 0, usually hd ** -0.5.
        out: (R, Hq * hd) to write into; last stride 1.
        workspace: made by `decode_attention_workspace` for these shapes or larger ones.
    Returns: (R, Hq * hd) of q's dtype. Not differentiable by its kernels: for decoding.
    Raises: ValueError naming the argument.
    Numerics: fp32 scores, softmax and sums; the probabilities are rounded to q's dtype before
        they weigh the values, as flash attention does. Batch-invariant: a row's result is the same
        bits whatever else is in the batch. Traffic: read each suffix token once, each prefix token
        once for each tile; write R * Hq * hd, and that in fp32 for every `split_tokens` tokens.
        Two launches, neither of which depends on step. Head dimensions that are no power of two
        are padded in registers; the padding reads nothing.
    Source: Hydragen, arXiv:2402.05099; Flash-Decoding (2023).
    """
    _check(q, keys, values, step, prefix_keys, prefix_values, prefix_lengths, tiles)
    if not scale > 0:
        raise ValueError(f"scale: wanted > 0, got {scale}")
    rows, heads, head_dim = q.shape
    check_tensor("out", out, (rows, heads * head_dim), q)
    if use_triton(q):
        from kernels.gpu.decode_attention import launch_decode_attention

        suffix, prefix = keys.shape[2], prefix_keys.shape[2]
        if workspace is None:
            workspace = decode_attention_workspace(
                rows, heads, keys.shape[1], head_dim, prefix, suffix, device=q.device
            )
        else:
            _check_workspace(workspace, q, keys.shape[1], prefix, suffix)
        out = q.new_empty(rows, heads * head_dim) if out is None else out
        launch_decode_attention(
            q,
            keys,
            values,
            step,
            prefix_keys,
            prefix_values,
            prefix_lengths,
            tiles,
            scale,
            out,
            workspace,
        )
        return out
    length = int(step) + 1
    if not 0 < length <= keys.shape[2]:
        raise ValueError(f"step: wanted 0 to {keys.shape[2] - 1}, got {length - 1}")
    row_prefix = _prefix_of_rows(tiles, rows, tile_rows(heads, keys.shape[1]), len(prefix_keys))
    most, given = prefix_keys.shape[2], int(prefix_lengths.max()) if rows else 0
    if given > most:
        raise ValueError(f"prefix_lengths: wanted at most {most}, got {given}")
    if use_c(q) and head_dim <= MOST_HEAD_DIM_C:
        from kernels.cpu.launch import launch_decode_attention

        out = q.new_empty(rows, heads * head_dim) if out is None else out
        launch_decode_attention(
            q,
            keys,
            values,
            step,
            prefix_keys,
            prefix_values,
            prefix_lengths,
            row_prefix,
            scale,
            out,
        )
        return out
    mixed = reference_attention.decode_attention(
        q, keys, values, length, prefix_keys, prefix_values, prefix_lengths, row_prefix, scale
    )
    return mixed if out is None else out.copy_(mixed)


def _prefix_of_rows(tiles: Tensor, rows: int, most: int, prefixes: int) -> Tensor:
    """(T, 3) tiles -> (R,) int32, the prefix of each row; 0 for rows in none."""
    row_prefix = torch.zeros(rows, dtype=torch.int32)
    for first, count, index in tiles.tolist():
        if count > most:
            raise ValueError(f"tiles: wanted at most {most} rows a tile, got {count}")
        if not 0 <= index < prefixes:
            raise ValueError(f"tiles: wanted a prefix of 0 to {prefixes - 1}, got {index}")
        row_prefix[first : first + count] = index
    return row_prefix


def decode_attention_workspace(
    rows: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    prefix: int,
    suffix: int,
    *,
    device: torch.device | str,
) -> tuple[Tensor, Tensor]:
    """Room for the partial results of every split, to be allocated once a rollout.

    Args:
        rows, heads, kv_heads, head_dim: R, Hq, Hkv, hd.
        prefix, suffix: P and S, the capacities.
    Returns: partials (R * Hq * splits * hd,) and their log-sum-exp (R * Hq * splits,), fp32.
    """
    tokens = split_tokens(heads, kv_heads)
    count = rows * heads * (-(-prefix // tokens) + -(-suffix // tokens))
    return (
        torch.empty(count * head_dim, dtype=torch.float32, device=device),
        torch.empty(count, dtype=torch.float32, device=device),
    )


def _check(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    step: Tensor,
    prefix_keys: Tensor,
    prefix_values: Tensor,
    prefix_lengths: Tensor,
    tiles: Tensor,
) -> None:
    if q.ndim != 3 or q.shape[2] % 16 or q.dtype not in DTYPES:
        raise ValueError(
            "q: wanted (R, Hq, head_dim) bf16, fp16 or fp32, head_dim a multiple of 16, "
            f"got {tuple(q.shape)} {q.dtype}"
        )
    rows, heads, head_dim = q.shape
    check_tensor("q", q, q.shape, q)
    if keys.ndim != 4 or keys.shape[1] == 0 or heads % keys.shape[1]:
        raise ValueError(
            f"keys: wanted ({rows}, Hkv, S, {head_dim}) with {heads} a multiple of Hkv, "
            f"got {tuple(keys.shape)}"
        )
    kv_heads = keys.shape[1]
    for name, cached in (("keys", keys), ("values", values)):
        check_tensor(name, cached, (rows, kv_heads, keys.shape[2], head_dim), q)
    check_strides("values", values, keys)
    if prefix_keys.ndim != 4:
        raise ValueError(
            f"prefix_keys: wanted (U, {kv_heads}, P, {head_dim}), got {tuple(prefix_keys.shape)}"
        )
    prefixes, _, length, _ = prefix_keys.shape
    for name, cached in (("prefix_keys", prefix_keys), ("prefix_values", prefix_values)):
        check_tensor(name, cached, (prefixes, kv_heads, length, head_dim), q)
    check_strides("prefix_values", prefix_values, prefix_keys)
    check_index("step", step, (1,), q)
    check_index("prefix_lengths", prefix_lengths, (rows,), q)
    check_index("tiles", tiles, (len(tiles), 3), q)


def check_strides(name: str, values: Tensor, keys: Tensor) -> None:
    """Raise unless the values lie as the keys do: one set of strides serves both."""
    pairs = zip(values.shape, values.stride(), keys.stride(), strict=True)
    if any(size > 1 and ours != theirs for size, ours, theirs in pairs):
        raise ValueError(f"{name}: wanted the keys' strides {keys.stride()}, got {values.stride()}")


def _check_workspace(
    workspace: tuple[Tensor, Tensor], q: Tensor, kv_heads: int, prefix: int, suffix: int
) -> None:
    rows, heads, head_dim = q.shape
    needed = decode_attention_workspace(
        rows, heads, kv_heads, head_dim, prefix, suffix, device="meta"
    )
    for given, least in zip(workspace, needed, strict=True):
        wrong = given.dtype != torch.float32 or given.device != q.device
        if wrong or given.numel() < least.numel() or not given.is_contiguous():
            raise ValueError(
                f"workspace: wanted contiguous fp32 of {least.numel()} elements on {q.device}, "
                f"got {given.dtype} of {given.numel()} on {given.device}"
            )
