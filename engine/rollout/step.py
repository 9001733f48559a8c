"""One decode step as a fixed sequence of launches over static buffers.

A step feeds every row's current token through all layers and the head, draws the next tokens,
writes them and their log-probs into their column, gathers their embeddings as the next input and
advances the step counter. All that varies during a rollout lives in device tensors, so that a step
captured once as a CUDA graph can be replayed for all others.
"""

from typing import Any

import torch
from torch import Tensor

from engine.model.policy import Policy
from engine.model.rope import head_dimension, rope_tables
from engine.rollout.sampling import Sampling
from engine.rollout.step_weights import StepWeights
from kernels.decode_attention import MOST_HEAD_DIM_C, decode_attention, decode_attention_workspace
from kernels.dispatch import use_c
from kernels.head_sample import head_sample, head_workspace
from kernels.kv_append import kv_append
from kernels.rms_norm import rms_norm
from kernels.sample_step import sample_step, sample_workspace
from kernels.swiglu import swiglu
from kernels.tiling import prefix_tiles, tile_rows


def has_c_ops(policy: Policy) -> bool:
    """Whether the C ops can decode this policy, here and now."""
    head_dim = head_dimension(policy.config)
    return use_c(policy.lm_head.weight) and not head_dim % 16 and head_dim <= MOST_HEAD_DIM_C


