"""Rotary embedding and the append to the cache in one pass over the packed projections."""

import torch
from torch import Tensor

from kernels.dispatch import use_c, use_triton
from kernels.reference import attention as reference_attention
from kernels.state import LayerCache

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kv_append(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache: LayerCache,
    *,
    heads: int,
    out: Tensor | None = None,
) -> Tensor:
    """Rotate q and k of each row's current token; write k and v into slot `step` of the cache.

    A row's token stands at position first_positions + step. Column j of a head's first half
    rotates with column j of its second half, as in Llama.

    Args:
        qkv: (R, (Hq + 2 Hkv) * hd) bf16/fp16/fp32: queries, keys, values; last stride 1.
        cos, sin: (T, hd / 2) fp32, contiguous.
        cache: its keys and values, of qkv's dtype, are written in place; neither `step` nor the
            position it gives is range-checked on CUDA.
        heads: Hq.
        out: (R, Hq, hd) to write the queries into; last stride 1.
    Returns: the rotated queries, (R, Hq, hd), not scaled.
    Raises: ValueError naming the argument.
    Numerics: fp32, rounded once. Traffic: read qkv and one row of angles; write as much.
    Source: RoFormer, arXiv:2104.09864.
    """
    _check(qkv, cos, sin, cache, heads)
    keys, values = cache.keys, cache.values
    shape = (len(qkv), heads, keys.shape[3])
    check_tensor("out", out, shape, qkv)
    if use_triton(qkv):
        from kernels.gpu.kv_append import launch_kv_append

        out = qkv.new_empty(shape) if out is None else out
        launch_kv_append(qkv, cos, sin, cache, heads, out)
        return out
    slot = int(cache.step)
    if not 0 <= slot < keys.shape[2]:
        raise ValueError(f"step: wanted 0 to {keys.shape[2] - 1}, got {slot}")
    if use_c(qkv) and shape[2] % 16 == 0 and keys.stride() == values.stride():
        from kernels.cpu.launch import launch_kv_append as launch_in_c

        out = qkv.new_empty(shape) if out is None else out
        launch_in_c(qkv, cos, sin, cache, heads, out)
        return out
    angles = cache.first_positions + slot
    q, k, v = reference_attention.rotated(qkv, cos[angles], sin[angles], heads, keys.shape[1])
    keys[:, :, slot], values[:, :, slot] = k, v
    return q if out is None else out.copy_(q)


def _check(qkv: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache, heads: int) -> None:
    keys, values = cache.keys, cache.values
    multiple = 16 if use_triton(qkv) else 2
    if keys.ndim != 4 or keys.shape[3] % multiple:
        raise ValueError(
            f"keys: wanted (R, Hkv, S, head_dim), head_dim a multiple of {multiple}, got "
            f"{tuple(keys.shape)}"
        )
    rows, kv_heads, _, head_dim = keys.shape
    check_tensor("keys", keys, keys.shape, qkv)
    check_tensor("values", values, keys.shape, qkv)
    if qkv.dtype not in DTYPES:
        raise ValueError(f"qkv: wanted bf16, fp16 or fp32, got {qkv.dtype}")
    check_tensor("qkv", qkv, (rows, (heads + 2 * kv_heads) * head_dim), qkv)
    for name, table in (("cos", cos), ("sin", sin)):
        check_tensor(name, table, (len(cos), head_dim // 2), qkv, torch.float32, contiguous=True)
    check_index("first_positions", cache.first_positions, (rows,), qkv)
    check_index("step", cache.step, (1,), qkv)


def check_tensor(
    name: str,
    tensor: Tensor | None,
    shape: tuple[int, ...],
    like: Tensor,
    dtype: torch.dtype | None = None,
    contiguous: bool = False,
) -> None:
    """Raise unless `tensor` is None or has the shape, like's dtype and device, and last stride 1."""
    if tensor is None:
        return
    dtype = like.dtype if dtype is None else dtype
    if (tensor.shape, tensor.dtype, tensor.device) != (tuple(shape), dtype, like.device):
        raise ValueError(
            f"{name}: wanted {tuple(shape)} {dtype} on {like.device}, "
            f"got {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
        )
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{name}: wanted a contiguous tensor, got strides {tensor.stride()}")
    if tensor.numel() and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{name}: wanted a last stride of 1, got strides {tensor.stride()}")


def check_index(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """Raise unless `tensor` is contiguous int32 of the shape on like's device."""
    check_tensor(name, tensor, shape, like, torch.int32, contiguous=True)
