"""Means over prompts with bootstrap intervals.

The unit that is drawn again is the prompt: pictures of one prompt resemble each other, and drawing
them apart would make the interval too narrow. Source: Efron and Tibshirani, "An Introduction to the
Bootstrap", 1993, chapter 13 (percentile interval).
"""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
_INDICES = 1 << 21  # drawn at a time
Interval = dict[str, float | int]


def intervals(
    values: np.ndarray,
    names: Sequence[str],
    tasks: Sequence[str],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, dict[str, object]]:
    """The mean of each column, and what it could have been with other prompts of the same kind.

    Args:
        values: (P, E) scores, each the mean over a prompt's pictures, or paired differences.
        names: E names of the columns.
        tasks: P task types.
        seed: of the resampling.
    Returns: name -> {"all": I, "task_mean": I, "by_task": {task: I}} with I = {"mean", "low",
        "high", "prompts"}; `task_mean` counts every task type the same. low .. high holds the
        middle 95 % of the resampled means; of a single prompt it is the mean itself.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.shape != (len(tasks), len(names)) or not len(tasks):
        raise ValueError(
            f"values: wanted ({len(tasks)}, {len(names)}) and at least one row, got {values.shape}"
        )
    random = np.random.default_rng(seed)
    kinds = list(dict.fromkeys(tasks))
    groups = [values[[task == kind for task in tasks]] for kind in kinds]
    drawn = _resampled_means(values, resamples, random)  # (R, E)
    by_kind = [_resampled_means(group, resamples, random) for group in groups]
    task_mean = np.mean([group.mean(0) for group in groups], axis=0)
    # Task types are drawn independently of each other, so their means may be added up draw by draw.
    drawn_task_mean = np.mean(by_kind, axis=0)
    return {
        name: {
            "all": _interval(values.mean(0)[e], drawn[:, e], len(values)),
            "task_mean": _interval(task_mean[e], drawn_task_mean[:, e], len(values)),
            "by_task": {
                kind: _interval(group.mean(0)[e], means[:, e], len(group))
                for kind, group, means in zip(kinds, groups, by_kind, strict=True)
            },
        }
        for e, name in enumerate(names)
    }


def _resampled_means(values: np.ndarray, resamples: int, random: np.random.Generator) -> np.ndarray:
    """(R, E) means of P rows drawn with replacement; the columns share their draws."""
    count = len(values)
    means = np.empty((resamples, values.shape[1]))
    step = max(1, _INDICES // count)
    for start in range(0, resamples, step):
        part = means[start : start + step]
        rows = random.integers(0, count, (len(part), count))
        for e, column in enumerate(values.T):
            part[:, e] = column[rows].mean(1)
    return means


def _interval(mean: float, drawn: np.ndarray, prompts: int) -> Interval:
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {"mean": float(mean), "low": float(low), "high": float(high), "prompts": prompts}