class StaticStep:
    """Buffers and launches of one rollout.

    Args:
        policy: the policy.
        weights: its weights, for what is drawn.
        row_prefix: (R,) int64, the prefix of each row: B conditional rows, then for images B
            unconditional ones.
        lengths: (R,) how much of its prefix each row uses.
        prefix_keys, prefix_values: (layers, U, Hkv, P, head_dim).
        last: (B,) int64 text ids, the first tokens to be fed.
        steps: tokens to draw, at most.
        sampling: how.
        fused_head: the head's last layer runs in the sampling kernel: its logits stay fp32 and
            never reach memory. False, and whenever top-k or top-p is on: a GEMM, then sample_step.

    Attributes:
        tokens: (B, steps) int64; logprobs, guided_logprobs: (B, steps) fp32.
        alive: (B,) bool, text rows that have not ended; None for images.
        error: (1,) int64, see kernels.sample_step.
        in_c: every launch is one of the C ops, so that a CPU can record them.
    """

    def __init__(
        self,
        policy: Policy,
        weights: StepWeights,
        row_prefix: Tensor,
        lengths: Tensor,
        prefix_keys: Tensor,
        prefix_values: Tensor,
        last: Tensor,
        *,
        steps: int,
        sampling: Sampling,
        fused_head: bool,
    ) -> None:
        self.policy, self.weights = policy, weights
        self.sampling, self.steps = sampling, steps
        all_tokens = sampling.top_k == 0 and sampling.top_p == 1.0
        self.fused_head = fused_head and all_tokens
        self.in_c = all_tokens and not fused_head and has_c_ops(policy)
        text = policy.config.text_config
        self.heads, self.kv_heads = text.num_attention_heads, text.num_key_value_heads
        self.head_dim = head_dimension(policy.config)
        self.first_positions = lengths.to(torch.int32)
        self.tiles = prefix_tiles(row_prefix, tile_rows(self.heads, self.kv_heads))
        longest = prefix_keys.shape[3]
        cos, signed_sin = rope_tables(policy.config, longest + steps, policy.device)
        half = self.head_dim // 2
        self.cos, self.sin = cos[:, :half].contiguous(), signed_sin[:, half:].contiguous()
        self._allocate(len(lengths), len(last), longest)
        self.prefixes = list(zip(prefix_keys, prefix_values, strict=True))
        self.x.copy_(policy.embed_text(last).repeat(len(lengths) // len(last), 1))

    def _allocate(self, rows: int, count: int, prefix: int) -> None:
        policy, text = self.policy, self.policy.config.text_config
        device, head_dim, steps = policy.device, self.head_dim, self.steps

        def buffer(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=policy.dtype, device=device)

        self.x, self.residual, self.normed, self.delta = (
            buffer(rows, text.hidden_size) for _ in range(4)
        )
        self.qkv = buffer(rows, (self.heads + 2 * self.kv_heads) * head_dim)
        self.q = buffer(rows, self.heads, head_dim)
        self.mixed = buffer(rows, self.heads * head_dim)
        self.gate_up = buffer(rows, 2 * text.intermediate_size)
        self.activated = buffer(rows, text.intermediate_size)
        self.suffix = buffer(text.num_hidden_layers, 2, rows, self.kv_heads, steps, head_dim)
        self.partials = decode_attention_workspace(
            rows, self.heads, self.kv_heads, head_dim, prefix, steps, device=device
        )
        self.step = torch.zeros(1, dtype=torch.int32, device=device)
        self.error = torch.zeros(1, dtype=torch.int64, device=device)
        # What is never reached counts as ended.
        self.tokens = torch.full((count, steps), policy.pad, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros((count, steps), dtype=torch.float32, device=device)
        self.guided_logprobs = torch.zeros_like(self.logprobs)
        self.alive = None
        if not self.sampling.image:
            self.alive = torch.ones(count, dtype=torch.bool, device=device)
        self.features, last = self.normed, self.weights.last
        if self.sampling.image:
            self.features = buffer(rows, last.in_features)
        if self.fused_head:
            self.scratch = head_workspace(self.features[:count], last.weight)
        else:
            self.logits = buffer(rows, last.out_features)
            self.scratch = sample_workspace(count, last.out_features, device)

    @torch.no_grad()
    def launch(self) -> None:
        """Launch one decode step: at most 10 kernels a layer and 6 more."""
        for index, layer in enumerate(self.weights.layers):
            keys, values = self.suffix[index]
            if index == 0:
                rms_norm(self.x, layer.norm1, self.weights.eps, out=self.normed)
            else:
                self._add_norm(self.residual, layer.norm1)
            layer.qkv.into(self.qkv, self.normed)
            kv_append(
                self.qkv,
                self.cos,
                self.sin,
                self.first_positions,
                self.step,
                keys,
                values,
                heads=self.heads,
                out=self.q,
            )
            decode_attention(
                self.q,
                keys,
                values,
                self.step,
                *self.prefixes[index],
                self.first_positions,  # a prefix ends where the suffix begins
                self.tiles,
                scale=self.head_dim**-0.5,
                out=self.mixed,
                workspace=self.partials,
            )
            layer.out.into(self.delta, self.mixed)
            self._add_norm(self.x if index == 0 else self.residual, layer.norm2)
            layer.gate_up.into(self.gate_up, self.normed)
            swiglu(self.gate_up, out=self.activated)
            layer.down.into(self.delta, self.activated)
        self._add_norm(self.residual, self.weights.norm)
        self._draw()

    def _add_norm(self, residual: Tensor, weight: Tensor) -> None:
        """self.residual = residual + self.delta; self.normed = its norm."""
        rms_norm(
            self.delta,
            weight,
            self.weights.eps,
            residual=residual,
            out=self.normed,
            residual_out=self.residual,
        )

    def _draw(self) -> None:
        """The head, the draw, the next input and the step counter."""
        sampling, weights, inputs = self.sampling, self.weights, self.features
        if weights.features is not None:
            weights.features.into(inputs, self.normed, gelu=True)
        if not self.fused_head:
            weights.logits.into(self.logits, inputs)
            inputs = self.logits
        cond, uncond = inputs.split(len(self.tokens)) if sampling.image else (inputs, None)
        draw: dict[str, Any] = {
            "cfg_weight": sampling.cfg_weight,
            "temperature": sampling.temperature,
            "seed": sampling.seed,
            "sample_ids": sampling.sample_ids,
            "step": self.step,
            "step_offset": sampling.first_step,
            "greedy": sampling.greedy,
            "table": weights.table,
            "x": self.x,
            "tokens": self.tokens,
            "logprobs": self.logprobs,
            "guided_logprobs": self.guided_logprobs,
            "error": self.error,
            "eos": None if sampling.image else self.policy.eos,
            "alive": self.alive,
            "pad": self.policy.pad,
            "workspace": self.scratch,
        }
        if self.fused_head:
            head_sample(cond, uncond, weights.last.weight, weights.last.bias, **draw)
        else:
            sample_step(cond, uncond, top_k=sampling.top_k, top_p=sampling.top_p, **draw)
