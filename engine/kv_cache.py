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

from engine.policy import Policy, head_dimension, rope_tables


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
        prefixes: cover rows 0 .. R - 1 in order.
        suffix_length: most suffix tokens a row will hold.
    """

    def __init__(self, policy: Policy, prefixes: Sequence[Prefixes], suffix_length: int) -> None:
        text = policy.config.text_config
        self.prefixes = list(prefixes)
        self.heads, self.kv_heads = text.num_attention_heads, text.num_key_value_heads
        self.head_dim = head_dimension(policy.config)
        rows = sum(p.groups * p.size for p in self.prefixes)
        self.width = max(p.keys.shape[3] for p in self.prefixes)
        # (layers, keys | values, R, Hkv, S, head_dim)
        self.suffix = torch.empty(
            (text.num_hidden_layers, 2, rows, self.kv_heads, suffix_length, self.head_dim),
            dtype=policy.dtype,
            device=policy.device,
        )
        # Scores of one layer: the widest prefix, then the suffix. A prefix block narrower than
        # the widest leaves -inf in between.
        self.scores = torch.full(
            (rows, self.kv_heads, self.heads // self.kv_heads, self.width + suffix_length),
            -torch.inf,
            dtype=torch.float32,
            device=policy.device,
        )

    def append(self, layer: int, slot: int, kv: Tensor) -> None:
        """Store the keys and values of suffix position `slot`: kv (R, 2, Hkv, head_dim)."""
        self.suffix[layer, :, :, :, slot].copy_(kv.transpose(0, 1))

    def attend(self, layer: int, q: Tensor, length: int) -> Tensor:
        """Attention of one query a row over its prefix and its first `length` suffix tokens.

        Args:
            q: (R, Hq, head_dim), rotated and scaled by head_dim ** -0.5.
        Returns: (R, Hq * head_dim).
        """
        rows = q.shape[0]
        repeat = self.heads // self.kv_heads
        keys, values = self.suffix[layer, :, :, :, :length].unbind(0)  # (R, Hkv, length, hd)
        grouped = q.view(rows, self.kv_heads, repeat, self.head_dim)
        scores = self.scores[..., : self.width + length]
        scores[..., self.width :].copy_(grouped @ keys.transpose(-1, -2))
        for block in self.prefixes:
            n, g, width = block.groups, block.size, block.keys.shape[3]
            shared = self._by_group(grouped[block.rows], n, g)  # (n, Hkv, g * repeat, hd)
            partial = shared @ block.keys[layer].transpose(-1, -2)
            partial = partial.view(n, self.kv_heads, g, repeat, width)
            if block.bias is not None:
                partial += block.bias[:, :, :, None]
            scores[block.rows, :, :, :width].view(n, g, self.kv_heads, repeat, width).copy_(
                partial.transpose(1, 2)
            )
        probs = scores.softmax(-1).to(q.dtype)
        mixed = probs[..., self.width :] @ values  # (R, Hkv, repeat, hd)
        for block in self.prefixes:
            n, g, width = block.groups, block.size, block.keys.shape[3]
            shared = self._by_group(probs[block.rows, :, :, :width], n, g)
            partial = (shared @ block.values[layer]).view(
                n, self.kv_heads, g, repeat, self.head_dim
            )
            mixed[block.rows].view(n, g, self.kv_heads, repeat, self.head_dim).add_(
                partial.transpose(1, 2)
            )
        return mixed.view(rows, -1)

    def _by_group(self, x: Tensor, groups: int, size: int) -> Tensor:
        """(groups * size, Hkv, repeat, W) -> (groups, Hkv, size * repeat, W)."""
        width = x.shape[-1]
        if size == 1:
            return x
        x = x.view(groups, size, self.kv_heads, -1, width).transpose(1, 2)
        return x.reshape(groups, self.kv_heads, -1, width)
