"""The trunk's modules, named as in transformers' Llama; training forward and prefill use them."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import JanusConfig

from engine.model.attention import attention
from engine.model.linear import Linear
from engine.model.rope import head_dimension, rotate
from engine.model.token_tree import TokenTree


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv:1910.07467), computed in fp32, or fp64 when given it."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype in (torch.float32, torch.float64):
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return self.weight * F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with rotary positions; MHA or GQA."""

    def __init__(self, config: JanusConfig) -> None:
        super().__init__()
        text = config.text_config
        self.head_dim = head_dimension(config)
        self.heads, self.kv_heads = text.num_attention_heads, text.num_key_value_heads
        bias = text.attention_bias
        self.q_proj = Linear(text.hidden_size, self.heads * self.head_dim, bias=bias)
        self.k_proj = Linear(text.hidden_size, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = Linear(text.hidden_size, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = Linear(self.heads * self.head_dim, text.hidden_size, bias=bias)
        self.implementation = "sdpa"  # see engine.model.attention

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, tree: TokenTree | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, D) -> output (B, T, D) and this layer's k, v (B, Hkv, T, head_dim).

        With a tree, x is (1, N, D), its tokens; cos and sin are always those of x's tokens.
        """
        batch, length, _ = x.shape
        q = rotate(self._by_head(self.q_proj(x)), cos, sin).to(x.dtype)
        k, v = self.keys_values(x, cos, sin)
        attend = attention(self.implementation, x.device, x.dtype)
        if tree is None:
            mixed = attend(q, k, v).transpose(1, 2)
        else:
            by_token = [y[0].transpose(0, 1) for y in (q, k, v)]
            mixed = tree.attend(by_token[0], by_token[1], by_token[2], attend)
        return self.o_proj(mixed.reshape(batch, length, -1)), k, v

    def keys_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, D) -> k, v (B, Hkv, T, head_dim), k rotated."""
        k = rotate(self._by_head(self.k_proj(x)), cos, sin).to(x.dtype)
        return k, self._by_head(self.v_proj(x))

    def _by_head(self, x: Tensor) -> Tensor:
        """(B, T, H * head_dim) -> (B, H, T, head_dim)."""
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)


class MLP(nn.Module):
    """SwiGLU feed-forward (arXiv:2002.05202)."""

    def __init__(self, width: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = Linear(width, hidden, bias=bias)
        self.up_proj = Linear(width, hidden, bias=bias)
        self.down_proj = Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, config: JanusConfig) -> None:
        super().__init__()
        text = config.text_config
        self.self_attn = Attention(config)
        self.mlp = MLP(text.hidden_size, text.intermediate_size, text.mlp_bias)
        self.input_layernorm = RMSNorm(text.hidden_size, text.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(text.hidden_size, text.rms_norm_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, tree: TokenTree | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        mixed, k, v = self.self_attn(self.input_layernorm(x), cos, sin, tree)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), k, v

    def output(self, x: Tensor, cos: Tensor, sin: Tensor, tree: TokenTree | None = None) -> Tensor:
        """`forward` without keys and values."""
        return self(x, cos, sin, tree)[0]


class LanguageModel(nn.Module):
    """The trunk: token embedding, layers, final norm."""

    def __init__(self, config: JanusConfig) -> None:
        super().__init__()
        text = config.text_config
        self.embed_tokens = nn.Embedding(text.vocab_size, text.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(text.num_hidden_layers))
        self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps)
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, tree: TokenTree | None = None) -> Tensor:
        """Embeddings (B, T, D) -> what the last norm gives, (B, T, D); see Attention for the rest.

        With `gradient_checkpointing` the backward pass keeps each layer's input alone and runs the
        layer again (arXiv:1604.06174). Not the last: its turn comes before anything was freed.
        """
        *earlier, last = self.decoder_layers()
        for layer in earlier:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer.output, x, cos, sin, tree, use_reentrant=False)
            else:
                x = layer.output(x, cos, sin, tree)
        return self.norm(last.output(x, cos, sin, tree))

    def decoder_layers(self) -> Iterator[Layer]:
        """The layers in order."""
        for layer in self.layers:
            assert isinstance(layer, Layer)
            yield layer

    def keys_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each layer's k, v (B, Hkv, T, head_dim) of embeddings x (B, T, D); k is rotated."""
        *earlier, last = self.decoder_layers()
        for layer in earlier:
            x, k, v = layer(x, cos, sin)
            yield k, v
        # Nobody reads the last one's output.
        yield last.self_attn.keys_values(last.input_layernorm(x), cos, sin)
