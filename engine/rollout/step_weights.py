"""A model's weights as the launches of a decode step: whatever source they come from."""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.model.head import Head
from engine.model.weight_source import LayerWeights, LinearWeights, NormWeights, WeightSource
from kernels.cpu.linear import PanelLinear
from kernels.dispatch import C_WEIGHTS, use_c
from kernels.rms_norm import rms_norm
from kernels.swiglu import swiglu


@dataclass(frozen=True, slots=True)
class _Linear:
    weight: Tensor  # (in, out), a view of the source's
    bias: Tensor | None

    def into(self, out: Tensor, x: Tensor, *, gelu: bool = False) -> None:
        if self.bias is None:
            torch.mm(x, self.weight, out=out)
        else:
            torch.addmm(self.bias, x, self.weight, out=out)
        if gelu:
            torch.ops.aten.gelu_(out)


def _linear(weights: LinearWeights) -> _Linear | PanelLinear:
    if use_c(weights.weight, C_WEIGHTS):
        return PanelLinear(weights.weight, weights.bias)
    return _Linear(weights.weight.detach().t(), weights.bias)


@dataclass(frozen=True, slots=True)
class _RMSNorm:
    weight: Tensor
    eps: float
    in_c = True  # where the C ops are

    def into(self, out: Tensor, x: Tensor) -> None:
        """out = norm(x)."""
        rms_norm(x, self.weight, self.eps, out=out)

    def add_into(self, out: Tensor, total: Tensor, delta: Tensor, residual: Tensor) -> None:
        """total = residual + delta; out = norm(total)."""
        rms_norm(delta, self.weight, self.eps, residual=residual, out=out, residual_out=total)


@dataclass(frozen=True, slots=True)
class _LayerNorm:
    weight: Tensor
    bias: Tensor | None
    eps: float
    in_c = False

    def into(self, out: Tensor, x: Tensor) -> None:
        out.copy_(F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps))

    def add_into(self, out: Tensor, total: Tensor, delta: Tensor, residual: Tensor) -> None:
        torch.add(residual, delta, out=total)
        self.into(out, total)


def _norm(weights: NormWeights, dtype: torch.dtype) -> _RMSNorm | _LayerNorm:
    weight = weights.weight.detach().to(dtype)
    if weights.kind == "rms":
        return _RMSNorm(weight, weights.eps)
    bias = None if weights.bias is None else weights.bias.detach().to(dtype)
    return _LayerNorm(weight, bias, weights.eps)


class StepLayer:
    """One layer's launches; projections of the same input are one product.

    Attributes:
        inner: width between the feed-forward's products.
        gated: SwiGLU between them, else GELU.
    """

    def __init__(self, weights: LayerWeights, dtype: torch.dtype) -> None:
        self.norm1, self.norm2 = _norm(weights.norm1, dtype), _norm(weights.norm2, dtype)
        self.qkv, self.out = _linear(weights.qkv), _linear(weights.out)
        self.up, self.down = _linear(weights.up), _linear(weights.down)
        self.gated = weights.activation == "swiglu"
        self.inner = weights.down.weight.shape[1]

    def feed_forward(self, out: Tensor, x: Tensor, wide: Tensor, activated: Tensor) -> None:
        """out = down(activation(up(x))); wide and activated are what lies between.

        Args:
            wide: (R, 2 * inner), not used without a gate; activated: (R, inner).
        """
        if self.gated:
            self.up.into(wide, x)
            swiglu(wide, out=activated)
        else:
            self.up.into(activated, x, gelu=True)
        self.down.into(out, activated)


class StepWeights:
    """The trunk's layers and one head, as they are now.

    On CUDA the linears are the source's tensors, read where they are; on a CPU with the C ops they
    are copies, laid out for it, of the same dtype.

    Args:
        source: of the trunk's weights.
        head: of the tokens drawn.

    Attributes:
        version: the source's, when it was read.
        dtype: what a step computes in: the weights', but fp32 with the C ops.
        trunk_bytes: of the trunk's weights.
        layers, norm: the trunk's.
        inner: the head's inner layer, which its GELU follows; None without one.
        head: the head; logits: its last layer as a product, made when first used.
    """

    @torch.no_grad()
    def __init__(self, source: WeightSource, head: Head) -> None:
        self.version = source.version
        self.dtype = torch.float32 if use_c(head.weight, C_WEIGHTS) else head.weight.dtype
        self.layers, self.trunk_bytes = [], 0
        for layer in source.layers():
            self.layers.append(StepLayer(layer, self.dtype))
            self.trunk_bytes += layer.nbytes
        self.norm, self.head = _norm(source.norm(), self.dtype), head
        self.inner: _Linear | PanelLinear | None = None
        if head.inner is not None:
            self.inner = _linear(LinearWeights(head.inner.weight, head.inner.bias))

    @cached_property
    def logits(self) -> _Linear | PanelLinear:
        with torch.no_grad():
            return _linear(LinearWeights(self.head.weight, self.head.bias))

    @property
    def all_in_c(self) -> bool:
        """Whether every launch is a C op, where there are C ops."""
        norms = [self.norm, *(norm for layer in self.layers for norm in (layer.norm1, layer.norm2))]
        return all(norm.in_c for norm in norms)
