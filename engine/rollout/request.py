"""What a rollout is asked for and gives back."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.model.head import LevelName
from kernels.state import Draw


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What to draw, and how.

    Attributes:
        level: whose head's tokens.
        steps: tokens to draw, at most.
        guided: every sample has a second row, of the unconditional prompt.
        sample_ids: (B,) int64.
        draw: guidance, temperature, noise and the rest.
    """

    level: LevelName
    steps: int
    guided: bool
    sample_ids: Tensor
    draw: Draw

    @property
    def branches(self) -> int:
        return 2 if self.guided else 1


@dataclass(slots=True)
class Drawn:
    """What a rollout drew, a row for each prompt.

    Attributes:
        ids: (B, T) int64; pad after a row's end-of-sequence.
        logprobs, guided_logprobs: (B, T) fp32 nats, 0 after a row's end-of-sequence.
        mask: (B, T) bool, True up to and including end-of-sequence.
    """

    ids: Tensor
    logprobs: Tensor
    guided_logprobs: Tensor
    mask: Tensor

    def rows(self, index: Tensor) -> "Drawn":
        """The rows (B',) int64 of it."""
        return Drawn(*(t[index] for t in self._tensors()))

    def columns(self, count: int) -> "Drawn":
        """The first columns of it."""
        return Drawn(*(t[:, :count] for t in self._tensors()))

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.ids, self.logprobs, self.guided_logprobs, self.mask


def joined(parts: Sequence[Drawn], pad: int) -> Drawn:
    """Rows of several rollouts one below the other; shorter ones are filled up with ended rows."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.ids.shape[1] for part in parts)

    def stacked(name: str, fill: float) -> Tensor:
        tensors = (getattr(part, name) for part in parts)
        return torch.cat([F.pad(t, (0, width - t.shape[1]), value=fill) for t in tensors])

    return Drawn(
        stacked("ids", pad),
        stacked("logprobs", 0),
        stacked("guided_logprobs", 0),
        stacked("mask", 0),
    )


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompts of B rows, sorted so that equal ones are neighbours, and each kept once.

    Attributes:
        distinct: U tensors (L_i,) int64.
        owner: (B,) int64 ascending, each row's prompt.
        order: (B,) int64, which of the prompts as they were given stands at each row.
    """

    distinct: list[Tensor]
    owner: Tensor
    order: Tensor

    @classmethod
    def of(cls, prompts: Sequence[Tensor]) -> "Prompts":
        """Args: prompts: B tensors (L_i,) int64."""
        index: dict[tuple[int, ...], int] = {}
        owner = [index.setdefault(tuple(p.tolist()), len(index)) for p in prompts]
        order = sorted(range(len(owner)), key=owner.__getitem__)  # stable
        device = prompts[0].device
        return cls(
            [prompts[owner.index(u)] for u in range(len(index))],
            torch.tensor([owner[i] for i in order], device=device),
            torch.tensor(order, device=device),
        )

    def rows(self, places: slice) -> "Prompts":
        """Some of the rows; their prompts keep their numbers."""
        return Prompts(self.distinct, self.owner[places], self.order[places])

    @property
    def longest(self) -> Tensor:
        return max(self.distinct, key=len)
