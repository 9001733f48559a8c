"""Training by level: credit, weights, beta, no plans; and what the metrics say of each level."""

import json
import math

import pytest
import torch

from engine.evaluate.judge import diversity
from engine.train import Trainer, train
from rewards import Ensemble, RewardPipeline
from tests.engine.test_train import Redness, assert_same_run, small

ROWS = [{"prompt": p, "nouns": ["circle"]} for p in ("two circles", "a red circle", "a cross")]


def steps(tmp_path, *flags: str, count: int = 1):
    config = small(tmp_path, "run", "--max_steps=3", "--num_generations=4", *flags)
    trainer = Trainer(config, ROWS, ROWS)
    trainer.ensemble = Ensemble([Redness()])
    with RewardPipeline(trainer.ensemble, "cpu") as pipeline:
        found = [trainer.step(step, pipeline) for step in range(1, count + 1)]
    return trainer, [f[0] for f in found], found[-1][1]


def test_metrics_by_level_add_up(tmp_path):
    flags = ("--loss_type=level", "--level_weights", "semantic=1", "token=0.25")
    _, (row,), _ = steps(tmp_path, *flags)
    for name in ("kl", "entropy", "clip_fraction", "policy_drift"):
        parts = [float(row[f"{name}/{level}"]) for level in ("semantic", "token")]
        assert float(row[name]) == pytest.approx(
            (parts[0] + 0.25 * parts[1]) / 1.25, rel=1e-5, abs=1e-6
        )
    shares = [float(row[f"gradient_share/{level}"]) for level in ("semantic", "token")]
    assert sum(shares) == pytest.approx(1) and min(shares) > 0
    assert {"zero_std_groups/semantic", "zero_std_groups/token"} <= set(row)


def test_a_level_s_weight_is_its_share_of_the_gradient(tmp_path):
    def share(weight: str) -> float:
        flags = ("--loss_type=level", "--level_weights", "semantic=1", f"token={weight}")
        _, (row,), _ = steps(tmp_path, *flags, "--beta=0")
        return float(row["gradient_share/token"])

    small_share, large = share("0.01"), share("1")
    ratio = (large / (1 - large)) / (small_share / (1 - small_share))
    assert ratio == pytest.approx(1e4, rel=0.05)


def test_without_plans(tmp_path):
    """Training and both evaluations go from the bare prompt to the picture."""
    flags = ["--plans=off", "--max_steps=1", "--eval_generations=2", "--eval_prompts=7"]
    train(small(tmp_path, "run", *flags))
    run = tmp_path / "run"
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert row["completion_length"] == 0 and "kl/semantic" not in row and "kl/token" in row
    summary = json.loads((run / "summary.json").read_text())["eval"]["after"]
    assert summary["diversity"]["distinct_plans"] == 0.5  # none, twice
    rows = json.loads((run / "eval/after.json").read_text())["rows"]
    assert {row["plan"] for row in rows} == {""}
    trainer, _, made = steps(tmp_path, "--plans=off")
    bare = [trainer.conversation.stage2(row["prompt"], None).tolist() for row in ROWS]
    assert all(prompt.tolist() in bare for prompt in made.stage2)


