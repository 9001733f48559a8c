"""A folder of pictures that is killed at every point and still ends up the same."""

import json
import os
from pathlib import Path

import pytest
import torch

from engine.generate.folder import PictureFolder
from engine.run import checkpoint
from engine.settings.errors import UserError

NAMES = [f"{i // 2:05d}/samples/{i % 2:04d}.png" for i in range(6)]
TEXTS = {f"{i:05d}/metadata.jsonl": f'{{"prompt": "p{i}"}}\n' for i in range(3)}
SETTINGS = {"seed": 1, "cfg_weight": 5.0, "roles": ("User", "Assistant")}


def open_folder(path, settings=SETTINGS, names=NAMES, texts=TEXTS, **more):
    return PictureFolder(path, names, texts, settings, shown={"model_path": "m"}, **more)


def picture(number, settings=SETTINGS):
    level = (number + settings["seed"]) / 20
    return torch.full((3, 4, 4), level), {"prompt": f"p{number // 2}", "plan": None}


def fill(path, settings=SETTINGS, names=NAMES, texts=TEXTS, size=4, **more):
    """The command's loop: batches at fixed places, drawn as a whole. Returns the pictures drawn."""
    folder = open_folder(path, settings, names, texts, **more)
    folder.begin()
    drawn = []
    for start in range(0, len(names), size):
        numbers = range(start, min(start + size, len(names)))
        if any(n not in folder.records for n in numbers):
            folder.add({n: picture(n, settings) for n in numbers})
            drawn += numbers
    folder.finish()
    assert folder.complete
    return drawn


def tree(path: Path) -> dict[str, bytes]:
    files = (f for f in sorted(path.rglob("*")) if f.is_file())
    return {str(f.relative_to(path)): f.read_bytes() for f in files}


@pytest.fixture(autouse=True)
def no_flush(monkeypatch):
    """Flushing to disk shows in no file's content and takes most of the time."""
    monkeypatch.setattr(checkpoint, "_fsync", lambda path: None)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class Killed(BaseException):
    """Stands for SIGKILL: no handler of the program runs its course."""


