"""Prompts and completions that one forward scores, and what they share, found once."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from engine.model.head import LevelName
from engine.model.token_tree import TokenTree, worthwhile_tree


@dataclass(frozen=True)
class Sequences:
    """B prompts, each with a completion. What they share is found once, however many forwards run.

    Attributes:
        level: which head's tokens the completions are.
        prompts: B tensors (L_i,) int64 text ids.
        completions: (B, T) int64. Positions past a row's own end may hold anything: a causal model
            does not see them earlier.
        lengths: (B,) int64 in 0 .. T, completion tokens of each row; None: T.
        share: compute once what several rows begin with, and no padding, where that pays; the same
            values and gradients but for rounding.
    """

    level: LevelName
    prompts: Sequence[Tensor]
    completions: Tensor
    lengths: Tensor | None = None
    share: bool = True

    @cached_property
    def _trees(self) -> dict[bool, TokenTree | None]:
        return {}

    def tree(self, *, own_ids: bool) -> TokenTree | None:
        """Their tree of tokens; None where it spares too little.

        Args: own_ids: see Head.
        """
        if not self.share:
            return None
        if own_ids not in self._trees:
            self._trees[own_ids] = worthwhile_tree(
                self.prompts, self.completions, self.lengths, own_ids=own_ids
            )
        return self._trees[own_ids]

    def without_beyond(self, hidden: Tensor) -> Tensor:
        """(B, T, D) with zeros past each row's length."""
        if self.lengths is None:
            return hidden
        steps = torch.arange(self.completions.shape[1], device=hidden.device)
        return hidden.masked_fill((steps >= self.lengths[:, None])[..., None], 0)
