"""Which implementation an op takes: Triton for CUDA tensors, PyTorch for the rest."""

import os

from torch import Tensor


def use_triton(x: Tensor) -> bool:
    """CUDA tensors take the Triton kernel. TRITON_INTERPRET=1 (tests) takes it on CPU as well."""
    return x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