def killer(monkeypatch, at: int):
    """Stop the program at its `at`-th change of the disk or flush, before it or half-way through."""
    count = 0

    def once(change, half=None):
        def call(*args, **more):
            nonlocal count
            count += 1
            if count == at:
                if half is not None:
                    half(*args)
                raise Killed
            return change(*args, **more)

        return call

    def half_written(path, data):
        with open(path, "wb") as handle:
            handle.write(data[: len(data) // 2])

    monkeypatch.setattr(checkpoint, "write_new", once(checkpoint.write_new, half_written))
    monkeypatch.setattr(Path, "mkdir", once(Path.mkdir))
    monkeypatch.setattr(os, "replace", once(os.replace))
    monkeypatch.setattr(checkpoint, "_fsync", once(checkpoint._fsync))
    monkeypatch.setattr(os, "fsync", once(os.fsync))


def test_a_run_killed_anywhere_and_started_again_leaves_the_same_files(tmp_path):
    fill(tmp_path / "whole")
    wanted = tree(tmp_path / "whole")
    assert set(wanted) == {*NAMES, *TEXTS, "settings.json", "manifest.jsonl"}
    at, alive = 0, False
    while not alive:
        at += 1
        path = tmp_path / f"killed-{at}"
        with pytest.MonkeyPatch.context() as patch:
            killer(patch, at)
            try:
                fill(path)
                alive = True
            except Killed:
                pass
        for file, content in tree(path).items():
            # What has its final name is whole, but for the manifest, which grows line by line.
            if ".tmp-" not in file and file != "manifest.jsonl":
                assert content == wanted[file], (at, file)
        fill(path)
        assert tree(path) == wanted, at
    assert at > 60  # every write, rename and flush of the job


def test_a_run_killed_twice_leaves_the_same_files(tmp_path):
    fill(tmp_path / "whole")
    for first, second in ((40, 5), (50, 12), (20, 30), (10, 10)):
        path = tmp_path / f"{first}-{second}"
        for at in (first, second):
            with pytest.MonkeyPatch.context() as patch:
                killer(patch, at)
                with pytest.raises(Killed):
                    fill(path)
        fill(path)
        assert tree(path) == tree(tmp_path / "whole")


@pytest.mark.parametrize("cut", [1, 40, 90])
def test_half_a_manifest_line_is_dropped(tmp_path, cut):
    fill(tmp_path)
    wanted = tree(tmp_path)
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_bytes(manifest.read_bytes()[:-cut])
    drawn = fill(tmp_path)
    assert drawn == ([] if cut == 1 else [4, 5]) and tree(tmp_path) == wanted


def test_what_exists_is_not_drawn_again_and_what_is_missing_is(tmp_path):
    fill(tmp_path)
    wanted, before = tree(tmp_path), (tmp_path / NAMES[0]).stat().st_mtime_ns
    assert fill(tmp_path) == []
    (tmp_path / NAMES[5]).unlink()
    (tmp_path / "00001" / "metadata.jsonl").unlink()
    assert fill(tmp_path) == [4, 5]
    assert tree(tmp_path) == wanted
    assert (tmp_path / NAMES[0]).stat().st_mtime_ns == before


def test_changed_settings_are_refused_until_overwritten(tmp_path):
    fill(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(UserError, match=r"seed was 1, now 2; --overwrite starts anew$"):
        open_folder(tmp_path, {**SETTINGS, "seed": 2})
    with pytest.raises(UserError, match=r"top_k was None, now 3"):
        open_folder(tmp_path, {**SETTINGS, "top_k": 3})
    assert tree(tmp_path) == before
    # The model's path is only shown: the same files may lie elsewhere.
    assert PictureFolder(tmp_path, NAMES, TEXTS, SETTINGS, shown={"model_path": "n"}).complete
    changed = {**SETTINGS, "seed": 2}
    few, texts = NAMES[:2], {"00000/metadata.jsonl": TEXTS["00000/metadata.jsonl"]}
    assert fill(tmp_path, changed, few, texts, overwrite=True) == [0, 1]
    fill(tmp_path / "fresh", changed, few, texts)
    fresh = tree(tmp_path / "fresh")
    now = tree(tmp_path)
    assert {f: c for f, c in now.items() if not f.startswith("fresh")} == fresh
    assert not (tmp_path / "00001").exists()  # else an evaluator would count it


def test_pictures_of_another_program_are_not_replaced(tmp_path):
    (tmp_path / "00000" / "samples").mkdir(parents=True)
    (tmp_path / NAMES[1]).write_bytes(b"mine")
    with pytest.raises(UserError, match=r"0001\.png: there already, with no settings\.json"):
        open_folder(tmp_path)
    assert (tmp_path / NAMES[1]).read_bytes() == b"mine"
    assert fill(tmp_path, overwrite=True) == list(range(6))


def test_overwriting_removes_nothing_outside(tmp_path):
    out, outside = tmp_path / "out", tmp_path / "precious.png"
    fill(out)
    outside.write_bytes(b"keep")
    with (out / "manifest.jsonl").open("a") as handle:
        for name in ("../precious.png", str(outside), "", None, 3, "a/../../precious.png"):
            handle.write(json.dumps({"file": name}) + "\n")
    fill(out, overwrite=True)
    assert outside.read_bytes() == b"keep"


@pytest.mark.parametrize("content", ["{", "[]", '{"settings": 1}'])
def test_settings_of_another_kind_are_named(tmp_path, content):
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(UserError, match=r"settings\.json: "):
        open_folder(tmp_path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: Not a directory"):
        open_folder(tmp_path / "file")
    with pytest.raises(UserError, match="file/below: Not a directory"):
        open_folder(tmp_path / "file" / "below")
