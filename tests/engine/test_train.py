"""The trainer as a user meets it: runs, resumes, stops, refuses, learns."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from engine.policy import load_policy
from engine.run.checkpoint import latest_checkpoint, load_checkpoint
from engine.settings.errors import UserError, run_command
from engine.settings.options import parse_args
from engine.settings.train import TrainConfig
from engine.train import Trainer, main, train

SMALL = [
    "--prompts_per_step=2",
    "--num_generations=2",
    "--eval_generations=0",
    "--reward_funcs=gdino",
    "--save_steps=1",
    "--sample_steps=100",
    "--threads=1",
    "--lr_scheduler_type=constant",  # a run may then be lengthened
]


def small(tmp_path, name, *extra):
    flags = [*SMALL, f"--output_dir={tmp_path}", f"--run_name={name}", *extra]
    return parse_args(TrainConfig, flags, description="")


def final_tensors(run_dir):
    tensors, state = load_checkpoint(latest_checkpoint(run_dir))
    return {f"{g}/{k}": v for g, named in tensors.items() for k, v in named.items()}, state


def metrics(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "per_s")
    return [{k: v for k, v in row.items() if not any(t in k for t in timed)} for row in rows]


def assert_same_run(a, b):
    (tensors_a, state_a), (tensors_b, state_b) = final_tensors(a), final_tensors(b)
    assert state_a == state_b
    assert tensors_a.keys() == tensors_b.keys()
    for key, tensor in tensors_a.items():
        assert torch.equal(tensor, tensors_b[key]), key
    assert metrics(a) == metrics(b)


def test_resumed_run_is_bit_identical(tmp_path):
    flags = ("--num_iterations=2", "--learning_rate=1e-3")
    train(small(tmp_path, "whole", "--max_steps=4", *flags))
    train(small(tmp_path, "parts", "--max_steps=2", *flags))
    train(small(tmp_path, "parts", "--max_steps=4", *flags, "--resume"))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_run_folder_holds_what_the_design_lists(tmp_path):
    flags = ["--eval_generations=1", "--eval_prompts=7", "--sample_steps=1"]
    train(small(tmp_path, "run", "--max_steps=1", *flags))
    run = tmp_path / "run"
    for name in ("config.yaml", "report.html", "summary.json", "samples/step-000001.png"):
        assert (run / name).stat().st_size > 0, name
    assert list((run / "tensorboard").iterdir())
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary["eval"]) == {"before", "after"}
    assert set(summary["eval"]["before"]["by_task"]) >= {"riddle", "spatial", "numeracy"}
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    wanted = """step loss reward reward_std rewards/gdino kl entropy clip_fraction policy_drift
        completion_length grad_norm lr images_per_s tokens_per_s seconds/rollout
        seconds/rewards_exposed seconds/train judge"""
    assert set(wanted.split()) <= set(row)
    assert row["policy_drift"] < 1e-4  # the trainer scores what the sampler drew
    assert row["clip_fraction"] == 0
    trained = load_policy(str(run / "policy"))
    assert not torch.equal(trained.lm_head.weight, load_policy("tiny").lm_head.weight)


def start(tmp_path, *extra):
    command = [sys.executable, "-m", "engine.train", *SMALL, f"--output_dir={tmp_path}", *extra]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def wait_for_steps(run_dir, steps, process):
    path = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not path.exists() or path.read_text().count("\n") < steps:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_interrupt_saves_and_the_run_goes_on(tmp_path):
    process = start(tmp_path, "--run_name=stopped", "--max_steps=500", "--save_steps=500")
    wait_for_steps(tmp_path / "stopped", 2, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "--resume" in errors and "Traceback" not in errors
    done = final_tensors(tmp_path / "stopped")[1]["step"]
    assert done >= 2
    more = f"--max_steps={done + 1}"
    train(small(tmp_path, "stopped", more, "--save_steps=500", "--resume"))
    train(small(tmp_path, "whole", more, "--save_steps=500"))
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_killed_run_goes_on_from_its_last_checkpoint(tmp_path):
    process = start(tmp_path, "--run_name=killed", "--max_steps=500")
    wait_for_steps(tmp_path / "killed", 2, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    done = final_tensors(tmp_path / "killed")[1]["step"]
    more = f"--max_steps={done + 2}"
    train(small(tmp_path, "killed", more, "--resume"))
    train(small(tmp_path, "whole", more))
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


BAD = {
    "misspelt flag": (["--max_step", "3"], "--max_steps"),
    "unknown reward": (["--reward_funcs", "hps", "gdinoo"], "gdino"),
    "impossible value": (["--num_generations", "1"], "num_generations"),
    "negative": (["--beta", "-1"], "beta"),
    "not a number": (["--max_steps", "many"], "--max_steps"),
    "no prompt file": (["--dataset_name", "nowhere.jsonl"], "nowhere.jsonl"),
    "malformed prompts": (["--dataset_name", "{tmp}/broken.jsonl"], "broken.jsonl:2"),
    "empty prompt": (["--dataset_name", "{tmp}/blank.jsonl"], "blank.jsonl:1"),
    "empty file": (["--dataset_name", "{tmp}/empty.jsonl"], "empty.jsonl"),
    "prompt too long": (["--dataset_name", "{tmp}/long.txt"], "context"),
    "over max_prompt_length": (["--max_prompt_length", "3"], "max_prompt_length"),
    "no model": (["--model", "nowhere"], "nowhere"),
    "resume nothing": (["--resume"], "--resume"),
    "expert whose file is missing": (["--gdino_ckpt_path", "x.pth"], "--gdino_ckpt_path"),
    "absent device": (["--device", "cuda:99"], "--device cuda:99"),
    "no hps file": (["--hps_ckpt_path", "x.pt", "--reward_funcs", "hps"], "--hps_ckpt_path"),
    "run folder is a file": (["--run_name", "taken"], "taken"),
    "bad config key": (["--config", "{tmp}/bad.yaml"], "bad.yaml:1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, tmp_path, monkeypatch, capsys):
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a red circle"}\n{"prompt": \n')
    (tmp_path / "blank.jsonl").write_text('{"prompt": "  "}\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "long.txt").write_text("a red circle and " * 60)
    (tmp_path / "bad.yaml").write_text("max_stepz: 3\n")
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "taken").write_text("not a folder")
    flags, named = BAD[case]
    if not any(f.startswith("--run_name") for f in flags):
        flags = [*flags, "--run_name", "fresh"]
    flags = [f.replace("{tmp}", str(tmp_path)) for f in flags]
    base = [f for f in SMALL if f.split("=")[0] not in flags]
    monkeypatch.setattr(sys, "argv", ["train", *base, f"--output_dir={runs}", *flags])
    assert run_command(main) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and named in lines[0], lines
    assert not (runs / "fresh").exists()
    assert (runs / "taken").read_text() == "not a folder"


def test_existing_run_is_not_overwritten(tmp_path):
    train(small(tmp_path, "run", "--max_steps=1"))
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="--resume"):
        train(small(tmp_path, "run", "--max_steps=1"))
    with pytest.raises(UserError, match="learning_rate"):
        train(small(tmp_path, "run", "--max_steps=2", "--learning_rate=1", "--resume"))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_checkpoint_of_another_shape_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    train(small(tmp_path, "run", "--max_steps=1"))
    file = tmp_path / "run" / "policy" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"model\.safetensors: 'lm_head\.weight': wanted shape"):
        load_policy(str(tmp_path / "run" / "policy"))


class Redness:
    """A toy expert: how much red a picture holds."""

    name = "redness"

    def score(self, prompts, images, metadata):
        return (images[:, 0] - images[:, 1:].mean(1)).mean((1, 2))


def test_loop_raises_a_toy_reward(tmp_path):
    from rewards import Ensemble, RewardPipeline

    rows = [{"prompt": p, "nouns": ["circle"]} for p in ("two circles", "one star", "a cross")]
    flags = ("--max_steps=8", "--num_generations=8", "--learning_rate=2e-3", "--threads=2")
    trainer = Trainer(small(tmp_path, "toy", *flags), rows, rows)
    trainer.ensemble = Ensemble([Redness()])
    with RewardPipeline(trainer.ensemble, "cpu") as pipeline:
        rewards = [float(trainer.step(step, pipeline)[0]["reward"]) for step in range(1, 13)]
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.01, rewards


def test_micro_batches_change_nothing_but_rounding(tmp_path):
    from rewards import RewardPipeline

    results = []
    for size in (0, 3):
        config = small(tmp_path, "micro", f"--micro_batch_size={size}", "--num_generations=4")
        trainer = Trainer(config, [{"prompt": "a red circle", "nouns": ["circle"]}], [])
        with RewardPipeline(trainer.ensemble, "cpu") as pipeline:
            found, made, scores = trainer.step(1, pipeline)
        assert len(scores.total) == len(made.plans) == 8
        results.append(found)
    for name in ("loss", "kl", "entropy", "grad_norm"):
        assert float(results[0][name]) == pytest.approx(float(results[1][name]), rel=1e-3, abs=1e-5)
