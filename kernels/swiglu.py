"""The gated activation of a decoder layer's feed-forward."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import use_c, use_triton
from kernels.rms_norm import DTYPES, check_like


def swiglu(gate_up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """silu(first half) * second half of each row.

    Args:
        gate_up: (R, 2F) bf16/fp16/fp32; last stride 1.
        out: (R, F) to write into; must not overlap gate_up.
    Returns: (R, F), gate_up's dtype. Not differentiable by its kernels: for decoding.
    Raises: ValueError naming the argument.
    Numerics: fp32; silu is rounded to the dtype before the product, as a Llama MLP does, so that
        decoding and training round alike. Traffic: read gate_up, write R * F.
    Source: SwiGLU, arXiv:2002.05202.
    """
    if gate_up.ndim != 2 or gate_up.shape[1] % 2 or gate_up.dtype not in DTYPES:
        raise ValueError(
            "gate_up: wanted (R, 2F) bf16, fp16 or fp32, "
            f"got {tuple(gate_up.shape)} {gate_up.dtype}"
        )
    check_like("gate_up", gate_up, gate_up)
    gate, up = gate_up.chunk(2, -1)
    check_like("out", out, gate)
    if use_triton(gate_up) or use_c(gate_up):
        if use_triton(gate_up):
            from kernels.gpu.swiglu import launch_swiglu
        else:
            from kernels.cpu.launch import launch_swiglu

        out = gate_up.new_empty(gate.shape) if out is None else out
        launch_swiglu(gate_up, out)
        return out
    if out is None:
        return F.silu(gate).mul_(up)
    return torch.mul(F.silu(gate), up, out=out)
