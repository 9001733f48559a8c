"""Prompt files, the order in which they are drawn, and the text around a prompt."""

import json
import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from engine.config import nearest
from engine.errors import UserError

Row = dict[str, Any]
_TINY_DATA = Path(__file__).parent / "tiny" / "data"
EMBEDDED = {
    "tiny": _TINY_DATA / "train.jsonl",
    "tiny:heldout": _TINY_DATA / "heldout.jsonl",
}
REASONING_FILE = Path(__file__).parent / "prompts" / "reasoning.txt"
SYSTEM = (
    "You are a helpful assistant that understands both language and pictures, "
    "and answers in natural language."
)


def load_prompts(path: str | Path) -> list[Row]:
    """The rows of a prompt file, in T2I-R1's format.

    Args:
        path: JSON lines or one JSON array (any suffix but .txt), text with a prompt a line
            (.txt), or a name of `EMBEDDED`. Empty lines are skipped.
    Returns: dicts with at least `prompt`; `nouns`, `attr_nouns`, `spatial_info` and
        `numeracy_info` are checked where present (null counts as absent), other keys are kept.
    Raises: UserError naming file and line (for an array: file and row number, from 1).
    """
    file = EMBEDDED.get(str(path), Path(path))
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        hint = f" (embedded prompts: {', '.join(EMBEDDED)})" if "." not in file.name else ""
        raise UserError(f"{file}: no such prompt file{hint}") from error
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}:{line}: not UTF-8 text") from error
    # Not splitlines(): JSON strings may hold U+2028 and the like unescaped.
    lines = [(f"{file}:{i}", line.strip()) for i, line in enumerate(text.split("\n"), 1)]
    if file.suffix == ".txt":
        found = [(where, {"prompt": line}) for where, line in lines if line]
    elif text.lstrip().startswith("["):
        rows = enumerate(_parse_json(text, file, 1), 1)
        found = [(f"{file}: row {i}", row) for i, row in rows]
    else:
        found = [
            (where, _parse_json(line, file, i)) for i, (where, line) in enumerate(lines, 1) if line
        ]
    if not found:
        raise UserError(f"{file}: holds no prompts")
    return [_check_row(row, where) for where, row in found]


def _parse_json(text: str, file: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(f"{file}:{line}: not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond all use
        raise UserError(f"{file}:{first_line}: not JSON: {error}") from error


def _check_row(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with 'prompt', got {_kind(row)}")
    if "prompt" not in row:
        hint = f" (nearest key: {nearest('prompt', row)!r})" if row else ""
        raise UserError(f"{where}: 'prompt' is missing{hint}")
    prompt = row["prompt"]
    if not isinstance(prompt, str):
        raise UserError(f"{where}: 'prompt' must be a string, got {_kind(prompt)}")
    if not prompt.strip():
        raise UserError(f"{where}: 'prompt' is empty")
    if any("\ud800" <= c <= "\udfff" for c in prompt):
        raise UserError(f"{where}: 'prompt' holds half a surrogate pair, which is no character")
    row = {key: value for key, value in row.items() if value is not None}
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


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


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


@dataclass(frozen=True, slots=True)
class PromptSampler:
    """Which rows a step trains on: shuffled epochs, as a pure function of (seed, step).

    Every row comes once an epoch; a batch may span the end of one and the start of the next.
    """

    num_rows: int
    batch: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_rows < 1 or self.batch < 1:
            raise ValueError(f"num_rows and batch must be >= 1, got {self.num_rows}, {self.batch}")

    def rows(self, step: int) -> list[int]:
        """Indices in [0, num_rows) of step `step` >= 0; `batch` of them."""
        places = range(step * self.batch, (step + 1) * self.batch)
        return [
            _epoch_order(self.num_rows, self.seed, place // self.num_rows)[place % self.num_rows]
            for place in places
        ]


@lru_cache(maxsize=4)
def _epoch_order(num_rows: int, seed: int, epoch: int) -> tuple[int, ...]:
    # A string seed is hashed by Random itself: (seed, epoch) pairs do not collide.
    return tuple(random.Random(f"{seed}/{epoch}").sample(range(num_rows), num_rows))


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """The Janus "deepseek" conversation around a prompt, as text without the BOS token.

    Attributes:
        system: opens stage 1; empty: no system prompt.
        reasoning: the instruction to plan; its first `{}` stands for the prompt.
    """

    system: str
    reasoning: str

    def stage1_text(self, prompt: str) -> str:
        """What the semantic CoT continues."""
        # Not str.format: prompts and instructions may hold braces of their own.
        return _conversation(self.system, self.reasoning.replace("{}", prompt, 1))

    def stage2_text(self, prompt: str, cot: str) -> str:
        """What precedes the image-start token."""
        return _conversation("", f"{prompt}. {cot}")


def _conversation(system: str, message: str) -> str:
    opening = f"{system}\n\n" if system else ""
    return f"{opening}<|User|>: {message}\n\n<|Assistant|>:"


def load_template(checkpoint_dir: Path | None, reasoning_prompt_path: str | None) -> PromptTemplate:
    """The template of a checkpoint, with the user's instruction where one is given.

    Args:
        checkpoint_dir: its `prompt_template.json` {"system", "reasoning"}, if there is one,
            replaces the packaged texts.
        reasoning_prompt_path: text file that replaces the instruction alone.
    Raises: UserError naming the file that is unreadable or has no `{}` slot.
    """
    system, reasoning, source = SYSTEM, _read_text(REASONING_FILE), REASONING_FILE
    template_file = checkpoint_dir / "prompt_template.json" if checkpoint_dir else None
    if template_file is not None and template_file.exists():
        source = template_file
        found = _parse_json(_read_text(source), source, 1)
        for key in ("system", "reasoning"):
            if not isinstance(found, dict) or not isinstance(found.get(key), str):
                raise UserError(f"{source}: must be an object with a string {key!r}")
        system, reasoning = found["system"], found["reasoning"]
    if reasoning_prompt_path is not None:
        source = Path(reasoning_prompt_path)
        reasoning = _read_text(source)
    if "{}" not in reasoning:
        raise UserError(f"{source}: the instruction has no {{}} slot for the prompt")
    return PromptTemplate(system, reasoning)


def _read_text(path: Path) -> str:
    """A text file without the newline that editors put at its end."""
    try:
        return path.read_text(encoding="utf-8").rstrip("\r\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text") from error
