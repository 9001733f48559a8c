"""The ops of a decoder layer as plain maths in PyTorch: the oracle for their kernels.

Each computes in fp32, or in fp64 when given fp64, and rounds where Llama rounds.
"""

import torch.nn.functional as F
from torch import Tensor

from kernels.reference import as_float


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x (R, D), weight (D,) -> (normalised x + residual, x + residual), both x's dtype."""
    total = x if residual is None else x + residual
    wide = as_float(total)
    normed = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()
    return weight * normed.to(x.dtype), total


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up (R, 2F) -> silu(first half) * second half, (R, F)."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(as_float(gate)).to(gate.dtype) * up
