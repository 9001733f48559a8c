"""The tiny world: scenes of coloured shapes on a 64x64 canvas, and their renderer.

A scene is one to four objects, each with a shape, a colour, a texture, a size and a
named position. Everything an object looks like follows from those five words, so a
picture can be read back exactly; the judge and the experts each do that in their own way.
"""

import random
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

IMAGE_SIZE = 64
BACKGROUND = (238, 235, 228)
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (218, 38, 38),
    "orange": (245, 132, 24),
    "yellow": (244, 214, 38),
    "green": (38, 158, 66),
    "cyan": (52, 200, 214),
    "blue": (40, 76, 214),
    "purple": (128, 48, 178),
    "pink": (248, 138, 190),
}
TEXTURES = ("plain", "striped", "dotted", "checked")
SIZES: dict[str, int] = {"small": 16, "large": 28}  # side of the bounding box in pixels
POSITIONS: dict[str, tuple[int, int]] = {  # centre (x, y) in pixels
    "center": (32, 32),
    "left": (16, 32),
    "right": (48, 32),
    "top": (32, 16),
    "bottom": (32, 48),
    "upper left": (16, 16),
    "upper right": (48, 16),
    "lower left": (16, 48),
    "lower right": (48, 48),
}
QUADRANTS = ("upper left", "upper right", "lower left", "lower right")
PAIRS = (("left", "right"), ("top", "bottom"))
DARKEN = 0.45  # the second colour of a texture, as a share of the first

# Combinations that no training prompt asks for; every other held-out prompt does.
HELD_OUT_COLORED = frozenset(
    {
        ("purple", "circle"),
        ("orange", "square"),
        ("green", "triangle"),
        ("pink", "diamond"),
        ("cyan", "cross"),
        ("blue", "star"),
    }
)
HELD_OUT_TEXTURED = frozenset(
    {("checked", "circle"), ("dotted", "triangle"), ("striped", "cross"), ("dotted", "square")}
)


@dataclass(frozen=True, slots=True)
class Obj:
    """One object of a scene, in the world's words."""

    shape: str
    color: str
    texture: str = "plain"
    size: str = "large"
    position: str = "center"

    def is_held_out(self) -> bool:
        return (self.color, self.shape) in HELD_OUT_COLORED or (
            self.texture,
            self.shape,
        ) in HELD_OUT_TEXTURED


Scene = tuple[Obj, ...]


def plan_text(scene: Scene) -> str:
    """The scene as the semantic-level chain of thought: one clause an object."""
    return ", ".join(f"{o.size} {o.texture} {o.color} {o.shape} {o.position}" for o in scene)


def read_plan(text: str) -> Scene | None:
    """The scene that `plan_text` wrote down; None where the text is not of its form."""
    found = []
    for clause in text.split(", "):
        size, texture, color, shape, position = [*clause.split(" ", 4), "", "", "", ""][:5]
        words = ((size, SIZES), (texture, TEXTURES), (color, COLORS), (shape, SHAPES))
        if position not in POSITIONS or any(word not in known for word, known in words):
            return None
        found.append(Obj(shape, color, texture, size, position))
    return tuple(found)


def random_object(rng: random.Random, *, allow_held_out: bool, **fixed: str) -> Obj:
    """An object with the given words fixed and the others drawn (plain and large preferred).

    Small objects are plain: at 16 pixels a texture could not be told apart.
    """
    while True:
        texture = fixed.get("texture") or (
            "plain"
            if fixed.get("size") == "small" or rng.random() < 0.6
            else rng.choice(TEXTURES[1:])
        )
        size = fixed.get("size") or ("large" if rng.random() < 0.7 else "small")
        obj = Obj(
            shape=fixed.get("shape") or rng.choice(SHAPES),
            color=fixed.get("color") or rng.choice(tuple(COLORS)),
            texture=texture,
            size=size if texture == "plain" else "large",
            position=fixed.get("position") or "center",
        )
        if allow_held_out or not obj.is_held_out():
            return obj


def place(scene: Scene, rng: random.Random) -> Scene:
    """The scene's objects on free positions that suit their number, order kept."""
    if len(scene) == 1:
        names: tuple[str, ...] = ("center",)
    elif len(scene) == 2:
        names = rng.choice(PAIRS)
    else:
        names = tuple(sorted(rng.sample(QUADRANTS, len(scene)), key=QUADRANTS.index))
    return tuple(replace(o, position=p) for o, p in zip(scene, names, strict=True))


