"""The bench command's JSON, its checks, and the ablation's table."""

import json
import subprocess
import sys

import pytest
import torch

from bench import ablation
from bench.__main__ import main, table
from bench.rollout import suite as rollout
from bench.rollout.eager_loop import EagerLoop
from engine.policy import load_policy
from engine.settings.errors import UserError


@pytest.fixture(scope="module")
def policy():
    return load_policy("tiny", dtype=torch.float32)


@pytest.fixture(scope="module")
def loop(policy):
    return EagerLoop(policy)


def test_rollout_suite_prints_one_json_object(capsys):
    main(["rollout", "--json", "--skip_mini", "--images", "2", "--repeats", "1"])
    report = json.loads(capsys.readouterr().out)
    assert report["suite"] == "rollout" and report["correct"] is True
    assert {"cpu", "cores", "threads", "torch", "transformers", "commit"} <= report[
        "machine"
    ].keys()
    assert [row["provider"] for row in report["rows"]] == ["ours", "eager_loop", "eager_unsplit"]
    assert all(row["images_per_s"] > 0 and "2 images" in row["shape"] for row in report["rows"])
    assert report["ratios"].keys() == {"vs_eager_loop", "vs_eager_unsplit"}
    assert "vs_eager_loop" in table(report)


def test_unknown_suite_is_one_line_and_exit_code_2():
    command = [sys.executable, "-m", "bench", "rolout"]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 2
    assert answer.stderr.splitlines() == ["error: unknown suite 'rolout' (nearest: rollout)"]


def test_unknown_flag_names_the_nearest():
    with pytest.raises(UserError, match=r"--imags .*--images"):
        main(["rollout", "--imags", "2"])


def test_engines_agree_chunk_by_chunk(policy, loop):
    prompts = rollout.distinct_prompts(policy, 3, 9)
    assert all(e <= 1 for e in rollout.disagreement(policy, loop, prompts, chunk_rows=4))


def test_other_weights_are_seen_and_carry_no_speed(policy, monkeypatch):
    def spoilt(policy):
        loop = EagerLoop(policy)
        loop.llama.layers[-1].mlp.down_proj.weight.data.mul_(1.2)
        return loop

    monkeypatch.setattr(rollout, "EagerLoop", spoilt)
    prompts = rollout.distinct_prompts(policy, 2, 9)
    rows, ratios = rollout.compare(policy, prompts, "tiny", repeats=1, checked=2, unsplit=False)
    assert [row["correct"] for row in rows] == [False, False]
    assert not any("seconds" in row or "images_per_s" in row for row in rows) and ratios == {}


def test_eager_loop_samples_every_image_once(policy, loop):
    prompts = rollout.distinct_prompts(policy, 3, 9)
    ids = loop.sample(prompts, chunk_rows=4)
    assert ids.shape == (3, policy.image_tokens)
    assert 0 <= ids.min() and ids.max() < policy.config.vq_config.num_embeddings


def summary(before, after, riddle):
    held = {
        when: {"mean": mean, "by_task": {"color": {"mean": mean, "n": 4}, "riddle": r}}
        for when, mean, r in (
            ("before", before, {"mean": 0.2, "n": 4}),
            ("after", after, {"mean": 0.2 + riddle, "n": 4}),
        )
    }
    return {"eval": held, "seconds": 120.0}


def write_runs(root, gains):
    for level, (overall, riddle) in gains.items():
        for seed in (0, 1):
            folder = root / ablation.run_name(level, seed)
            folder.mkdir(parents=True)
            held = summary(0.4, 0.4 + overall + 0.02 * seed, riddle)
            (folder / "summary.json").write_text(json.dumps(held))


def test_ablation_table_from_finished_runs(tmp_path):
    gains = {"semantic": (0.10, 0.3), "token": (0.05, 0.1), "both": (0.20, 0.2)}
    write_runs(tmp_path / "runs", gains)
    out = tmp_path / "docs" / "ablation.md"
    flags = ["--seeds", "0", "1", "--output_dir", str(tmp_path / "runs"), "--out", str(out)]
    ablation.main(flags)
    page = out.read_text()
    row = next(line for line in page.splitlines() if line.startswith("| both | 0.4"))
    assert row == (
        "| both | 0.400 | 0.610 | +0.210 (+0.200, +0.220) | +0.200 (+0.200, +0.200) | 2.0 |"
    )
    assert "by mean gain: both, semantic, token; both gains more than semantic on 2 of 2" in page
    assert "On `riddle` prompts, by mean gain: semantic, both, token" in page


def test_ablation_names_a_summary_without_evaluation(tmp_path):
    gains = {"semantic": (0.1, 0.1), "token": (0.1, 0.1), "both": (0.1, 0.1)}
    write_runs(tmp_path, gains)
    (tmp_path / "token-1" / "summary.json").write_text('{"eval": {}}')
    with pytest.raises(UserError, match=r"token-1/summary\.json: wanted a run's summary"):
        ablation.main(["--seeds", "0", "1", "--output_dir", str(tmp_path), "--out", "unused.md"])
