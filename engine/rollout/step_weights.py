"""A policy's weights as a decode step takes them."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from engine.model.policy import Policy
from engine.rollout.packed_linear import packed
from kernels.cpu.linear import PanelLinear
from kernels.dispatch import use_c


@dataclass(frozen=True, slots=True)
class _Linear:
    weight: Tensor  # (in, out), a view of the parameter
    bias: Tensor | None

    def into(self, out: Tensor, x: Tensor, *, gelu: bool = False) -> None:
        if self.bias is None:
            torch.mm(x, self.weight, out=out)
        else:
            torch.addmm(self.bias, x, self.weight, out=out)
        if gelu:
            torch.ops.aten.gelu_(out)


@torch.no_grad()
def _linear(*modules: nn.Linear) -> _Linear | PanelLinear:
    weight, bias = packed(*modules)
    return PanelLinear(weight, bias) if use_c(weight) else _Linear(weight.t(), bias)


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer's; projections of the same input are one product."""

    norm1: Tensor
    qkv: _Linear | PanelLinear
    out: _Linear | PanelLinear
    norm2: Tensor
    gate_up: _Linear | PanelLinear
    down: _Linear | PanelLinear


class StepWeights:
    """The trunk's layers and one head.

    On CUDA they are the policy's own, read where they are; on a CPU with the C ops the linears are
    copies, laid out for it, of the weights as they are now.

    Args:
        policy: the policy.
        image: the image head and the image tokens' embeddings, else those of text.

    Attributes:
        layers: the layers.
        norm: weight of the last norm; eps: of every norm.
        features: the image head's first layer, which its GELU follows; None for text.
        last: the head's last layer; logits: the same as a product, made when first used.
        table: (V, D) embeddings of the tokens drawn.
    """

    def __init__(self, policy: Policy, *, image: bool) -> None:
        trunk = policy.model.language_model
        self.layers = [
            LayerWeights(
                layer.input_layernorm.weight,
                _linear(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
                _linear(layer.self_attn.o_proj),
                layer.post_attention_layernorm.weight,
                _linear(layer.mlp.gate_proj, layer.mlp.up_proj),
                _linear(layer.mlp.down_proj),
            )
            for layer in trunk.layers
        ]
        self.norm, self.eps = trunk.norm.weight, trunk.norm.eps
        self.features: _Linear | PanelLinear | None = None
        if image:
            head = policy.model.generation_head
            self.features, self.last = _linear(head.proj_out), head.vision_head
            self.table = policy.image_table()
        else:
            self.last, self.table = policy.lm_head, trunk.embed_tokens.weight

    @cached_property
    def logits(self) -> _Linear | PanelLinear:
        return _linear(self.last)
