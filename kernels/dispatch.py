"""Which implementation an op takes: Triton on CUDA, C on a CPU where it can be, PyTorch elsewhere."""

import os
from collections.abc import Sequence

import torch
from torch import Tensor


def use_triton(x: Tensor) -> bool:
    """CUDA tensors take the Triton kernel. TRITON_INTERPRET=1 (tests) takes it on CPU as well."""
    return x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


C_WEIGHTS = (torch.float32, torch.bfloat16)  # what the C kernels read; they compute in fp32


def use_c(x: Tensor, dtypes: Sequence[torch.dtype] = (torch.float32,)) -> bool:
    """CPU tensors take the C kernel while gradients are off; see kernels.cpu.build.

    Plain ones: FakeTensor and other subclasses have no memory to point to. Never what takes Triton.

    Args: dtypes: those that the kernel takes; C_WEIGHTS where x is a weight or a table.
    """
    if use_triton(x):
        return False
    plain = type(x) in (Tensor, torch.nn.Parameter) and x.layout == torch.strided
    if not plain or x.device.type != "cpu" or x.dtype not in dtypes or torch.is_grad_enabled():
        return False
    from kernels.cpu.build import library

    return library() is not None
