"""Bootstrap intervals against normal theory and a plain loop."""

import random
import statistics

import numpy as np
import pytest

from engine.evaluate.intervals import intervals


def one(values, tasks=None, **more):
    column = np.asarray(values, dtype=float)[:, None]
    return intervals(column, ["x"], tasks or ["t"] * len(column), **more)["x"]


def test_a_mean_of_many_prompts_has_the_normal_interval():
    values = np.random.default_rng(0).normal(0.6, 0.2, 400)
    found = one(values)["all"]
    assert found["mean"] == pytest.approx(values.mean()) and found["prompts"] == 400
    half = 1.96 * values.std() / 400**0.5
    assert found["low"] == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert found["high"] == pytest.approx(values.mean() + half, abs=0.05 * half)


def test_a_few_skewed_prompts_have_the_interval_of_a_plain_loop():
    values = [0.0, 0.0, 0.0, 0.1, 0.9, 1.0, 0.0]
    rng = random.Random(1)
    means = sorted(statistics.fmean(rng.choices(values, k=7)) for _ in range(40_000))
    found = one(values)["all"]
    assert found["low"] == pytest.approx(means[1000], abs=0.02)
    assert found["high"] == pytest.approx(means[39_000], abs=0.02)


def test_true_means_are_covered_nineteen_times_in_twenty():
    rng = np.random.default_rng(5)
    covered = 0
    for _ in range(300):
        found = one(rng.uniform(size=50), resamples=400)["all"]
        covered += found["low"] <= 0.5 <= found["high"]
    assert 0.90 <= covered / 300 <= 0.98


def test_task_types_are_kept_apart_and_count_the_same_in_their_mean():
    values = np.array([[1.0, 0.0]] * 3 + [[0.0, 0.5]] * 9)
    found = intervals(values, ["a", "b"], ["few"] * 3 + ["many"] * 9)
    assert found["a"]["by_task"]["few"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "prompts": 3}
    assert found["b"]["by_task"]["many"] == {"mean": 0.5, "low": 0.5, "high": 0.5, "prompts": 9}
    assert found["a"]["all"]["mean"] == 0.25 and found["a"]["task_mean"]["mean"] == 0.5
    # Within a task type nothing varies, so the mean over task types does not either.
    assert found["a"]["task_mean"]["low"] == found["a"]["task_mean"]["high"] == 0.5
    assert found["a"]["all"]["low"] < 0.25 < found["a"]["all"]["high"]


def test_columns_share_their_draws_and_a_seed_repeats_them():
    values = np.random.default_rng(2).normal(size=(30, 1)).repeat(2, axis=1)
    found = intervals(values, ["a", "b"], ["t"] * 30)
    assert found["a"] == found["b"] == intervals(values, ["a", "b"], ["t"] * 30)["a"]
    assert found != intervals(values, ["a", "b"], ["t"] * 30, seed=1)


def test_large_files_are_drawn_in_parts_that_fit_memory(monkeypatch):
    from engine.evaluate import intervals as module

    values = np.random.default_rng(3).normal(size=50)
    whole = one(values)
    monkeypatch.setattr(module, "_INDICES", 50 * 7)
    parts = one(values)
    for key in ("low", "high"):
        assert parts["all"][key] == pytest.approx(whole["all"][key])


def test_bad_shapes_are_named():
    with pytest.raises(ValueError, match=r"values: wanted \(2, 1\).* got \(3, 1\)"):
        intervals(np.zeros((3, 1)), ["x"], ["t", "t"])
    with pytest.raises(ValueError, match="at least one row"):
        intervals(np.zeros((0, 1)), ["x"], [])
