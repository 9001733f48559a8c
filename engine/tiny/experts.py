"""The tiny world's reward experts: a trained CLIP, and exact analysis for the other three slots.

`gdino` answers as a detector does (boxes with words, fed to the published formulas), `git` as
a yes/no attribute model does, `orm` as a whole-prompt model does. The three share one
`SceneReader`, so a batch is analysed once.
"""

from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.errors import UserError
from engine.tiny.world import (
    BACKGROUND,
    COLORS,
    DARKEN,
    IMAGE_SIZE,
    POSITIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    _mask,
    _pattern,
)
from rewards import HPS, RewardExpert
from rewards.detection import LOCALITIES, Detections, asked_names, detection_score

EXPERT_NAMES = ("hps", "gdino", "git", "orm")
MAX_OBJECTS = 4
MIN_INTERIOR = 16  # pixels
WINDOW = 16  # half the side of the region around a position that belongs to it
# RGB distance from the background: none of a pixel is painted below the first, all above the
# second. A half-covered edge pixel of a typical colour lies between.
PAINTED = (40.0, 90.0)
TYPICAL_CONTRAST = 190.0
WORDS = {
    word: (kind, i)
    for kind, words in (
        ("shape", SHAPES),
        ("color", tuple(COLORS)),
        ("texture", TEXTURES),
        ("size", tuple(SIZES)),
    )
    for i, word in enumerate(words)
}
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Reading:
    """Up to four objects of each picture; a slot's words are distributions."""

    present: Tensor
    """(B, 4) how sure it is that the slot holds an object of the world, in [0, 1]."""
    shape: Tensor
    """(B, 4, 6) sums to at most 1; the same for the next three."""
    color: Tensor
    """(B, 4, 8)"""
    texture: Tensor
    """(B, 4, 4)"""
    size: Tensor
    """(B, 4, 2)"""
    center: Tensor
    """(B, 4, 2) x and y in pixels."""
    boxes: Tensor
    """(B, 4, 4) corners in pixels."""
    stray: Tensor
    """(B,) share of the painted area that no object accounts for."""


@dataclass(frozen=True, slots=True)
class Templates:
    """What can stand where, as flat pictures. The 12 kinds are (size, shape)."""

    outlines: Tensor
    """(9 positions, 12 kinds, 4096) painted share of each pixel, as the reader sees it."""
    interiors: Tensor
    """(9, 12, 4096) 1 well inside the outline, where no background mixes in."""
    windows: Tensor
    """(9, 4096) 1 within 16 pixels of the position."""
    patterns: Tensor
    """(4 textures, 4096) 1 where the texture shows its first colour."""
    conflicts: Tensor
    """(9, 9) 1 for two positions whose windows overlap."""


@lru_cache(maxsize=2)
def _templates(device: torch.device) -> Templates:
    coverage = torch.stack(
        [
            torch.from_numpy(_mask(shape, size, position)[..., 0])
            for position in POSITIONS
            for size in SIZES
            for shape in SHAPES
        ]
    )
    outlines = _painted(coverage * TYPICAL_CONTRAST)
    full = (coverage >= 1).float()
    eroded = -F.max_pool2d(-full[:, None], 3, stride=1, padding=1)[:, 0]
    # A small star has next to nothing left after erosion: keep all of its full pixels.
    enough = eroded.sum((1, 2), keepdim=True) >= MIN_INTERIOR
    interiors = torch.where(enough, eroded, full)

    centers = torch.tensor(list(POSITIONS.values()), dtype=torch.float32)
    axis = torch.arange(IMAGE_SIZE) + 0.5
    inside_x = (axis[None] - centers[:, :1]).abs() < WINDOW  # (9, 64)
    inside_y = (axis[None] - centers[:, 1:]).abs() < WINDOW
    windows = (inside_y[:, :, None] & inside_x[:, None, :]).flatten(1).float()
    patterns = torch.stack([torch.from_numpy(_pattern(t)).flatten() for t in TEXTURES])
    conflicts = (torch.cdist(centers, centers, p=torch.inf) < 2 * WINDOW).float()
    shape = (len(POSITIONS), len(SIZES) * len(SHAPES), IMAGE_SIZE**2)
    return Templates(
        outlines.reshape(shape).to(device),
        interiors.reshape(shape).to(device),
        windows.to(device),
        patterns.to(device),
        conflicts.to(device),
    )


