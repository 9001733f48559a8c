"""Sequences as a tree of tokens: what several of them begin with is computed once.

A causal model's state at a token depends on that token and on those before it, and on nothing
else. Sequences that begin alike therefore share those states exactly: the samples of a group
their prompt, second-stage prompts of one request that request, unconditional prompts their pads.
The trunk runs over the tree's tokens, packed without padding; only attention lays them out in
rows again. A shared token receives the sum of its rows' gradients.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from engine.model.attention import Attend

ABSENT = -1  # past a sequence's end; sorts before every token
OWN = 1 << 32  # added to ids that are no text ids, so that they equal none
# Shares of the work that must be spared, or the overhead of sparing it is not repaid: of a padded
# batch's tokens by a tree, of a tree's query-key pairs by one more attention call.
TREE_SPARES, CALL_SPARES = 0.1, 0.05


class Gather:
    """x[index] of a matrix x (N, W), whose backward sums a row's gradients in fp32, in one order.

    Indexing's own rounds after every addition on a CPU and adds atomically on CUDA.

    Args:
        index: (*shape) int64, on the host.
        used: (*shape) bool; no gradient comes from where it is False.
        count: N.
        device: x's.
    """

    def __init__(self, index: Tensor, used: Tensor, count: int, device: torch.device) -> None:
        places = used.flatten().nonzero()[:, 0]
        rows = index.flatten()[places]
        uses = torch.bincount(rows, minlength=count)
        self.index = index.to(device)
        # Where row 0 is used, then row 1, ..., and where each row's part begins.
        self.places = places[rows.argsort(stable=True)].to(device)
        self.offsets = (uses.cumsum(0) - uses).to(device)

    def __call__(self, x: Tensor) -> Tensor:
        """(N, W) -> (*shape, W)."""
        return _Gathered.apply(x, self).view(*self.index.shape, x.shape[1])


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gather: Gather) -> Tensor:
        ctx.gather = gather
        return x.index_select(0, gather.index.flatten())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        gather = ctx.gather
        return F.embedding_bag(gather.places, grad.contiguous(), gather.offsets, mode="sum"), None


@dataclass(slots=True)
class Window:
    """Rows that attend in one call, with queries from one position on.

    Attributes:
        queries: (R, E - start), the tokens at positions start .. E - 1 of each row.
        keys: (R, E), those at positions 0 .. E - 1. Past a row's end both are token 0: only
            queries that nobody reads look there.
    """

    queries: Gather
    keys: Gather

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        """q (N, Hq, head_dim), k and v (N, Hkv, head_dim) -> (R * (E - start), Hq * head_dim)."""
        mixed = attend(_by_row(q, self.queries), _by_row(k, self.keys), _by_row(v, self.keys))
        return mixed.transpose(1, 2).reshape(self.queries.index.numel(), -1)


def _by_row(x: Tensor, tokens: Gather) -> Tensor:
    """x (N, H, head_dim) -> (R, H, E, head_dim) of tokens (R, E)."""
    return tokens(x.flatten(1)).unflatten(-1, x.shape[1:]).transpose(1, 2)


class TokenTree:
    """B sequences, each a prompt and a completion, as their N distinct beginnings.

    The last token of a completion predicts nothing that is scored and is left out.

    Args:
        prompts: B tensors (L_i,) int64 text ids, L_i >= 1.
        completions: (B, T) int64.
        lengths: (B,) int64 in 0 .. T, completion tokens of each row.
        own_ids: the completions' ids name no text tokens; see engine.model.head.

    Attributes:
        text_ids, other_ids: (N_text,), (N_other,) int64 ids of the N tokens, text first.
        positions: (N,) int64, how many tokens precede each in its sequence.
        width: tokens of the longest sequence.
        predict: (B, T), the tokens whose states predict the completions'; token 0 past a row's
            length.
    """

    def __init__(
        self, prompts: Sequence[Tensor], completions: Tensor, lengths: Tensor, *, own_ids: bool
    ) -> None:
        device = completions.device
        starts = torch.tensor([len(p) for p in prompts])
        # One copy from the device; what follows is index arithmetic on the host.
        flat = torch.cat([*prompts, completions.flatten(), lengths]).cpu()
        text, drawn, lengths = flat.split([int(starts.sum()), completions.numel(), len(prompts)])
        drawn = drawn.view(completions.shape) + (OWN if own_ids else 0)
        # Sorted, rows that begin alike are adjacent.
        rows, row_of = _grid(text, starts, drawn, lengths).unique(dim=0, return_inverse=True)
        present = rows != ABSENT
        count, width = rows.shape
        # A row's own tokens begin where it differs from the row above.
        first = torch.zeros(count, dtype=torch.int64)
        first[1:] = (rows[1:] == rows[:-1]).long().cumprod(1).sum(1)
        position = torch.arange(width)
        differs = position >= first[:, None]
        owner = torch.where(differs, torch.arange(count)[:, None], 0).cummax(0).values
        own = differs & present
        slots = own.flatten().nonzero()[:, 0]  # each token's place in `rows`
        is_own = rows.flatten()[slots] >= OWN
        slots = torch.cat((slots[~is_own], slots[is_own]))
        number = torch.zeros(count * width, dtype=torch.int64)
        number[slots] = torch.arange(len(slots))
        tokens = number[owner * width + position]

        ids = rows.flatten()[slots].to(device)
        texts = len(slots) - int(is_own.sum())
        self.text_ids, self.other_ids = ids[:texts], ids[texts:] - OWN
        self.positions, self.width = (slots % width).to(device), width
        step = torch.arange(completions.shape[1])
        asked = step < lengths[:, None]
        predict = tokens[row_of[:, None], (starts[:, None] - 1 + step).clamp(max=width - 1)]
        self.predict = Gather(predict.where(asked, 0), asked, len(slots), device)

        ends = present.sum(1)
        self._windows: list[Window] = []
        outputs, done = torch.empty_like(tokens), 0
        for chosen in _calls(first.argsort(stable=True), first, ends):
            start, end = int(first[chosen[0]]), int(ends[chosen].max())
            queries, keys = tokens[chosen, start:end], tokens[chosen, :end]
            self._windows.append(
                Window(
                    Gather(queries, own[chosen, start:end], len(slots), device),
                    Gather(keys, present[chosen, :end], len(slots), device),
                )
            )
            outputs[chosen, start:end] = torch.arange(done, done + queries.numel()).view_as(queries)
            done += queries.numel()
        self._outputs = outputs.flatten()[slots].to(device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        """Causal attention of every token over its own sequence.

        Args:
            q: (N, Hq, head_dim), rotated by `positions`.
            k, v: (N, Hkv, head_dim), k rotated.
            attend: the backend.
        Returns: (N, Hq * head_dim).
        """
        outputs = torch.cat([window.attend(q, k, v, attend) for window in self._windows])
        return outputs.index_select(0, self._outputs)


def worthwhile_tree(
    prompts: Sequence[Tensor], completions: Tensor, lengths: Tensor | None, *, own_ids: bool
) -> TokenTree | None:
    """The sequences' tree; None where it has about as many tokens as the padded batch."""
    batch, steps = completions.shape
    if batch == 1:
        return None
    if lengths is None:
        lengths = torch.full((batch,), steps, device=completions.device)
    tree = TokenTree(prompts, completions, lengths, own_ids=own_ids)
    padded = batch * (max(len(p) for p in prompts) + steps - 1)
    return tree if len(tree.positions) <= (1 - TREE_SPARES) * padded else None


