"""The detector reward one picture at a time, in plain Python, and rows of every kind."""

import random
from typing import Any

import torch
import torch.nn.functional as F

Row = dict[str, Any]
Box = list[float]

SIDES = {
    "left of": "x<", "on the left of": "x<", "right of": "x>", "on the right of": "x>",
    "above": "y<", "on top of": "y<", "on the top of": "y<", "below": "y>",
    "on the bottom of": "y>", "next to": "near", "near": "near", "on side of": "near",
}  # fmt: skip


def plain_iou(a: Box, b: Box) -> float:
    shared = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(
        0.0, min(a[3], b[3]) - max(a[1], b[1])
    )
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union > 0 else 0.0


def plain_suppress(
    found: list[tuple[float, Box]], threshold: float = 0.5
) -> list[tuple[float, Box]]:
    """What greedy suppression leaves of (score, box) pairs, best first."""
    kept: list[tuple[float, Box]] = []
    for score, box in sorted(found, key=lambda item: -item[0]):
        if all(plain_iou(box, other) <= threshold for _, other in kept):
            kept.append((score, box))
    return kept


def plain_relation(locality: str, a: Box, b: Box, height: int, width: int) -> float:
    """How well box a is `locality` box b."""
    dx = (b[0] + b[2] - a[0] - a[2]) / 2
    dy = (b[1] + b[3] - a[1] - a[3]) / 2
    side = SIDES[locality]
    if side == "near":
        reach = 150 / 512 * max(height, width)
        return 1.0 if abs(dx) < reach or abs(dy) < reach else reach / max(abs(dx), abs(dy))
    main, other = (dx, dy) if side[0] == "x" else (dy, dx)
    if side[1] == ">":
        main = -main
    if main <= 0 or abs(main) <= abs(other):
        return 0.0
    overlap = plain_iou(a, b)
    return 1.0 if overlap < 0.1 else 0.1 / overlap


def plain_score(
    row: Row, found: dict[str, list[Box]], *, size: tuple[int, int], attributes: bool = True
) -> float:
    """The reward of one picture.

    Args: found: each name's boxes, duplicates suppressed, most confident first.
    """
    if row.get("numeracy_info"):
        return float(all(len(found[c["obj_name"]]) == c["num"] for c in row["numeracy_info"]))
    order = ["attr_nouns", "nouns"] if attributes else ["nouns", "attr_nouns"]
    names = row.get(order[0]) or row[order[1]]
    existence = sum(bool(found[name]) for name in names) / len(names)
    info = row.get("spatial_info")
    if not info:
        return existence
    first = found[info["obj1"]][:1]
    # One box cannot be both objects.
    second = [box for box in found[info["obj2"]] if box not in first][:1]
    relation = (
        plain_relation(info["locality"], first[0], second[0], *size) if first and second else 0
    )
    return 0.6 * relation + 0.4 * existence


NOUNS = ["cat", "dog", "red cube", "stop sign", "café", "Piñata", "post-it", "l'œuf", "TV"]


def rows_of_every_kind(count: int, seed: int = 0) -> list[Row]:
    """Prompt rows that go through all task types, all localities, and odd spellings."""
    rng = random.Random(seed)
    localities = list(SIDES)
    rows: list[Row] = []
    for i in range(count):
        nouns = rng.sample(NOUNS, rng.randint(1, 3))
        match i % 4:
            case 0:  # color, shape, texture
                row = {
                    "task_type": "color",
                    "nouns": nouns,
                    "attr_nouns": [f"red {n}" for n in nouns],
                }
            case 1:
                a, b = rng.choice([(nouns[0], nouns[-1]), *[rng.sample(NOUNS, 2)] * 3])
                info = {"obj1": a, "obj2": b, "locality": localities[i // 4 % len(localities)]}
                row = {"task_type": "spatial", "nouns": [a, b], "spatial_info": info}
            case 2:
                info = [{"obj_name": n, "num": rng.randint(1, 3)} for n in nouns[:2]]
                row = {"task_type": "numeracy", "nouns": nouns[:2], "numeracy_info": info}
            case _:
                row = {"task_type": "complex", "nouns": [*nouns, nouns[0]]}
        rows.append({"prompt": f"a picture of {' and '.join(nouns)}, no. {i}!", **row})
    return rows


def make_pictures(count, height, width, seed=0):
    """Blobs of colour and some noise, in 8 bits: noise alone looks all alike to a network."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 3, 4, generator=generator)
    images = F.interpolate(coarse, (height, width), mode="bicubic")
    images = images + 0.2 * torch.rand(count, 3, height, width, generator=generator) - 0.1
    return (images * 255).round().clamp(0, 255) / 255
