"""Prompts of the tiny world in T2I-R1's JSON-lines format, with the scenes they describe.

Task types follow T2I-R1's data (`color, shape, texture, spatial, numeracy, complex`), plus
`riddle`: a prompt that names neither shape nor colour, so that the semantic-level chain of
thought has something to work out. A row carries `prompt`, `task_type` and `nouns`, and where
they apply `attr_nouns`, `spatial_info`, `numeracy_info`; the policy only ever sees `prompt`.
"""

import json
import random
from pathlib import Path
from typing import Any

from engine.tiny.world import (
    COLORS,
    POSITIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Obj,
    Scene,
    place,
    random_object,
)

TASK_TYPES = ("color", "shape", "texture", "spatial", "numeracy", "complex", "riddle")
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
PLACES = {  # locality -> positions of its two objects
    "left of": ("left", "right"),
    "on the left of": ("left", "right"),
    "right of": ("right", "left"),
    "on the right of": ("right", "left"),
    "above": ("top", "bottom"),
    "on the top of": ("top", "bottom"),
    "below": ("bottom", "top"),
    "on the bottom of": ("bottom", "top"),
    "next to": ("left", "right"),
}
SHAPE_RIDDLES = {
    "circle": ("a shape with no corners", "a shape like the full moon", "a shape like a coin"),
    "square": (
        "a shape like a chessboard",
        "a shape like a window pane",
        "a shape with four right angles",
    ),
    "triangle": (
        "a three-sided shape",
        "a shape with three corners",
        "a shape like a slice of pizza",
    ),
    "diamond": ("a box that stands on its tip", "a shape like a kite", "a shape from card games"),
    "cross": (
        "a shape like a plus sign",
        "a shape with four equal arms",
        "a shape like a road junction",
    ),
    "star": (
        "a shape with five points",
        "a shape like a sheriff badge",
        "a shape on top of a christmas tree",
    ),
}
COLOR_RIDDLES = {
    "red": ("a ripe tomato", "a fire engine", "a strawberry"),
    "orange": ("a carrot", "a pumpkin", "autumn leaves"),
    "yellow": ("a ripe banana", "a lemon", "a canary"),
    "green": ("grass", "a cucumber", "a frog"),
    "cyan": ("a tropical lagoon", "a swimming pool", "toothpaste"),
    "blue": ("the deep sea", "a sapphire", "denim"),
    "purple": ("an eggplant", "a plum", "lavender"),
    "pink": ("a flamingo", "bubble gum", "a piglet"),
}
Row = dict[str, Any]


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _plural(words: str) -> str:
    return words + ("es" if words.endswith(("s", "x")) else "s")


def _pair(rng: random.Random, allow_held_out: bool, **words: str) -> list[Obj]:
    """Two objects of different shape and colour."""
    first = random_object(rng, allow_held_out=allow_held_out, **words)
    while True:
        second = random_object(rng, allow_held_out=allow_held_out, **words)
        if second.shape != first.shape and second.color != first.color:
            return [first, second]


def _textured(rng: random.Random, allow_held_out: bool, shape: str) -> Obj:
    while True:
        obj = random_object(rng, allow_held_out=allow_held_out, shape=shape)
        if obj.texture != "plain":
            return obj


def _named(objects: list[Obj], *words: str) -> list[str]:
    return [" ".join(getattr(o, w) for w in words) for o in objects]


def _attribute(rng: random.Random, allow: bool, kind: str) -> tuple[Row, Scene]:
    words = {
        "color": ("color", "shape"),
        "shape": ("size", "shape"),
        "texture": ("texture", "shape"),
    }
    objects = _pair(rng, allow)
    if kind == "texture":
        objects = [_textured(rng, allow, o.shape) for o in objects]
    names = _named(objects, *words[kind])
    row = {
        "prompt": " and ".join(_article(n) for n in names),
        "nouns": [o.shape for o in objects],
        "attr_nouns": names,
    }
    return row, place(tuple(objects), rng)


def _spatial(rng: random.Random, allow: bool, *words: str) -> tuple[Row, Scene]:
    objects = _pair(rng, allow)
    names = _named(objects, *words)
    locality = rng.choice(tuple(PLACES))
    row: Row = {
        "prompt": f"{_article(names[0])} {locality} {_article(names[1])}",
        "nouns": [o.shape for o in objects],
        "spatial_info": {
            "obj1": objects[0].shape,
            "obj2": objects[1].shape,
            "locality": locality,
        },
    }
    if len(words) > 1:
        row["attr_nouns"] = names
    scene = tuple(
        Obj(o.shape, o.color, o.texture, o.size, p)
        for o, p in zip(objects, PLACES[locality], strict=True)
    )
    return row, scene


