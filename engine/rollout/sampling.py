"""What every decoder is asked for and gives back."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        image: image tokens under guidance, else text until end-of-sequence.
        first_step: noise step of the first token.
        sample_ids: (B,) int64.
    """

    image: bool
    first_step: int
    sample_ids: Tensor
    temperature: float
    seed: int
    greedy: bool
    cfg_weight: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass(slots=True)
class Decoded:
    """What a rollout drew, a row for each prompt.

    Attributes:
        ids: (B, T) int64; pad after a text row's end-of-sequence.
        logprobs, guided_logprobs: (B, T) fp32 nats, 0 after a text row's end-of-sequence.
        mask: (B, T) bool, True up to and including end-of-sequence.
    """

    ids: Tensor
    logprobs: Tensor
    guided_logprobs: Tensor
    mask: Tensor

    def rows(self, index: Tensor) -> "Decoded":
        """The rows (B',) int64 of it."""
        return Decoded(*(t[index] for t in self._tensors()))

    def columns(self, count: int) -> "Decoded":
        """The first columns of it."""
        return Decoded(*(t[:, :count] for t in self._tensors()))

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.ids, self.logprobs, self.guided_logprobs, self.mask


def distinct_prompts(prompts: Sequence[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
    """The prompts without repetition, each row's prompt once rows are sorted by it, the sorting.

    Args:
        prompts: B tensors (L_i,) int64.
    Returns: U tensors; (B,) int64 ascending; (B,) int64, the row that stands at each place.
    """
    index: dict[tuple[int, ...], int] = {}
    owner = [index.setdefault(tuple(p.tolist()), len(index)) for p in prompts]
    order = sorted(range(len(owner)), key=owner.__getitem__)  # stable
    distinct = [prompts[owner.index(u)] for u in range(len(index))]
    device = prompts[0].device
    return (
        distinct,
        torch.tensor([owner[i] for i in order], device=device),
        torch.tensor(order, device=device),
    )


def joined(parts: Sequence[Decoded], pad: int) -> Decoded:
    """Rows of several decodings one below the other; shorter ones are filled up with ended rows."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.ids.shape[1] for part in parts)

    def stacked(name: str, fill: float) -> Tensor:
        tensors = (getattr(part, name) for part in parts)
        return torch.cat([F.pad(t, (0, width - t.shape[1]), value=fill) for t in tensors])

    return Decoded(
        stacked("ids", pad),
        stacked("logprobs", 0),
        stacked("guided_logprobs", 0),
        stacked("mask", 0),
    )
