"""A linear layer for few rows, its weight laid out for the registers of this machine."""

import ctypes

import torch
from torch import Tensor

from kernels.cpu.build import loaded
from kernels.cpu.launch import launch_linear, launch_pack


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
        shape = -(-len(weight) // panel), weight.shape[1], panel
        self._panels = torch.empty(shape, dtype=weight.dtype)
        launch_pack(weight.detach().contiguous(), self._panels)
        self._bias = None if bias is None else bias.detach().float().contiguous()

    def into(self, out: Tensor, x: Tensor, *, gelu: bool = False) -> None:
        """Write the layer's output, or its exact GELU.

        Args:
            x: (R, K) fp32; last stride 1. A row's result does not depend on the other rows.
            out: (R, N) fp32; last stride 1.
        """
        launch_linear(x, self._panels, self._bias, out, gelu)
