"""Read pictures of the tiny world by matching what can stand at each of its positions.

The experts for the detector, VQA and ORM slots all look through one `SceneReader`. It is
batched tensor code: 64 pictures take a few hundredths of a second on one core.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.tiny.world import (
    BACKGROUND,
    COLORS,
    DARKEN,
    IMAGE_SIZE,
    POSITIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    Obj,
    render,
)

MAX_OBJECTS = 4
MIN_INTERIOR = 16  # pixels
WINDOW = 16  # half the side of the region around a position that belongs to it
# RGB distance from the background: none of a pixel is painted below the first, all above the
# second. A half-covered edge pixel of a typical colour lies between.
PAINTED = (40.0, 90.0)
TYPICAL_CONTRAST = 190.0


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
            _coverage(Obj(shape, "blue", "plain", size, position))
            for position in POSITIONS
            for size in SIZES
            for shape in SHAPES
        ]
    )
    outlines = _painted(coverage * TYPICAL_CONTRAST)
    full = (coverage > 0.99).float()
    eroded = -F.max_pool2d(-full[:, None], 3, stride=1, padding=1)[:, 0]
    # A small star has next to nothing left after erosion: keep all of its full pixels.
    enough = eroded.sum((1, 2), keepdim=True) >= MIN_INTERIOR
    interiors = torch.where(enough, eroded, full)

    centers = torch.tensor(list(POSITIONS.values()), dtype=torch.float32)
    axis = torch.arange(IMAGE_SIZE) + 0.5
    inside_x = (axis[None] - centers[:, :1]).abs() < WINDOW  # (9, 64)
    inside_y = (axis[None] - centers[:, 1:]).abs() < WINDOW
    windows = (inside_y[:, :, None] & inside_x[:, None, :]).flatten(1).float()
    patterns = torch.stack([_pattern(t).flatten() for t in TEXTURES])
    conflicts = (torch.cdist(centers, centers, p=torch.inf) < 2 * WINDOW).float()
    shape = (len(POSITIONS), len(SIZES) * len(SHAPES), IMAGE_SIZE**2)
    return Templates(
        outlines.reshape(shape).to(device),
        interiors.reshape(shape).to(device),
        windows.to(device),
        patterns.to(device),
        conflicts.to(device),
    )


def _coverage(obj: Obj) -> Tensor:
    """(64, 64) float: how much of each pixel a plain object covers, in [0, 1]."""
    paint = torch.tensor(COLORS[obj.color], dtype=torch.float32) - torch.tensor(BACKGROUND)
    shown = torch.from_numpy(render((obj,))) - torch.tensor(BACKGROUND, dtype=torch.float32)
    return shown @ paint / paint.square().sum()


def _pattern(texture: str) -> Tensor:
    """(64, 64) float: 1 where the texture shows its first colour, on any object anywhere."""
    square = torch.from_numpy(render((Obj("square", "blue", texture),)))
    cell = square[24:32, 24:32] == torch.tensor(COLORS["blue"])  # textures have period 8
    return cell.all(-1).float().repeat(IMAGE_SIZE // 8, IMAGE_SIZE // 8)


def _painted(distance: Tensor) -> Tensor:
    """The painted share of pixels at the given RGB distance from the background."""
    low, high = PAINTED
    return ((distance - low) / (high - low)).clamp(0, 1)


class SceneReader:
    """Reads pictures of the tiny world by matching what can stand at each named position.

    It remembers its last batch by identity, so the experts that share it analyse once; a batch
    must not be written to in place between two reads.
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
