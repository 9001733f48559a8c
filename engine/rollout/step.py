"""One decode step as a fixed sequence of launches over static buffers.

A step feeds every row's current token through all layers and the head, draws the next tokens,
writes them and their log-probs into their column, gathers their embeddings as the next input and
advances the step counter. All that varies during a rollout lives in device tensors, so that a step
captured once as a CUDA graph can be replayed for all others.
"""

import torch
from torch import Tensor

from engine.model.generator import Generator, TrunkShape
from engine.rollout.prefill import Prepared
from engine.rollout.request import Prompts, Request
from kernels.decode_attention import MOST_HEAD_DIM_C, decode_attention, decode_attention_workspace
from kernels.dispatch import C_WEIGHTS, use_c
from kernels.head_sample import head_sample, head_workspace
from kernels.kv_append import kv_append
from kernels.sample_step import sample_step, sample_workspace
from kernels.state import LayerCache, StepState
from kernels.tiling import prefix_tiles, tile_rows


class DecodeStep:
    """Buffers and launches of one rollout: B conditional rows, under guidance B more.

    Args:
        prepared: weights and prefixes.
        prompts: the rows', among those of `prepared`.
        request: what to draw.
        fused_head: the head's last layer runs in the sampling kernel: its logits stay fp32 and
            never reach memory. False, and whenever top-k or top-p is on: a GEMM, then sample_step.

    Attributes:
        state: tokens, log-probs, errors: see kernels.state.
        in_c: every launch is one of the C ops, so that a CPU can record them.
    """

    def __init__(
        self, prepared: Prepared, prompts: Prompts, request: Request, *, fused_head: bool
    ) -> None:
        generator, weights = prepared.generator, prepared.weights
        self.weights, self.draw, self.shape = weights, request.draw, generator.shape
        self.fused_head = fused_head and request.draw.all_tokens
        self.in_c = (
            request.draw.all_tokens
            and not fused_head
            and weights.all_in_c
            and generator.position_table() is None
            and _has_c_ops(weights.head.weight, self.shape)
        )
        device, last = prompts.owner.device, [p[-1:] for p in prompts.distinct]
        lengths = torch.tensor([len(p) - 1 for p in prompts.distinct], device=device)
        first, row_prefix, row_lengths = [], [prompts.owner], lengths[prompts.owner]
        first.append(torch.cat(last)[prompts.owner])
        if request.guided:
            blank = torch.cat([generator.unconditional(p)[-1:] for p in prompts.distinct])
            first.append(blank[prompts.owner])
            row_prefix.append(torch.full_like(prompts.owner, len(prompts.distinct)))
            row_lengths = row_lengths.repeat(2)
        self.first_positions = row_lengths.to(torch.int32)
        self.position_table = generator.position_table()
        width = prepared.keys.shape[3]
        self.cos, self.sin = generator.rotations(width + request.steps)
        self._allocate(generator, prompts, request, width)
        self.caches = self._caches(prepared, torch.cat(row_prefix))
        self.state.x.copy_(generator.embed_text(torch.cat(first)))

    def _allocate(
        self, generator: Generator, prompts: Prompts, request: Request, prefix: int
    ) -> None:
        shape, head, device = self.shape, self.weights.head, prompts.owner.device
        count, steps = len(prompts.owner), request.steps
        rows = count * request.branches
        inner = max(layer.inner for layer in self.weights.layers)

        def buffer(*size: int) -> Tensor:
            return torch.empty(size, dtype=self.weights.dtype, device=device)

        x, self.residual, self.normed, self.delta = (buffer(rows, shape.width) for _ in range(4))
        self.qkv = buffer(rows, (shape.heads + 2 * shape.kv_heads) * shape.head_dim)
        self.q = buffer(rows, shape.heads, shape.head_dim)
        self.mixed = buffer(rows, shape.heads * shape.head_dim)
        self.wide, self.activated = buffer(rows, 2 * inner), buffer(rows, inner)
        # A tensor a layer: no allocator has to find room for all of them in one piece.
        self.suffix = [
            buffer(2, rows, shape.kv_heads, steps, shape.head_dim) for _ in range(shape.layers)
        ]
        self.partials = decode_attention_workspace(
            rows,
            shape.heads,
            shape.kv_heads,
            shape.head_dim,
            prefix,
            steps,
            device=device,
        )
        self.features = self.normed
        if self.weights.inner is not None:
            self.features = buffer(rows, head.weight.shape[1])
        if self.fused_head:
            scratch = head_workspace(self.features[:count], head.weight)
        else:
            self.logits = buffer(rows, len(head.weight))
            scratch = sample_workspace(count, len(head.weight), device)
        alive = None
        if head.eos is not None:
            alive = torch.ones(count, dtype=torch.bool, device=device)
        self.state = StepState(
            step=torch.zeros(1, dtype=torch.int32, device=device),
            sample_ids=request.sample_ids,
            table=head.table.detach(),
            x=x,
            # What is never reached counts as ended.
            tokens=torch.full((count, steps), generator.pad, dtype=torch.int64, device=device),
            logprobs=torch.zeros((count, steps), dtype=torch.float32, device=device),
            guided_logprobs=torch.zeros((count, steps), dtype=torch.float32, device=device),
            error=torch.zeros(1, dtype=torch.int64, device=device),
            eos=head.eos,
            alive=alive,
            pad=generator.pad,
            workspace=scratch,
        )

    def _caches(self, prepared: Prepared, row_prefix: Tensor) -> list[LayerCache]:
        tiles = prefix_tiles(row_prefix, tile_rows(self.shape.heads, self.shape.kv_heads))
        row_prefix = row_prefix.to(torch.int32)
        return [
            LayerCache(
                step=self.state.step,
                first_positions=self.first_positions,
                keys=keys,
                values=values,
                prefix_keys=prefix_keys.to(keys.dtype),
                prefix_values=prefix_values.to(keys.dtype),
                prefix_lengths=self.first_positions,  # a prefix ends where the suffix begins
                tiles=tiles,
                row_prefix=row_prefix,
            )
            for (keys, values), prefix_keys, prefix_values in zip(
                self.suffix, prepared.keys, prepared.values, strict=True
            )
        ]

    @torch.no_grad()
    def launch(self) -> None:
        """Launch one decode step: at most 10 kernels a layer and 6 more."""
        shape, x = self.shape, self.state.x
        if self.position_table is not None:
            positions = self.first_positions + self.state.step
            x += self.position_table.index_select(0, positions)
        for index, (layer, cache) in enumerate(zip(self.weights.layers, self.caches, strict=True)):
            if index == 0:
                layer.norm1.into(self.normed, x)
            else:
                layer.norm1.add_into(self.normed, self.residual, self.delta, self.residual)
            layer.qkv.into(self.qkv, self.normed)
            kv_append(self.qkv, self.cos, self.sin, cache, heads=shape.heads, out=self.q)
            decode_attention(
                self.q,
                cache,
                scale=shape.head_dim**-0.5,
                out=self.mixed,
                workspace=self.partials,
            )
            layer.out.into(self.delta, self.mixed)
            before = x if index == 0 else self.residual
            layer.norm2.add_into(self.normed, self.residual, self.delta, before)
            layer.feed_forward(self.delta, self.normed, self.wide, self.activated)
        self.weights.norm.add_into(self.normed, self.residual, self.delta, self.residual)
        self._draw()

    def _draw(self) -> None:
        """The head, the draw, the next input and the step counter."""
        head, inputs, count = self.weights.head, self.features, len(self.state.tokens)
        if self.weights.inner is not None:
            self.weights.inner.into(inputs, self.normed, gelu=True)
        if not self.fused_head:
            self.weights.logits.into(self.logits, inputs)
            inputs = self.logits
        cond, uncond = inputs[:count], inputs[count:] if len(inputs) > count else None
        if self.fused_head:
            head_sample(cond, uncond, head.weight, head.bias, self.draw, self.state)
        else:
            sample_step(cond, uncond, self.draw, self.state)


def _has_c_ops(weight: Tensor, shape: TrunkShape) -> bool:
    """Whether the C ops take weights like this and heads of this size, here and now."""
    return (
        use_c(weight, C_WEIGHTS) and not shape.head_dim % 16 and shape.head_dim <= MOST_HEAD_DIM_C
    )
