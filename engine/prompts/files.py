"""Prompt files: JSON lines, a JSON array, CSV, Parquet or a prompt a line; every row is checked.

The rows are T2I-R1's (`data/geneval_and_t2i_data_final.json` of CaraJ7/T2I-R1: 7,223 JSON lines of
`prompt`, `task_type`, `nouns` and, by task, `attr_nouns`, `spatial_info` or `numeracy_info`). The
files of GenEval (`evaluation_metadata.jsonl`), WISE (an array with `Prompt` and `prompt_id`) and
T2I-CompBench (`*_val.txt`) are read as they are.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from engine.settings.errors import UserError
from engine.settings.options import nearest

Row = dict[str, Any]
Located = tuple[str, Any]  # where a row stands, for errors; the row, unchecked
_TINY_DATA = Path(__file__).parents[1] / "tiny" / "data"
EMBEDDED = {
    "tiny": _TINY_DATA / "train.jsonl",
    "tiny:heldout": _TINY_DATA / "heldout.jsonl",
}
NESTED = ("nouns", "attr_nouns", "spatial_info", "numeracy_info")  # JSON in the cells of a CSV
PROMPT_KEYS = ("prompt", "Prompt")  # the second is WISE's
_BLANK = re.compile(r"[ \t\r\n]*")


def load_prompts(path: str | Path) -> list[Row]:
    """The rows of a prompt file.

    Args:
        path: by its suffix .txt (a prompt a line), .csv (a header with a column `prompt`; JSON in
            the columns of `NESTED`), .parquet (needs pyarrow), else JSON lines or one JSON array;
            or a name of `EMBEDDED`. UTF-8. Empty lines are skipped.
    Returns: dicts with at least `prompt`. `task_type` and the fields of `NESTED` are checked where
        present; null, or an empty cell, counts as absent. WISE's `Prompt` is read as `prompt`.
        Other keys are kept as they are.
    Raises: UserError naming file and line (Parquet: file and row, from 1).
    """
    file = EMBEDDED.get(str(path), Path(path))
    readers = {".txt": _text_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
    read: Callable[[Path], Iterable[Located]] = readers.get(file.suffix.lower(), _json_rows)
    try:
        found = list(read(file))
    except FileNotFoundError as error:
        hint = f" (embedded prompts: {', '.join(EMBEDDED)})" if "." not in file.name else ""
        raise UserError(f"{file}: no such prompt file{hint}") from error
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from error
    if not found:
        raise UserError(f"{file}: holds no prompts")
    return [_check_row(row, where) for where, row in found]


def parse_json(text: str, file: Path, first_line: int = 1) -> Any:
    """JSON text of a file that starts at `first_line`. Raises: UserError naming file and line."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _not_json(error, file, first_line) from error


