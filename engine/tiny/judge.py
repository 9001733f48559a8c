"""The evaluator: reads a picture back into words and compares them with what was asked.

It is not one of the rewards and shares no code with them: connected regions instead of
templates at known places, hue votes instead of palette distances, outlines normalised to
their bounding box, run lengths for textures. Only the world's constants and renderer are
common, and those define what the words mean.
"""

from functools import cache
from typing import Any

import numpy as np
import torch

from engine.settings.errors import UserError
from engine.tiny.world import BACKGROUND, COLORS, SHAPES, SIZES, TEXTURES, Obj, render

CONTRAST = 62.0  # RGB distance from the background that counts as painted
STRICT_CONTRAST = 85.0  # where a faint bridge joins two objects; pink, the palest, has 105
MIN_AREA = 32  # pixels; the smallest object, a small star, has 84
GRID = 24  # side of the normalised outline
WORD_KINDS = {
    **dict.fromkeys(SHAPES, "shape"),
    **dict.fromkeys(COLORS, "color"),
    **dict.fromkeys(TEXTURES, "texture"),
    **dict.fromkeys(SIZES, "size"),
}
# Share of dark pixels, and of neighbours that differ along rows and along columns.
TEXTURE_SIGNS = {
    "plain": (0.0, 0.0, 0.0),
    "striped": (0.5, 0.0, 0.25),
    "checked": (0.5, 0.25, 0.25),
    "dotted": (0.25, 0.125, 0.125),
}
UNKNOWN = "unknown"


def judge(images: torch.Tensor, rows: list[dict[str, Any]]) -> np.ndarray:
    """How much of each prompt its picture shows.

    Args:
        images: (B, 3, 64, 64) float in [0, 1].
        rows: B prompt rows.
    Returns: (B,) float64 in [0, 1]: the share of the asked names that are there; for spatial
        rows the mean of that and of the relation; for counting rows 1 or 0. Halved when the
        picture does not hold as many objects as asked.
    """
    if len(images) != len(rows):
        raise ValueError(f"{len(images)} images for {len(rows)} rows")
    return np.array([score_scene(read_scene(i), row) for i, row in zip(images, rows, strict=True)])


def score_scene(objects: list[dict[str, Any]], row: dict[str, Any]) -> float:
    """The judge's score of a scene that `read_scene` read, in [0, 1]."""
    names = row.get("attr_nouns") or row.get("nouns")
    if not names:
        raise UserError(f"prompt {row.get('prompt')!r} has neither 'attr_nouns' nor 'nouns'")
    counting = row.get("numeracy_info")
    if counting:
        wanted = sum(item["num"] for item in counting)
        right = [
            sum(_is(o, _full_name(item["obj_name"], names)) for o in objects) == item["num"]
            for item in counting
        ]
        score = float(all(right))
    else:
        wanted = len(names)
        score = sum(any(_is(o, name) for o in objects) for name in names) / len(names)
    if row.get("spatial_info"):
        score = (score + _relation_holds(objects, row["spatial_info"])) / 2
    return score if len(objects) == wanted else score / 2


def _is(obj: dict[str, Any], name: str) -> bool:
    for word in name.split():
        if word not in WORD_KINDS:
            raise UserError(f"the tiny world has no word {word!r} (in {name!r})")
    return all(obj[WORD_KINDS[word]] == word for word in name.split())


def _full_name(noun: str, names: list[str]) -> str:
    """The name with its attributes that ends in `noun`, if the row has one."""
    return next((name for name in names if name.split()[-1] == noun), noun)


def _relation_holds(objects: list[dict[str, Any]], info: dict[str, str]) -> float:
    """1 when some pair of distinct objects stands as told, else 0."""
    for a in objects:
        for b in objects:
            if a is b or not (_is(a, info["obj1"]) and _is(b, info["obj2"])):
                continue
            dx, dy = b["x"] - a["x"], b["y"] - a["y"]
            if abs(dx) > abs(dy):
                holds = {"left": dx > 0, "right": dx < 0}
            else:
                holds = {"above": dy > 0, "top": dy > 0, "below": dy < 0, "bottom": dy < 0}
            holds.update({"next": True, "near": True, "side": True})
            if any(holds.get(word, False) for word in info["locality"].split()):
                return 1.0
    return 0.0


