"""Folders of pictures of strangers: nothing outside them is created, changed or removed."""

import json
import os
import random
import tracemalloc
from argparse import Namespace
from pathlib import Path

import pytest

from engine.generate.folder import LINE_BYTES, MANIFEST
from engine.settings.errors import UserError
from tests.engine.generate.test_folder import (  # noqa: F401
    NAMES,
    SETTINGS,
    TEXTS,
    fill,
    no_flush,
    open_folder,
    tree,
)
from tests.engine.hostile_folder import audit, hostile_names, prepare, swap

MANIFEST_LINE = {"prompt": "p", "plan": None, "settings": "0"}


@pytest.fixture
def place(tmp_path):
    return prepare(tmp_path)


def add_lines(out: Path, *names) -> None:
    with (out / "manifest.jsonl").open("a") as handle:
        for name in names:
            handle.write(json.dumps({**MANIFEST_LINE, "file": name}) + "\n")


def set_texts(out: Path, *names) -> None:
    content = json.loads((out / "settings.json").read_text())
    (out / "settings.json").write_text(json.dumps({**content, "texts": list(names)}))


@pytest.mark.parametrize("overwrite", [False, True])
def test_names_that_lead_out_or_are_none_are_passed_over(place, overwrite):
    wanted, before = tree(place.out), audit(place.outside)
    for name in hostile_names(place.outside):
        add_lines(place.out, name)
        if overwrite:
            set_texts(place.out, name)
        fill(place.out, overwrite=overwrite)
        assert audit(place.outside) == before, name
        assert tree(place.out) == wanted, name


def test_only_names_that_this_program_gives_are_removed(place):
    for name in ("thesis.txt", "photo.png", "settings.json.bak", "code/setup.py", "images/cat.png"):
        (place.out / name).parent.mkdir(exist_ok=True)
        (place.out / name).write_bytes(b"mine")
        (place.out / f".{Path(name).name}.tmp-7").write_bytes(b"mine")
    kept = {name for name in tree(place.out) if name not in (*NAMES, *TEXTS)}
    add_lines(place.out, *kept)
    set_texts(place.out, *kept)
    add_lines(place.out, "17/samples/0003.png", "00017-a-red-circle-3.png")
    (place.out / "17/samples").mkdir(parents=True)
    (place.out / "17/samples/0003.png").write_bytes(b"an earlier job's")
    fill(place.out, overwrite=True)
    assert not (place.out / "17").exists()
    assert set(tree(place.out)) == {*NAMES, *TEXTS, *kept}
    assert (place.out / "thesis.txt").read_bytes() == b"mine"


