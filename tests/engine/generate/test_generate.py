"""The command that draws pictures: what it writes, resumes, refuses, and how far along it is."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from engine.generate import __main__ as generate_command
from engine.generate.__main__ import GenerateConfig, main, sample_id
from engine.generate.pictures import Settings, generate, longest_plan
from engine.policy import load_policy
from engine.prompts.conversation import Conversation
from engine.prompts.data import load_template
from engine.rollout import sample_images
from engine.run import progress
from engine.run.progress import Progress
from engine.settings.errors import UserError, run_command
from engine.weights.fingerprint import checkpoint_fingerprint
from engine.weights.read import TINY

PROMPTS = ["two red stars", "a blue circle left of a green cross", "a/pink\\square", "one star"]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS))
    return str(path)


@pytest.fixture(scope="module")
def policy():
    return load_policy("tiny")


def run(prompts, out, *flags):
    main(["--prompts", prompts, "--out", str(out), "--num_generations", "2", *flags])


def records(out):
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


def tree(path):
    files = (f for f in sorted(path.rglob("*")) if f.is_file())
    return {str(f.relative_to(path)): f.read_bytes() for f in files}


def pixels(path):
    return np.asarray(Image.open(path))


def test_pictures_and_manifest_are_those_of_the_rollout(prompts, tmp_path, policy):
    run(prompts, tmp_path / "out", "--seed", "3", "--cfg_weight", "2", "--batch_size", "3")
    found = records(tmp_path / "out")
    assert [r["prompt"] for r in found] == [p for p in PROMPTS for _ in range(2)]
    assert len({r["settings"] for r in found}) == 1 and {r["seed"] for r in found} == {3}
    assert len({r["sample_id"] for r in found}) == 8
    conversation = Conversation(policy, load_template(TINY, None))
    for record in (found[0], found[5]):
        made = generate(
            policy,
            conversation,
            [record["prompt"]],
            torch.tensor([record["sample_id"]]),
            Settings(seed=3, max_completion_length=40, cfg_weight=2.0),
        )
        assert made.plans == [record["plan"]] and record["plan"]
        expected = made.pixels[0].permute(1, 2, 0).numpy() * 255
        assert np.abs(pixels(tmp_path / "out" / record["file"]) - expected).max() <= 0.51


def test_no_cot_asks_with_the_bare_prompt(prompts, tmp_path, policy):
    run(prompts, tmp_path / "out", "--no_cot")
    found = records(tmp_path / "out")
    assert all(r["plan"] is None for r in found)
    text = f"<|User|>: {PROMPTS[1]}\n\n<|Assistant|>:"
    ids = policy.tokenizer.encode(text, add_special_tokens=False)
    prompt = torch.tensor([policy.bos, *ids, policy.image_start])
    record = found[3]
    drawn = sample_images(
        policy, [prompt], cfg_weight=1.5, sample_ids=torch.tensor([record["sample_id"]])
    )
    expected = policy.decode_images(drawn.ids)[0].permute(1, 2, 0).numpy() * 255
    assert np.abs(pixels(tmp_path / "out" / record["file"]) - expected).max() <= 0.51


def test_noise_depends_on_prompt_and_picture_alone(prompts, tmp_path):
    """The same pictures but for rounding, whatever the batch and however many of a prompt."""
    run(prompts, tmp_path / "a", "--batch_size", "64")
    run(prompts, tmp_path / "b", "--batch_size", "3")
    main(["--prompts", prompts, "--out", str(tmp_path / "c"), "--num_generations", "1"])
    a, b, c = (records(tmp_path / name) for name in "abc")
    for key in ("plan", "sample_id", "file", "settings"):
        assert [r[key] for r in a] == [r[key] for r in b]
    assert [(r["plan"], r["sample_id"], r["file"]) for r in a[::2]] == [
        (r["plan"], r["sample_id"], r["file"]) for r in c
    ]
    ids = [sample_id(n, each) for each in (1, 3) for n in range(9)]
    assert ids[:9] == [65536 * n for n in range(9)] and ids[9:13] == [0, 1, 2, 65536]


def test_started_again_it_draws_only_batches_with_something_missing(prompts, tmp_path, monkeypatch):
    out, drawn = tmp_path / "out", []

    def counted(policy, conversation, texts, *more):
        drawn.append(len(texts))
        return generate(policy, conversation, texts, *more)

    monkeypatch.setattr(generate_command, "generate", counted)
    run(prompts, out, "--batch_size", "3")
    whole = tree(out)
    assert drawn == [3, 3, 2]
    (out / records(out)[4]["file"]).unlink()
    run(prompts, out, "--batch_size", "3")
    assert drawn == [3, 3, 2, 3] and tree(out) == whole
    monkeypatch.setattr(generate_command, "load_policy", None)  # a finished folder needs no model
    run(prompts, out, "--batch_size", "3")
    assert drawn == [3, 3, 2, 3] and tree(out) == whole


CHANGES = {
    "seed": ["--seed", "1"],
    "cfg_weight": ["--cfg_weight", "4"],
    "temperature": ["--temperature", "0.5"],
    "cot": ["--no_cot"],
    "layout": ["--layout", "t2i-compbench"],
    "num_generations": ["--num_generations", "3"],
    "max_completion_length": ["--max_completion_length", "7"],
    "reasoning": ["--reasoning_prompt_path", "{tmp}/reasoning.txt"],
    "prompts": ["--prompts", "{tmp}/other.txt"],
    "model": ["--model", "{tmp}/model"],
}


def test_settings_that_changed_are_refused_by_name(prompts, tmp_path, policy):
    (tmp_path / "reasoning.txt").write_text("say what {} shows")
    (tmp_path / "other.txt").write_text("\n".join([*PROMPTS[:3], "two stars"]))
    model = tmp_path / "model"
    model.mkdir()
    for file in TINY.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    out = tmp_path / "out"
    run(prompts, out)
    before = tree(out)
    for key, flags in CHANGES.items():
        given = [flag.replace("{tmp}", str(tmp_path)) for flag in flags]
        with pytest.raises(UserError, match=rf"^{out}: {key} was .* now .*; --overwrite") as caught:
            run(prompts, out, *given)
        assert "\n" not in str(caught.value)
    assert tree(out) == before
    run(prompts, out, "--seed", "1", "--overwrite")
    run(prompts, tmp_path / "fresh", "--seed", "1")
    assert tree(out) == tree(tmp_path / "fresh")


def test_a_killed_run_goes_on_to_the_same_files(prompts, tmp_path, capsys):
    def flags(out):
        given = ["--num_generations", "6", "--batch_size", "2", "--out", str(tmp_path / out)]
        return ["--prompts", prompts, *given]

    command = [sys.executable, "-m", "engine.generate", *flags("killed")]
    # Other tests may have changed this process' threads, and the rounding depends on them.
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
    manifest = tmp_path / "killed" / "manifest.jsonl"
    deadline = time.monotonic() + 240
    while not manifest.exists() or manifest.read_text().count("\n") < 4:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert 4 <= len(list((tmp_path / "killed" / "images").glob("*.png"))) < 24
    main(flags("killed"))
    main(flags("whole"))
    shown = capsys.readouterr()
    assert "whole: 24 pictures, 0 of them there before" in shown.out
    assert "24/24 images" in shown.err
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")


def test_layouts_on_disk(tmp_path, capsys):
    rows = [
        {
            "tag": "two_object",
            "include": [{"class": "star"}],
            "prompt": "two stars",
            "prompt_id": 9,
        },
        {"tag": "colors", "include": [], "prompt": "a/red star", "prompt_id": 4},
    ]
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    for layout, number in (("geneval", "2"), ("t2i-compbench", "2"), ("wise", "1")):
        out = tmp_path / layout
        main(["--prompts", str(file), "--out", str(out), "--no_cot", "--layout", layout]
             + ["--num_generations", number] * (layout != "wise"))  # fmt: skip
        names = set(tree(out)) - {"manifest.jsonl", "settings.json"}
        pictures = {r["file"] for r in records(out)}
        assert names - pictures == (
            {f"0000{i}/metadata.jsonl" for i in range(2)} if layout == "geneval" else set()
        )
        for name in pictures:
            assert Image.open(out / name).size == (64, 64)
    assert json.loads((tmp_path / "geneval/00001/metadata.jsonl").read_text()) == rows[1]
    assert (tmp_path / "wise/9.png").exists() and (tmp_path / "wise/4.png").exists()
    assert (tmp_path / "t2i-compbench/samples/a red star_000003.png").exists()
    note = capsys.readouterr().err
    assert "note: 1 prompts are no file name" in note and "'a/red star'" in note


def test_a_prompt_draws_a_grid(tmp_path, capsys):
    out = tmp_path / "quick"
    for _ in range(2):  # again into the same folder: it is a look, not a job
        main(["--prompt", PROMPTS[0], PROMPTS[3], "--num_generations", "2", "--out", str(out)])
    assert Image.open(out / "grid.png").width > 2 * 64
    found = json.loads((out / "plans.json").read_text())
    assert [r["prompt"] for r in found] == [PROMPTS[0]] * 2 + [PROMPTS[3]] * 2
    assert all(r["plan"] for r in found)
    assert "grid.png: 4 pictures" in capsys.readouterr().out
    assert set(tree(out)) == {"grid.png", "plans.json"}


BAD = {
    "both": (["--prompt", "a", "--prompts", "{tmp}/p.txt"], "either --prompt"),
    "neither": ([], "either --prompt"),
    "empty": (["--prompt", " "], "--prompt"),
    "layout of a grid": (["--prompt", "a", "--layout", "wise"], "--layout wise"),
    "unknown layout": (["--prompts", "{tmp}/p.txt", "--layout", "gen"], "geneval"),
    "two for wise": (["--prompts", "{tmp}/p.txt", "--layout", "wise", "--num_generations", "2"],
                     "num_generations must be 1"),
    "no metadata": (["--prompts", "{tmp}/p.txt", "--layout", "geneval"], "needs 'tag'"),
    "long prompt": (["--prompts", "{tmp}/p.txt", "--max_prompt_length", "2"], "max_prompt_length"),
    "long plan": (["--prompts", "{tmp}/p.txt", "--max_completion_length", "999"], "context"),
    "no file": (["--prompts", "{tmp}/none.csv"], "none.csv"),
    "no model": (["--prompts", "{tmp}/p.txt", "--model", "{tmp}/none"], "none"),
    "bad row": (["--prompts", "{tmp}/bad.jsonl"], "bad.jsonl:2"),
    "not a folder": (["--prompts", "{tmp}/p.txt", "--out", "{tmp}/p.txt"], "p.txt: Not a dir"),
    "no device": (["--prompts", "{tmp}/p.txt", "--device", "gpu"], "device must be auto"),
    "absent device": (["--prompts", "{tmp}/p.txt", "--device", "cuda:99"], "--device cuda:99"),
    "no slot": (["--prompt", "a", "--reasoning_prompt_path", "{tmp}/p.txt"], "p.txt"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_exit_code_2_and_no_output(case, tmp_path, monkeypatch, capsys):
    (tmp_path / "p.txt").write_text("a red star and a blue circle")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"promt": "b"}\n')
    flags, named = BAD[case]
    flags = [flag.replace("{tmp}", str(tmp_path)) for flag in flags]
    out = [] if "--out" in flags else ["--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["generate", *out, *flags])
    assert run_command(main) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and named in lines[0], lines
    assert not (tmp_path / "out").exists()


def test_weights_that_are_no_numbers_are_told_in_one_line(prompts, tmp_path, monkeypatch, policy):
    broken = load_policy("tiny")
    with torch.no_grad():
        broken.model.language_model.norm.weight.fill_(float("nan"))
    monkeypatch.setattr(generate_command, "load_policy", lambda *args, **more: broken)
    with pytest.raises(UserError, match=r"^--model tiny: logits of row \d+ .* not finite"):
        run(prompts, tmp_path / "out")


def test_defaults_follow_the_layout_and_the_context(policy):
    assert GenerateConfig(prompts="p").num_generations == 4
    assert GenerateConfig(prompts="p", layout="wise").num_generations == 1
    assert longest_plan(policy, None) == 40 and longest_plan(policy, 7) == 7
    policy.config.text_config.max_position_embeddings, kept = 16_384, policy.context_length
    assert longest_plan(policy, None) == 512
    policy.config.text_config.max_position_embeddings = kept


def test_fingerprint_follows_content_not_place(tmp_path):
    def folder(name, size, **bytes_at):
        path = tmp_path / name
        path.mkdir()
        (path / "config.json").write_text("{}")
        (path / "README.md").write_text(name)  # no part of the model
        content = bytearray(size)
        for at, value in bytes_at.items():
            content[int(at[1:])] = value
        (path / "model.safetensors").write_bytes(content)
        return checkpoint_fingerprint(path)

    assert folder("a", 100) == folder("b", 100) != folder("c", 101)
    assert folder("d", 100, _57=1) != folder("e", 100)
    large = 20 << 20
    assert folder("f", large) == folder("g", large) != folder("h", large, **{f"_{large - 1}": 1})
    with pytest.raises(UserError, match="none: no such checkpoint folder"):
        checkpoint_fingerprint(tmp_path / "none")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_shows_speed_and_time_left(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    with Progress(100, 20, stream=stream) as shown:
        now[0] += 5
        shown.advance(10)  # too soon for a line
        assert stream.getvalue() == ""
        now[0] += 15
        shown.advance(10)
        now[0] += 1
        shown.advance(60)
    # 20 in 20 seconds, not the 20 that were found; then the end.
    first, last = stream.getvalue().splitlines()
    assert first == "40/100 images, 1.00 images/s, 01:00 left"
    assert last.startswith("100/100 images, 3.81 images/s")


def test_progress_is_a_bar_on_a_terminal():
    stream = Terminal()
    with Progress(4, 1, stream=stream) as shown:
        shown.advance(3)
    assert "4/4" in stream.getvalue() and "image/s" in stream.getvalue()
