"""Prompt files of every format: what is read, and how a bad row is named."""

import json
import sys
from pathlib import Path

import pytest

from engine.prompts.files import EMBEDDED, load_prompts
from engine.settings.errors import UserError
from engine.tiny.prompts import TASK_TYPES, make_splits, write_rows


def file(folder: Path, text: str | bytes, name: str = "p.jsonl") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# One row of each shape of T2I-R1's geneval_and_t2i_data_final.json, in words of our own.
PUBLISHED = [
    {
        "prompt": "a photo of a sports ball above a cup",
        "nouns": ["sports ball", "cup"],
        "spatial_info": {"obj1": "sports ball", "obj2": "cup", "locality": "above"},
        "task_type": "spatial",
    },
    {
        "task_type": "numeracy",
        "prompt": "three cats and one dog",
        "nouns": ["cats", "dog"],
        "numeracy_info": [{"obj_name": "cats", "num": 3}, {"obj_name": "dog", "num": 1}],
    },
    {
        "task_type": "color",
        "prompt": 'a red "sofa", and a blue lamp',
        "nouns": ["sofa", "lamp"],
        "attr_nouns": ["red sofa", "blue lamp"],
    },
    {"task_type": "non", "prompt": "a man sleeps", "nouns": ["man"]},
]


def test_written_rows_are_read_back(tmp_path):
    train, held_out = make_splits(train=5, held_out=3, seed=1)
    path = tmp_path / "p.json"
    write_rows(path, train + held_out)
    assert load_prompts(path) == train + held_out
    path.write_text(json.dumps(train, indent=1))
    assert load_prompts(str(path)) == train


def test_embedded_splits_cover_all_task_types_and_share_no_prompt():
    train, held_out = load_prompts("tiny"), load_prompts("tiny:heldout")
    assert {row["task_type"] for row in train} == set(TASK_TYPES)
    assert {row["task_type"] for row in held_out} == set(TASK_TYPES)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    assert load_prompts(EMBEDDED["tiny"]) == train


def test_plain_text_and_odd_but_valid_files(tmp_path):
    path = file(tmp_path, "\ufeffa cat\r\n\r\n  [a dog]\n", "p.txt")
    assert load_prompts(path) == [{"prompt": "a cat"}, {"prompt": "[a dog]"}]
    path = file(tmp_path, '{"prompt": "a\u2028b", "mine": 1, "nouns": null}\n\n')
    assert load_prompts(path) == [{"prompt": "a\u2028b", "mine": 1}]


@pytest.mark.parametrize(
    "line, words",
    [
        ("{prompt: 1}", ("not JSON",)),
        ("[" * 100_000, ("not JSON",)),
        ('"a cat"', ("object", "a string")),
        ("{}", ("'prompt' is missing",)),
        ('{"promt": "a"}', ("'prompt' is missing", "'promt'")),
        ('{"prompt": 3}', ("'prompt'", "a number")),
        ('{"prompt": null}', ("'prompt'", "null")),
        ('{"prompt": " \\n"}', ("'prompt' is empty",)),
        ('{"prompt": "\\ud800"}', ("'prompt'", "surrogate")),
        ('{"prompt": "a", "task_type": 3}', ("'task_type'",)),
        ('{"prompt": "a", "nouns": ["\\ud800"]}', ("'nouns'",)),
        ('{"prompt": "a", "nouns": "cat"}', ("'nouns'",)),
        ('{"prompt": "a", "nouns": [1]}', ("'nouns'",)),
        ('{"prompt": "a", "attr_nouns": [""]}', ("'attr_nouns'",)),
        ('{"prompt": "a", "spatial_info": []}', ("'spatial_info'",)),
        ('{"prompt": "a", "spatial_info": {"obj1": "b", "obj2": "c"}}', ("'locality'",)),
        ('{"prompt": "a", "numeracy_info": {"obj_name": "b", "num": 1}}', ("'numeracy_info'",)),
        ('{"prompt": "a", "numeracy_info": [{"obj_name": "b", "num": 0}]}', ("'num'",)),
        ('{"prompt": "a", "numeracy_info": [{"obj_name": "b", "num": true}]}', ("'num'",)),
        ('{"prompt": "a", "numeracy_info": [{"num": 2}]}', ("'obj_name'",)),
    ],
)
def test_a_bad_row_is_named_with_its_line(tmp_path, line, words):
    path = file(tmp_path, '{"prompt": "fine"}\n\n' + line + "\n")
    with pytest.raises(UserError) as caught:
        load_prompts(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:3: ") and "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "text, name, words",
    [
        ("", "p.jsonl", ("holds no prompts",)),
        ("\n \n", "p.txt", ("holds no prompts",)),
        ("[]", "p.json", ("holds no prompts",)),
        (b'{"prompt": "a"}\n\xff', "p.jsonl", (":2:", "UTF-8")),
        ('[{"prompt": "a"},\n{"prompt": }]', "p.json", (":2:", "not JSON")),
        ('[{"prompt": "a"},\n{"prompt": ""}]', "p.json", (":2: row 2", "'prompt' is empty")),
        ('\n[ {"prompt":\n"a"}, \n\n{"prompt": 1}]', "p.json", (":5: row 2", "a number")),
        ('[{"prompt": "a"}\n{"prompt": "b"}]', "p.json", (":2:", "','")),
        ('[{"prompt": "a"},\n]', "p.json", (":2:", "not JSON")),
        ('[{"prompt": "a"}]\n\nx', "p.json", (":3:", "Extra data")),
        ('[{"prompt": "a"},\n' + "[" * 100_000, "p.json", (":2:", "not JSON")),
        ('[{"prompt": "a"}', "p.json", (":1:", "not JSON")),
        ("", "p.csv", ("holds no prompts",)),
        ("prompt\n", "p.csv", ("holds no prompts",)),
        ("promt,nouns\na,\n", "p.csv", (":1:", "no column 'prompt'", "'promt'")),
        ("prompt,prompt\na,b\n", "p.csv", (":1:", "'prompt' twice")),
        ("prompt,nouns\na\n", "p.csv", (":2:", "1 cells", "2")),
        ('prompt\n"a\nb"\n\n"c\n', "p.csv", (":5:", "not CSV")),
        ('prompt\n"a" b\n', "p.csv", (":2:", "not CSV")),
        ('prompt,nouns\na,"[""b"",]"\n', "p.csv", (":2:", "'nouns' holds no JSON")),
        ("prompt,nouns\na,['b']\n", "p.csv", (":2:", "'nouns' holds no JSON")),
        ('prompt,task_type\na,b\n" ",c\n', "p.csv", (":3:", "'prompt' is empty")),
        (b"prompt\na\n\xff\n", "p.csv", (":3:", "UTF-8")),
    ],
)
def test_bad_files_are_named(tmp_path, text, name, words):
    path = file(tmp_path, text, name)
    with pytest.raises(UserError) as caught:
        load_prompts(path)
    assert str(path) in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match="absent.jsonl: no such prompt file"):
        load_prompts(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match="tinny.*tiny:heldout"):
        load_prompts("tinny")
    with pytest.raises(UserError, match=f"{tmp_path}: Is a directory"):
        load_prompts(tmp_path)


