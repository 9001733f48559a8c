"""The ablation's figures and table from finished runs, and its splits."""

import json

import pytest

from bench import ablation
from engine.prompts.data import load_prompts
from engine.settings.errors import UserError
from engine.settings.options import parse_args
from engine.settings.train import TrainConfig

GAINS = {"semantic": (0.10, 0.3), "token": (0.05, 0.1), "both": (0.20, 0.2), "bare": (0.05, 0.0)}


def write_runs(root, gains=GAINS):
    """Two seeds, two prompts; the second prompt gains 0.04 more than the first."""
    for arm, (overall, riddle) in gains.items():
        for seed in (0, 1):
            folder = root / ablation.run_name(arm, seed)
            (folder / "eval").mkdir(parents=True)
            after = 0.4 + overall + 0.02 * seed
            held = {
                when: {
                    "mean": mean,
                    "by_task": {"color": {"mean": mean, "n": 2}, "riddle": {"mean": r, "n": 2}},
                }
                for when, mean, r in (("before", 0.4, 0.2), ("after", after, 0.2 + riddle))
            }
            (folder / "summary.json").write_text(json.dumps({"eval": held, "seconds": 120.0}))
            for when, scores in (("before", (0.4, 0.4)), ("after", (after - 0.02, after + 0.02))):
                rows = [{"prompt": p, "score": s} for p, s in zip("ab", scores, strict=True)]
                text = json.dumps({"rows": rows * 2})
                (folder / "eval" / f"{when}.json").write_text(text)


def test_figures_and_table_from_finished_runs(tmp_path, capsys):
    write_runs(tmp_path / "runs")
    out = tmp_path / "docs" / "ablation.md"
    flags = ["--seeds", "0", "1", "--output_dir", str(tmp_path / "runs"), "--out", str(out)]
    ablation.main([*flags, "--json"])
    figures = json.loads(capsys.readouterr().out)
    assert figures["both_gain"] == pytest.approx(0.21)
    assert figures["both_gain_by_seed"] == pytest.approx([0.20, 0.22])
    assert figures["both_gain_se"] == pytest.approx(0.04 / 2**0.5 / 2**0.5)
    assert figures["both_minus_semantic"] == pytest.approx(0.10)
    assert figures["both_minus_token"] == pytest.approx(0.15)
    assert figures["both_minus_token_se"] == pytest.approx(0, abs=1e-9)  # paired by prompt
    page = out.read_text()
    row = next(line for line in page.splitlines() if line.startswith("| both | 0.4"))
    assert row == "| both | 0.400 | 0.610 | +0.210 ± 0.020 (+0.200, +0.220) | +0.200 | 2.0 |"
    assert "* both minus semantic: +0.100 ± 0.000 (+0.100, +0.100)" in page
    assert "* token: `--train_levels token" in page


def test_a_run_without_evaluation_is_named(tmp_path):
    write_runs(tmp_path)
    (tmp_path / "token-1" / "summary.json").write_text('{"eval": {}}')
    with pytest.raises(UserError, match=r"token-1/summary\.json: wanted a run's evaluations"):
        ablation.main(["--seeds", "0", "1", "--output_dir", str(tmp_path), "--out", "unused.md"])


def test_settings_are_chosen_on_training_prompts_alone(tmp_path):
    flags = ablation._validation(tmp_path)
    fit, scored = (load_prompts(flags[i]) for i in (1, 3))
    train = [row["prompt"] for row in load_prompts("tiny")]
    assert sorted(r["prompt"] for r in fit + scored) == sorted(train)
    held_out = {row["prompt"] for row in load_prompts("tiny:heldout")}
    assert not held_out & {row["prompt"] for row in scored}
    assert {r["task_type"] for r in scored} == {r["task_type"] for r in fit}


@pytest.mark.parametrize("arm", ablation.ARMS)
def test_every_arm_is_a_training_of_64_pictures_a_step(arm):
    config = parse_args(TrainConfig, ablation.ARMS[arm], description="")
    assert config.images_per_step == 64


def test_unknown_arms_are_refused():
    with pytest.raises(UserError, match=r"--arms: unknown 'tokens' \(nearest: token\)"):
        ablation.main(["--arms", "tokens"])
