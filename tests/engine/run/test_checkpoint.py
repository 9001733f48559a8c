"""Checkpoints: bit-exact, whole after a kill, and clear about what is wrong."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.run.checkpoint import (
    atomic_write_text,
    latest_checkpoint,
    load_checkpoint,
    load_named_tensors,
    load_optimizer_tensors,
    optimizer_tensors,
    prune,
    remove_temporaries,
    save_checkpoint,
)
from engine.settings.errors import UserError


def save(run_dir: Path, step: int, value: float = 0.0) -> Path:
    tensors = {"model": {"w": torch.full((3, 5), value)}}
    return save_checkpoint(run_dir, step, tensors=tensors, state={"value": value})


def test_round_trip_is_bit_exact(tmp_path):
    tensors = {
        "model": {
            "bf16": torch.randn(4, 6).bfloat16(),
            "view": torch.randn(8, 6).T[2:4],
            "half": torch.randn(10)[:5],
            "nan": torch.tensor([float("nan"), -0.0]),
        },
        "rng": {"torch": torch.get_rng_state()},
        "empty": {},
    }
    path = save_checkpoint(tmp_path, 30, tensors=tensors, state={"rows": (1, 2), "x": 0.1})
    assert path == tmp_path / "checkpoints" / "step-000030" == latest_checkpoint(tmp_path)
    loaded, state = load_checkpoint(path)
    assert state == {"rows": [1, 2], "x": 0.1, "step": 30}
    assert loaded.keys() == tensors.keys()
    for group, named in tensors.items():
        assert loaded[group].keys() == named.keys()
        for name, tensor in named.items():
            got = loaded[group][name]
            assert got.dtype == tensor.dtype
            same = got.view(torch.uint8), tensor.contiguous().view(torch.uint8)
            assert torch.equal(*same), name


def test_latest_prune_and_replace(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    prune(tmp_path, 1)
    for step in (9, 10, 1_000_000):
        save(tmp_path, step)
    save(tmp_path, 10, 7.0)
    prune(tmp_path, 2)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-000010", "step-1000000"]
    assert load_checkpoint(tmp_path / "checkpoints" / "step-000010")[1]["value"] == 7.0
    assert latest_checkpoint(tmp_path).name == "step-1000000"


def test_incomplete_checkpoints_are_passed_over(tmp_path):
    kept = save(tmp_path, 1)
    truncated, stateless, gone = save(tmp_path, 2), save(tmp_path, 3), save(tmp_path, 4)
    with (truncated / "model.safetensors").open("r+b") as handle:
        handle.truncate(20)
    (stateless / "state.json").unlink()
    (gone / "model.safetensors").unlink()
    (tmp_path / "checkpoints" / "step-000005").mkdir()
    (tmp_path / "checkpoints" / ".tmp-6-1").mkdir()
    assert latest_checkpoint(tmp_path) == kept
    remove_temporaries(tmp_path)
    assert not (tmp_path / "checkpoints" / ".tmp-6-1").exists()


def test_a_replacement_cut_short_loses_nothing(tmp_path):
    path = save(tmp_path, 5, 1.0)
    old = path.rename(path.with_name(".old-5-123"))  # killed between the two renames
    assert latest_checkpoint(tmp_path) == old
    assert load_checkpoint(old)[1]["value"] == 1.0
    remove_temporaries(tmp_path)
    assert latest_checkpoint(tmp_path) == path


def test_damage_is_found_and_named(tmp_path):
    path = save(tmp_path, 1)
    file = path / "model.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[:-1] + b"\x01")
    with pytest.raises(UserError, match=f"^{file}: damaged"):
        load_checkpoint(path)
    file.unlink()
    with pytest.raises(UserError, match=f"^{file}: .*No such file"):
        load_checkpoint(path)
    state = json.loads((path / "state.json").read_text())
    state["files"]["../evil.safetensors"] = {"bytes": 0, "sha256": ""}
    for text in (json.dumps(state), "{", "[]"):
        (path / "state.json").write_text(text)
        with pytest.raises(UserError, match=f"^{path / 'state.json'}: "):
            load_checkpoint(path)


def test_unwritable_folder_is_named(tmp_path):
    (tmp_path / "run").write_text("a file where the run folder should be")
    with pytest.raises(UserError, match=f"^{tmp_path / 'run' / 'checkpoints'}: cannot write"):
        save(tmp_path / "run", 1)
    with pytest.raises(UserError, match="cannot be written"):
        atomic_write_text(tmp_path / "run" / "config.yaml", "x")


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    kept = save(tmp_path, 1, 4.0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # stands in for a full disk
    try:
        with pytest.raises(UserError, match=f"^{tmp_path / 'checkpoints'}: cannot write"):
            big = {"model": {"w": torch.zeros(100_000)}}
            save_checkpoint(tmp_path, 1, tensors=big, state={})
        atomic_write_text(tmp_path / "a.txt", "old")
        with pytest.raises(UserError, match="a.txt: cannot be written"):
            atomic_write_text(tmp_path / "a.txt", "x" * 200_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in kept.parent.iterdir()] == ["step-000001"]
    assert load_checkpoint(kept)[1]["value"] == 4.0
    assert (tmp_path / "a.txt").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "checkpoints"]


def test_state_that_is_not_json_writes_nothing(tmp_path):
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path, 1, tensors={}, state={"x": object()})
    assert list(tmp_path.iterdir()) == []


def trained(steps: int) -> tuple[torch.nn.Module, torch.optim.AdamW, list[str]]:
    """A small model, its AdamW after `steps` updates; the last parameter gets no gradient."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    names = [name for name, _ in model.named_parameters()]
    for step in range(steps):
        update(model, optimizer, step)
    return model, optimizer, names


