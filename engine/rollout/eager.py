"""Decoding in eager PyTorch, all rows at once, over the static cache.

For CPUs where the C ops are not: weights that are not fp32, machines without a C compiler. All else
takes engine/rollout/decoder.py.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.model.layers import RMSNorm
from engine.model.policy import Policy
from engine.model.rope import rope_tables
from engine.rollout.packed_linear import BlockedLinear
from engine.rollout.prefill import KVCache, prefill_prompts, share
from engine.rollout.sampling import Decoded, Sampling, distinct_prompts
from kernels import cfg_sample
from kernels.philox import gumbel

NOISE_BLOCK = 1 << 16  # Gumbel variables drawn at a time: few enough to stay in cache


@torch.no_grad()
def decode_eager(
    policy: Policy, prompts: Sequence[Tensor], *, steps: int, sampling: Sampling
) -> Decoded:
    """Draw up to `steps` tokens for each of B prompts (L_i,).

    Raises: FloatingPointError naming row and step of the first bad logits.
    """
    distinct, owner, order = distinct_prompts(prompts)
    device, count, image = policy.device, len(prompts), sampling.image
    ids = sampling.sample_ids[order]
    lengths = torch.tensor([len(p) for p in distinct], device=device)[owner] - 1
    branches = 2 if image else 1  # rows: conditional, then unconditional
    keys, values = prefill_prompts(policy, distinct, image=image)
    own = len(distinct)
    prefixes = [share(keys[:, :own], values[:, :own], lengths, owner=owner)]
    if image:
        nobody = torch.zeros_like(owner)
        prefixes.append(share(keys[:, own:], values[:, own:], lengths, owner=nobody))
    cache = KVCache(policy, prefixes, steps)
    decoder = Decoder(policy, cache, lengths.repeat(branches), steps, image=image)
    config, trunk = policy.config, policy.model.language_model
    vocab = config.vq_config.num_embeddings if image else config.text_config.vocab_size
    table = policy.image_table() if image else trunk.embed_tokens.weight
    noise = _Noise(sampling.seed, ids, vocab, sampling.first_step, steps)
    tokens = torch.full((count, steps), policy.pad, device=device)
    logprobs = torch.zeros((2, count, steps), dtype=torch.float32, device=device)
    mask = torch.zeros((count, steps), dtype=torch.bool, device=device)
    alive = torch.ones(count, dtype=torch.bool, device=device)
    last = torch.stack([p[-1] for p in distinct])[owner]
    x = policy.embed_text(last).repeat(branches, 1)
    used = 0
    with torch.inference_mode():  # what it writes to was made outside
        while used < steps and alive.any():
            logits = decoder.logits(decoder.step(x, used))
            token, *drawn = cfg_sample(
                logits[:count],
                logits[count:] if image else None,
                cfg_weight=sampling.cfg_weight,
                temperature=sampling.temperature,
                seed=sampling.seed,
                sample_ids=ids,
                step=sampling.first_step + used,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                greedy=sampling.greedy,
                noise=None if sampling.greedy else noise.at(used),
            )
            tokens[:, used] = torch.where(alive, token, policy.pad)
            for kept, logprob in zip(logprobs, drawn, strict=True):
                kept[:, used] = torch.where(alive, logprob, 0)
            mask[:, used] = alive
            x = table[token].repeat(branches, 1)
            if not image:
                alive &= token != policy.eos
            used += 1
    _require_finite(logprobs.sum(0), order)
    return Decoded(tokens, *logprobs, mask).columns(used).rows(order.argsort())


class _Noise:
    """Gumbel noise for consecutive steps, drawn a few steps at a time."""

    def __init__(self, seed: int, sample_ids: Tensor, vocab: int, first: int, steps: int) -> None:
        self.seed, self.sample_ids, self.vocab = seed, sample_ids, vocab
        self.first, self.steps = first, steps
        self.ahead = max(1, NOISE_BLOCK // (len(sample_ids) * vocab))
        self.block: Tensor | None = None

    def at(self, step: int) -> Tensor:
        """(B, V) fp32 noise of a step; steps are asked for in order."""
        if step % self.ahead == 0:
            count = min(self.ahead, self.steps - step)
            steps = torch.arange(count, device=self.sample_ids.device) + self.first + step
            self.block = gumbel(self.seed, self.sample_ids, steps, self.vocab)
        return self.block[step % self.ahead]


def _require_finite(logprobs: Tensor, order: Tensor) -> None:
    """A NaN or all -inf row of logits shows as a non-finite log-prob; name its first place."""
    bad = (~logprobs.isfinite()).nonzero()
    if len(bad):
        row, step = bad[0].tolist()
        raise FloatingPointError(f"logits of row {int(order[row])} at step {step} are not finite")


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