def test_beta_follows_the_kl_that_is_asked_for_and_is_resumed(tmp_path):
    flags = ("--kl_target=1e-9", "--learning_rate=1e-3", "--beta=0.1")
    trainer, rows, _ = steps(tmp_path, *flags, count=3)
    # Step 1's KL is that of an untrained policy, rounding; then it is far above the target.
    assert rows[2]["beta/token"] == pytest.approx(rows[1]["beta/token"] * 1.02, rel=1e-6)
    assert trainer.learner.beta["semantic"] == rows[2]["beta/semantic"]
    _, rows, _ = steps(tmp_path, "--kl_target=1e9", "--beta=0.1", count=1)
    assert rows[0]["beta/token"] == pytest.approx(0.1 * 0.98)
    more = ("--learning_rate=1e-3", "--kl_target=1e-9")
    train(small(tmp_path, "whole", "--max_steps=3", *more))
    train(small(tmp_path, "parts", "--max_steps=2", *more))
    train(small(tmp_path, "parts", "--max_steps=3", *more, "--resume"))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_groups_without_variance_can_be_left_out(tmp_path, monkeypatch):
    class Half:
        """Scores the first prompt's pictures all the same."""

        name = "half"

        def score(self, prompts, images, metadata):
            values = torch.arange(len(prompts), dtype=torch.float32)
            return torch.where(torch.tensor([p == prompts[0] for p in prompts]), 0.5, values)

    found = {}
    for choice in ("off", "skip"):
        flags = ("--num_generations=4", "--loss_type=level", f"--dynamic_sampling={choice}")
        config = small(tmp_path, choice, *flags)
        trainer = Trainer(config, ROWS, ROWS)
        trainer.ensemble.experts[0] = Half()
        trainer.ensemble.weights = {"half": 1.0}
        credit, seen = trainer.learner.credit, []
        monkeypatch.setattr(
            trainer.learner,
            "credit",
            lambda e, c, seen=seen, credit=credit: seen.append((e, credit(e, c))),
        )
        with RewardPipeline(trainer.ensemble, "cpu") as pipeline:
            row, _, _ = trainer.step(1, pipeline)
        assert row["zero_std_groups/token"] == 0.5
        found[choice] = seen[0][0].levels[1].weights
    assert (found["off"] > 0).all()
    assert not found["skip"][:4].any()
    torch.testing.assert_close(found["skip"][4:], 2 * found["off"][4:])


def test_groups_without_variance_can_be_drawn_again(tmp_path):
    """What is drawn again is new, stands in its place, and is what trains; the rest is as it was."""

    class Once:
        """The first prompt's pictures score the same, the first time."""

        name, calls = "once", 0

        def score(self, prompts, images, metadata):
            self.calls += 1
            values = torch.arange(len(prompts), dtype=torch.float32)
            same = torch.tensor([p == prompts[0] for p in prompts]) & (self.calls == 1)
            return torch.where(same, 0.5, values)

    rows, made = {}, {}
    for choice in ("off", "resample"):
        flags = ("--max_steps=2", "--num_generations=4", f"--dynamic_sampling={choice}")
        trainer = Trainer(small(tmp_path, choice, *flags), ROWS, ROWS)
        trainer.ensemble.experts[0] = Once()
        trainer.ensemble.weights = {"once": 1.0}
        with RewardPipeline(trainer.ensemble, "cpu") as pipeline:
            rows[choice], made[choice], _ = trainer.step(1, pipeline)
    assert rows["off"]["resampled_groups"] == 0 and rows["off"]["zero_std_groups"] == 0.5
    assert rows["resample"]["resampled_groups"] == 1 and rows["resample"]["zero_std_groups"] == 0
    ids = {choice: found.image.ids for choice, found in made.items()}
    assert not ids["off"][:4].equal(ids["resample"][:4]) and ids["off"][4:].equal(
        ids["resample"][4:]
    )
    assert made["off"].plans[4:] == made["resample"].plans[4:]
    # The sampler's log-probs stand beside their tokens still.
    assert float(rows["resample"]["policy_drift"]) < 1e-4


@pytest.mark.parametrize(
    "flags",
    [
        ["--advantages=nested", "--num_generations=2", "--images_per_plan=2"],
        ["--token_weighting=guidance"],
        ["--token_weighting=entropy", "--token_weighting_top=0.25"],
        ["--advantage_scale=expert", "--advantage_baseline=leave_one_out"],
    ],
)
def test_every_setting_trains(tmp_path, flags):
    _, rows, _ = steps(tmp_path, *flags, count=2)
    assert all(math.isfinite(float(r["loss"])) and float(r["grad_norm"]) > 0 for r in rows)


def test_diversity():
    pixels = torch.zeros(4, 3, 8, 8)
    pixels[1], pixels[3] = 0.5, 0.1
    found = diversity(["a", "b", "c", "c"], pixels, 2)
    assert found["distinct_plans"] == 0.75
    assert found["pixel_distance"] == pytest.approx(0.3)