LINKS = [
    "settings.json",
    "manifest.jsonl",
    "00000",
    "00000/samples",
    NAMES[0],
    "00001/metadata.jsonl",
]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("missing", [False, True], ids=["filled", "empty"])
@pytest.mark.parametrize("name", LINKS)
def test_a_link_at_any_level_is_refused_before_anything_changes(place, name, overwrite, missing):
    target = place.outside / "moved" / Path(name).name
    swap(place.out / name, target)
    if missing:  # a folder to be filled rather than emptied; a file to be made
        for path in sorted(target.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        if target.is_file():
            target.unlink()
    before = audit(place.out.parent)
    with pytest.raises(UserError, match=rf"out/{name}: a symbolic link") as error:
        fill(place.out, overwrite=overwrite)
    assert "\n" not in str(error.value)
    assert audit(place.out.parent) == before


def test_links_that_only_the_manifest_names_are_not_followed(place):
    swap(place.out / "17", place.outside)
    (place.out / "18").mkdir()
    swap(place.out / "18/samples", place.outside / "samples")
    swap(place.out / "1.png", place.outside / "thesis.txt")
    names = ("17/samples/0000.png", "18/samples/0000.png", "1.png", "17/1.png", "17/metadata.jsonl")
    add_lines(place.out, *names)
    set_texts(place.out, *names)
    before = audit(place.outside)
    fill(place.out, overwrite=True)
    assert audit(place.outside) == before and (place.out / "1.png").is_symlink()


def test_leftovers_that_are_links_or_folders_stay(place):
    swap(place.out / ".settings.json.tmp-1", place.outside / "thesis.txt")
    swap(place.out / "00000/samples/.0000.png.tmp-3", place.outside / "samples")
    (place.out / ".manifest.jsonl.tmp-2").mkdir()
    (place.out / "00000/samples/.0001.png.tmp-4").write_bytes(b"half a pict")
    before = audit(place.outside)
    fill(place.out)
    assert audit(place.outside) == before and (place.out / ".settings.json.tmp-1").is_symlink()
    assert not (place.out / "00000/samples/.0001.png.tmp-4").exists()


def test_the_folder_itself_may_be_a_link(place):
    link = place.out.parent / "link"
    link.symlink_to(place.out)
    wanted = tree(place.out)
    assert fill(link) == []
    assert fill(link, overwrite=True) == list(range(6))
    assert tree(place.out) == wanted and link.is_symlink()


def test_a_pipe_is_named_and_not_waited_for(place):
    for name in ("manifest.jsonl", "settings.json"):
        (place.out / name).unlink()
        os.mkfifo(place.out / name)
        with pytest.raises(UserError, match=f"{name}: no file and no folder"):
            open_folder(place.out, overwrite=True)


@pytest.mark.parametrize(
    "content",
    [
        '{"settings": {}, "texts": 5}',
        '{"settings": {}, "texts": {"a": 1}}',
        '{"settings": {}, "texts": null}',
        '{"settings": []}',
        '{"settings": {"a": ' + "[" * 100_000 + "]" * 100_000 + "}}",
        "[" * 100_000,
        "9" * 5000,
        "\ud800",
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_settings_of_a_wrong_shape_are_one_line(place, content, overwrite):
    (place.out / "settings.json").write_text(content, errors="surrogatepass")
    with pytest.raises(UserError, match=r"settings\.json: ") as error:
        open_folder(place.out, overwrite=overwrite)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("depth", [*range(300, 1001, 20)])
def test_settings_near_the_limit_of_nesting(place, depth):
    settings = json.loads((place.out / "settings.json").read_text())
    line = json.dumps(settings).replace('"seed": 1', '"seed": ' + "[" * depth + "]" * depth)
    (place.out / "settings.json").write_text(line)
    with pytest.raises(UserError, match="seed was|not JSON"):
        open_folder(place.out)


def test_a_settings_key_cannot_break_the_line(place):
    content = json.loads((place.out / "settings.json").read_text())
    content["settings"]["\x1b[2J\nerror: \ud800"] = 1
    (place.out / "settings.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        open_folder(place.out)
    assert str(error.value).isprintable()


def random_name(rng: random.Random, place: Namespace):
    pieces = [
        "/", "//", "..", ".", "", "images", "samples", "00000", "thesis.txt", "0000.png", "17",
        "1.png", "metadata.jsonl", str(place.outside), "out", "outside", "\0", "link", "é", "\ud800",
        "00000-a-0.png", "p_000000.png", "settings.json", "manifest.jsonl", " ", "\\", "\n", "loop",
    ]  # fmt: skip
    if rng.random() < 0.3:
        return rng.choice(hostile_names(place.outside))
    return rng.choice(["", "/", "//", "../", "./"]) + rng.choice(["/", "//"]).join(
        rng.choice(pieces) for _ in range(rng.randrange(1, 6))
    )


def random_line(rng: random.Random, place: Namespace) -> str:
    name = random_name(rng, place)
    line = json.dumps({**MANIFEST_LINE, "file": name, rng.choice(["file", "extra"]): name})
    damaged = [line[: rng.randrange(len(line))], "[" * 3000, "[]", "null", f"[{line}]", "{}", '""']
    return rng.choice(damaged) if rng.random() < 0.2 else line


def make_hostile(rng: random.Random, place: Namespace) -> None:
    """Links to the outside at random places, a random manifest, random settings."""
    add = [place.outside, *(p for p in place.outside.rglob("*")), place.out, place.out.parent]
    levels = ["17", "link", "00000/link", "17/samples", "00002/samples", "images", "samples", "1.png",
              "samples/0000.png", ".settings.json.tmp-5", "00000/samples/.0000.png.tmp-6", "loop",
              f".settings.json.tmp-{os.getpid()}", f".manifest.jsonl.tmp-{os.getpid()}"]  # fmt: skip
    if rng.random() < 0.3:
        levels += [*LINKS, *NAMES]
    for level in rng.sample(levels, rng.randrange(6)):
        path = place.out / level
        if os.path.lexists(path) and not path.is_dir():
            path.unlink()
        if not os.path.lexists(path) and path.parent.resolve().is_relative_to(place.out):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(path if level == "loop" else rng.choice(add))
    settings = place.out / "settings.json"
    if not settings.is_symlink():
        content = json.loads(settings.read_text())
        content["texts"] = [random_name(rng, place) for _ in range(rng.randrange(8))]
        if rng.random() < 0.2:
            content[rng.choice(["texts", "settings"])] = random_name(rng, place)
        settings.write_text(json.dumps(content))
    if not (place.out / "manifest.jsonl").is_symlink():
        with (place.out / "manifest.jsonl").open("a") as handle:
            handle.writelines(random_line(rng, place) + "\n" for _ in range(rng.randrange(30)))


def test_two_hundred_hostile_folders_touch_nothing_outside(place):
    before, refused = audit(place.outside), 0
    for seed in range(200):
        rng = random.Random(seed)
        folder = place.out.parent / f"out-{seed}"
        fill(folder)
        make_hostile(rng, Namespace(out=folder, outside=place.outside))
        try:
            fill(folder, {**SETTINGS, "seed": 2}, NAMES[:4], overwrite=rng.random() < 0.9)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error), seed
        assert audit(place.outside) == before, seed
        assert tree(place.out) == tree(place.out.parent / "out"), seed
    assert 40 < refused < 160  # both ways are taken


def test_a_manifest_of_many_lines_is_read_line_by_line(tmp_path):
    fill(tmp_path / "out", names=NAMES[:2])
    with (tmp_path / "out" / MANIFEST).open("a") as handle:
        for i in range(50_000):
            handle.write(f'{{"file": "{i:05d}/samples/0000.png", "settings": "x"}}\n')
        handle.write('{"file": "' + "0" * 100_000_000)  # a kill does not make such a line
    tracemalloc.start()
    folder = open_folder(tmp_path / "out", overwrite=True)
    assert sum(1 for _ in folder._read_manifest()) == 50_002
    assert tracemalloc.get_traced_memory()[1] < 5 * LINE_BYTES
    tracemalloc.stop()
    fill(tmp_path / "out", overwrite=True)
    assert set(tree(tmp_path / "out")) == {*NAMES, *TEXTS, "settings.json", "manifest.jsonl"}
