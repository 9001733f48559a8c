"""A checkpoint folder's weights as data: which tensor lies in which file, and its values.

Reading runs no code of the checkpoint: safetensors, or pickles through torch's weights-only
unpickler. Files are mapped, not read, so that a tensor costs memory only while it is copied;
names, shapes and dtypes are all known before the first value is touched.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from engine.model.source import Entry
from engine.settings.errors import UserError

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
_PLAIN_NAME = re.compile(r"\w[\w.-]{0,200}\.(safetensors|bin)")
# By their names in a safetensors header.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_SUPPORTED = frozenset(DTYPES.values())
_ZIP = b"PK\x03\x04"


def parse_json(text: str | bytes, where: str | Path) -> Any:
    """JSON in which no object has a key twice. Raises: UserError starting with `where`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise UserError(f"{where}: key {twice!r} is given twice")
        return found

    def finite(text: str) -> float:
        raise UserError(f"{where}: not JSON: {text} is no number")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=finite)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:  # text, a number or a nesting beyond all use
        raise UserError(f"{where}: not JSON: {one_line(error)}") from None


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises: UserError naming the file."""
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    try:
        values = parse_json(file.read_bytes(), file)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: wanted a JSON object, got {type(values).__name__}")
    return values


def find_weights(folder: Path) -> dict[str, Entry]:
    """Every tensor of the folder's weight files, in the files' order.

    Looked for, as in transformers: model.safetensors, its shards by their index, then
    pytorch_model.bin, its shards by their index.
    Raises: UserError naming file and key: no or damaged files, an index that points out of the
        folder or promises what its files lack, a key that comes twice.
    """
    paths, index = _paths(folder)
    entries: dict[str, Entry] = {}
    for path in paths:
        for key, entry in open_weights(path).entries.items():
            if key in entries:
                raise UserError(f"{path}: key {key!r} is in {entries[key].file.name} too")
            entries[key] = entry
    for key, path in index.items():
        if key not in entries or entries[key].file != path:
            raise UserError(f"{path}: key {key!r} is missing, which the index says is there")
    return entries


def has_weights(folder: Path) -> bool:
    """Whether there is a file that `find_weights` would read."""
    return any((folder / (n + end)).is_file() for n in SINGLE_FILES for end in ("", ".index.json"))


class Reader:
    """Tensors by name; one file is mapped at a time, so ask in the order of the files."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self.entries = entries
        self._open: WeightFile | None = None

    def __getitem__(self, key: str) -> Tensor:
        """The tensor on the CPU, mapped: to be copied, not written to.

        Raises: UserError naming file and key where it is not what it was when it was found.
        """
        entry = self.entries[key]
        if self._open is None or self._open.path != entry.file:
            self._open = None  # unmap the one before the next is mapped
            self._open = open_weights(entry.file)
        if self._open.entries.get(key) != entry:
            raise UserError(f"{entry.file}: {key!r} has changed since the file was opened")
        return self._open.tensor(key)


class WeightFile(Protocol):
    """An open file of tensors."""

    path: Path
    entries: dict[str, Entry]

    def tensor(self, key: str) -> Tensor:
        """The mapped tensor of one of `entries`."""
        ...


def open_weights(path: Path) -> WeightFile:
    """Map a weight file, by its suffix. Raises: UserError naming the file."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    return SafetensorsFile(path) if path.suffix == ".safetensors" else PickledFile(path)


class SafetensorsFile:
    """A WeightFile in the safetensors format."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
            with path.open("rb") as file:
                header = file.read(int.from_bytes(file.read(8), "little"))
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path}: not a safetensors file: {one_line(error)}") from None
        self.entries = {
            key: Entry(path, tuple(value["shape"]), _dtype(path, key, value["dtype"]))
            for key, value in parse_json(header, path).items()
            if key != "__metadata__"
        }

    def tensor(self, key: str) -> Tensor:
        try:
            return self._file.get_tensor(key)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{self.path}: {key!r} cannot be read: {one_line(error)}") from None


class PickledFile:
    """A WeightFile of torch.save: a dict of tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                mapped = file.read(4) == _ZIP  # torch 1.5 and older wrote no zip: not mappable
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        # The weights-only unpickler runs no code, but on damaged data it fails in any way.
        except Exception as error:
            raise UserError(f"{path}: refused: {_pickle_fault(error)}") from None
        if not isinstance(content, dict):
            raise UserError(f"{path}: wanted a dict of tensors, got {type(content).__name__}")
        for key, value in content.items():
            if not isinstance(key, str) or not _is_plain(value):
                kind = type(value).__name__
                raise UserError(f"{path}: {key!r}: wanted a dense tensor on the CPU, got {kind}")
            _dtype(path, key, value.dtype)
        self._tensors: dict[str, Tensor] = content
        self.entries = {k: Entry(path, tuple(t.shape), t.dtype) for k, t in content.items()}

    def tensor(self, key: str) -> Tensor:
        return self._tensors[key].detach()


def one_line(error: BaseException) -> str:
    """The first line of an error's text, cut where it is long, or its kind where it has none."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= 300 else f"{line[:300]} ..."


def _paths(folder: Path) -> tuple[list[Path], dict[str, Path]]:
    """The files to read, and what their index says of the keys, if there is one."""
    for name in SINGLE_FILES:
        if (folder / name).is_file():
            return [folder / name], {}
        index = folder / f"{name}.index.json"
        if index.is_file():
            places = _read_index(index)
            return sorted(set(places.values())), places
    raise UserError(f"{folder / SINGLE_FILES[0]}: no such file, nor another that holds weights")


def _read_index(index: Path) -> dict[str, Path]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"{index}: wanted a JSON object with a weight_map")
    for key, name in places.items():
        # Nothing but a plain name: an index must not reach out of its folder.
        if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
            raise UserError(f"{index}: {key!r}: {name!r:.200} is not the name of a weight file")
        if not (index.parent / name).is_file():
            raise UserError(f"{index.parent / name}: no such file, but {index.name} names it")
    return {key: index.parent / name for key, name in places.items()}


def _dtype(path: Path, key: str, dtype: str | torch.dtype) -> torch.dtype:
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in _SUPPORTED:
        raise UserError(f"{path}: {key!r}: dtype {dtype} is not supported")
    return found


def _is_plain(value: Any) -> bool:
    return (
        type(value) in (Tensor, nn.Parameter)
        and value.layout == torch.strided
        and value.device.type == "cpu"
    )


def _pickle_fault(error: BaseException) -> str:
    """Torch's message without its advice to unpickle anyway."""
    named = re.search(
        r"(?:Unsupported global: GLOBAL|Trying to load unsupported GLOBAL) (\S+)", str(error)
    )
    if named:
        return f"it holds {named[1]}, which is no tensor"
    return f"not a file of tensors: {one_line(error)}"
