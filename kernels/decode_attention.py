"""Attention of one query a row over a prefix stored once for its group and a suffix of its own."""

import torch
from torch import Tensor

from kernels.dispatch import use_c, use_triton
from kernels.kv_append import DTYPES, check_index, check_tensor
from kernels.state import LayerCache
from kernels.tiling import split_tokens

MOST_HEAD_DIM_C = 256  # the C kernel's arrays of a head end there; PyTorch beyond


def decode_attention(
    q: Tensor,
    cache: LayerCache,
    *,
    scale: float,
    out: Tensor | None = None,
    workspace: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """softmax(scale * q @ k.T) @ v of each row over its prefix and its suffix tokens 0 .. step.

    The current token is in the cache already (kernels.kv_append). What lies in the cache beyond a
    row's tokens may be anything, NaN included; on CUDA, what no row of its tile attends.

    Args:
        q: (R, Hq, hd) bf16/fp16/fp32, hd even, on CUDA a multiple of 16; last stride 1.
        cache: of q's dtype; Hkv divides Hq. Not range-checked on CUDA: step, prefix_lengths. A
            tile of more than `tile_rows` rows gives NaN there.
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
        are padded in registers; the padding reads nothing. The PyTorch path rounds scores and
        sums to q's dtype, and its rounding may depend on the batch.
    Source: Hydragen, arXiv:2402.05099; Flash-Decoding (2023).
    """
    _check(q, cache)
    if not scale > 0:
        raise ValueError(f"scale: wanted > 0, got {scale}")
    rows, heads, head_dim = q.shape
    kv_heads, suffix, prefix = cache.keys.shape[1], cache.keys.shape[2], cache.prefix_keys.shape[2]
    check_tensor("out", out, (rows, heads * head_dim), q)
    if use_triton(q):
        from kernels.gpu.decode_attention import launch_decode_attention

        if workspace is None:
            workspace = decode_attention_workspace(
                rows, heads, kv_heads, head_dim, prefix, suffix, device=q.device
            )
        else:
            _check_workspace(workspace, q, kv_heads, prefix, suffix)
        out = q.new_empty(rows, heads * head_dim) if out is None else out
        launch_decode_attention(q, cache, scale, out, workspace)
        return out
    length = int(cache.step) + 1
    if not 0 < length <= suffix:
        raise ValueError(f"step: wanted 0 to {suffix - 1}, got {length - 1}")
    given = int(cache.prefix_lengths.max()) if rows else 0
    if given > prefix:
        raise ValueError(f"prefix_lengths: wanted at most {prefix}, got {given}")
    named = cache.row_prefix[cache.prefix_lengths > 0]
    if len(named) and not (0 <= int(named.min()) and int(named.max()) < len(cache.prefix_keys)):
        raise ValueError(
            f"row_prefix: wanted 0 to {len(cache.prefix_keys) - 1}, got {named.tolist()}"
        )
    if use_c(q) and head_dim % 16 == 0 and head_dim <= MOST_HEAD_DIM_C:
        from kernels.cpu.launch import launch_decode_attention as launch_in_c

        out = q.new_empty(rows, heads * head_dim) if out is None else out
        launch_in_c(q, cache, scale, out)
        return out
    mixed = _eager(q, cache, length, scale)
    return mixed if out is None else out.copy_(mixed)


def _eager(q: Tensor, cache: LayerCache, length: int, scale: float) -> Tensor:
    """The same in PyTorch: a product for the suffixes, and one for each run of rows with a prefix."""
    rows, heads, head_dim = q.shape
    kv_heads = cache.keys.shape[1]
    grouped = q.view(rows, kv_heads, heads // kv_heads, head_dim)
    keys, values = cache.keys[:, :, :length], cache.values[:, :, :length]
    longest = int(cache.prefix_lengths.max()) if rows else 0
    scores = q.new_full((*grouped.shape[:3], longest + length), -torch.inf, dtype=torch.float32)
    # Keys on the left: one query on the left takes up to 2.8 times as long on a CPU.
    scores[..., longest:] = (keys @ grouped.mT).mT
    runs = _runs(cache)
    for some, index, shared in runs:
        asking = grouped[some].transpose(0, 1).flatten(1, 2)  # (Hkv, rows of the run * repeat, hd)
        found = asking @ cache.prefix_keys[index, :, :shared].mT
        scores[some, ..., :shared] = found.unflatten(1, (-1, grouped.shape[2])).transpose(0, 1)
    probs = (scores * scale).softmax(-1).to(q.dtype)
    mixed = probs[..., longest:] @ values
    for some, index, shared in runs:
        weights = probs[some, ..., :shared].transpose(0, 1).flatten(1, 2)
        part = weights @ cache.prefix_values[index, :, :shared]
        mixed[some] += part.unflatten(1, (-1, grouped.shape[2])).transpose(0, 1)
    return mixed.reshape(rows, heads * head_dim)


def _runs(cache: LayerCache) -> list[tuple[slice, int, int]]:
    """Runs of rows that attend the same of one prefix: the rows, the prefix, how much of it.

    Rows that attend less are a run of their own: beyond their tokens a NaN times 0 would be NaN.
    """
    asked = torch.stack((cache.row_prefix, cache.prefix_lengths))
    asked, counts = asked.unique_consecutive(return_counts=True, dim=1)
    runs, first = [], 0
    for (index, shared), count in zip(asked.T.tolist(), counts.tolist(), strict=True):
        if shared:
            runs.append((slice(first, first + count), index, shared))
        first += count
    return runs


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


def _check(q: Tensor, cache: LayerCache) -> None:
    multiple = 16 if use_triton(q) else 2
    if q.ndim != 3 or q.shape[2] % multiple or q.dtype not in DTYPES:
        raise ValueError(
            f"q: wanted (R, Hq, head_dim) bf16, fp16 or fp32, head_dim a multiple of {multiple}, "
            f"got {tuple(q.shape)} {q.dtype}"
        )
    rows, heads, head_dim = q.shape
    keys, values = cache.keys, cache.values
    prefix_keys, prefix_values = cache.prefix_keys, cache.prefix_values
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
    check_index("step", cache.step, (1,), q)
    check_index("prefix_lengths", cache.prefix_lengths, (rows,), q)
    check_index("row_prefix", cache.row_prefix, (rows,), q)
    check_index("tiles", cache.tiles, (len(cache.tiles), 3), q)


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
