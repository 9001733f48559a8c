"""Damaged prompt files: one clear line and no output, whatever the damage."""

import io
import json
import random
from collections import Counter

import pytest

from engine.generate.__main__ import main
from engine.prompts.files import load_prompts
from engine.settings.errors import UserError

ROWS = [
    {"prompt": "a red cat", "task_type": "color", "nouns": ["cat"], "attr_nouns": ["red cat"]},
    {
        "prompt": "a cup, left of two dogs",
        "task_type": "spatial",
        "nouns": ["cup", "dogs"],
        "spatial_info": {"obj1": "cup", "obj2": "dogs", "locality": "left of"},
    },
    {
        "prompt": "fünf Katzen 🐈",
        "task_type": "numeracy",
        "nouns": ["Katzen"],
        "numeracy_info": [{"obj_name": "Katzen", "num": 5}],
    },
]
# What a hand or another program may have left in a file.
LEFTOVERS = [
    b"null", b"[]", b"{}", b"[[", b"{{", b"}", b"]", b'"', b'""', b",", b",,", b"\n", b"\r", b"\0",
    b"1e999", b"-1", b"NaN", b"true", b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b"\xff\xfe",
    b"\xed\xa0\x80", b"\\ud800", b"\\u0000", b'" "', b"'", b"prompt", b"Prompt", b"\xef\xbb\xbf",
    b"x" * 200_000, b"\t", b": ", b'"num": 0', b'"nouns": 3', b"PAR1", b"\xe2\x80\xa8",
]  # fmt: skip


def json_lines() -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()


def json_array() -> bytes:
    return json.dumps(ROWS, indent=1).encode()


def csv_file() -> bytes:
    names = ["prompt", "task_type", "nouns", "attr_nouns", "spatial_info", "numeracy_info"]
    lines = [",".join(names)]
    for row in ROWS:
        cells = [row.get(name, "") for name in names]
        text = [c if isinstance(c, str) else json.dumps(c) for c in cells]
        lines.append(",".join('"' + cell.replace('"', '""') + '"' for cell in text))
    return "\n".join(lines).encode()


def text_file() -> bytes:
    return "\n".join(row["prompt"] for row in ROWS).encode()


def parquet_file() -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    names = dict.fromkeys(name for row in ROWS for name in row)
    table = pyarrow.Table.from_pylist([{n: row.get(n) for n in names} for row in ROWS])
    buffer = io.BytesIO()
    parquet.write_table(table, buffer, compression="none")
    return buffer.getvalue()


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to three of: bytes changed, cut out, doubled or swapped, a leftover put in, an end lost."""
    for _ in range(rng.randint(1, 3)):
        a, b = sorted(rng.randint(0, len(data)) for _ in range(2))
        b = min(b, a + rng.choice([1, 2, 8, 64, len(data)]))
        piece = rng.choice(LEFTOVERS)
        data = rng.choice(
            [
                data[:a],
                data[:a] + data[b:],
                data[:a] + data[a:b] * 2 + data[b:],
                data[:a] + data[a:b][::-1] + data[b:],
                data[:a] + piece + data[a:],
                data[:a] + piece + data[b:],
                data[:a] + bytes(rng.randrange(256) for _ in range(b - a)) + data[b:],
            ]
        )
    return data


def check_accepted(rows: list[dict]) -> None:
    """What got through must be usable, by a tokenizer among others."""
    assert rows
    for row in rows:
        assert row["prompt"].strip()
        words = [*row.get("nouns", []), *row.get("attr_nouns", [])]
        words += [row.get("task_type", "x"), *row.get("spatial_info", {}).values()][:4]
        words += [item["obj_name"] for item in row.get("numeracy_info", [])]
        for text in (row["prompt"], *(w for w in words if isinstance(w, str))):
            assert text.encode()
        assert all(item["num"] >= 1 for item in row.get("numeracy_info", []))
        json.dumps(row, default=str)


@pytest.mark.parametrize(
    "make, suffix, files, least_refused",
    [
        (json_lines, "jsonl", 900, 600),
        (json_array, "json", 500, 400),
        (csv_file, "csv", 500, 300),
        (text_file, "txt", 300, 10),
        (parquet_file, "parquet", 300, 150),
    ],
)
def test_damaged_files_are_refused_in_one_line(
    make, suffix, files, least_refused, tmp_path, capsys
):
    whole = make()
    rng = random.Random(f"prompts/{suffix}")
    path, out = tmp_path / f"p.{suffix}", tmp_path / "out"
    path.write_bytes(whole)
    check_accepted(load_prompts(path))
    outcomes = Counter()
    for number in range(files):
        path.write_bytes(mutate(whole, rng))
        try:
            rows = load_prompts(path)
        except UserError as error:
            outcomes["refused"] += 1
            message = str(error)
            assert len(message.splitlines()) == 1, (number, message)
            assert message.startswith(str(path)), (number, message)
            assert len(message) < 1000, (number, message)
            with pytest.raises(UserError) as caught:
                main(["--prompts", str(path), "--out", str(out)])
            assert str(caught.value) == message and not out.exists()
        else:
            outcomes["accepted"] += 1
            check_accepted(rows)
    assert outcomes["refused"] >= least_refused, outcomes
    assert capsys.readouterr().out == ""