def as_csv(rows: list[dict]) -> str:
    """By hand: every cell quoted, quotes doubled."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names]
    for row in rows:
        cells = [row.get(name, "") for name in names]
        lines.append([c if isinstance(c, str) else json.dumps(c) for c in cells])
    return "\r\n".join(
        ",".join('"' + cell.replace('"', '""') + '"' for cell in line) for line in lines
    )


def test_published_rows_are_the_same_in_every_format(tmp_path):
    lines = "\n".join(json.dumps(row) for row in PUBLISHED)
    assert load_prompts(file(tmp_path, lines, "data_final.json")) == PUBLISHED
    assert load_prompts(file(tmp_path, json.dumps(PUBLISHED), "p.json")) == PUBLISHED
    assert load_prompts(file(tmp_path, as_csv(PUBLISHED), "p.CSV")) == PUBLISHED


def test_published_rows_from_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    # Arrow gives every row every field: null where the row has none.
    names = dict.fromkeys(name for row in PUBLISHED for name in row)
    padded = [{name: row.get(name) for name in names} for row in PUBLISHED]
    parquet.write_table(pyarrow.Table.from_pylist(padded), tmp_path / "p.parquet")
    assert load_prompts(tmp_path / "p.parquet") == PUBLISHED


def test_parquet_faults_name_file_and_row(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"prompt": "a", "nouns": ["b"]}, {"prompt": " ", "nouns": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    with pytest.raises(UserError, match=r"p\.parquet: row 2: 'prompt' is empty"):
        load_prompts(tmp_path / "p.parquet")
    half = (tmp_path / "p.parquet").read_bytes()[:-20]
    with pytest.raises(UserError, match=r"half\.parquet: not Parquet: ") as caught:
        load_prompts(file(tmp_path, half, "half.parquet"))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"absent\.parquet: no such prompt file"):
        load_prompts(tmp_path / "absent.parquet")


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"^[^\n]*p\.parquet: .*\[parquet\]") as caught:
        load_prompts(file(tmp_path, b"PAR1", "p.parquet"))
    assert "pip install pyarrow" in str(caught.value)


def test_files_of_the_benchmarks_are_read_as_they_are(tmp_path):
    wise = [{"Prompt": "a food", "Explanation": "It is a cake", "prompt_id": 7}]
    rows = load_prompts(file(tmp_path, json.dumps(wise, indent=4), "wise.json"))
    assert rows == [{"prompt": "a food", **wise[0]}]
    line = {"tag": "counting", "include": [{"class": "bear", "count": 2}], "prompt": "two bears"}
    rows = load_prompts(file(tmp_path, json.dumps(line), "evaluation_metadata.jsonl"))
    assert json.dumps(rows[0]) == json.dumps(line)  # order too: it is written down again
    rows = load_prompts(file(tmp_path, "two boys\r\nsix planes\r\n", "numeracy_val.txt"))
    assert rows == [{"prompt": "two boys"}, {"prompt": "six planes"}]
