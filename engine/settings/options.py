"""Settings classes: dataclasses whose fields are also flags, YAML keys and lines of `--help`.

A settings class is a `@dataclass(kw_only=True, slots=True)` whose fields are made by `option`
and whose `__post_init__` calls `check_fields`. `parse_args` builds `--help`, the flags and the
YAML keys from it; `-` and `_` are the same in a flag.
"""

import dataclasses
import difflib
import inspect
import math
import operator
import reprlib
import types
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from engine.settings.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
BOUNDS = {
    "at_least": (">=", operator.ge),
    "above": (">", operator.gt),
    "at_most": ("<=", operator.le),
    "below": ("<", operator.lt),
}


def option(
    default: Any,
    help: str,
    *,
    group: str = "",
    aliases: Sequence[str] = (),
    **limits: float,
) -> Any:
    """A settings field.

    Args:
        default: its value when not given, a tuple for a list; `dataclasses.MISSING`: mandatory.
        help: its line in `--help`.
        group: a heading of `--help` that starts at this field.
        aliases: other names of the flag and YAML key.
        limits: of a number or of each in a list: `at_least`, `above`, `at_most`, `below`.
    """
    bounds = [(*BOUNDS[name], limit) for name, limit in limits.items()]
    metadata = {"help": help, "group": group, "aliases": tuple(aliases), "bounds": bounds}
    if isinstance(default, tuple):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def check_fields(config: Any) -> None:
    """Check every field of a settings object against its type, choices and bounds.

    Text that spells a number or a boolean is converted in place.
    Raises: UserError naming the key, what is wanted and what it got.
    """
    hints = get_type_hints(type(config))
    for f in dataclasses.fields(config):
        value = _convert(hints[f.name], getattr(config, f.name), f.name)
        object.__setattr__(config, f.name, value)  # frozen classes too
        bounds = f.metadata["bounds"]
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not all(holds(number, b) for _, holds, b in bounds):
                wanted = " and ".join(f"{sign} {bound}" for sign, _, bound in bounds)
                raise UserError(f"{f.name} must be {wanted}, got {number}")


def parse_args(cls: type[T], argv: Sequence[str], *, description: str) -> T:
    """Settings from a command line.

    Args:
        cls: a settings class (see the module's docstring).
        argv: words after the program's name.
        description: first line of `--help`, which prints and exits with code 0.
    Raises: UserError naming the flag or `file:line: key`, with the nearest valid name.
    """
    if "-h" in argv or "--help" in argv:
        print(_help_text(cls, description))
        raise SystemExit(0)
    flags, config_path = _read_flags(cls, argv)
    values = ({} if config_path is None else _read_yaml(cls, Path(config_path))) | flags
    for f in dataclasses.fields(cls):
        if f.default is MISSING and f.default_factory is MISSING and f.name not in values:
            raise UserError(f"--{f.name} is required: {f.metadata['help']}")
    return cls(**values)