def _numeracy(rng: random.Random, allow: bool) -> tuple[Row, Scene]:
    first, second = _pair(rng, allow)
    if rng.random() < 0.6:
        counts = [rng.choice((2, 3, 4))]
        kinds = [first]
        names = _named(kinds, "color", "shape") if rng.random() < 0.6 else [first.shape]
    else:
        counts = rng.choice(([1, 2], [2, 1], [2, 2], [1, 3], [3, 1]))
        kinds = [first, second]
        names = [o.shape for o in kinds]
    row: Row = {
        "prompt": " and ".join(
            f"{NUMBERS[n]} {_plural(name) if n > 1 else name}"
            for n, name in zip(counts, names, strict=True)
        ),
        "nouns": [o.shape for o in kinds],
        "numeracy_info": [
            {"obj_name": o.shape, "num": n} for o, n in zip(kinds, counts, strict=True)
        ],
    }
    if " " in names[0]:
        row["attr_nouns"] = names
    objects = tuple(o for o, n in zip(kinds, counts, strict=True) for _ in range(n))
    return row, place(objects, rng)


def _complex(rng: random.Random, allow: bool) -> tuple[Row, Scene]:
    if rng.random() < 0.5:
        return _spatial(rng, allow, "size", "texture", "color", "shape")
    while True:
        objects = [random_object(rng, allow_held_out=allow) for _ in range(3)]
        if len({o.shape for o in objects}) == 3:
            break
    names = _named(objects, "texture", "color", "shape")
    row = {
        "prompt": f"{_article(names[0])}, {_article(names[1])} and {_article(names[2])}",
        "nouns": [o.shape for o in objects],
        "attr_nouns": names,
    }
    return row, place(tuple(objects), rng)


def _riddle(rng: random.Random, allow: bool) -> tuple[Row, Scene]:
    obj = random_object(rng, allow_held_out=allow)
    shape, thing = rng.choice(SHAPE_RIDDLES[obj.shape]), rng.choice(COLOR_RIDDLES[obj.color])
    row = {
        "prompt": f"{shape} in the colour of {thing}",
        "nouns": [obj.shape],
        "attr_nouns": [f"{obj.color} {obj.shape}"],
    }
    return row, place((obj,), rng)


def draw(task_type: str, rng: random.Random, *, allow_held_out: bool = False) -> tuple[Row, Scene]:
    """A prompt row of the given task type and one scene that fulfils it."""
    if task_type in ("color", "shape", "texture"):
        row, scene = _attribute(rng, allow_held_out, task_type)
    elif task_type == "spatial":
        words = ("color", "shape") if rng.random() < 0.6 else ("shape",)
        row, scene = _spatial(rng, allow_held_out, *words)
    elif task_type == "numeracy":
        row, scene = _numeracy(rng, allow_held_out)
    elif task_type == "complex":
        row, scene = _complex(rng, allow_held_out)
    elif task_type == "riddle":
        row, scene = _riddle(rng, allow_held_out)
    else:
        raise ValueError(f"unknown task type {task_type!r}")
    return {"prompt": row.pop("prompt"), "task_type": task_type, **row}, scene


def _names_held_out(row: Row) -> bool:
    """Whether the prompt itself asks for a combination that training never shows."""
    for name in row.get("attr_nouns", ()):
        words = name.split()
        color = next((w for w in words if w in COLORS), "")
        texture = next((w for w in words if w in TEXTURES), "")
        if Obj(words[-1], color, texture).is_held_out():
            return True
    return False


def make_splits(*, train: int, held_out: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Prompt rows of the train and held-out splits, `train` and `held_out` of each task type.

    No prompt is in both. No train prompt names a held-out combination; every other held-out
    prompt does, for the task types whose prompts name attributes at all.
    """
    rng = random.Random(seed)
    seen: set[str] = set()
    splits: tuple[list[Row], list[Row]] = ([], [])
    for held, count, rows in ((True, held_out, splits[1]), (False, train, splits[0])):
        for task_type in TASK_TYPES:
            kept = 0
            for _ in range(200 * count):
                row, _ = draw(task_type, rng, allow_held_out=held)
                wants_held_out = held and kept % 2 == 0 and task_type != "shape"
                if row["prompt"] in seen or wants_held_out != _names_held_out(row):
                    continue
                seen.add(row["prompt"])
                rows.append(row)
                kept += 1
                if kept == count:
                    break
    rng.shuffle(splits[0])
    return splits


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def corpus() -> list[str]:
    """Text that holds every word of the world, for training its tokenizer."""
    rng = random.Random(0)
    lines = [
        f"{a} in the colour of {b}"
        for group in SHAPE_RIDDLES.values()
        for a in group
        for things in COLOR_RIDDLES.values()
        for b in things
    ]
    lines += [
        draw(t, rng, allow_held_out=True)[0]["prompt"] for t in TASK_TYPES for _ in range(400)
    ]
    lines += [
        f" {size} {texture} {color} {shape} {position},"
        for size in SIZES
        for texture in TEXTURES
        for color in COLORS
        for shape in SHAPES
        for position in POSITIONS
    ]
    return lines
