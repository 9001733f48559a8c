"""The experts' contract, and the weighted mean of their scores."""

import math
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, Protocol

import torch
from torch import Tensor


class RewardError(RuntimeError):
    """An expert that failed, or answered something that is no score. Names the expert."""


class RewardExpert(Protocol):
    """Anything that scores pictures against their prompts."""

    name: str

    def score(self, prompts: list[str], images: Tensor, metadata: list[dict[str, Any]]) -> Tensor:
        """One score a picture; higher is better.

        Args:
            prompts: B prompts.
            images: (B, 3, H, W) float in [0, 1].
            metadata: B prompt rows (`prompt`, `task_type`, `nouns`, `attr_nouns`,
                `spatial_info`, `numeracy_info`; some absent).
        Returns: (B,) fp32 on the images' device.
        """
        ...


@dataclass(frozen=True, slots=True)
class Scores:
    """What an ensemble answers for one batch."""

    total: Tensor
    """(B,) fp32, the weighted mean over the experts that scored."""
    by_expert: dict[str, Tensor]
    """(B,) fp32 for each expert that scored."""
    skipped: dict[str, int]
    """Pictures left unscored, for each expert that failed on this batch."""


class Ensemble:
    """A weighted mean of experts that says by name which one failed."""

    def __init__(
        self,
        experts: list[RewardExpert],
        weights: dict[str, float] | None = None,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> None:
        """
        Args:
            experts: at least one, with distinct names.
            weights: positive weight of each expert; an absent one weighs 1.
            on_error: "raise" stops with a RewardError; "skip" leaves the failing expert out
                of this batch and counts it in `Scores.skipped`.
        Raises: ValueError naming the expert or the value.
        """
        names = [e.name for e in experts]
        if not names:
            raise ValueError("an ensemble needs at least one reward expert")
        if len(set(names)) != len(names):
            raise ValueError(f"reward expert named twice in {names}")
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
        for name, weight in (weights or {}).items():
            if name not in names:
                near = get_close_matches(name, names, 1, 0.0)
                raise ValueError(f"weight for unknown reward {name!r}; nearest: {near[0]!r}")
            if not (math.isfinite(weight) and weight > 0):
                raise ValueError(f"weight of reward {name!r} must be positive, got {weight}")
        self.experts = experts
        self.weights = {name: (weights or {}).get(name, 1.0) for name in names}
        self.on_error = on_error

    def score(self, prompts: list[str], images: Tensor, metadata: list[dict[str, Any]]) -> Scores:
        """Scores of every expert and their weighted mean.

        Args:
            prompts, metadata: B each.
            images: (B, 3, H, W) float in [0, 1].
        Raises: RewardError naming the expert, with on_error="raise", or with "skip" when no
            expert is left. ValueError when the three lengths differ.
        """
        if not len(prompts) == len(images) == len(metadata):
            raise ValueError(
                f"{len(prompts)} prompts, {len(images)} images and {len(metadata)} metadata rows"
            )
        by_expert: dict[str, Tensor] = {}
        skipped: dict[str, int] = {}
        for expert in self.experts:
            try:
                by_expert[expert.name] = _checked(expert, prompts, images, metadata)
            except RewardError:
                if self.on_error == "raise":
                    raise
                skipped[expert.name] = len(prompts)
        if not by_expert:
            raise RewardError(f"every expert failed on this batch: {', '.join(skipped)}")
        weight = sum(self.weights[name] for name in by_expert)
        total = sum(s * (self.weights[name] / weight) for name, s in by_expert.items())
        return Scores(total, by_expert, skipped)


def _checked(
    expert: RewardExpert, prompts: list[str], images: Tensor, metadata: list[dict[str, Any]]
) -> Tensor:
    """The expert's (B,) fp32 scores, every failure turned into a RewardError with its name."""
    try:
        scores = expert.score(prompts, images, metadata)
    # An expert is foreign code: whatever it raises is reported under its name.
    except Exception as error:
        raise RewardError(
            f"expert {expert.name!r} failed: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(scores, Tensor) or scores.shape != (len(prompts),):
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise RewardError(
            f"expert {expert.name!r} returned {got}, wanted a ({len(prompts)},) tensor"
        )
    scores = scores.detach().to(images.device, torch.float32)
    # The one host sync an expert costs; it runs on the reward stream, not the main one.
    bad = int((~scores.isfinite()).sum())
    if bad:
        raise RewardError(f"expert {expert.name!r} returned {bad} NaN or infinite scores")
    return scores
