"""Writing checkpoints: nothing of a stranger's is replaced, and a failure harms nothing."""

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import engine.weights.save
from engine.policy import load_policy, save_policy
from engine.settings.errors import UserError
from engine.weights.save import write_policy
from tests.engine.weights.original_layout import edit_weights, small_model, write_original


@pytest.fixture
def folder(tmp_path) -> Path:
    """A good checkpoint in the original layout."""
    write_original(tmp_path / "checkpoint", small_model(layers=1))
    return tmp_path / "checkpoint"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_only_a_folder_of_ours_is_replaced(folder, tmp_path):
    policy = load_policy(str(folder))
    (tmp_path / "empty").mkdir()
    save_policy(policy, tmp_path / "empty")
    save_policy(policy, tmp_path / "empty", layout="transformers")
    assert not (tmp_path / "empty" / "preprocessor_config.json").exists()
    before = contents(folder)
    with pytest.raises(UserError, match="config.json"):
        save_policy(policy, folder)
    (tmp_path / "empty" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="notes.txt"):
        save_policy(policy, tmp_path / "empty")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="not a folder"):
        save_policy(policy, tmp_path / "file")
    (tmp_path / "listed").mkdir()
    (tmp_path / "listed" / "saved_policy.json").write_text('{"files": 3}')
    (tmp_path / "listed" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="thesis.txt"):
        save_policy(policy, tmp_path / "listed")
    assert contents(folder) == before


def test_links_are_followed_only_where_the_user_typed_one(folder, tmp_path):
    policy = load_policy(str(folder))
    out, link = tmp_path / "out", tmp_path / "link"
    save_policy(policy, out)
    link.symlink_to(out)
    siblings = sorted(p.name for p in tmp_path.iterdir())
    assert save_policy(policy, link, layout="transformers") == link
    assert link.is_symlink() and sorted(p.name for p in tmp_path.iterdir()) == siblings
    assert (out / "generation_config.json").exists()  # of the new layout, behind the link
    (tmp_path / "thesis.txt").write_text("mine")
    (out / "config.json").unlink()
    (out / "config.json").symlink_to(tmp_path / "thesis.txt")
    with pytest.raises(UserError, match="holds 'config.json'"):
        save_policy(policy, out)
    with pytest.raises(UserError, match="config.json: a symbolic link"):
        write_policy(policy, out)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("fails_at", [1, 3])
def test_a_failed_save_leaves_what_was_there(folder, tmp_path, monkeypatch, fails_at):
    policy = load_policy(str(folder))
    out = save_policy(policy, tmp_path / "out")
    before, siblings = contents(out), sorted(p.name for p in tmp_path.iterdir())
    calls = []

    def full(*args, **kwargs):
        calls.append(args)
        if len(calls) == fails_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save_file(*args, **kwargs)

    monkeypatch.setattr(engine.weights.save, "save_file", full)
    with pytest.raises(UserError, match="No space left on device"):
        save_policy(policy, out, layout="transformers", max_shard_bytes=100_000)
    with pytest.raises(UserError, match="layout"):
        save_policy(policy, out, layout="hf")
    assert contents(out) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == siblings


def test_a_kill_while_writing_leaves_what_was_there(folder, tmp_path, monkeypatch):
    """The process dies at its third file; the folder is still the one before."""
    policy = load_policy(str(folder))
    out = save_policy(policy, tmp_path / "out")
    before, written = contents(out), []

    def dying(*args, **kwargs):
        written.append(args)
        if len(written) == 3:
            os._exit(9)
        return save_file(*args, **kwargs)

    monkeypatch.setattr(engine.weights.save, "save_file", dying)
    child = os.fork()
    if child == 0:
        save_policy(policy, out, max_shard_bytes=100_000)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert contents(out) == before
    load_policy(str(out))


def test_a_tower_that_cannot_be_carried_over_is_named(folder, tmp_path):
    block = "vision_model.vision_tower.blocks.0.attn.qkv.weight"
    edit_weights(folder, **{block: torch.ones(64, 64)})
    policy = load_policy(str(folder))  # generation does without
    with pytest.raises(UserError, match="qkv.weight.*queries"):
        save_policy(policy, tmp_path / "out", layout="transformers")
    edit_weights(folder, **{block: None, "vision_model.surprise": torch.ones(1)})
    with pytest.raises(UserError, match="qkv.weight.*changed"):
        save_policy(policy, tmp_path / "out")
    with pytest.raises(
        UserError, match="model.safetensors: unexpected key 'vision_model.surprise'"
    ):
        save_policy(load_policy(str(folder)), tmp_path / "out", layout="transformers")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint"]
    save_policy(load_policy(str(folder)), tmp_path / "out")  # the same layout takes it as it is
    assert "vision_model.surprise" in load_file(tmp_path / "out" / "model.safetensors")
