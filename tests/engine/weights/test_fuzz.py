"""Damaged checkpoints by the hundred: each loads, or is refused in one line and writes nothing."""

import copy
import json
import random
import shutil
import signal
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine import convert
from engine.policy import load_policy, save_policy
from engine.settings.errors import UserError
from tests.engine.weights.original_layout import small_model, write_original

SECONDS = 20  # a case that takes longer hangs
ODD_VALUES = [
    None, True, False, 0, 1, -1, 3, 64, 2**31, 2**63, 10**12, 10**30, -(10**12), 0.0, -0.5, 1e300,
    "", "0", "janus", "llama", "../x", "\0", "\ud800", "a\nb", "x" * 5000, [], [0], [1, 2], {},
    {"a": 1}, [[[]]], "torch.float8", "nan", "os.system",
]  # fmt: skip


class Hang(KeyboardInterrupt):
    """What no handler of errors catches."""


# Mutators: each takes the random generator and bytes, and returns other bytes


def damage_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flip, cut out, double, insert or cut off."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.randint(1, 40))
        data = rng.choice(
            [
                data[:at] + rng.randbytes(end - at) + data[end:],
                data[:at] + data[end:],
                data[:at] + data[at:end] * 2 + data[end:],
                data[:at]
                + rng.choice([b"{", b"}", b'"', b",", b"\0", b"[[", b"9" * 30])
                + data[at:],
                data[:at],
            ]
        )
    return data


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Every path into a JSON value."""
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    return [path] * bool(path) + [p for k, v in items for p in places(v, (*path, k))]


def damage_json(rng: random.Random, data: bytes) -> bytes:
    """Replace, remove, rename or move values; or damage the bytes."""
    if rng.random() < 0.15:
        return damage_bytes(rng, data)
    values = json.loads(data)
    for _ in range(rng.randint(1, 2)):
        found = places(values)
        if not found:
            break
        path, other = rng.choice(found), rng.choice(found)
        holder = values
        for key in path[:-1]:
            holder = holder[key]
        kind = rng.random()
        if kind < 0.6:
            holder[path[-1]] = copy.deepcopy(rng.choice(ODD_VALUES))
        elif kind < 0.8:
            del holder[path[-1]]
        elif isinstance(holder, dict) and kind < 0.9:
            holder[rng.choice(["", "x", "../y", "\ud800", str(other[-1])])] = holder.pop(path[-1])
        else:
            holder[path[-1]] = json.loads(json.dumps(values))
    return json.dumps(values).encode()


def damage_safetensors(rng: random.Random, data: bytes) -> bytes:
    """The header's JSON with its length made right, its bytes, or its length."""
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = data[8 : 8 + length], data[8 + length :]
    kind = rng.random()
    if kind < 0.6:
        header = damage_json(rng, header)
    elif kind < 0.9:
        header = damage_bytes(rng, header)
    else:
        length = rng.choice([0, 1, 2**63, 2**32, length - 1, length + 1, rng.getrandbits(64)])
        return struct.pack("<Q", length) + header + rest
    return struct.pack("<Q", len(header)) + header + rest


def damage_pickle(rng: random.Random, data: bytes) -> bytes:
    """The pickle inside the zip, its other records, or the zip's own bytes."""
    if rng.random() < 0.3:
        return damage_bytes(rng, data)
    scratch = Path(damage_pickle.scratch)
    scratch.write_bytes(data)
    with zipfile.ZipFile(scratch) as file:
        records = {name: file.read(name) for name in file.namelist()}
    name = next(n for n in records if n.endswith("data.pkl"))
    if rng.random() < 0.2:
        name = rng.choice(list(records))
    records[name] = damage_bytes(rng, records[name])
    if rng.random() < 0.1:
        del records[rng.choice(list(records))]
    with zipfile.ZipFile(scratch, "w") as file:
        for name, record in records.items():
            file.writestr(name, record)
    return scratch.read_bytes()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """Good folders to start from."""
    root, model = tmp_path_factory.mktemp("good"), small_model(layers=1)
    damage_pickle.scratch = str(root / "scratch.zip")
    write_original(root / "original", model)
    write_original(root / "pickled", model, form="bin")
    write_original(root / "sharded", model, shards=2)
    save_policy(load_policy(str(root / "original")), root / "transformers", layout="transformers")
    return {path.name: path for path in root.iterdir() if path.is_dir()}


CASES = [
    ("original", "config.json", damage_json, 330),
    ("transformers", "config.json", damage_json, 330),
    ("sharded", "model.safetensors.index.json", damage_json, 130),
    ("original", "model.safetensors", damage_safetensors, 150),
    ("transformers", "original/original_only.safetensors", damage_safetensors, 60),
    ("pickled", "pytorch_model.bin", damage_pickle, 120),
    ("original", "tokenizer.json", damage_json, 60),
    ("original", "tokenizer_config.json", damage_json, 60),
    ("transformers", "original/config.json", damage_json, 30),
]


@pytest.mark.parametrize(("kind", "name", "damage", "count"), CASES)
def test_damaged_checkpoints(
    checkpoints, tmp_path, kind: str, name: str, damage: Callable, count: int
):
    def hang(*_: object) -> None:
        raise Hang(f"case {case}")

    shutil.copytree(checkpoints[kind], tmp_path / "folder")
    file, out = tmp_path / "folder" / name, tmp_path / "out"
    good, refused = file.read_bytes(), 0
    previous = signal.signal(signal.SIGALRM, hang)
    layout = "original" if kind == "transformers" else "transformers"
    try:
        for case in range(count):
            rng = random.Random(f"{kind}/{name}/{case}")
            file.write_bytes(damage(rng, good))
            signal.alarm(SECONDS)
            try:
                convert.main(["--model", str(file.parents[name.count("/")]), "--out", str(out),
                              "--layout", layout])  # fmt: skip
                shutil.rmtree(out)
            except UserError as error:
                refused += 1
                assert "\n" not in str(error) and len(str(error)) < 2000, (case, str(error))
                assert str(tmp_path / "folder") in str(error), (case, str(error))
            except Exception as error:
                raise AssertionError(f"case {case}: {type(error).__name__}: {error}") from error
            finally:
                signal.alarm(0)
            assert [p.name for p in tmp_path.iterdir()] == ["folder"], case
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert refused > count / 4  # most damage must be such that it matters
