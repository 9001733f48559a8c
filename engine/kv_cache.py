"""Static key/value cache: prompt prefixes stored once for their group, private suffixes a row.

A row's context is a prefix (its prompt but for the last token) followed by its own suffix (that
last token and what is generated after it). Prefixes are read-only after prefill and shared:
rows with the same prompt share one, and all unconditional rows share [BOS, pad, pad, ...], of
which each uses as much as its own prompt's length. Nothing is allocated after construction.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.policy import Policy
from engine.rope import head_dimension, rope_tables


@dataclass(slots=True)
class Prefixes:
    """The prefixes of consecutive rows: `groups` prefixes for `size` rows each.

    Attributes:
        first: index of the first of groups * size rows.
        keys, values: (layers, groups, Hkv, P, head_dim).
        bias: (groups, 1, size, P) fp32, 0 where a row's own prefix reaches, -inf beyond; None
            when every row's reaches P.
    """

    first: int
    groups: int
    size: int
    keys: Tensor
    values: Tensor
    bias: Tensor | None

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + self.groups * self.size)


@torch.no_grad()
def prefill(policy: Policy, prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values of prompts, each from position 0.

    Args:
        prompts: U tensors (L_i,) int64; shorter ones are right-padded, which a causal model
            cannot see.
    Returns: keys, values (layers, U, Hkv, max L_i, head_dim); positions past L_i are junk.
    """
    ids = nn.utils.rnn.pad_sequence(list(prompts), batch_first=True)
    trunk = policy.model.language_model
    cos, sin = rope_tables(policy.config, ids.shape[1], ids.device)
    x = policy.embed_text(ids)
    keys, values = [], []
    for layer in trunk.layers:
        x, k, v = layer(x, cos, sin)
        keys.append(k)
        values.append(v)
    return torch.stack(keys), torch.stack(values)


def share(keys: Tensor, values: Tensor, lengths: Tensor, *, owner: Tensor, first: int) -> Prefixes:
    """Prefixes for rows first, first + 1, ... from prefilled prompts.

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
    if len(index) != keys.shape[1] or size == 1:
        keys, values = keys.index_select(1, index), values.index_select(1, index)
    width = keys.shape[3]
    bias = None
    if bool((lengths < width).any()):
        beyond = torch.arange(width, device=lengths.device) >= lengths[:, None]
        bias = torch.zeros_like(beyond, dtype=torch.float32).masked_fill_(beyond, -torch.inf)
        bias = bias.view(len(index), 1, size, width)
    return Prefixes(first, len(index), size, keys, values, bias)


class KVCache:
    """Keys and values of R decoding rows.

    Args:
        policy: gives the shapes, dtype and device.
        prefixes: cover rows 0 .. R - 1 in order, all of one width.
        suffix_length: most suffix tokens a row will hold.
    """

    def __init__(self, policy: Policy, prefixes: Sequence[Prefixes], suffix_length: int) -> None:
        text = policy.config.text_config
        layers = text.num_hidden_layers
        self.prefixes = list(prefixes)
        self.heads, self.kv_heads = text.num_attention_heads, text.num_key_value_heads
        self.head_dim = head_dimension(policy.config)
        rows = sum(p.groups * p.size for p in self.prefixes)
        (self.width,) = {p.keys.shape[3] for p in self.prefixes}
        # A (row, key/value head) pair is one matrix of a batched product.
        self.suffix = torch.empty(
            (layers, 2, rows * self.kv_heads, suffix_length, self.head_dim),
            dtype=policy.dtype,
            device=policy.device,
        )
        # One layer's scores. A step uses as much of the front as its length takes, so that they
        # are contiguous at every length.
        self.scores = torch.empty(
            rows * self.heads * (self.width + suffix_length),
            dtype=torch.float32,
            device=policy.device,
        )

    def append(self, layer: int, slot: int, keys: Tensor, values: Tensor) -> None:
        """Store the keys and values of suffix position `slot`: (R, Hkv, head_dim) each."""
        at = self.suffix[layer, :, :, slot].view(2, *keys.shape)
        at[0].copy_(keys)
        at[1].copy_(values)

    def attend(self, layer: int, q: Tensor, length: int) -> Tensor:
        """Attention of one query a row over its prefix and its first `length` suffix tokens.

        Args:
            q: (R, Hq, head_dim), rotated and scaled by head_dim ** -0.5.
        Returns: (R, Hq * head_dim).
        """
        rows, total = len(q), self.width + length
        keys, values = self.suffix[layer, :, :, :length].unbind(0)  # (R * Hkv, length, hd)
        scores = self.scores[: rows * self.heads * total].view(len(keys), -1, total)
        q = q.reshape(len(keys), -1, self.head_dim)
        scores[..., self.width :] = q.bmm(keys.transpose(1, 2))
        for block in self.prefixes:
            target = self._by_group(scores, block)[..., : self.width]
            partial = self._batched(q, block).bmm(block.keys[layer].flatten(0, 1).transpose(1, 2))
            target.copy_(partial.view(target.shape))
            if block.bias is not None:
                target += block.bias[..., None, :]
        probs = scores.softmax(-1).to(q.dtype)
        mixed = probs[..., self.width :].bmm(values)  # (R * Hkv, repeat, hd)
        for block in self.prefixes:
            target = self._by_group(mixed, block)
            prefix_probs = self._batched(probs[..., : self.width], block)
            prefix_values = block.values[layer].flatten(0, 1)
            if block.size == 1:
                target.view(len(prefix_values), -1, self.head_dim).baddbmm_(
                    prefix_probs, prefix_values
                )
            else:
                target += prefix_probs.bmm(prefix_values).view(target.shape)
        return mixed.view(rows, -1)

    def _by_group(self, x: Tensor, block: Prefixes) -> Tensor:
        """(R * Hkv, repeat, W) -> the block's rows as (groups, Hkv, size, repeat, W), a view."""
        x = x.view(-1, self.kv_heads, *x.shape[1:])[block.rows]
        return x.view(block.groups, block.size, *x.shape[1:]).transpose(1, 2)

    def _batched(self, x: Tensor, block: Prefixes) -> Tensor:
        """(R * Hkv, repeat, W) -> (groups * Hkv, size * repeat, W); a view where strides allow."""
        return self._by_group(x, block).reshape(block.groups * self.kv_heads, -1, x.shape[-1])
