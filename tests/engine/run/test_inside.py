"""What is written and removed in run folders and elsewhere stays inside, whoever filled them."""

import json
import os
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from PIL import Image

from engine.report.__main__ import write_report
from engine.run import inside
from engine.run.checkpoint import atomic_write_text, prune, remove_temporaries, save_checkpoint
from engine.run.folder import WRITTEN, open_run
from engine.run.inside import inside_or_none, remove_folder, write_new
from engine.run.monitor import RunLogger
from engine.settings.errors import UserError
from engine.weights.save import require_replaceable
from tests.engine.generate.test_folder import no_flush  # noqa: F401
from tests.engine.hostile_folder import audit, hostile_names, prepare, swap


@pytest.fixture
def place(tmp_path):
    return prepare(tmp_path)


def test_what_inside_allows_is_the_real_place(tmp_path):
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    (root / "a/file").write_text("")
    link = tmp_path / "typed"
    link.symlink_to(root)
    for name in ("a", "a/file", "a/file/below", "new", "new/er", "é", "a b", "-x", "c:\\x", ".a"):
        path = inside.inside(link, name)
        assert path == link / name and os.path.realpath(path) == f"{os.path.realpath(root)}/{name}"
    (root / "a/loop").symlink_to(root / "a/loop")
    (root / "dangling").symlink_to(tmp_path / "nowhere")
    (root / "within").symlink_to(root / "a")
    for name in ("a/loop", "dangling", "dangling/x", "within", "within/file", *hostile_names(root)):
        if name in ("~", " "):
            continue  # plain names, for a file system
        with pytest.raises(UserError) as error:
            inside.inside(link, name)
        assert str(error.value).isprintable() and inside_or_none(link, name) is None


def test_removing_a_folder_follows_no_link(place):
    (place.out / "old").mkdir()
    swap(place.out / "old/images", place.outside / "images")
    swap(place.out / "old/thesis.txt", place.outside / "thesis.txt")
    swap(place.out / "linked", place.outside)
    before = audit(place.outside)
    remove_folder(place.out, "old")
    with pytest.raises(UserError, match="linked: a symbolic link"):
        remove_folder(place.out, "linked")
    assert audit(place.outside) == before and not (place.out / "old").exists()


def save(run: Path, step: int) -> Path:
    return save_checkpoint(run, step, tensors={"policy": {"w": torch.ones(2)}}, state={})


def test_checkpoints_are_neither_written_nor_pruned_through_links(place):
    run, elsewhere = place.out.parent / "run", place.outside / "checkpoints"
    for step in (1, 2, 3):
        save(run, step)
    for name in ("step-000001", ".tmp-9-9", ".old-8-8", ".tmp-notes"):
        if name == "step-000001":
            swap(run / "checkpoints" / name, elsewhere / name)
        else:
            (elsewhere / name).mkdir(parents=True)
            (run / "checkpoints" / name).symlink_to(elsewhere / name)
    (run / "checkpoints" / ".tmp-thesis").mkdir()
    before = audit(place.outside)
    remove_temporaries(run)
    prune(run, 1)
    save(run, 4)
    assert audit(place.outside) == before
    left = {path.name for path in (run / "checkpoints").iterdir()}
    links = {"step-000001", ".tmp-9-9", ".old-8-8", ".tmp-notes"}
    assert left == {"step-000003", "step-000004", ".tmp-thesis", *links}
    with pytest.raises(UserError, match="step-000001: a symbolic link"):
        save(run, 1)
    swap(run / "checkpoints", place.outside / "all")
    before = audit(place.outside)
    for change in (lambda: save(run, 5), lambda: prune(run, 1), lambda: remove_temporaries(run)):
        with pytest.raises(UserError, match="checkpoints: a symbolic link"):
            change()
    assert audit(place.outside) == before


@pytest.mark.parametrize("name", WRITTEN)
def test_a_run_does_not_begin_with_a_link_among_its_files(place, name):
    run = place.out.parent / "run"
    swap(run / name, place.outside / "thesis.txt")
    before = audit(place.outside)
    with pytest.raises(UserError, match=f"{name}: a symbolic link"):
        open_run(Namespace(run_dir=run, resume=False), "", None)
    assert audit(place.outside) == before


def test_metrics_are_not_appended_through_a_link(place):
    run = place.out.parent / "run"
    swap(run / "metrics.jsonl", place.outside / "new.jsonl")
    with pytest.raises(UserError, match="metrics.jsonl: a symbolic link"):
        RunLogger(run, 1, resume=False, quiet=True)
    assert not (place.outside / "new.jsonl").exists()


def test_a_policy_folder_with_foreign_files_or_links_is_not_replaced(tmp_path):
    folder = tmp_path / "policy"
    (folder / "original").mkdir(parents=True)
    listed = ["config.json", "original/config.json", "thesis.txt", "/etc/x.json", 3, [], None]
    for name in listed[:2]:
        (folder / name).write_text("{}")
    (folder / "saved_policy.json").write_text(json.dumps({"files": listed}))
    require_replaceable(folder)
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds 'thesis.txt'"):
        require_replaceable(folder)
    for name in ("thesis.txt", "original/config.json"):
        (folder / name).unlink()
    (folder / "original").rmdir()
    swap(folder / "original", tmp_path / "elsewhere")
    with pytest.raises(UserError, match="holds 'original'"):
        require_replaceable(folder)


def test_the_report_shows_no_picture_from_outside_the_run(tmp_path):
    run, secret = tmp_path / "run", tmp_path / "secret.png"
    Image.new("RGB", (200, 20), "red").save(secret)
    (run / "samples").mkdir(parents=True)
    (run / "eval").mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    (run / "samples/step-000001.png").symlink_to(secret)
    (run / "eval/link.png").symlink_to(secret)
    os.mkfifo(run / "samples/pipe.png")
    os.mkfifo(run / "eval/pipe.png")
    names = ["link.png", "eval/link.png", str(secret), f"/{secret}", "../secret.png", "pipe.png",
             "x\0y", "x" * 5000, "\ud800"]  # fmt: skip
    rows = [{"prompt": str(i), "task_type": str(i), "image": n} for i, n in enumerate(names)]
    (run / "eval/before.json").write_text(json.dumps({"rows": rows}))
    page = write_report(run).read_text()
    assert "data:image/png" not in page and page.count("no picture") == len(names)
    (run / "eval/before.json").unlink()
    swap(run / "config.yaml", tmp_path / "secrets.yaml")
    with pytest.raises(UserError, match="config.yaml: a symbolic link"):
        write_report(run)


def test_a_temporary_name_that_is_a_link_is_not_written_through(place):
    own = place.out / f".settings.json.tmp-{os.getpid()}"
    swap(own, place.outside / "thesis.txt")
    before = audit(place.outside)
    atomic_write_text(place.out / "settings.json", "{}")
    assert audit(place.outside) == before and not own.exists()
    own.symlink_to(place.outside / "new.txt")
    write_new(own, b"x")
    assert audit(place.outside) == before and not own.is_symlink()
