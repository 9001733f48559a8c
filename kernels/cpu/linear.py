"""A linear layer for few rows, its weight laid out for the registers of this machine."""

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu.build import loaded
from kernels.cpu.launch import launch_linear


class PanelLinear:
    """x @ weight.T + bias in fp32 on the C kernel; needs `kernels.cpu.build.library()`.

    The weight is copied into panels of as many outputs as a tile of the kernel has, so that a
    product reads it from front to back. One of bf16 stays so: what a product of few rows takes is
    the reading of its weight.

    Args:
        weight: (N, K) fp32 or bf16.
        bias: (N,) of either, or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        panel = ctypes.c_int64.in_dll(loaded(), "linear_panel").value
        padded = F.pad(weight.detach(), (0, 0, 0, -len(weight) % panel))
        if weight.dtype == torch.bfloat16:
            halves = padded.view(-1, 2, panel // 2, weight.shape[1])
            self._panels = halves.permute(0, 3, 2, 1).contiguous()
        else:
            self._panels = padded.view(-1, panel, weight.shape[1]).mT.contiguous()
        self._bias = None if bias is None else bias.detach().float().contiguous()

    def into(self, out: Tensor, x: Tensor, *, gelu: bool = False) -> None:
        """Write the layer's output, or its exact GELU.

        Args:
            x: (R, K) fp32; last stride 1. A row's result does not depend on the other rows.
            out: (R, N) fp32; last stride 1.
        """
        launch_linear(x, self._panels, self._bias, out, gelu)
