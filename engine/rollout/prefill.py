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
from transformers import JanusConfig

from engine.model.policy import Policy
from engine.model.rope import head_dimension, rope_tables

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


def kv_bytes(model: JanusConfig, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values, of all layers, in one row."""
    text = model.text_config
    values = text.num_hidden_layers * text.num_key_value_heads * head_dimension(model)
    return 2 * values * dtype.itemsize


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


def prefill_prompts(
    policy: Policy, distinct: Sequence[Tensor], *, image: bool
) -> tuple[Tensor, Tensor]:
    """Keys and values of what rows share: the prompts but for their last token.

    Args:
        distinct: U tensors (L_i,) int64.
        image: then the unconditional prompt comes after the U, as long as the longest of them:
            every unconditional prefix is a head of it.
    Returns: see `prefill`.
    """
    prefixes = [p[:-1] for p in distinct]
    if image:
        prefixes.append(policy.unconditional(max(distinct, key=len))[:-1])
    return prefill(policy, prefixes)


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

    A (row, key/value head) pair is one matrix of a batched product. The views that a step needs
    are made by `begin` for all layers at once: making them layer by layer costs more than some of
    the arithmetic.
    """

    def __init__(
        self, first: int, prefixes: Prefixes, suffix_length: int, q: Tensor, out: Tensor
    ) -> None:
        """Args: q, out: (R * Hkv, repeat, head_dim) of the whole cache, in use from step to step."""
        layers, self.groups, self.kv_heads, self.width, head_dim = prefixes.keys.shape
        self.size, self.bias = prefixes.size, prefixes.bias
        self.rows = slice(first, first + prefixes.rows)
        matrices = slice(first * self.kv_heads, self.rows.stop * self.kv_heads)
        self.q, self.out = q[matrices], out[matrices]
        self.shared = prefixes.size > 1
        # Where the suffix begins in the rows' own storage.
        self.start = 0 if self.shared else self.width
        own = (layers, 2, len(self.q), self.start + suffix_length, head_dim)
        self.keys_values = prefixes.keys.new_empty(own)
        keys, values = prefixes.keys.flatten(1, 2), prefixes.values.flatten(1, 2)
        if self.shared:  # (layers, groups * Hkv, P, hd)
            self.prefix_keys, self.prefix_values = keys.mT.unbind(), values.unbind()
        else:
            self.keys_values[:, 0, :, : self.width] = keys
            self.keys_values[:, 1, :, : self.width] = values

    def begin(self, slot: int, buffers: "_Buffers") -> None:
        """Make suffix position `slot` the last."""
        own = self.start + slot + 1
        total = self.width + slot + 1
        filled = self.keys_values[..., :own, :]
        last = filled[..., own - 1, :].unflatten(2, (-1, self.kv_heads))
        self.last = last.unbind()  # a layer: (2, rows, Hkv, hd)
        self.keys, self.values = filled[:, 0].mT.unbind(), filled[:, 1].unbind()
        matrices, repeat, head_dim = self.q.shape
        self.scores, self.probs = buffers.scores((matrices, repeat, total))
        self.own_scores = self.scores[..., total - own :]
        self.own_probs = self.probs[..., total - own :]
        # Not bmm(out=slice): it allocates where the output is not contiguous.
        direct = own == total and self.scores.dtype == self.q.dtype
        self.own_products = None if direct else buffers.products((matrices, repeat, own))
        self.prefix_scores = self._by_group(self.scores)[..., : self.width]
        if self.shared:
            batch, queries = self.groups * self.kv_heads, self.size * repeat
            self.prefix_products = buffers.products((batch, queries, self.width))
            self.prefix_mixed = buffers.products((batch, queries, head_dim))
            self.prefix_probs = self._by_group(self.probs)[..., : self.width]

    def append(self, layer: int, keys_values: Tensor) -> None:
        """Store the last position: (R, 2, Hkv, head_dim), of all the cache's rows."""
        self.last[layer].copy_(keys_values[self.rows].transpose(0, 1))

    def attend(self, layer: int, buffers: "_Buffers") -> None:
        """From q to out. The prefix's part of shared ones is a product of its own."""
        if self.own_products is None:
            torch.bmm(self.q, self.keys[layer], out=self.scores)
        else:
            self.own_scores.copy_(torch.bmm(self.q, self.keys[layer], out=self.own_products))
        if self.shared:
            q = self._by_group(self.q).reshape(*self.prefix_products.shape[:2], -1)
            products = torch.bmm(q, self.prefix_keys[layer], out=self.prefix_products)
            self.prefix_scores.copy_(products.view(self.prefix_scores.shape))
        if self.bias is not None:
            self.prefix_scores += self.bias
        buffers.softmax(self.scores, self.probs)
        torch.bmm(self.own_probs, self.values[layer], out=self.out)
        if self.shared:
            probs = self.prefix_probs.reshape(self.prefix_products.shape)
            mixed = torch.bmm(probs, self.prefix_values[layer], out=self.prefix_mixed)
            target = self._by_group(self.out)
            target += mixed.view(target.shape)

    def _by_group(self, x: Tensor) -> Tensor:
        """(rows * Hkv, repeat, W) -> (groups, Hkv, size, repeat, W), a view."""
        return x.view(self.groups, self.size, self.kv_heads, *x.shape[1:]).transpose(1, 2)


class _Buffers:
    """Memory for one layer's attention, used again by the next.

    A step uses as much of the front of a buffer as its length takes, so that what it uses is
    contiguous at every length.
    """

    def __init__(self, like: Tensor, count: int) -> None:
        self._products = like.new_empty(count)
        self._scores = like.new_empty(count, dtype=torch.float32)
        self._fp32_probs = torch.empty_like(self._scores)
        self._probs = self._fp32_probs if like.dtype == torch.float32 else like.new_empty(count)

    def products(self, shape: Sequence[int]) -> Tensor:
        """For matrix products, of the cache's dtype."""
        return _front(self._products, shape)

    def scores(self, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """For attention scores, fp32, and for probabilities, of the cache's dtype."""
        return _front(self._scores, shape), _front(self._probs, shape)

    def softmax(self, scores: Tensor, probs: Tensor) -> None:
        """Softmax over the last dimension, in fp32, into what `scores` gave for it."""
        if probs.dtype == torch.float32:
            torch.softmax(scores, -1, out=probs)
        else:
            probs.copy_(torch.softmax(scores, -1, out=_front(self._fp32_probs, scores.shape)))


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
        self.rows = sum(part.rows for part in prefixes)
        like = prefixes[0].keys
        # Matrix products give head_dim columns a query too, however short the context.
        longest = max(max(p.keys.shape[3] for p in prefixes) + suffix_length, self.head_dim)
        self._buffers = _Buffers(like, max(p.rows for p in prefixes) * self.heads * longest)
        queries = (self.rows * self.kv_heads, self.heads // self.kv_heads, self.head_dim)
        self._queries, self._mixed = like.new_empty(queries), like.new_empty(queries)
        self._by_row = self._queries.view(self.rows, self.heads, self.head_dim)
        self._result = self._mixed.view(self.rows, -1)
        self.blocks: list[_Block] = []
        first = 0
        for part in prefixes:
            block = _Block(first, part, suffix_length, self._queries, self._mixed)
            self.blocks.append(block)
            first = block.rows.stop

    def begin(self, slot: int) -> None:
        """Make suffix position `slot` the last that is stored and attended."""
        for block in self.blocks:
            block.begin(slot, self._buffers)

    def append(self, layer: int, keys_values: Tensor) -> None:
        """Store the last position's keys and values: (R, 2, Hkv, head_dim)."""
        for block in self.blocks:
            block.append(layer, keys_values)

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Attention of one query a row over its prefix and its suffix up to the last position.

        Args:
            q: (R, Hq, head_dim), rotated and scaled by head_dim ** -0.5.
        Returns: (R, Hq * head_dim), overwritten by the next call.
        """
        self._by_row.copy_(q)
        for block in self.blocks:
            block.attend(layer, self._buffers)
        return self._result
