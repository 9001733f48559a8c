"""File names as the benchmarks' evaluators read them, whatever a prompt holds."""

import json
import os
import re

import pytest

from engine.generate.benchmark_layouts import layout_files
from engine.settings.errors import UserError

NASTY = [
    "a/b\\c:d*e?f|g<h>i",
    "nul \0 byte",
    "..",
    "/etc/passwd",
    "~/x",
    "new\nline\ttab",
    "x" * 300,
    "猫" * 300,
    "🐈 cat",
    "🐈",
    "A Red CAT",
    "a red cat",
    "a red cat",
    "under_scored_000001",
    "CON",
    " .hidden",
    "trailing. ",
    "___",
]


def rows(*prompts, **more):
    return [{"prompt": prompt, **more} for prompt in prompts]


@pytest.mark.parametrize("layout", ["plain", "t2i-compbench"])
def test_any_prompt_gives_a_name_that_can_be_written(layout, tmp_path):
    names = layout_files(layout, rows(*NASTY), 3, "p.txt").pictures
    assert len({name.lower() for name in names}) == len(names) == 3 * len(NASTY)
    for name in names:
        folder, _, file = name.partition("/")
        assert folder in ("images", "samples") and "/" not in file and file.endswith(".png")
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
        # Room for the name that a file has while it is being written.
        (tmp_path / folder / f".{file}.tmp-{2**22}").write_bytes(b"")
        assert (tmp_path / name).resolve().parent == (tmp_path / folder).resolve()
    if layout == "plain":
        assert all(re.fullmatch(r"images/[0-9]{5}[a-z0-9-]*\.png", name) for name in names)


def compbench_reads(folder):
    """What BLIPvqa_eval/BLIP_vqa.py and UniDet_eval/numeracy_eval.py make of samples/."""
    names = os.listdir(folder)
    names.sort(key=lambda name: int(name.split("_")[-1].split(".")[0]))
    assert [int(name.split(".png")[0].split("_")[1]) for name in names] == list(range(len(names)))
    return [name.split("_")[0] for name in names]


def test_compbench_evaluator_reads_prompt_and_number(tmp_path):
    prompts = ["a green bench and a blue bowl", "The hat was on top of the rack.", "a man's cup"]
    files = layout_files("t2i-compbench", rows(*prompts), 2, "color_val.txt")
    assert files.pictures[0] == "samples/a green bench and a blue bowl_000000.png"
    assert files.pictures[3] == "samples/The hat was on top of the rack._000003.png"
    assert files.altered == [] and files.texts == {}
    (tmp_path / "samples").mkdir()
    for name in files.pictures:
        (tmp_path / name).write_bytes(b"")
    assert compbench_reads(tmp_path / "samples") == [p for p in prompts for _ in range(2)]


def test_compbench_says_which_prompts_it_had_to_alter(tmp_path):
    files = layout_files("t2i-compbench", rows("a cat", "a/b", "c_d"), 1, "p.txt")
    assert files.altered == [1, 2]
    (tmp_path / "samples").mkdir()
    for name in files.pictures:
        (tmp_path / name).write_bytes(b"")
    assert compbench_reads(tmp_path / "samples") == ["a cat", "a b", "c d"]


def test_geneval_evaluator_finds_metadata_and_samples():
    row = {"tag": "counting", "include": [{"class": "bear", "count": 2}], "prompt": "two bears"}
    files = layout_files("geneval", [row, {**row, "prompt": "2 bears"}], 2, "metadata.jsonl")
    assert files.pictures == [
        "00000/samples/0000.png",
        "00000/samples/0001.png",
        "00001/samples/0000.png",
        "00001/samples/0001.png",
    ]
    # evaluate_images.py: folders of digits, json.load of one object, names of digits.
    assert list(files.texts) == ["00000/metadata.jsonl", "00001/metadata.jsonl"]
    assert json.loads(files.texts["00000/metadata.jsonl"]) == row
    assert json.loads(files.texts["00001/metadata.jsonl"])["prompt"] == "2 bears"


@pytest.mark.parametrize("key", ["tag", "include"])
def test_geneval_needs_its_own_prompt_file(key):
    row = {"tag": "counting", "include": [], "prompt": "two bears"}
    bad = {k: v for k, v in row.items() if k != key}
    with pytest.raises(UserError, match=rf"^m\.jsonl: prompt 2: --layout geneval needs '{key}'"):
        layout_files("geneval", [row, bad], 1, "m.jsonl")


def test_wise_names_are_the_prompts_ids():
    def names(*ids):
        found = [{"prompt": "a", "prompt_id": number} for number in ids]
        return layout_files("wise", found, 1, "wise.json").pictures

    assert names(401, 7, "1000") == ["401.png", "7.png", "1000.png"]  # text: from a CSV
    assert layout_files("wise", rows("a", "b"), 1, "w.txt").pictures == ["1.png", "2.png"]
    for bad in (0, 1001, "x", None, True, 1.5, "../1", 7):
        with pytest.raises(UserError, match=r"^wise\.json: prompt 2: --layout wise needs"):
            names(7, bad)
    with pytest.raises(UserError, match="num_generations must be 1, got 2"):
        layout_files("wise", rows("a"), 2, "w.txt")
    with pytest.raises(UserError, match="prompt 1001"):
        layout_files("wise", rows(*["a"] * 1001), 1, "w.txt")
