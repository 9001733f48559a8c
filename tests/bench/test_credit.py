"""The figures of `python -m bench credit` against cases whose answer is known."""

import json
import math

import numpy as np
import pytest
import torch

from bench import __main__ as bench
from bench import credit
from engine.settings.errors import UserError
from engine.tiny.world import plan_text, read_plan


def test_variance_components():
    random = np.random.default_rng(0)
    plans = random.normal(size=(2000, 4, 1)) * 2
    pictures = random.normal(size=(2000, 4, 8))
    assert credit.variance_between(plans + pictures) == pytest.approx(0.8, abs=0.02)
    assert credit.variance_between(pictures) < 0.02
    assert credit.variance_between(plans + 0 * pictures) == pytest.approx(1)


def test_best_of_n_is_the_mean_over_all_subsets():
    reward = np.array([[[3.0, 1.0, 2.0, 0.0]]])
    score = np.array([[[10.0, 20.0, 30.0, 40.0]]])
    assert credit.best_of(reward, score, 4) == 10
    # Of six pairs three hold the first, two more the third, one the second and the last.
    assert credit.best_of(reward, score, 2) == pytest.approx((3 * 10 + 2 * 30 + 20) / 6)
    assert credit.best_of(reward, score, 1) == pytest.approx(score.mean())


def test_correlation_is_within_plans():
    reward = np.array([[[0.0, 1.0], [10.0, 11.0]]])
    assert credit.within_correlation(reward, np.array([[[5.0, 6.0], [1.0, 2.0]]])) == pytest.approx(
        1
    )
    assert credit.within_correlation(reward, np.array([[[6.0, 5.0], [9.0, 8.0]]])) == pytest.approx(
        -1
    )


def test_signal_share():
    torch.manual_seed(0)
    common, count = torch.randn(20_000), 200
    gradients = [common + 3 * torch.randn(20_000) for _ in range(count)]
    assert credit.signal_share(gradients) == pytest.approx(0.1, abs=0.01)
    assert abs(credit.signal_share([torch.randn(20_000) for _ in range(count)])) < 0.01


def test_a_plan_is_read_back():
    text = "large striped red star left, small plain blue circle upper right"
    assert plan_text(read_plan(text)) == text
    for wrong in ("", "red star", "large striped red star", "large striped red star nowhere"):
        assert read_plan(wrong) is None


def test_the_suite_on_the_embedded_model(capsys):
    flags = ["--count", "2", "--plans", "2", "--images", "4"]
    bench.main(["credit", "--json", *flags])
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["best_of_4"] >= row["best_of_2"] - 0.3 and 0 <= row["share_between_plans"] <= 1
    assert 0 <= row["rendered"] <= 1 and 1 <= row["distinct_plans"] <= 2
    assert math.isfinite(row["signal_plans"]) and math.isfinite(row["signal_images"])
    assert row["distance_within_plan"] < 1
    bench.main(["credit", "--json", "--count", "1", "--plans", "0", "--images", "2"])
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert "rendered" not in row and "signal_images" in row and "signal_plans" not in row


def test_a_picture_of_the_curves(tmp_path, monkeypatch):
    path = tmp_path / "c.png"
    with monkeypatch.context() as patch:
        patch.setattr(credit.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(UserError, match=r"--picture: needs pip install .*\[bench\]"):
            credit.Config(picture=str(path))
    pytest.importorskip("matplotlib")
    row = {"provider": "a", "score": 0.4, "best_of_2": 0.5, "best_of_4": 0.6, "rendered": 0.7}
    credit.draw_curves([row], 4, path)
    assert path.stat().st_size > 1000
