"""Rotary positions, in Llama's half-split layout (RoFormer, arXiv:2104.09864)."""

import torch
from torch import Tensor
from transformers import JanusConfig

from engine.settings.errors import UserError


def rope_tables(config: JanusConfig, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rotary cosines and signed sines, each (length, head_dim) fp32.

    The sine's first half is negated, so that `x * cos + swap_halves(x) * sin` rotates.
    """
    text = config.text_config
    parameters = text.rope_parameters
    if parameters["rope_type"] != "default":
        raise UserError(f"config.json: rope_type {parameters['rope_type']!r} is not supported")
    head_dim = head_dimension(config)
    exponent = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    inverse = 1.0 / parameters["rope_theta"] ** exponent
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), inverse)
    return angles.cos().repeat(1, 2), torch.cat((-angles.sin(), angles.sin()), -1)


def half_tables(config: JanusConfig, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The same angles' cosines and sines, each (length, head_dim / 2) fp32, as kernels take them."""
    cos, signed_sin = rope_tables(config, length, device)
    half = cos.shape[1] // 2
    return cos[:, :half].contiguous(), signed_sin[:, half:].contiguous()


def head_dimension(config: JanusConfig) -> int:
    """Width of one attention head."""
    text = config.text_config
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary embedding to x (..., head_dim); cos and sin broadcast against it."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((x[..., half:], x[..., :half]), -1) * sin
