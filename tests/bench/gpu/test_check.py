"""The GPU check's logic at tiny shapes: what it measures on a GPU is not measured here."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.gpu import check as gpu_check
from bench.gpu import loss, ops, parity, rewards
from bench.gpu.case import Step, largest
from bench.gpu.models import Plan, Shape, prompts_of, random_policy
from bench.gpu.rollout import ModelCheck, loop_seconds
from bench.gpu.timing import median_seconds

TINY = Shape(
    name="tiny",
    width=32,
    intermediate=48,
    layers=1,
    heads=2,
    kv_heads=1,
    image_vocab=32,
    text_vocab=64,
    grid=2,
)
PLAN = Plan(sizes=(2, 1), prompt=5, window=1, checked=2, dtype=torch.float32, chunk_rows=2)


def steps(device):
    return (
        Step(
            shape=TINY,
            images=2,
            dtype=torch.float32,
            device=torch.device(device),
            prefix=3,
            suffix=5,
            step=2,
        ),
    )


def rows_of(items):
    return [row for label, make in items for row in gpu_check.attempt(label, make)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_and_exit_code_2():
    command = [sys.executable, "-m", "bench", "gpu_check", "--json"]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 2 and answer.stdout == ""
    assert answer.stderr.splitlines() == [
        "error: gpu_check needs a CUDA device, and torch sees none"
    ]


def test_every_op_is_held_against_fp64_and_timed(interpreter, device):
    rows = rows_of(ops.items(torch.device(device), steps(device), copy_megabytes=1))
    names = {"rms_norm", "swiglu", "kv_append", "decode_attention", "cfg_sample", "sample_step"}
    assert {r["op"] for r in rows} == names | {"copy", "head_sample", "addmm + sample_step"}
    for row in rows[1:]:
        assert row["correct"] and row["max_error"] <= row["allowed_error"], row
        assert row["us"] > 0 and row["share_of_copy"] > 0


def test_a_wrong_op_has_no_speed(device, monkeypatch):
    right = ops.swiglu
    monkeypatch.setattr(ops, "swiglu", lambda x, out: right(x, out=out).mul_(1.01))
    (row,) = [
        row
        for row in rows_of(ops.items(torch.device(device), steps(device), copy_megabytes=1))
        if row["op"] == "swiglu"
    ]
    assert row["correct"] is False and "us" not in row


def test_nan_is_no_small_error():
    one, nan = torch.ones(2), torch.tensor([1.0, torch.nan])
    error, allowed = largest((nan, one), (one, one), (one.double(), one.double()), torch.float32)
    assert not error <= allowed


def loss_items(device, dtype=torch.float32):
    return loss.items(torch.device(device), {"tiny": TINY}, dtype=dtype, rows=8)


def test_the_loss_is_held_against_fp64_and_timed(interpreter, device):
    rows = rows_of(loss_items(device))
    assert [row["head"] for row in rows] == ["image", "image guided", "text"]
    assert [row["vocabulary_gemms"] for row in rows] == [2, 2, 3]
    for row in rows:
        assert row["correct"] and row["error_over_allowed"] <= 1, row
        assert row["share_of_gemms"] == row["gemms_ms"] / row["ms"] > 0
    found = gpu_check.ratios(rows)
    assert found["tiny_image_guided_loss_share_of_gemms"] == rows[1]["share_of_gemms"]
    assert found["tiny_text_loss_logits_over_ours"] == rows[2]["logits_ms"] / rows[2]["ms"]


def test_guided_activations_of_16_bits_are_two_gemms(device):
    heads = [label for label, _ in loss_items(device, torch.bfloat16)]
    assert heads == ["loss tiny image", "loss tiny image guided", "loss tiny text"]
    settings = {"model": "tiny", "name": "", "rows": 4, "vocab": 8, "width": 4, "device": device}
    for guided, trainable, count in ((False, False, 2), (True, False, 3), (True, True, 5)):
        head = loss.Head(guided=guided, trainable=trainable, dtype=torch.bfloat16, **settings)
        assert loss.gemm_count(head) == count


@pytest.mark.parametrize("wrong", ["logprobs", "gradient", "last chunk"])
def test_a_wrong_loss_has_no_speed(device, monkeypatch, wrong):
    right = loss.linear_grpo_loss

    def off(hidden, weight, targets, advantages, *, chunk_rows=None, **given):
        if wrong == "gradient":
            hidden = hidden * 1.01 - (hidden * 0.01).detach()  # the value stays
        if wrong == "last chunk" and chunk_rows is not None:
            advantages = torch.where(torch.arange(len(targets)) < 2 * chunk_rows, advantages, 0)
        output = right(hidden, weight, targets, advantages, chunk_rows=chunk_rows, **given)
        shift = 0.01 if wrong == "logprobs" else 0
        return output._replace(logprobs=output.logprobs + shift)

    monkeypatch.setattr(loss, "linear_grpo_loss", off)
    for row in rows_of(loss_items("cpu")):
        assert row["correct"] is False and "ms" not in row and "error" not in row


def test_parity(device):
    rows = rows_of(parity.items(torch.device(device), PLAN, {"tiny": TINY}))
    assert len(rows) == 2 and all(row["correct"] for row in rows), rows
    assert rows[0]["tokens"] == 6 * 4 and rows[0]["different_tokens"] == 0


def test_experts_are_held_against_the_cpu_and_run_beside_the_main_work(device):
    found = rows_of(rewards.items(torch.device(device), experts=("hps", "git"), images=2))
    assert [row.get("expert") for row in found] == ["hps", "git", None]
    assert all(row["correct"] for row in found)
    assert all(row["images_per_s"] > 0 and row["batched_vs_single"] > 0 for row in found[:2])
    assert found[2]["reward_seconds"] > 0 and found[2]["main_seconds"] > 0
    assert gpu_check.ratios(found).keys() == {"rewards_hidden_share"}


def test_an_expert_that_scores_otherwise_has_no_speed(device, monkeypatch):
    write = rewards.reward_models.write

    def other(name, folder):
        made = write(name, folder)

        def load(**options):
            expert = made(**options)
            if options:
                score = expert.score
                monkeypatch.setattr(expert, "score", lambda *batch: score(*batch) + 0.01)
            return expert

        return load

    monkeypatch.setattr(rewards.reward_models, "write", other)
    (row,) = rewards.expert_rows("hps", torch.device(device))
    assert not row["correct"] and "images_per_s" not in row


def test_rollouts_of_a_model(device):
    check = ModelCheck(TINY, PLAN, torch.device(device))
    rows = rows_of(check.items())
    assert not [row for row in rows if "error" in row]
    timed = [(row["provider"], row["images"]) for row in rows if "provider" in row]
    peers = ("ours", "eager_loop", "eager_unsplit", "static_cache")
    assert timed == [(p, n) for p in peers for n in (2, 1)] + [
        ("ours, cuBLAS head", 2),
        ("ours, 8 images a prompt", 2),
        ("eager_loop in full", 1),
    ]
    by = {(row["provider"], row["images"]): row for row in rows if "provider" in row}
    assert by["ours", 2]["step_over_roofline"] > 0 and by["ours", 2]["correct"]
    # Two images are two chunks of two rows: twice the one chunk that was timed.
    assert by["eager_loop", 2]["seconds"] == 2 * by["eager_loop", 1]["seconds"]
    assert "2 chunks of 2 rows, one timed" in by["eager_loop", 2]["timed"]
    assert by["eager_unsplit", 1]["seconds"] == by["eager_loop", 1]["seconds"]
    assert gpu_check.ratios(rows).keys() == {
        *(f"tiny_{n}_vs_{peer}" for n in (1, 2) for peer in peers[1:]),
        *(f"tiny_{n}_step_over_roofline" for n in (1, 2)),
    }


def test_a_model_that_is_wrong_has_no_speed(device, monkeypatch):
    check = ModelCheck(TINY, PLAN, torch.device(device))
    check.prepare()
    right = check._forward
    monkeypatch.setattr(
        check, "_forward", lambda policy, *a: right(policy, *a) + (policy is check.policy)
    )
    assert check.drift()[0]["correct"]  # the eager forward is worse than ours
    monkeypatch.setattr(check, "_forward", lambda *a: right(*a) + 1)
    assert not check.drift()[0]["correct"]
    assert check.ours(2).keys().isdisjoint({"seconds", "step_ms"})


def test_roofline_counts_weights_and_context(device):
    check = ModelCheck(TINY, PLAN, torch.device(device))
    check.prepare()
    check.rate = 1.0
    layer = 32 * (32 + 2 * 16) + 32 * 32 + 3 * 32 * 48 + 2 * 32
    head = 32 * 32 + 32 + 32 * 32 + 32
    # Two prompts and the unconditional one of 4 tokens; four rows of 2.5 suffix tokens on average.
    tokens = 3 * 4 + 4 * 2.5
    assert check.roofline(2, 1) == 4 * (layer + head + tokens * 2 * 16)


def test_loop_steps_are_timed_one_by_one(device):
    policy = random_policy(TINY, torch.float32, torch.device(device))
    from bench.gpu.models import peer_loop

    loop = peer_loop(policy)
    assert len(loop_seconds(loop, prompts_of(policy, 2, 5), 3)) == 3
    assert loop.policy is policy


def test_median_seconds_of_calls(device):
    calls = []
    seconds = median_seconds([lambda: calls.append(1)] * 2, torch.device("cpu"))
    assert seconds >= 0 and len(calls) == 6


# The parent's part: rows as they come, processes that fail or hang


def script(*lines):
    return [sys.executable, "-uc", "; ".join(lines)]


def said(**row):
    return f"print('{json.dumps({'part': 'ops', **row})}')"


@pytest.fixture
def results(tmp_path):
    return gpu_check.Results(tmp_path / "out" / "check.json", {"gpu": "none"})


def saved(results):
    return json.loads(results.path.read_text())


def test_rows_are_kept_as_they_come(results):
    row = {"provider": "ours", "model": "7b", "images": 8, "seconds": 2.0, "correct": True}
    peer = {"provider": "eager_loop", "model": "7b", "images": 8, "seconds": 9.0}
    lines = said(items=["a", "b"]), said(**row), said(done="a"), said(**peer), said(done="b")
    gpu_check.run_part("ops", script(*lines), 20, results)
    report = saved(results)
    assert report["correct"] and report["left_out"] == []
    assert report["ratios"] == {"7b_8_vs_eager_loop": 4.5}
    assert [r.get("provider") for r in report["rows"]] == ["ours", "eager_loop", None]
    assert not list(results.path.parent.glob("*.tmp"))


def test_a_part_that_hangs_is_ended_and_what_it_left_is_listed(results, monkeypatch):
    monkeypatch.setattr(gpu_check, "GRACE", 0)
    lines = said(items=["a", "b", "c"]), said(correct=True), said(done="a"), "import time"
    started = time.monotonic()
    gpu_check.run_part("ops", script(*lines, "time.sleep(60)"), 3, results)
    assert time.monotonic() - started < 30
    report = saved(results)
    assert report["left_out"] == ["ops: b (ended by force)", "ops: c (ended by force)"]
    assert report["correct"]


def test_a_part_that_dies_is_reported(results):
    gpu_check.run_part(
        "ops", script(said(correct=True), "raise SystemExit('no driver')"), 20, results
    )
    report = saved(results)
    assert report["correct"] is False
    assert report["rows"][1]["error"] == "exit code 1: no driver"


def test_an_item_that_raises_is_a_row_and_the_next_one_runs(capsys):
    def broken():
        raise RuntimeError("bad shape\nmore")

    gpu_check.work("ops", 60, [("x", broken), ("y", lambda: [{"correct": True}])])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == {"part": "ops", "items": ["x", "y"]}
    assert rows[1]["error"] == "RuntimeError: bad shape" and rows[1]["correct"] is False
    assert rows[3] == {"part": "ops", "correct": True}


def test_items_after_the_deadline_are_left_out(capsys, results):
    gpu_check.work("ops", -1, [("x", lambda: [{"correct": True}])])
    for line in capsys.readouterr().out.splitlines():
        for row in gpu_check.Said().read(line) if "left_out" in line else []:
            results.add(row)
    assert saved(results)["left_out"] == ["ops: x (no time)"] and not saved(results)["correct"]


def test_test_verdicts_of_both_formats(results):
    lines = (
        "tests/test_a.py::test_x[1 2] PASSED [ 10%]",
        "[gw1] [ 20%] FAILED tests/test_a.py::test_y ",
        "tests/test_a.py::test_z SKIPPED (no GPU) [100%]",
    )
    heard = gpu_check.Said()
    for line in lines:
        assert heard.read(line) == []
    row = gpu_check.tests_row(heard.verdicts, 1)
    assert (row["passed"], row["failed"], row["skipped"], row["correct"]) == (1, 1, 1, False)
    assert row["failures"] == ["tests/test_a.py::test_y"]
    assert gpu_check.tests_row({"t": "PASSED"}, 0)["correct"]
    assert (
        not gpu_check.tests_row({}, 0)["correct"]
        and not gpu_check.tests_row({"t": "PASSED"}, 2)["correct"]
    )


def test_commands_name_real_files_and_parts():
    words = gpu_check.command("tests", 9.0)
    places = [Path(word) for word in words if "tests/" in word]
    assert len(places) == 3 and all(place.exists() for place in places)
    assert gpu_check.command("7b", 9.4)[1:] == ["-m", "bench.gpu.check", "7b", "9"]
    labels = [label for label, _ in gpu_check.items_of("loss", torch.device("cpu"))]
    assert "loss 7b image guided" in labels and len(labels) == 6
    labels = [label for label, _ in gpu_check.items_of("7b", torch.device("cpu"))]
    assert {"ours 64", "eager_loop 64", "eager_unsplit 64", "static_cache 64"} <= set(labels)