def update(model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
    optimizer.zero_grad()
    model[0](x).pow(2).sum().backward()
    optimizer.step()


def test_optimizer_resumes_bit_exactly(tmp_path):
    whole, _, _ = trained(5)
    model, optimizer, names = trained(2)
    tensors = {
        "model": dict(model.named_parameters()),
        "optimizer": optimizer_tensors(optimizer, names),
    }
    path = save_checkpoint(tmp_path, 2, tensors=tensors, state={})
    loaded, _ = load_checkpoint(path)

    model, optimizer, names = trained(0)
    load_named_tensors(dict(model.named_parameters()), loaded["model"], source="m")
    load_optimizer_tensors(optimizer, names, loaded["optimizer"], source="o")
    assert "1.weight.exp_avg" not in loaded["optimizer"]
    for step in range(2, 5):
        update(model, optimizer, step)
    for wanted, got in zip(whole.parameters(), model.parameters(), strict=True):
        assert torch.equal(wanted, got)


def test_another_model_is_refused_by_name():
    model, optimizer, names = trained(1)
    parameters = dict(model.named_parameters())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    good = {name: torch.ones_like(p) for name, p in parameters.items()}
    bad = {
        "'1.bias' is missing": {k: v for k, v in good.items() if k != "1.bias"},
        "'extra' has no": good | {"extra": torch.ones(1)},
        r"'1.bias': shape must be \(3,\), got \(4,\)": good | {"1.bias": torch.ones(4)},
        "'1.bias': dtype": good | {"1.bias": torch.ones(3).double()},
    }
    for message, tensors in bad.items():
        with pytest.raises(UserError, match=f"^m.safetensors: {message}"):
            load_named_tensors(parameters, tensors, source="m.safetensors")
    assert all(torch.equal(before[name], p) for name, p in parameters.items())

    good = optimizer_tensors(optimizer, names)
    bad = {
        "'0.weight.exp_avg' is": {k: v for k, v in good.items() if k != "0.weight.exp_avg"},
        "'0.bias.step' is": {k: v for k, v in good.items() if k != "0.bias.step"},
        "'0.bias.exp_avg': shape": good | {"0.bias.exp_avg": torch.ones(9)},
    }
    for message, tensors in bad.items():
        with pytest.raises(UserError, match=f"^o.safetensors: {message}"):
            load_optimizer_tensors(optimizer, names, tensors, source="o.safetensors")
    assert optimizer_tensors(optimizer, names).keys() == good.keys()


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from engine.run.checkpoint import latest_checkpoint, load_checkpoint, prune, save_checkpoint

def save_forever(run_dir, first, pipe):
    for i in range(first, 10**9):
        tensors = {"a": {"w": torch.full((64, 65), float(i))}, "b": {"w": torch.full((9,), float(i))}}
        save_checkpoint(run_dir, i // 2, tensors=tensors, state={"i": i})  # each step twice
        os.write(pipe, b"%d\\n" % i)  # saved, and may be relied on
        prune(run_dir, 2)

run_dir = Path(sys.argv[1])
random.seed(0)
first, pieces = 0, set()
for kill in range(20):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        save_forever(run_dir, first, writer)
    os.close(writer)
    with open(reader) as pipe:
        saved = [int(pipe.readline())]  # at least one, however slow the machine
        time.sleep(random.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        saved += [int(line) for line in pipe]
    tensors, state = load_checkpoint(latest_checkpoint(run_dir))
    assert state["i"] >= saved[-1], (state, saved)
    assert state["step"] == state["i"] // 2
    assert all((t == state["i"]).all() for g in tensors.values() for t in g.values())
    first = state["i"] + 1
    pieces |= {p.name.split("-")[0] for p in (run_dir / "checkpoints").glob(".*")}
print(first, *pieces)
"""


def test_a_kill_at_any_moment_leaves_the_last_saved_checkpoint(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        check=False,
        cwd=Path(__file__).parents[3],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    saves, *pieces = done.stdout.split()
    assert int(saves) >= 20, done.stdout
    assert ".tmp" in pieces  # at least one kill came in the middle of a save
