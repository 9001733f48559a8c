"""One decode step on a CPU, all rows at once, over the static cache.

CUDA takes engine/static_step.py.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kv_cache import KVCache
from engine.layers import RMSNorm
from engine.packed_linear import BlockedLinear
from engine.policy import Policy
from engine.rope import rope_tables


class Decoder:
    """Decodes rows of the policy one token at a time.

    Args:
        policy: the policy, with the weights that all steps will have: they are copied.
        cache: a filled KVCache.
        positions: (R,) int64 position of each row's first suffix token.
        steps: most tokens that will be decoded.
        image: whether they are image tokens.
    """

    def __init__(
        self, policy: Policy, cache: KVCache, positions: Tensor, steps: int, *, image: bool
    ) -> None:
        trunk = policy.model.language_model
        self.policy, self.cache, self.positions = policy, cache, positions
        self.norm: RMSNorm = trunk.norm
        linear = partial(BlockedLinear, rows=len(positions))
        self.layers = [
            (
                layer.input_layernorm,
                linear(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
                linear(layer.self_attn.o_proj),
                layer.post_attention_layernorm,
                linear(layer.mlp.gate_proj, layer.mlp.up_proj),
                linear(layer.mlp.down_proj),
            )
            for layer in trunk.layers
        ]
        image_head = policy.model.generation_head
        head = [image_head.proj_out, image_head.vision_head] if image else [policy.lm_head]
        self.head = [linear(module) for module in head]
        heads, kv_heads, head_dim = cache.heads, cache.kv_heads, cache.head_dim
        cos, sin = rope_tables(policy.config, int(positions.max()) + steps, positions.device)
        # Queries and keys are rotated together, and values come along unchanged; the queries'
        # share of the tables carries the attention scale.
        scale = torch.ones(heads + kv_heads, 1, device=cos.device)
        scale[:heads] = head_dim**-0.5
        half, count = head_dim // 2, len(positions)
        turned = (cos[:, None] * scale).view(len(cos), -1, 2, half)
        self.cos = torch.cat((turned, torch.ones_like(turned[:, :kv_heads])), 1)
        self.sin = (sin[:, None, half:] * scale).to(policy.dtype)
        self.rotated = torch.empty(
            (count, heads + 2 * kv_heads, 2, half), dtype=policy.dtype, device=cos.device
        )
        self.low, self.high = self.rotated[:, : heads + kv_heads].unbind(2)
        whole = self.rotated.flatten(2)
        self.q = whole[:, :heads]
        self.keys_values = whole[:, heads:].unflatten(1, (2, kv_heads))

    @torch.no_grad()
    def step(self, x: Tensor, slot: int) -> Tensor:
        """Feed the token at suffix position `slot`.

        Args:
            x: (R, D) its embeddings.
        Returns: (R, D) final-norm hidden states, which predict the next token.
        """
        cache, rotated = self.cache, self.rotated
        cache.begin(slot)
        at = self.positions + slot
        cos, sin = self.cos[at], self.sin[at]  # (R, Hq + 2 Hkv, 2, hd / 2), (R, Hq + Hkv, hd / 2)
        for index, (norm1, qkv_proj, o_proj, norm2, up_proj, down_proj) in enumerate(self.layers):
            qkv = qkv_proj(_normed(x, norm1)).view(rotated.shape)
            torch.mul(qkv, cos, out=rotated)
            low, high = qkv[:, : self.low.shape[1]].unbind(2)
            self.low.addcmul_(high, sin, value=-1)
            self.high.addcmul_(low, sin)
            cache.append(index, self.keys_values)
            x = o_proj(cache.attend(index, self.q)).add_(x)
            gate, up = up_proj(_normed(x, norm2)).chunk(2, -1)
            # silu(gate) * up; faster than F.silu.
            x = down_proj(gate.sigmoid().mul_(gate).mul_(up)).add_(x)
        return _normed(x, self.norm)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """(R, D) -> (R, codebook or vocabulary)."""
        *first, last = self.head
        for linear in first:
            hidden = F.gelu(linear(hidden))
        return last(hidden)


def _normed(x: Tensor, norm: RMSNorm) -> Tensor:
    """norm(x); torch's own takes seven passes over x, this three."""
    if x.dtype != torch.float32:
        return norm(x)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = length.square_().mul_(1 / x.shape[-1]).add_(norm.eps).rsqrt_()
    return (x * scale).mul_(norm.weight)