def _grid(text: Tensor, starts: Tensor, drawn: Tensor, lengths: Tensor) -> Tensor:
    """The sequences but for their last completion tokens, right-padded with ABSENT."""
    begin = starts[:, None]
    fed = (lengths[:, None] - 1).clamp(min=0)
    position, step = torch.arange(int((begin + fed).max())), torch.arange(drawn.shape[1])
    ids = torch.full((len(starts), len(position)), ABSENT)
    ids[position < begin] = text
    ids[(position >= begin) & (position < begin + fed)] = drawn[step < fed]
    return ids


def _calls(rows: Tensor, first: Tensor, ends: Tensor, least: float | None = None) -> list[Tensor]:
    """Which rows attend together: few calls, with few pairs of query and key that none needs.

    Args:
        rows: (R,) row numbers, by ascending `first`.
        first, ends: of every row, the position of its first own token, and its length.
        least: pairs that one more call must spare.
    """
    starts, widths = first[rows], ends[rows]
    head = widths.cummax(0).values  # the widest of the first 1, 2, ... rows
    tail = widths.flip(0).cummax(0).values.flip(0)  # of all, of all but the first, ...
    whole = len(rows) * int(head[-1] * (head[-1] - starts[0]))
    least = CALL_SPARES * whole if least is None else least
    count = torch.arange(1, len(rows))
    cut = count * head[:-1] * (head[:-1] - starts[0])
    cut += (len(rows) - count) * tail[1:] * (tail[1:] - starts[1:])
    if len(cut) == 0 or whole - int(cut.min()) < least:
        return [rows]
    at = int(cut.argmin()) + 1
    return _calls(rows[:at], first, ends, least) + _calls(rows[at:], first, ends, least)