def read_scene(image: torch.Tensor | np.ndarray) -> list[dict[str, Any]]:
    """The objects of one picture, left to right.

    Args: image: (3, 64, 64) float in [0, 1].
    Returns: a dict an object: shape, color, texture, size ("unknown" where unclear), the
        centre x, y of its bounding box, and its area, in pixels.
    """
    pixels = np.asarray(image, np.float32).transpose(1, 2, 0) * 255  # (64, 64, 3)
    distance, painted = _paint(pixels)
    regions = []
    for region in _regions(painted):
        wide = max(region.any(0).sum(), region.any(1).sum()) > max(SIZES.values()) + 4
        parts = _regions(region & (distance > STRICT_CONTRAST)) if wide else []
        regions += parts if len(parts) > 1 else [region]
    objects = [_describe(pixels, region) for region in regions]
    return sorted(objects, key=lambda o: (o["x"], o["y"]))


def _paint(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(H, W) distance of each pixel from the background, and which ones are painted."""
    distance = np.sqrt(((pixels - np.asarray(BACKGROUND, np.float32)) ** 2).sum(-1))
    painted = distance > CONTRAST
    # By majority: a speck of noise that touches an object would stretch its bounding box.
    return distance, painted & (_neighbours(painted) >= 4)


def _neighbours(mask: np.ndarray) -> np.ndarray:
    """(H, W) how many of the eight neighbours are set."""
    padded = np.pad(mask.astype(np.int8), 1)
    height, width = mask.shape
    around = sum(padded[y : y + height, x : x + width] for y in range(3) for x in range(3))
    return around - mask


def _regions(painted: np.ndarray) -> list[np.ndarray]:
    """Masks of the connected (4-neighbour) regions of at least MIN_AREA pixels, by runs."""
    runs: list[tuple[int, int, int]] = []  # row, first column, column past the last
    parent: list[int] = []

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    edges = np.diff(np.pad(painted.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    rows, starts = (v.tolist() for v in np.nonzero(edges == 1))
    stops = np.nonzero(edges == -1)[1].tolist()
    first = 0  # the first run of the row above that can still touch
    for i, (y, start, stop) in enumerate(zip(rows, starts, stops, strict=True)):
        runs.append((y, start, stop))
        parent.append(i)
        while runs[first][0] < y - 1 or (runs[first][0] == y - 1 and runs[first][2] <= start):
            first += 1
        j = first
        while runs[j][0] == y - 1 and runs[j][1] < stop:
            parent[find(j)] = find(i)
            j += 1

    regions: dict[int, np.ndarray] = {}
    for i, (y, start, stop) in enumerate(runs):
        region = regions.setdefault(find(i), np.zeros(painted.shape, bool))
        region[y, start:stop] = True
    return [region for region in regions.values() if region.sum() >= MIN_AREA]


def _describe(pixels: np.ndarray, region: np.ndarray) -> dict[str, Any]:
    ys, xs = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    top, bottom, left, right = ys[0], ys[-1] + 1, xs[0], xs[-1] + 1
    height, width = bottom - top, right - left
    region = region[top:bottom, left:right]
    pixels = pixels[top:bottom, left:right]
    inner = region & (_neighbours(region) == 8)
    if inner.sum() < 12:
        inner = region
    bright = pixels.max(-1)  # the V of HSV
    values = np.sort(bright[inner])
    dim, level = (float(values[int(q * (len(values) - 1))]) for q in (0.1, 0.9))
    return {
        "shape": _shape(region),
        "color": _color(pixels[inner], bright[inner], level),
        "texture": _texture(bright, inner, dim, level),
        "size": "small" if (height + width) / 2 <= sum(SIZES.values()) / 2 else "large",
        "x": float(left + right) / 2,
        "y": float(top + bottom) / 2,
        "area": int(region.sum()),
    }


def _outline(crop: np.ndarray) -> np.ndarray:
    """(24, 24) float32: the region stretched to a common square, nearest pixel."""
    rows = ((np.arange(GRID) + 0.5) * crop.shape[0] / GRID).astype(int)
    columns = ((np.arange(GRID) + 0.5) * crop.shape[1] / GRID).astype(int)
    return crop[rows][:, columns].astype(np.float32)


@cache
def _outlines() -> tuple[tuple[str, ...], np.ndarray]:
    """Names and (12, 24, 24) outlines of every shape at both sizes, as the renderer draws them."""
    names, outlines = [], []
    for shape in SHAPES:
        for size in SIZES:
            picture = render((Obj(shape, "blue", "plain", size),)).astype(np.float32)
            _, painted = _paint(picture)
            ys, xs = np.flatnonzero(painted.any(1)), np.flatnonzero(painted.any(0))
            names.append(shape)
            outlines.append(_outline(painted[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1]))
    return tuple(names), np.stack(outlines)


def _shape(crop: np.ndarray) -> str:
    height, width = crop.shape
    if not 0.7 < height / width < 1.4 or max(height, width) > 40:
        return UNKNOWN
    names, outlines = _outlines()
    wrong = np.abs(outlines - _outline(crop)).mean((1, 2))
    return names[int(wrong.argmin())] if wrong.min() < 0.15 else UNKNOWN


def _hue(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hue in degrees and chroma of (N, 3) pixels."""
    high, low = rgb.max(-1), rgb.min(-1)
    chroma = high - low
    r, g, b = rgb[:, 0], rgb[:, 1], rgb[:, 2]
    safe = np.maximum(chroma, 1e-6)
    hue = np.where(
        high == r, (g - b) / safe, np.where(high == g, 2 + (b - r) / safe, 4 + (r - g) / safe)
    )
    return hue * 60 % 360, chroma


@cache
def _palette() -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """Names, hues in degrees and saturations of the world's colours."""
    rgb = np.asarray(list(COLORS.values()), np.float32)
    hue, chroma = _hue(rgb)
    return tuple(COLORS), hue, chroma / rgb.max(-1)


def _color(rgb: np.ndarray, bright: np.ndarray, level: float) -> str:
    """The colour that most pixels vote for, weighted by how colourful they are."""
    names, hues, saturations = _palette()
    hue, chroma = _hue(rgb)
    turn = np.abs(hue[:, None] - hues)
    turn = np.minimum(turn, 360 - turn)  # (N, 8) degrees
    votes = np.bincount(turn.argmin(1), weights=chroma, minlength=len(names))
    winner = int(votes.argmax())
    near = turn[:, winner] < 30
    saturation = float((chroma / np.maximum(bright, 1))[near].mean()) if near.any() else 0.0
    clear = votes[winner] > 0.4 * votes.sum()
    # Greys and mud have a hue too: the brightest pixels must be as bright and as colourful.
    vivid = saturation > 0.5 * saturations[winner]
    lit = level > 0.6 * max(COLORS[names[winner]])
    return names[winner] if clear and vivid and lit else UNKNOWN


def _texture(bright: np.ndarray, inner: np.ndarray, dim: float, level: float) -> str:
    """The texture whose share of dark pixels and run lengths fit best."""
    # The second colour is 0.45 of the first; after blurring, still clearly dimmer.
    dark = (bright < (dim + level) / 2) & (dim < 0.7 * level)
    across = inner[:, 1:] & inner[:, :-1]
    down = inner[1:] & inner[:-1]
    signs = np.array(
        [
            _share(dark[inner]),
            _share((dark[:, 1:] != dark[:, :-1])[across]),
            _share((dark[1:] != dark[:-1])[down]),
        ]
    )
    wrong = {name: np.abs((signs - sign) * (1, 2, 2)).sum() for name, sign in TEXTURE_SIGNS.items()}
    return min(wrong, key=wrong.__getitem__)


def _share(flags: np.ndarray) -> float:
    """Share of true flags; 0 of none, as a region one pixel wide has no neighbours to compare."""
    return float(flags.mean()) if flags.size else 0.0