def _not_json(error: Exception, file: Path, first_line: int) -> UserError:
    if isinstance(error, json.JSONDecodeError):
        line = first_line + error.lineno - 1
        return UserError(f"{file}:{line}: not JSON: {error.msg} at column {error.colno}")
    # A number or a nesting beyond all use.
    return UserError(f"{file}:{first_line}: not JSON: {error}")


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}:{line}: not UTF-8 text") from error


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, stripped, with their numbers."""
    # Not splitlines(): JSON strings may hold U+2028 and the like unescaped.
    for number, line in enumerate(text.split("\n"), 1):
        if stripped := line.strip():
            yield number, stripped


def _text_rows(file: Path) -> Iterator[Located]:
    for number, line in _lines(_read_text(file)):
        yield f"{file}:{number}", {"prompt": line}


def _json_rows(file: Path) -> Iterator[Located]:
    text = _read_text(file)
    if text.lstrip().startswith("["):
        yield from _array_rows(text, file)
        return
    for number, line in _lines(text):
        yield f"{file}:{number}", parse_json(line, file, number)


def _array_rows(text: str, file: Path) -> Iterator[Located]:
    """Elements of a JSON array one by one: json.loads would not say on which line one began."""
    decoder = json.JSONDecoder()
    line, counted, number = 1, 0, 0
    position = _skip_blank(text, text.index("[") + 1)
    closed = text.startswith("]", position)
    try:
        while not closed:
            line += text.count("\n", counted, position)
            counted, number = position, number + 1
            row, position = decoder.raw_decode(text, position)
            yield f"{file}:{line}: row {number}", row
            position = _skip_blank(text, position)
            closed = text.startswith("]", position)
            if not closed:
                if not text.startswith(",", position):
                    raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
                position = _skip_blank(text, position + 1)
        position = _skip_blank(text, position + 1)
        if position < len(text):
            raise json.JSONDecodeError("Extra data", text, position)
    except (ValueError, RecursionError) as error:
        # A JSONDecodeError counts lines from the beginning of the file by itself.
        first_line = 1 if isinstance(error, json.JSONDecodeError) else line
        raise _not_json(error, file, first_line) from error


def _skip_blank(text: str, position: int) -> int:
    blank = _BLANK.match(text, position)
    return position if blank is None else blank.end()


def _csv_rows(file: Path) -> Iterator[Located]:
    reader = csv.reader(io.StringIO(_read_text(file), newline=""), strict=True)
    names: list[str] | None = None
    line = 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UserError(f"{file}:{line}: not CSV: {error}") from error
        if cells is None:
            return
        where, line = f"{file}:{line}", reader.line_num + 1
        if not cells:
            continue
        if names is None:
            names = [cell.strip() for cell in cells]
            _check_header(names, where)
            continue
        if len(cells) != len(names):
            raise UserError(f"{where}: has {len(cells)} cells, the header has {len(names)}")
        row = zip(names, cells, strict=True)
        filled = {name: cell for name, cell in row if cell.strip() or name in PROMPT_KEYS}
        yield where, {name: _cell(name, cell, where) for name, cell in filled.items()}


def _check_header(names: list[str], where: str) -> None:
    if not set(PROMPT_KEYS) & set(names):
        near = nearest("prompt", names)
        raise UserError(f"{where}: the header has no column 'prompt' (nearest: {near!r})")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{where}: the header names {twice!r} twice")


def _cell(name: str, cell: str, where: str) -> Any:
    if name not in NESTED:
        return cell
    try:
        return json.loads(cell)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", None) or error
        raise UserError(f"{where}: column {name!r} holds no JSON: {reason}") from error


def _parquet_rows(file: Path) -> Iterator[Located]:
    with file.open("rb") as handle:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise UserError(
                f"{file}: Parquet needs pyarrow, the extra [parquet]: pip install pyarrow"
            ) from error
        try:
            rows = parquet.read_table(handle).to_pylist()
        # A damaged file also shows as an OSError, as text that is not UTF-8, or as a length that
        # no memory holds.
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{file}: not Parquet: {reason}") from error
    for number, row in enumerate(rows, 1):
        yield f"{file}: row {number}", row


def _check_row(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with 'prompt', got {_kind(row)}")
    if "prompt" not in row and "Prompt" in row:
        row = {"prompt": row["Prompt"], **row}
    if "prompt" not in row:
        hint = f" (nearest key: {nearest('prompt', row)!r})" if row else ""
        raise UserError(f"{where}: 'prompt' is missing{hint}")
    prompt = row["prompt"]
    if not isinstance(prompt, str):
        raise UserError(f"{where}: 'prompt' must be a string, got {_kind(prompt)}")
    if not prompt.strip():
        raise UserError(f"{where}: 'prompt' is empty")
    if not _is_text(prompt):
        raise UserError(f"{where}: 'prompt' holds half a surrogate pair, which is no character")
    checked = ("task_type", *NESTED)
    row = {key: value for key, value in row.items() if value is not None or key not in checked}
    if "task_type" in row and not _is_name(row["task_type"]):
        raise UserError(f"{where}: 'task_type' must be a non-empty string")
    for key in ("nouns", "attr_nouns"):
        names = row.get(key, [])
        if not isinstance(names, list) or not all(map(_is_name, names)):
            raise UserError(f"{where}: {key!r} must be a list of non-empty strings")
    if "spatial_info" in row:
        info = row["spatial_info"]
        for key in ("obj1", "obj2", "locality"):
            if not isinstance(info, dict) or not _is_name(info.get(key)):
                raise UserError(f"{where}: 'spatial_info' must be an object with a string {key!r}")
    if "numeracy_info" in row:
        counts = row["numeracy_info"]
        if not isinstance(counts, list) or not all(map(_is_count, counts)):
            raise UserError(
                f"{where}: 'numeracy_info' must be a list of objects with a string 'obj_name' "
                "and a whole number 'num' >= 1"
            )
    return row


def _is_text(value: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in value)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and _is_text(value)


def _is_count(value: Any) -> bool:
    # type(), because a bool is an int too
    return (
        isinstance(value, dict)
        and _is_name(value.get("obj_name"))
        and type(value.get("num")) is int
        and value["num"] >= 1
    )


def _kind(value: Any) -> str:
    """What JSON calls the type of `value`."""
    kinds = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
    return "null" if value is None else kinds.get(type(value), "a number")
