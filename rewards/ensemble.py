"""The experts' contract, and the weighted mean of their scores."""

import math
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, Protocol

import nvtx
import torch
from torch import Tensor

Around = Callable[[str], AbstractContextManager[object]]
# How torch words a failed allocation that it does not raise as an OutOfMemoryError.
NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")


class RewardError(RuntimeError):
    """An expert that failed, or answered something that is no score. Names the expert."""


class RewardExpert(Protocol):
    """Anything that scores pictures against their prompts.

    An expert may also have `prepare(prompts, metadata)`, which is called while the pictures are
    still being drawn: the place to tokenise what `score` will ask about them.
    """

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


def expert_range(name: str) -> AbstractContextManager[object]:
    """The NVTX range of an expert's work."""
    return nvtx.annotate(f"rewards/{name}")


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
            weights: of each expert, not all 0; an absent one weighs 1. With 0 an expert is
                scored and reported and has no part in the total.
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
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"weight of reward {name!r} must be >= 0, got {weight}")
        self.experts = experts
        self.weights = {name: (weights or {}).get(name, 1.0) for name in names}
        if not sum(self.weights.values()):
            raise ValueError("the weights of all rewards are 0")
        self.on_error = on_error
        self._unprepared: dict[str, Exception] = {}

    def prepare(
        self,
        prompts: list[str],
        metadata: list[dict[str, Any]],
        *,
        around: Around = expert_range,
    ) -> None:
        """Let the experts do what needs no pictures; the next `score` reports what failed."""
        for expert in self.experts:
            ahead = getattr(expert, "prepare", None)
            if ahead is None:
                continue
            try:
                with around(expert.name):
                    ahead(prompts, metadata)
            # Foreign code, as in `score`, which reports it under the expert's name.
            except Exception as error:
                self._unprepared[expert.name] = error

    def score(
        self,
        prompts: list[str],
        images: Tensor,
        metadata: list[dict[str, Any]],
        *,
        around: Around = expert_range,
    ) -> Scores:
        """Scores of every expert and their weighted mean.

        Args:
            prompts, metadata: B each.
            images: (B, 3, H, W) float in [0, 1].
            around: called with an expert's name for the context that it runs in. What that
                raises counts as the expert's failure.
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
                by_expert[expert.name] = self._scores_of(expert, prompts, images, metadata, around)
            except RewardError:
                if self.on_error == "raise":
                    raise
                skipped[expert.name] = len(prompts)
        weight = sum(self.weights[name] for name in by_expert)
        if not weight:
            raise RewardError(
                f"every expert that has a weight failed on this batch: {', '.join(skipped)}"
            )
        parts = [s * (self.weights[name] / weight) for name, s in by_expert.items()]
        total = sum(parts[1:], parts[0])
        return Scores(total, by_expert, skipped)

    def _scores_of(
        self,
        expert: RewardExpert,
        prompts: list[str],
        images: Tensor,
        metadata: list[dict[str, Any]],
        around: Around,
    ) -> Tensor:
        """The expert's (B,) fp32 scores, every failure turned into a RewardError with its name."""
        try:
            unprepared = self._unprepared.pop(expert.name, None)
            if unprepared is not None:
                raise unprepared
            with around(expert.name):
                return _checked(expert, expert.score(prompts, images, metadata), images)
        except RewardError:
            raise
        # An expert is foreign code: whatever it raises is reported under its name.
        except Exception as error:
            if _is_out_of_memory(error):
                _release(error)
                raise RewardError(
                    f"expert {expert.name!r} ran out of memory on {len(prompts)} images: "
                    f"{_first_line(error)}"
                ) from error
            raise RewardError(
                f"expert {expert.name!r} failed: {type(error).__name__}: {error}"
            ) from error


def _checked(expert: RewardExpert, scores: Any, images: Tensor) -> Tensor:
    """What an expert answered as (B,) fp32 on the images' device."""
    if not isinstance(scores, Tensor) or scores.shape != (len(images),):
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise RewardError(
            f"expert {expert.name!r} returned {got}, wanted a ({len(images)},) tensor"
        )
    scores = scores.detach().to(images.device, torch.float32)
    # The one host sync an expert costs; it runs on the reward stream, not the main one.
    bad = int((~scores.isfinite()).sum())
    if bad:
        raise RewardError(f"expert {expert.name!r} returned {bad} NaN or infinite scores")
    return scores


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in NO_MEMORY)


def _release(error: Exception) -> None:
    """Give back what the failed call had taken, for the experts and the training after it."""
    traceback.clear_frames(error.__traceback__)  # they hold its intermediate results
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
