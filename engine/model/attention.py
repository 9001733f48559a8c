"""Causal attention of a training forward, by the backend that the user names."""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from engine.model.linear import wants_fp32
from engine.settings.errors import UserError

# (R, Hq, Q, head_dim), (R, Hkv, K, head_dim) twice -> (R, Hq, Q, head_dim): query i of Q sees keys
# 0 .. K - Q + i, so that the last query sees all. Hkv divides Hq.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
IMPLEMENTATIONS = ("sdpa", "flash_attention_2", "xformers")


@cache
def attention(name: str, device: torch.device, dtype: torch.dtype) -> Attend:
    """A backend, found to be there.

    Args: name: of IMPLEMENTATIONS, as transformers calls them.
    Raises: UserError in one line where it cannot be had for tensors of this kind.
    """
    if name == "sdpa":
        return _sdpa
    flag = f"--attn_implementation {name}"
    if device.type != "cuda":
        raise UserError(f"{flag}: runs on CUDA, the policy is on {device.type}; take sdpa")
    if name == "flash_attention_2" and dtype == torch.float32:
        raise UserError(f"{flag}: takes --dtype bfloat16 or float16, got float32")
    try:
        return _flash() if name == "flash_attention_2" else _xformers()
    except ImportError as error:  # flash-attn built for another torch fails so as well
        package = "flash-attn" if name == "flash_attention_2" else "xformers"
        reason = str(error).partition("\n")[0]
        raise UserError(f"{flag}: cannot load {package}: {reason}; take sdpa") from error


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if wants_fp32(q):
        return _sdpa(q.float(), k.float(), v.float()).to(q.dtype)
    grouped, square = q.shape[1] != k.shape[1], q.shape[2] == k.shape[2]
    mask = None if square else causal_lower_right(q.shape[2], k.shape[2])
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=square, enable_gqa=grouped
    )


def _flash() -> Attend:
    """FlashAttention-2 (arXiv:2307.08691); its causal mask is aligned at the lower right."""
    from flash_attn import flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        by_token = (x.transpose(1, 2) for x in (q, k, v))
        return flash_attn_func(*by_token, causal=True).transpose(1, 2)

    return attend


def _xformers() -> Attend:
    """xformers' memory-efficient attention, whose heads are not grouped: keys are expanded."""
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import LowerTriangularFromBottomRightMask

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        repeat = q.shape[1] // k.shape[1]
        if repeat > 1:
            k, v = (x.repeat_interleave(repeat, 1) for x in (k, v))
        by_token = (x.transpose(1, 2) for x in (q, k, v))
        mixed = memory_efficient_attention(
            *by_token, attn_bias=LowerTriangularFromBottomRightMask()
        )
        return mixed.transpose(1, 2)

    return attend
