"""The bench command's JSON and its checks."""

import copy
import json
import subprocess
import sys

import pytest
import torch

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


def test_rollout_suite_in_16_bits(capsys):
    flags = ["--dtype", "bfloat16", "--skip_mini", "--images", "2", "--repeats", "1"]
    main(["rollout", "--json", *flags])
    report = json.loads(capsys.readouterr().out)
    assert report["correct"] is True
    assert set(report["ratios"]) == {"vs_eager_loop", "vs_eager_unsplit", "vs_eager_fp32"}


def test_16_bit_rollouts_that_are_off_are_seen():
    policy = load_policy("tiny", dtype=torch.bfloat16)
    loop, exact = EagerLoop(policy), EagerLoop(copy.deepcopy(policy).float())
    prompts = rollout.distinct_prompts(policy, 2, 9)
    assert rollout.excess(policy, loop, exact, prompts, None) <= 1
    with torch.no_grad():
        policy.model.language_model.layers[-1].mlp.down_proj.weight.mul_(1.2)
    assert rollout.excess(policy, loop, exact, prompts, None) > 1
