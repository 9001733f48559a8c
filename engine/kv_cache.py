"""Static key/value cache: prompt prefixes stored once for their group, private suffixes a row.

A row's context is a prefix (its prompt but for the last token) followed by its own suffix (that
last token and what is generated after it). Prefixes are read-only after prefill and shared:
rows with the same prompt share one, and all unconditional rows share [BOS, pad, pad, ...], of
which each uses as much as its own prompt's length. A prefix of one row lies in front of that row's
suffix, so that both are one matrix. Nothing is allocated after construction.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.policy import Policy
from engine.rope import head_dimension, rope_tables

PREFILL_TOKENS = 512  # prefilled together: few enough for their activations to stay in cache


@dataclass(slots=True)
class Prefixes:
    """The prefixes of consecutive rows: one for every `size` rows.

    Attributes:
        size: rows that share a prefix.
        keys, values: (layers, groups, Hkv, P, head_dim).
        bias: (groups, 1, size, 1, P) fp32, 0 where a row's own prefix reaches, -inf beyond; None
            when every row's reaches P.
    """

    size: int
    keys: Tensor
    values: Tensor
    bias: Tensor | None

    @property
    def rows(self) -> int:
        return self.keys.shape[1] * self.size


@torch.no_grad()
def prefill(policy: Policy, prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values of prompts, each from position 0.

    Args:
        prompts: U tensors (L_i,) int64; shorter ones are right-padded, which a causal model
            cannot see.
    Returns: keys, values (layers, U, Hkv, max L_i, head_dim); positions past L_i are junk.
    """
    ids = nn.utils.rnn.pad_sequence(list(prompts), batch_first=True)
    count, width = ids.shape
    trunk = policy.model.language_model
    text = policy.config.text_config
    cos, sin = rope_tables(policy.config, width, ids.device)
    shape = (len(trunk.layers), count, text.num_key_value_heads, width)
    keys = torch.empty(
        (*shape, head_dimension(policy.config)), dtype=policy.dtype, device=policy.device
    )
    values = torch.empty_like(keys)
    together = max(1, PREFILL_TOKENS // max(1, width)) if policy.device.type == "cpu" else count
    for start in range(0, count, together):
        rows = slice(start, start + together)
        x = policy.embed_text(ids[rows])
        for index, layer in enumerate(trunk.layers):
            if index + 1 < len(trunk.layers):
                x, k, v = layer(x, cos, sin)
            else:  # nobody reads the last layer's output
                k, v = layer.self_attn.keys_values(layer.input_layernorm(x), cos, sin)
            keys[index, rows], values[index, rows] = k, v
    return keys, values


def share(keys: Tensor, values: Tensor, lengths: Tensor, *, owner: Tensor) -> Prefixes:
    """Prefixes for consecutive rows from prefilled prompts.

    Args:
        keys, values: (layers, U, Hkv, P, head_dim).
        lengths: (R,) how much of its prefix each row uses.
        owner: (R,) int64, ascending: the prompt of each row.
    Rows share a stored prefix where every prompt has the same number of rows; otherwise each
    row gets a copy of its own.
    """
    counts = torch.bincount(owner)
    counts = counts[counts > 0]
    size = int(counts[0])
    if bool((counts != size).any()):
        size = 1
    index = owner[::size]
    if len(index) != keys.shape[1]:
        keys, values = keys.index_select(1, index), values.index_select(1, index)
    width = keys.shape[3]
    bias = None
    if bool((lengths < width).any()):
        beyond = torch.arange(width, device=lengths.device) >= lengths[:, None]
        bias = torch.zeros_like(beyond, dtype=torch.float32).masked_fill_(beyond, -torch.inf)
        bias = bias.view(len(index), 1, size, 1, width)
    return Prefixes(size, keys, values, bias)


class _Block:
    """The keys and values of consecutive rows, whose prefixes are shared alike.

    A (row, key/value head) pair is one matrix of a batched product.
    """

    def __init__(self, first: int, prefixes: Prefixes, suffix_length: int) -> None:
        layers, self.groups, self.kv_heads, self.width, self.head_dim = prefixes.keys.shape
        self.size, self.bias = prefixes.size, prefixes.bias
        self.rows = slice(first, first + prefixes.rows)
        self.shared = prefixes.size > 1
        # Where the suffix begins in the rows' own storage.
        self.start = 0 if self.shared else self.width
        matrices, capacity = prefixes.rows * self.kv_heads, self.start + suffix_length
        like = prefixes.keys
        self.keys, self.values = like.new_empty(
            (2, layers, matrices, capacity, self.head_dim)
        ).unbind()
        if self.shared:
            self.prefix_keys = prefixes.keys.flatten(1, 2)  # (layers, groups * Hkv, P, hd)
            self.prefix_values = prefixes.values.flatten(1, 2)
        else:
            self.keys[:, :, : self.width] = prefixes.keys.flatten(1, 2)
            self.values[:, :, : self.width] = prefixes.values.flatten(1, 2)

    def append(self, layer: int, slot: int, keys: Tensor, values: Tensor) -> None:
        """Store suffix position `slot`: (R, Hkv, head_dim) each, of all the cache's rows."""
        at = self.start + slot
        self.keys[layer, :, at].view(-1, *keys.shape[1:]).copy_(keys[self.rows])
        self.values[layer, :, at].view(-1, *values.shape[1:]).copy_(values[self.rows])

    def attend(self, layer: int, q: Tensor, length: int, out: Tensor, buffers: "_Buffers") -> None:
        """The block's part of KVCache.attend.

        Args:
            q, out: (rows * Hkv, repeat, head_dim), contiguous.
        """
        own, total = self.start + length, self.width + length
        keys, values = self.keys[layer, :, :own].transpose(1, 2), self.values[layer, :, :own]
        scores = buffers.scores((*q.shape[:2], total))
        if not self.shared and scores.dtype == q.dtype:
            torch.bmm(q, keys, out=scores)
        else:
            # Not bmm(out=slice): it allocates where the output is not contiguous.
            scores[..., total - own :] = torch.bmm(
                q, keys, out=buffers.products((*q.shape[:2], own))
            )
        if self.shared:
            prefix_keys = self.prefix_keys[layer].transpose(1, 2)
            grouped = self._batched(q)
            partial = buffers.products((*grouped.shape[:2], self.width))
            prefix_scores = self._by_group(scores)[..., : self.width]
            prefix_scores.copy_(
                torch.bmm(grouped, prefix_keys, out=partial).view(prefix_scores.shape)
            )
        if self.bias is not None:
            prefix_scores = self._by_group(scores)[..., : self.width]
            prefix_scores += self.bias
        probs = buffers.softmax(scores)
        torch.bmm(probs[..., total - own :], values, out=out)
        if self.shared:
            grouped = self._batched(probs[..., : self.width])
            partial = buffers.products((*grouped.shape[:2], self.head_dim))
            target = self._by_group(out)
            target += torch.bmm(grouped, self.prefix_values[layer], out=partial).view(target.shape)

    def _by_group(self, x: Tensor) -> Tensor:
        """(rows * Hkv, repeat, W) -> (groups, Hkv, size, repeat, W), a view."""
        return x.view(self.groups, self.size, self.kv_heads, *x.shape[1:]).transpose(1, 2)

    def _batched(self, x: Tensor) -> Tensor:
        """(rows * Hkv, repeat, W) -> (groups * Hkv, size * repeat, W); a view where it can be."""
        return self._by_group(x).reshape(self.groups * self.kv_heads, -1, x.shape[-1])


class _Buffers:
    """Memory for one layer's attention, used again by the next.

    A step uses as much of the front of a buffer as its length takes, so that what it uses is
    contiguous at every length.
    """

    def __init__(self, like: Tensor, count: int) -> None:
        self._products = like.new_empty(count)
        self._scores = like.new_empty(count, dtype=torch.float32)
        self._probs = torch.empty_like(self._scores)
        self._rounded = None if like.dtype == torch.float32 else like.new_empty(count)

    def products(self, shape: Sequence[int]) -> Tensor:
        """For matrix products, of the cache's dtype."""
        return _front(self._products, shape)

    def scores(self, shape: Sequence[int]) -> Tensor:
        """For attention scores, fp32."""
        return _front(self._scores, shape)

    def softmax(self, scores: Tensor) -> Tensor:
        """Softmax over the last dimension, in fp32, rounded to the cache's dtype."""
        probs = torch.softmax(scores, -1, out=_front(self._probs, scores.shape))
        if self._rounded is None:
            return probs
        return _front(self._rounded, scores.shape).copy_(probs)


def _front(buffer: Tensor, shape: Sequence[int]) -> Tensor:
    return buffer[: math.prod(shape)].view(shape)


class KVCache:
    """Keys and values of R decoding rows.

    Args:
        policy: gives the shapes.
        prefixes: cover rows 0 .. R - 1 in order.
        suffix_length: most suffix tokens a row will hold.
    """

    def __init__(self, policy: Policy, prefixes: Sequence[Prefixes], suffix_length: int) -> None:
        text = policy.config.text_config
        self.heads, self.kv_heads = text.num_attention_heads, text.num_key_value_heads
        self.head_dim = head_dimension(policy.config)
        self.blocks: list[_Block] = []
        self.rows = 0
        for part in prefixes:
            self.blocks.append(_Block(self.rows, part, suffix_length))
            self.rows += part.rows
        like = prefixes[0].keys
        # Matrix products give head_dim columns a query too, however short the context.
        longest = max(max(p.keys.shape[3] for p in prefixes) + suffix_length, self.head_dim)
        self._buffers = _Buffers(like, max(p.rows for p in prefixes) * self.heads * longest)
        queries = (self.rows * self.kv_heads, self.heads // self.kv_heads, self.head_dim)
        self._queries, self._mixed = like.new_empty(queries), like.new_empty(queries)

    def append(self, layer: int, slot: int, keys: Tensor, values: Tensor) -> None:
        """Store the keys and values of suffix position `slot`: (R, Hkv, head_dim) each."""
        for block in self.blocks:
            block.append(layer, slot, keys, values)

    def attend(self, layer: int, q: Tensor, length: int) -> Tensor:
        """Attention of one query a row over its prefix and its first `length` suffix tokens.

        Args:
            q: (R, Hq, head_dim), rotated and scaled by head_dim ** -0.5.
        Returns: (R, Hq * head_dim), overwritten by the next call.
        """
        self._queries.view(q.shape).copy_(q)
        for block in self.blocks:
            matrices = slice(block.rows.start * self.kv_heads, block.rows.stop * self.kv_heads)
            block.attend(
                layer, self._queries[matrices], length, self._mixed[matrices], self._buffers
            )
        return self._mixed.view(self.rows, -1)
