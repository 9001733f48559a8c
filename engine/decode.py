"""One decode step on a CPU, all rows at once, over the static cache, with packed projections.

CUDA takes engine/static_step.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.kv_cache import KVCache
from engine.layers import RMSNorm
from engine.policy import Policy
from engine.rope import rope_tables

FEW_ROWS = 48


def packed(*linears: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """The linears' weights (and biases) as one tensor, without a copy.

    The first call lays the parameters side by side in one storage and makes each a view of it;
    optimizer steps and loads write through, so later calls only look.
    """
    return _side_by_side([m.weight for m in linears]), (
        None if linears[0].bias is None else _side_by_side([m.bias for m in linears])
    )


def _side_by_side(parameters: list[nn.Parameter]) -> Tensor:
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


class Decoder:
    """Decodes rows of the policy one token at a time.

    Args:
        policy: the policy; its weights are read, never copied.
        cache: a filled KVCache.
        positions: (R,) int64 position of each row's first suffix token.
        steps: most tokens that will be decoded.
    """

    def __init__(self, policy: Policy, cache: KVCache, positions: Tensor, steps: int) -> None:
        trunk = policy.model.language_model
        self.policy, self.cache, self.positions = policy, cache, positions
        self.norm: RMSNorm = trunk.norm
        self.layers = [
            (
                layer.input_layernorm,
                *packed(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
                layer.self_attn.o_proj,
                layer.post_attention_layernorm,
                *packed(layer.mlp.gate_proj, layer.mlp.up_proj),
                layer.mlp.down_proj,
            )
            for layer in trunk.layers
        ]
        heads, kv_heads, head_dim = cache.heads, cache.kv_heads, cache.head_dim
        self.split = heads * head_dim, kv_heads * head_dim
        cos, sin = rope_tables(policy.config, int(positions.max()) + steps, positions.device)
        # Queries and keys are rotated together; the queries' share of the tables carries the
        # attention scale.
        scale = torch.ones(heads + kv_heads, 1, device=cos.device)
        scale[:heads] = head_dim**-0.5
        half = head_dim // 2
        self.cos = (cos[:, None] * scale).view(len(cos), -1, 2, half)
        self.sin = (sin[:, None, half:] * scale).to(policy.dtype)
        self.rotated = torch.empty(
            (len(positions), heads + kv_heads, 2, half), dtype=policy.dtype, device=cos.device
        )

    @torch.no_grad()
    def step(self, x: Tensor, slot: int) -> Tensor:
        """Feed the token at suffix position `slot`.

        Args:
            x: (R, D) its embeddings.
        Returns: (R, D) final-norm hidden states, which predict the next token.
        """
        cache, (q_width, kv_width) = self.cache, self.split
        at = self.positions + slot
        cos, sin = self.cos[at], self.sin[at]  # (R, Hq + Hkv, 2, hd / 2), (R, Hq + Hkv, hd / 2)
        rotated = self.rotated
        low, high = rotated.unbind(2)
        q, k = rotated.flatten(2).split([cache.heads, cache.kv_heads], 1)
        for index, (norm1, w_qkv, b_qkv, o_proj, norm2, w_up, b_up, down) in enumerate(self.layers):
            qkv = _linear(_normed(x, norm1), w_qkv, b_qkv)
            qk, v = qkv.split([q_width + kv_width, kv_width], 1)
            qk = qk.view(rotated.shape)
            torch.mul(qk, cos, out=rotated)
            low.addcmul_(qk[:, :, 1], sin, value=-1)
            high.addcmul_(qk[:, :, 0], sin)
            cache.append(index, slot, k, v.view(k.shape))
            mixed = cache.attend(index, q, slot + 1)
            x = _add_linear(x, mixed, o_proj)
            gate, up = _linear(_normed(x, norm2), w_up, b_up).chunk(2, -1)
            # silu(gate) * up; faster than F.silu.
            x = _add_linear(x, gate.sigmoid().mul_(gate).mul_(up), down)
        return _normed(x, self.norm)

    @torch.no_grad()
    def image_logits(self, hidden: Tensor) -> Tensor:
        """(R, D) -> (R, codebook)."""
        head = self.policy.model.generation_head
        features = F.gelu(_linear(hidden, head.proj_out.weight, head.proj_out.bias))
        return _linear(features, head.vision_head.weight, head.vision_head.bias)

    @torch.no_grad()
    def text_logits(self, hidden: Tensor) -> Tensor:
        """(R, D) -> (R, vocabulary)."""
        return _linear(hidden, self.policy.lm_head.weight, None)


def _normed(x: Tensor, norm: RMSNorm) -> Tensor:
    """norm(x); torch's own takes seven passes over x, this three."""
    if x.dtype != torch.float32:
        return norm(x)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = length.square_().mul_(1 / x.shape[-1]).add_(norm.eps).rsqrt_()
    return (x * scale).mul_(norm.weight)


def _few(x: Tensor) -> bool:
    """Whether to multiply as weight @ x.T: for few rows CPU libraries are up to twice as fast."""
    return len(x) <= FEW_ROWS


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (R, K) @ weight.T + bias."""
    if not _few(x):
        return F.linear(x, weight, bias)
    if bias is None:
        return torch.mm(weight, x.t()).t()
    return torch.addmm(bias[:, None], weight, x.t()).t()


def _add_linear(x: Tensor, y: Tensor, linear: nn.Linear) -> Tensor:
    """x + linear(y), the sum folded into the matrix product."""
    if linear.bias is not None:
        x = x + linear.bias
    if _few(x):
        return torch.addmm(x.t(), linear.weight, y.t()).t().contiguous()
    return torch.addmm(x, y, linear.weight.t())