def to_yaml(config: Any) -> str:
    """A settings object as YAML that `--config` reads back to an equal object."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def nearest(name: str, names: Iterable[str]) -> str:
    """The one of `names` that looks most like `name`."""
    return difflib.get_close_matches(name, list(names), n=1, cutoff=0.0)[0]


def _names(cls: "type[DataclassInstance]") -> dict[str, str]:
    """Every accepted name -> the field it sets."""
    fields = dataclasses.fields(cls)
    return {name: f.name for f in fields for name in (f.name, *f.metadata["aliases"])}


def _read_flags(
    cls: "type[DataclassInstance]", argv: Sequence[str]
) -> tuple[dict[str, Any], str | None]:
    """Field values and the `--config` path of a command line; a later flag wins."""
    names, hints = _names(cls), get_type_hints(cls)
    values: dict[str, Any] = {}
    config_path, words = None, list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise UserError(f"unexpected argument {word!r}: values follow a --flag")
        flag, has_value, inline = word.partition("=")
        given: Any = [inline] if has_value else []
        while not has_value and words and not words[0].startswith("--"):
            given.append(words.pop(0))
        name = flag[2:].replace("-", "_")
        if name == "config":
            config_path = _single(flag, given)
        elif name in names:
            hint = hints[names[name]]
            if get_origin(hint) is not list:
                given = True if hint is bool and not given else _single(flag, given)
            values[names[name]] = _convert(hint, given, flag)
        elif hints.get(names.get(name.removeprefix("no_"), "")) is bool:
            if given:
                raise UserError(f"{flag} takes no value, got {given[0]!r}")
            values[names[name.removeprefix("no_")]] = False
        else:
            raise UserError(f"unknown flag {flag} (nearest: --{nearest(name, [*names, 'config'])})")
    return values, config_path


def _single(flag: str, given: list[str]) -> str:
    if len(given) != 1:
        raise UserError(f"{flag} takes one value, got {' '.join(given) or 'none'}")
    return given[0]


def _read_yaml(cls: "type[DataclassInstance]", path: Path) -> dict[str, Any]:
    """Field values of a YAML file, each checked with its line at hand."""
    names, hints = _names(cls), get_type_hints(cls)
    defaults = {f.name: f.default for f in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else f"{path}"
        raise UserError(f"{where}: not YAML: {getattr(error, 'problem', error)}") from error
    if root is None:
        return values
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}:{root.start_mark.line + 1}: expected lines of 'key: value'")
    for key, node in root.value:
        where = f"{path}:{key.start_mark.line + 1}"
        name = key.value if isinstance(key, yaml.ScalarNode) else str(key.tag)
        if name not in names:
            raise UserError(f"{where}: unknown key {name!r} (nearest: {nearest(name, names)})")
        if names[name] in values:
            raise UserError(f"{where}: {name} is given twice")
        try:
            value = loader.construct_object(node, deep=True)
        except (yaml.YAMLError, ValueError) as error:
            raise UserError(f"{where}: {name}: {getattr(error, 'problem', error)}") from error
        # null leaves a setting whose default is none at it, even where none stands for a number.
        if value is not None or defaults[names[name]] is not None:
            value = _convert(hints[names[name]], value, f"{where}: {name}")
        values[names[name]] = value
    return values


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint`; text from a command line may spell numbers and booleans.

    Lists of names and numbers are also split at commas: `--train_levels semantic,token`.
    Raises: UserError starting with `where`.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):  # X | None
        return None if value is None else _convert(args[0], value, where)
    if origin is Literal:
        if value in args:
            return value
        wanted = f"one of {', '.join(args)}"
        if isinstance(value, str):
            wanted += f" (nearest: {nearest(value, args)})"
    elif origin is list:
        items = value if isinstance(value, list) else [value]
        if args[0] is not str:
            items = [i for v in items for i in (v.split(",") if isinstance(v, str) else [v])]
        return [_convert(args[0], item, where) for item in items]
    elif hint is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        wanted = "true or false"
    elif hint is str:
        if isinstance(value, str):
            return value
        wanted = "text"
    else:
        numbers = (int, str) if hint is int else (int, float, str)
        if isinstance(value, numbers) and not isinstance(value, bool):
            try:
                number = hint(value)
                if math.isfinite(number):
                    return number
            except (ValueError, OverflowError):
                pass  # text that spells no number is reported below
        wanted = "a whole number" if hint is int else "a number"
    raise UserError(f"{where}: expected {wanted}, got {reprlib.repr(value)}")


def _help_text(cls: "type[DataclassInstance]", description: str) -> str:
    hints = get_type_hints(cls)
    rows = [("", ""), ("--config FILE.yaml", "read settings from a file; flags override it")]
    # What a class inherits comes after what is its own.
    own = inspect.get_annotations(cls)
    for f in sorted(dataclasses.fields(cls), key=lambda f: f.name not in own):
        hint, text = hints[f.name], f.metadata["help"]
        if f.metadata["group"]:
            rows += [("", ""), (f.metadata["group"] + ":", "")]
        is_list = get_origin(hint) is list
        if is_list or get_origin(hint) in (Union, types.UnionType):
            hint = get_args(hint)[0]
        default = f.default
        if f.default_factory is not MISSING:
            default = " ".join(map(str, f.default_factory()))
        word = {int: " N", float: " X", str: " TEXT", bool: f", --no-{f.name}"}.get(hint, " NAME")
        if get_origin(hint) is Literal:
            text += f" {{{', '.join(get_args(hint))}}}"
        if default is MISSING:
            text += " (required)"
        elif default not in (None, "") and hint is not bool:
            text += f" [{default}]"
        if f.metadata["aliases"]:
            text += f" (also {', '.join('--' + a for a in f.metadata['aliases'])})"
        rows.append((f"--{f.name}{word}{' ...' if is_list else ''}", text))
    width = max(len(flag) for flag, _ in rows) + 2
    lines = [f"  {flag:<{width}}{text}" if text else flag for flag, text in rows]
    return "\n".join([description, *lines])
