"""The two chains of thought as two values of one type, and the rows of them that a forward takes."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from engine.model.generator import Generator
from engine.model.head import LevelName
from engine.model.sequences import Sequences


@dataclass(slots=True)
class Level:
    """One chain of thought of B samples, to be trained on.

    Samples that share a plan repeat it; each copy carries its own picture's advantage.

    Attributes:
        name: whose head's tokens these are.
        prompts: B tensors (L_i,) int64.
        ids: (B, T) int64; mask: (B, T) bool, True on the tokens that were drawn, from the first on.
        longest: tokens that a sample has at most.
        sampled: (B, T) fp32 log-probs that the sampler returned.
        old: the same of the policy that the ratio compares with.
        ref: the same of the reference policy; None without KL.
        advantages: (B,) fp32; None until the rewards are there.
        weights: (B, T) fp32, mask and normaliser in one; None until they are known.
        kept: (B,) bool, the samples that count; None: all.
        importance: (B, T) fp32, what the tokens weigh beside each other; None: all the same.
        beta: weight of the KL term; None: the settings'.
        cfg_weight: the guided distribution of this weight is trained; None: the conditional one.
        detached: its unconditional branch gets no gradient.
        share: see engine.model.sequences.
    """

    name: LevelName
    prompts: list[Tensor]
    ids: Tensor
    mask: Tensor
    longest: int
    sampled: Tensor
    old: Tensor
    ref: Tensor | None = None
    advantages: Tensor | None = None
    weights: Tensor | None = None
    kept: Tensor | None = None
    importance: Tensor | None = None
    beta: float | None = None
    cfg_weight: float | None = None
    detached: bool = False
    share: bool = True


class LevelRows:
    """Samples start .. stop - 1 of a level: what one forward takes.

    What its sequences share is found once, for the policy's, the reference's and every update's
    forward.

    Args:
        level: its tensors are looked up when they are asked for.
    """

    def __init__(self, level: Level, start: int, stop: int) -> None:
        self.level, self._rows = level, slice(start, stop)
        self._mask = level.mask[self._rows]
        self._whole = bool(self._mask.all())
        self._unconditional: Sequences | None = None

    @cached_property
    def sequences(self) -> Sequences:
        return self._asked(self.level.prompts[self._rows])

    def _asked(self, prompts: list[Tensor]) -> Sequences:
        level = self.level
        lengths = None if self._whole else self._mask.sum(1)
        return Sequences(level.name, prompts, level.ids[self._rows], lengths, level.share)

    def unconditional(self, generator: Generator) -> Sequences:
        """The same completions after the prompts that guidance leads away from."""
        if self._unconditional is None:
            prompts = self.level.prompts[self._rows]
            self._unconditional = self._asked([generator.unconditional(p) for p in prompts])
        return self._unconditional

    def tokens(self, values: Tensor) -> Tensor:
        """The drawn tokens' values: (B, T, ...) of the whole level -> (n, ...)."""
        return self._drawn(values[self._rows])

    def _drawn(self, values: Tensor) -> Tensor:
        return values.flatten(0, 1) if self._whole else values[self._mask]

    def write(self, values: Tensor, tokens: Tensor) -> None:
        """Set the drawn tokens' values (n,) in a tensor (B, T) of the whole level."""
        values[self._rows][self._mask] = tokens

    def sample_of(self) -> Tensor:
        """(n,) int64, the sample of each drawn token, from 0."""
        rows = torch.arange(len(self._mask), device=self._mask.device)
        return self._drawn(rows[:, None].expand_as(self._mask))

    def features(self, generator: Generator) -> tuple[Tensor, Tensor | None]:
        """Inputs of the head's last layer that predict the drawn tokens, (n, K).

        Returns: of the conditional branch; of the unconditional one, None where it is not trained.
        """
        level, head = self.level, generator.head(self.level.name)
        cond = self._drawn(head.features(generator.completion_hidden(self.sequences)))
        if level.cfg_weight is None:
            return cond, None
        with torch.set_grad_enabled(torch.is_grad_enabled() and not level.detached):
            hidden = generator.completion_hidden(self.unconditional(generator))
            return cond, self._drawn(head.features(hidden))


class Experience:
    """What a rollout leaves to train on: its levels, cut into micro-batches once.

    Args:
        levels: those that train, each of the same B samples.
        micro_batch_size: samples of a forward; 0: all.
    """

    def __init__(self, levels: list[Level], micro_batch_size: int = 0) -> None:
        self.levels = levels
        self.cut(micro_batch_size or len(levels[0].ids))

    def cut(self, micro_batch_size: int) -> None:
        """Cut the samples into micro-batches, of which each is a level's rows, level by level."""
        count = len(self.levels[0].ids)
        self.micro_batch_size = size = min(micro_batch_size, count)
        self.parts = [
            [LevelRows(level, start, min(start + size, count)) for level in self.levels]
            for start in range(0, count, size)
        ]

    def credit(self, advantages: Mapping[LevelName, Tensor]) -> None:
        """Give every level its samples' advantages (B,)."""
        for level in self.levels:
            level.advantages = advantages[level.name]