def corrupt(scene: Scene, rng: random.Random, rate: float) -> Scene:
    """The scene as a careless annotator would note it: words, count and places go wrong.

    Each of shape, color, texture and size is redrawn with probability `rate`; with the same
    probability an object is lost or doubled, and two objects change places. Held-out
    combinations never appear by accident.
    """
    objects = list(scene)
    if rng.random() < rate:
        if len(objects) > 1 and (len(objects) == 4 or rng.random() < 0.5):
            objects.pop(rng.randrange(len(objects)))
        else:
            objects.append(rng.choice(objects))
        objects = list(place(tuple(objects), rng))
    if len(objects) > 1 and rng.random() < rate:
        i, j = rng.sample(range(len(objects)), 2)
        a, b = objects[i], objects[j]
        objects[i], objects[j] = (
            replace(a, position=b.position),
            replace(b, position=a.position),
        )
    noted = []
    for obj in objects:
        kept = {
            name: getattr(obj, name)
            for name in ("shape", "color", "texture", "size")
            if rng.random() >= rate
        }
        # A kept held-out pair stays as it is; a redrawn word must not make a new one.
        noted.append(
            random_object(rng, allow_held_out=obj.is_held_out(), position=obj.position, **kept)
        )
    return tuple(noted)


@cache
def _mask(shape: str, size: str, position: str) -> np.ndarray:
    """(64, 64, 1) float32 coverage of a shape in [0, 1], from 4x supersampling."""
    factor = 4
    cx, cy = POSITIONS[position]
    half = SIZES[size] / 2
    axis = (np.arange(IMAGE_SIZE * factor) + 0.5) / factor
    x = (axis[None, :] - cx) / half  # [-1, 1] inside the bounding box
    y = (axis[:, None] - cy) / half
    if shape == "circle":
        inside = x**2 + y**2 <= 1
    elif shape == "square":
        inside = (abs(x) <= 1) & (abs(y) <= 1)
    elif shape == "triangle":
        inside = (abs(y) <= 1) & (abs(x) <= (y + 1) / 2)
    elif shape == "diamond":
        inside = abs(x) + abs(y) <= 1
    elif shape == "cross":
        inside = (np.minimum(abs(x), abs(y)) <= 0.34) & (np.maximum(abs(x), abs(y)) <= 1)
    else:
        inside = _inside_star(x, y)
    inside = np.broadcast_to(inside, (IMAGE_SIZE * factor,) * 2).astype(np.float32)
    return inside.reshape(IMAGE_SIZE, factor, IMAGE_SIZE, factor).mean((1, 3))[..., None]


def _inside_star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A five-pointed star: the radius of its outline as a function of the angle."""
    inner = 0.45
    step = np.pi / 5
    angle = np.arctan2(x, -y) % (2 * step)
    angle = np.minimum(angle, 2 * step - angle)  # 0 at a point, `step` at a notch
    # The edge from the point (1, 0) to the notch inner * (cos step, sin step).
    ex, ey = inner * np.cos(step) - 1, inner * np.sin(step)
    radius = ey / (ey * np.cos(angle) - ex * np.sin(angle))
    return x**2 + y**2 <= radius**2


@cache
def _pattern(texture: str) -> np.ndarray:
    """(64, 64, 1) float32: 1 where the texture shows its first colour. Period 8 pixels."""
    y, x = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE]
    if texture == "plain":
        first = np.ones((IMAGE_SIZE, IMAGE_SIZE), bool)
    elif texture == "striped":
        first = y % 8 < 4
    elif texture == "checked":
        first = (x % 8 < 4) ^ (y % 8 < 4)
    else:
        first = (x % 8 - 3.5) ** 2 + (y % 8 - 3.5) ** 2 > 5.5
    return first.astype(np.float32)[..., None]


def render(scene: Scene) -> np.ndarray:
    """The picture of a scene.

    Returns: (64, 64, 3) uint8 RGB.
    """
    canvas = np.broadcast_to(np.asarray(BACKGROUND, np.float32), (IMAGE_SIZE, IMAGE_SIZE, 3)).copy()
    for obj in scene:
        color = np.asarray(COLORS[obj.color], np.float32)
        first = _pattern(obj.texture)
        paint = color * (first + (1 - first) * DARKEN)
        alpha = _mask(obj.shape, obj.size, obj.position)
        canvas += alpha * (paint - canvas)
    return canvas.round().astype(np.uint8)
