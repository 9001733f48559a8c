"""Where a model's weights are: what a decode step needs of each layer, whoever holds it.

`OwnWeights` is the only reader of the layers' projections by name. What merges an adapter
(engine/model/adapter.py), or gathers weights from other ranks, is another `WeightSource`; the
rollout asks no more than this.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from engine.model.layers import LanguageModel, RMSNorm
from engine.model.linear import Linear


@dataclass(frozen=True, slots=True)
class LinearWeights:
    """A linear layer: weight (N, K), bias (N,) or None."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class NormWeights:
    """A norm over the last dimension: root-mean-square, or with `layer` LayerNorm.

    Attributes:
        weight: (D,); bias: (D,) or None, of a LayerNorm.
        eps: added to the mean square.
    """

    weight: Tensor
    eps: float
    bias: Tensor | None = None
    kind: Literal["rms", "layer"] = "rms"


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One pre-norm decoder layer; projections of the same input lie side by side.

    Attributes:
        qkv: D to (Hq + 2 Hkv) * head_dim: queries, keys, values.
        up: D to twice the inner width for SwiGLU, gate first; to once it for an exact GELU.
    """

    norm1: NormWeights
    qkv: LinearWeights
    out: LinearWeights
    norm2: NormWeights
    up: LinearWeights
    down: LinearWeights
    activation: Literal["swiglu", "gelu"] = "swiglu"

    @property
    def nbytes(self) -> int:
        """Bytes of the linear layers."""
        linears = (self.qkv, self.out, self.up, self.down)
        biases = [linear.bias for linear in linears if linear.bias is not None]
        return sum(w.nbytes for w in (*(linear.weight for linear in linears), *biases))


class WeightSource(Protocol):
    """The trunk's weights as they are now. A rollout asks for all of them at its beginning.

    One that has a method `release()` is told when the rollout is over.
    """

    @property
    def version(self) -> int:
        """Another number after every change of the weights."""
        ...

    def layers(self) -> Iterator[LayerWeights]:
        """The layers in order."""
        ...

    def norm(self) -> NormWeights:
        """The last norm."""
        ...


class OwnWeights:
    """A trunk's own parameters, read where they are.

    Raises: TypeError naming a projection that is no plain linear layer (an adapter's wrapper, say),
        whose weight alone is not what the model computes.
    """

    def __init__(self, trunk: LanguageModel) -> None:
        self._trunk = trunk

    @property
    def version(self) -> int:
        """The number of writes so far, over all parameters."""
        return sum(p._version for p in self._trunk.parameters())

    def layers(self) -> Iterator[LayerWeights]:
        for index, layer in enumerate(self._trunk.decoder_layers()):
            attention, mlp, where = layer.self_attn, layer.mlp, f"layers.{index}"
            yield LayerWeights(
                norm1=_norm(layer.input_layernorm),
                qkv=self._joined(where, attention.q_proj, attention.k_proj, attention.v_proj),
                out=self._joined(where, attention.o_proj),
                norm2=_norm(layer.post_attention_layernorm),
                up=self._joined(where, mlp.gate_proj, mlp.up_proj),
                down=self._joined(where, mlp.down_proj),
            )

    def norm(self) -> NormWeights:
        return _norm(self._trunk.norm)

    def _joined(self, where: str, *linears: nn.Linear) -> LinearWeights:
        return packed(where, *linears)


def _norm(module: RMSNorm) -> NormWeights:
    return NormWeights(module.weight, module.eps)


@torch.no_grad()
def packed(where: str, *linears: nn.Linear) -> LinearWeights:
    """The linears' weights (and biases) as one tensor, without a copy.

    The first call lays the parameters side by side in one storage and makes each a view of it;
    optimizer steps and loads write through, so later calls only look.

    Raises: TypeError, see OwnWeights.
    """
    for linear in linears:
        if type(linear) not in (nn.Linear, Linear) or linear.weight.numel() == 0:
            raise TypeError(
                f"{where}: wanted plain linear layers that hold their weights, got "
                f"{type(linear).__name__} of {tuple(linear.weight.shape)}; such weights need a "
                "WeightSource of their own"
            )
    bias = None if linears[0].bias is None else _side_by_side([m.bias for m in linears])
    return LinearWeights(_side_by_side([m.weight for m in linears]), bias)


def _side_by_side(parameters: list[Tensor]) -> Tensor:
    first = parameters[0]
    storage, offset = first.untyped_storage().data_ptr(), first.storage_offset()
    for p in parameters:
        adjacent = p.untyped_storage().data_ptr() == storage and p.storage_offset() == offset
        if not (adjacent and p.is_contiguous()):
            break
        offset += p.numel()
    else:
        rows = sum(len(p) for p in parameters)
        return first.detach().as_strided((rows, *first.shape[1:]), first.stride())
    joined = torch.cat([p.detach() for p in parameters])
    for p, view in zip(parameters, joined.split([len(p) for p in parameters]), strict=True):
        p.data = view
    return joined
