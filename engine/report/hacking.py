"""Looks for reward hacking: where the reward the policy is paid rises and the judge falls."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

WINDOW = 9  # steps of the shortest stretch, and of the smoothing in the report's curves
MIN_CHANGE = 0.005  # smaller changes are not worth a line, however certain
STANDARD_ERRORS = 3.0

RULE = (
    f"Rule: two neighbouring stretches of equal length ({WINDOW}, {2 * WINDOW}, {4 * WINDOW}, … "
    "steps) are compared. Reward and judge part where, from the first stretch to the second, the "
    "mean reward rises and the mean judge score falls, each by at least "
    f"{MIN_CHANGE} and by {STANDARD_ERRORS:g} standard errors. The error comes from the "
    "step-to-step scatter of the curve itself. Of overlapping finds the clearest is reported, "
    f"from the judge's peak to its trough, with changes of {WINDOW}-step rolling means."
)


def rolling_mean(values: Sequence[float] | np.ndarray, window: int = WINDOW) -> np.ndarray:
    """Centred mean over `window` values, fewer at the ends; NaN is left out.

    Returns: (N,) float64, NaN where the window holds no finite value.
    """
    raw = np.asarray(values, np.float64)
    finite = np.isfinite(raw)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, raw, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(raw))
    low = np.maximum(index - window // 2, 0)
    high = np.minimum(index + window // 2 + 1, len(raw))
    held = counts[high] - counts[low]
    return np.where(held > 0, (sums[high] - sums[low]) / np.maximum(held, 1), np.nan)


def _noise(values: np.ndarray) -> float:
    """Scatter of a single step around the trend, from the differences of neighbouring steps."""
    return float(np.sqrt(np.mean(np.diff(values) ** 2) / 2))


def find_divergence(
    steps: Sequence[int], reward: Sequence[float], judge: Sequence[float]
) -> list[tuple[int, int, str]]:
    """The stretches of a run in which the reward rises while the judge falls, by `RULE`.

    Args:
        steps, reward, judge: (N,) each; a step where either score is NaN is left out.
    Returns: (first step, last step, sentence) a stretch, in order, not overlapping.
    """
    if not len(steps) == len(reward) == len(judge):
        raise ValueError(
            "steps, reward, judge: wanted one length, got "
            f"{len(steps)}, {len(reward)}, {len(judge)}"
        )
    scores = np.asarray([reward, judge], np.float64).reshape(2, -1)  # (2, N)
    kept = np.isfinite(scores).all(0)
    step_numbers, scores = np.asarray(steps)[kept], scores[:, kept]
    length = scores.shape[1]
    if length < 2 * WINDOW:
        return []
    noise = np.array([_noise(scores[0]), _noise(scores[1])])
    sums = np.concatenate([np.zeros((2, 1)), scores.cumsum(1)], axis=1)

    found = []  # (clarity, first index, last index, reward change, judge change)
    window = WINDOW
    while 2 * window <= length:
        needed = np.maximum(MIN_CHANGE, STANDARD_ERRORS * noise * math.sqrt(2 / window))
        for i in range(length - 2 * window + 1):
            first = (sums[:, i + window] - sums[:, i]) / window
            second = (sums[:, i + 2 * window] - sums[:, i + window]) / window
            up, down = second[0] - first[0], first[1] - second[1]
            if up >= needed[0] and down >= needed[1]:
                clarity = min(up / needed[0], down / needed[1])
                found.append((clarity, i, i + 2 * window - 1, up, -down))
        window *= 2

    chosen: list[tuple[int, int, float, float]] = []
    for _, i, j, up, change in sorted(found, key=lambda f: (-f[0], f[1])):
        if all(j < a or i > b for a, b, _, _ in chosen):
            chosen.append((i, j, up, change))
    smooth = np.stack([rolling_mean(scores[0]), rolling_mean(scores[1])])
    return [
        _describe(step_numbers, *_from_peak_to_trough(smooth, *stretch))
        for stretch in sorted(chosen)
    ]


def _from_peak_to_trough(
    smooth: np.ndarray, i: int, j: int, up: float, change: float
) -> tuple[int, int, float, float]:
    """The stretch i..j narrowed to where the smoothed judge falls, unless the reward rose outside.

    Returns: (first index, last index, reward change, judge change).
    """
    middle = (i + j + 1) // 2
    peak = i + int(smooth[1, i:middle].argmax())
    trough = middle + int(smooth[1, middle : j + 1].argmin())
    reward_change, judge_change = smooth[:, trough] - smooth[:, peak]
    if reward_change >= MIN_CHANGE:
        return peak, trough, float(reward_change), float(judge_change)
    return i, j, up, change


def _describe(
    steps: np.ndarray, i: int, j: int, reward_change: float, judge_change: float
) -> tuple[int, int, str]:
    start, end = int(steps[i]), int(steps[j])
    text = f"steps {start}–{end}: reward {reward_change:+.3f} while judge {judge_change:+.3f}"
    return start, end, text


def correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Pearson correlation over the finite pairs; None for under 3 pairs or a constant side."""
    pair = np.asarray([a, b], np.float64).reshape(2, -1)
    pair = pair[:, np.isfinite(pair).all(0)]
    if pair.shape[1] < 3 or bool((pair.std(1) < 1e-12).any()):
        return None
    return float(np.asarray(np.corrcoef(pair))[0, 1])


def expert_correlations(
    experts: Mapping[str, Sequence[float]], judge: Sequence[float]
) -> list[tuple[str, float | None]]:
    """(expert, correlation of its reward with the judge over the steps), the lowest first.

    Experts whose correlation is not defined come last.
    """
    rows = [(name, correlation(values, judge)) for name, values in experts.items()]
    return sorted(rows, key=lambda row: (row[1] is None, row[1] if row[1] is not None else 0.0))


def change_over_run(values: Sequence[float]) -> float | None:
    """Mean of the last `WINDOW` finite values less that of the first; None when they overlap."""
    finite = np.asarray(values, np.float64)
    finite = finite[np.isfinite(finite)]
    if len(finite) < 2 * WINDOW:
        return None
    return float(finite[-WINDOW:].mean() - finite[:WINDOW].mean())