def _painted(distance: Tensor) -> Tensor:
    """The painted share of pixels at the given RGB distance from the background."""
    low, high = PAINTED
    return ((distance - low) / (high - low)).clamp(0, 1)


class SceneReader:
    """Reads pictures of the tiny world by matching what can stand at each named position.

    It remembers its last batch by identity, so the experts that share it analyse once.
    """

    def __init__(self) -> None:
        self._images: Tensor | None = None
        self._reading: Reading | None = None

    def read(self, images: Tensor) -> Reading:
        """
        Args: images: (B, 3, 64, 64) float in [0, 1].
        Raises: ValueError for another shape.
        """
        if images is self._images and self._reading is not None:
            return self._reading
        if images.ndim != 4 or images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(f"wanted images (B, 3, 64, 64), got {tuple(images.shape)}")
        self._images, self._reading = images, _read(images.float())
        return self._reading


def _read(images: Tensor) -> Reading:
    templates = _templates(images.device)
    outlines, windows = templates.outlines, templates.windows
    pixels = images.flatten(2) * 255  # (B, 3, 4096)
    background = pixels.new_tensor(BACKGROUND)[:, None]
    distance = (pixels - background).square().sum(1).sqrt()
    painted = _painted(distance)  # (B, 4096)

    inside = torch.einsum("bn,pmn->bpm", painted, outlines)
    total = painted @ windows.T  # (B, 9)
    areas = outlines.sum(-1)
    iou = inside / (total[..., None] + areas - inside)  # (B, 9, 12)
    best_iou, best = iou.max(-1)

    # Greedily take the surest position, then strike out those whose windows overlap it.
    free = torch.ones_like(best_iou)
    rows = torch.arange(len(images), device=images.device)
    places, kinds, ious = [], [], []
    for _ in range(MAX_OBJECTS):
        value, place = (best_iou * free).max(-1)
        free = free * (1 - templates.conflicts[place])
        places.append(place)
        kinds.append(best[rows, place])
        ious.append(value)
    place, kind = torch.stack(places, 1), torch.stack(kinds, 1)  # (B, 4)
    quality = torch.stack(ious, 1)
    mask = outlines[place, kind]  # (B, 4, 4096)
    # Paint all around an object is no sign of it: a flooded window fits the large square well.
    around = (windows[place] - mask).clamp(0, 1)
    spill = torch.einsum("bn,bsn->bs", painted, around) / around.sum(-1)
    present = torch.sigmoid((quality - 0.6) / 0.04) * (1 - spill).square()

    kinds_iou = iou[rows[:, None], place].unflatten(-1, (len(SIZES), len(SHAPES)))
    shape = torch.softmax(kinds_iou.amax(-2) / 0.025, -1)
    size = torch.softmax(kinds_iou.amax(-1) / 0.025, -1)
    color, texture = _paint(pixels, templates.interiors[place, kind], templates.patterns)

    center = pixels.new_tensor(list(POSITIONS.values()))[place]
    half = pixels.new_tensor(list(SIZES.values()))[kind // len(SHAPES)] / 2
    boxes = torch.cat([center - half[..., None], center + half[..., None]], -1)
    covered = (mask * (present > 0.5)[..., None]).sum(1).clamp(max=1)
    stray = (painted * (1 - covered)).sum(-1) / painted.sum(-1).clamp(min=1)
    return Reading(present, shape, color, texture, size, center, boxes, stray)


def _paint(pixels: Tensor, mask: Tensor, patterns: Tensor) -> tuple[Tensor, Tensor]:
    """Which colour and texture the pixels under each mask show.

    The squared error against every painted pattern is expanded into sums that are shared by
    all of them: sum m|x|^2 - 2 sum m x.paint + sum m |paint|^2.

    Args:
        pixels: (B, 3, 4096) in [0, 255]; mask: (B, S, 4096); patterns: (4, 4096).
    Returns: (B, S, 8) and (B, S, 4), less than 1 in sum where nothing fits well.
    """
    palette = pixels.new_tensor(list(COLORS.values()))  # (8, 3)
    first = torch.einsum("bsn,tn,bcn->bstc", mask, patterns, pixels)
    every = torch.einsum("bsn,bcn->bsc", mask, pixels)[:, :, None]
    shown = first + DARKEN * (every - first)  # sum m x paint / colour, (B, S, 4, 3)
    power = torch.einsum("bsn,bn->bs", mask, pixels.square().sum(1))[..., None, None]
    weight = mask.sum(-1).clamp(min=1e-6)
    first_weight = mask @ patterns.T  # (B, S, 4)
    paint_weight = first_weight + DARKEN**2 * (weight[..., None] - first_weight)
    cross = shown @ palette.T  # (B, S, 4 textures, 8 colours)
    error = power - 2 * cross + paint_weight[..., None] * palette.square().sum(-1)
    error = error.clamp(min=0) / (3 * weight[..., None, None])  # mean square a channel
    by_color, by_texture = error.amin(-2), error.amin(-1)
    # Off-colour by 60 of 255 still counts for a third; VQ decoding is off by about 15.
    fit = torch.exp(-error.amin((-2, -1)) / 60**2)[..., None]
    color = torch.softmax(-by_color / 20**2, -1) * fit
    texture = torch.softmax(-by_texture / 20**2, -1) * fit
    return color, texture


def _named(reading: Reading, b: int, name: str) -> Tensor:
    """(4,) probability that each slot of picture b is what `name` says."""
    probability = reading.present[b]
    for word in name.split():
        if word not in WORDS:
            raise UserError(f"the tiny world has no word {word!r} (in {name!r})")
        kind, i = WORDS[word]
        probability = probability * getattr(reading, kind)[b, :, i]
    return probability


class Detector:
    """The GroundingDINO slot: hard detections, scored by the paper's formulas."""

    name = "gdino"

    def __init__(self, reader: SceneReader) -> None:
        self._reader = reader

    def score(self, prompts: list[str], images: Tensor, metadata: list[Row]) -> Tensor:
        """(B,) fp32 in [0, 1]; see `rewards.RewardExpert`."""
        reading = self._reader.read(images)
        scores = [
            detection_score(row, found, image_size=(IMAGE_SIZE, IMAGE_SIZE))
            for row, found in zip(metadata, self.detect(reading), strict=True)
        ]
        return torch.tensor(scores, device=images.device)

    def detect(self, reading: Reading) -> list[Detections]:
        """What stands out as an object, labelled with its surest words."""
        present, boxes = reading.present.cpu(), reading.boxes.cpu()
        kinds = ("size", "texture", "color", "shape")
        words = (tuple(SIZES), TEXTURES, tuple(COLORS), SHAPES)
        surest = [getattr(reading, kind).max(-1) for kind in kinds]
        sure = [values.tolist() for values, _ in surest]
        index = [indices.tolist() for _, indices in surest]
        found = []
        for b in range(len(present)):
            kept = [s for s in range(MAX_OBJECTS) if present[b, s] > 0.5]
            labels = [
                " ".join(w[index[k][b][s]] for k, w in enumerate(words) if sure[k][b][s] > 0.4)
                for s in kept
            ]
            found.append(Detections(boxes[b, kept], labels, present[b, kept]))
        return found


class AttributeVQA:
    """The GIT slot: the mean over the asked names of a soft P(yes)."""

    name = "git"

    def __init__(self, reader: SceneReader) -> None:
        self._reader = reader

    def score(self, prompts: list[str], images: Tensor, metadata: list[Row]) -> Tensor:
        """(B,) fp32 in [0, 1]; see `rewards.RewardExpert`."""
        reading = _on_cpu(self._reader.read(images))
        scores = []
        for b, row in enumerate(metadata):
            answers = torch.stack([_named(reading, b, name).max() for name in asked_names(row)])
            scores.append(answers.mean())
        return torch.stack(scores).to(images.device)


class WholePromptORM:
    """The ORM slot: a soft P(yes) that the picture shows the prompt, all of it and no more."""

    name = "orm"

    def __init__(self, reader: SceneReader) -> None:
        self._reader = reader

    def score(self, prompts: list[str], images: Tensor, metadata: list[Row]) -> Tensor:
        """(B,) fp32 in [0, 1]; see `rewards.RewardExpert`."""
        reading = _on_cpu(self._reader.read(images))
        return torch.stack([_whole_prompt(reading, b, row) for b, row in enumerate(metadata)]).to(
            images.device
        )


def _whole_prompt(reading: Reading, b: int, row: Row) -> Tensor:
    names = asked_names(row)
    slots = [_named(reading, b, name) for name in names]
    counts = row.get("numeracy_info")
    if counts:
        wanted = sum(item["num"] for item in counts)
        answers = [
            torch.exp(-(s.sum() - item["num"]).abs()) * s.max()
            for s, item in zip(slots, counts, strict=True)
        ]
    else:
        wanted = len(names)
        answers = [s.max() for s in slots]
    # The geometric mean keeps one missing object from hiding progress on the others.
    yes = torch.stack(answers).clamp(min=1e-6).log().mean().exp()
    info = row.get("spatial_info")
    if info:
        yes = yes * _relation(reading, b, info)
    number = torch.exp(-0.7 * (reading.present[b].sum() - wanted).abs())
    return yes * number * (1 - reading.stray[b])


def _relation(reading: Reading, b: int, info: dict[str, str]) -> Tensor:
    """How sure it is that the best slot for obj1 stands as told to the best for obj2."""
    if info["locality"] not in LOCALITIES:
        raise UserError(f"unknown locality {info['locality']!r} in spatial_info")
    side = LOCALITIES[info["locality"]]
    first, second = _named(reading, b, info["obj1"]), _named(reading, b, info["obj2"])
    both = first[:, None] * second[None, :] * (1 - torch.eye(MAX_OBJECTS))
    delta = reading.center[b][None, :] - reading.center[b][:, None]  # [i, j]: from i to j
    if side is None:
        return both.max()
    axis, sign = side
    margin = sign * delta[..., axis] - delta[..., 1 - axis].abs()
    return (both * torch.sigmoid(margin / 4)).max()


def _on_cpu(reading: Reading) -> Reading:
    """The small tables of a reading, where scalar work on them is cheap."""
    return Reading(*(getattr(reading, f).cpu() for f in Reading.__slots__))


def build_experts(
    names: list[str], weights_dir: Path, device: torch.device | str
) -> list[RewardExpert]:
    """The experts called `names`, in that order.

    Args: weights_dir: holds the folder `hps`, read only when hps is asked for.
    Raises: UserError naming an unknown expert or an unusable weights file.
    """
    reader = SceneReader()
    exact = {"gdino": Detector, "git": AttributeVQA, "orm": WholePromptORM}
    experts: list[RewardExpert] = []
    for name in names:
        if name == "hps":
            try:
                experts.append(HPS(weights_dir / "hps", device=device))
            except ValueError as error:
                raise UserError(str(error)) from error
        elif name in exact:
            experts.append(exact[name](reader))
        else:
            near = get_close_matches(name, EXPERT_NAMES, 1, 0.0)[0]
            raise UserError(f"unknown reward {name!r}; nearest: {near!r}")
    return experts
