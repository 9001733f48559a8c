"""Linear layers, also on CPUs that have no instruction for 16-bit products."""

import threading
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


@cache
def _cpu_multiplies(dtype: torch.dtype) -> bool:
    supported = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }
    name = supported.get(dtype)
    return name is None or bool(getattr(torch.ops.mkldnn, name)())


def wants_fp32(x: Tensor) -> bool:
    """Whether products of such tensors are better made in fp32 and rounded.

    On a CPU without bf16 or fp16 products PyTorch's take five times as long as fp32's (AVX2: 10
    against 55 GFLOP/s on one core).
    """
    return x.device.type == "cpu" and not _cpu_multiplies(x.dtype)


class Linear(nn.Linear):
    """nn.Linear, which on such a CPU reads and writes 16 bits and multiplies in fp32.

    One rounding at the end, as a GPU's tensor cores do.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not wants_fp32(x):
            return F.linear(x, self.weight, self.bias)
        return _WideLinear.apply(x, self.weight, self.bias)


_buffers = threading.local()  # .weight, .gradient: flat fp32 memory, as large as ever needed


def _buffer(name: str, shape: torch.Size) -> Tensor:
    """fp32 memory for the time of one product.

    Kept: memory of this size comes fresh from the system every time, and the system fills its
    pages more slowly than the product needs them.
    """
    kept = getattr(_buffers, name, None)
    if kept is None or kept.numel() < shape.numel():
        with torch.inference_mode(False):  # else it could not be written outside of one
            kept = torch.empty(shape.numel())
        setattr(_buffers, name, kept)
    return kept[: shape.numel()].view(shape)


def _widened(weight: Tensor) -> Tensor:
    return _buffer("weight", weight.shape).copy_(weight)


class _WideLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # A frozen weight, as beside an adapter, has no gradient that would take x.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        wide = None if bias is None else bias.float()
        return F.linear(x.float(), _widened(weight), wide).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.float().flatten(0, -2)
        found: list[Tensor | None] = [None, None, None]
        if ctx.needs_input_grad[0]:
            product = (rows @ _widened(weight)).to(grad.dtype)
            found[0] = product.view(*grad.shape[:-1], weight.shape[1])
        if ctx.needs_input_grad[1]:
            product = _buffer("gradient", weight.shape)
            torch.mm(rows.T, x.flatten(0, -2).float(), out=product)
            found[1] = product.to(weight.dtype)
        if ctx.needs_input_grad[2]:
            found[2] = rows.sum(0).to(grad.dtype)
        return tuple(found)
