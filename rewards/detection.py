"""The detector reward of T2I-R1 as batched formulas over detections, whoever made them.

Spatial prompts: 0.6 * relation + 0.4 * existence. Counting prompts: 1 if every count is
right, else 0. All others: the share of the asked objects that exist.

Departures from T2I-R1's code: "above" and "on top of" can score; "near" measures pixels, not
shares of the picture against 150; suppression sees corners, not centres; a wrong count earns 0,
not 0.2; a row with `spatial_info` is judged by it whatever its task type; the existence of all
its nouns counts, not of the relation's two alone.

What the rows ask is turned into tensors on the host, ahead of the pictures; from boxes to
rewards everything then is tensor code on the detector's device.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_convert

Row = dict[str, Any]

SPATIAL_WEIGHT = 0.6
EXISTENCE_WEIGHT = 0.4
IOU_THRESHOLD = 0.1  # boxes that overlap more than this are only partly apart
NEAR = 150 / 512  # T2I-CompBench: within 150 pixels of its 512-pixel pictures
LOCALITIES = {  # locality -> (axis, sign of centre 2 - centre 1); None: any side
    "left of": (0, 1),
    "on the left of": (0, 1),
    "right of": (0, -1),
    "on the right of": (0, -1),
    "above": (1, 1),
    "on top of": (1, 1),
    "on the top of": (1, 1),
    "below": (1, -1),
    "on the bottom of": (1, -1),
    "next to": None,
    "near": None,
    "on side of": None,
}
# Entries of one suppression table: bounds its memory where a detector sees boxes everywhere.
SUPPRESSION_LIMIT = 1 << 22


@dataclass(frozen=True, slots=True)
class Questions:
    """What B prompt rows ask of a detector: up to P names each, and how they are scored."""

    names: list[list[str]]
    """What to look for in each picture, each name once."""
    existence: Tensor
    """(B, P) fp32 how often a row asks for the name's existence; 0 on padding."""
    counted: Tensor
    """(B, M) int64 indices of the names to count, -1 on padding; only counting rows have any."""
    numbers: Tensor
    """(B, M) int64 how many of each there must be."""
    pair: Tensor
    """(B, 2) int64 indices of the two objects of a relation; -1 for rows without one."""
    direction: Tensor
    """(B, 2) fp32 unit vector x, y from object 1 to object 2; zeros: any side will do."""

    def to(self, device: torch.device | str) -> "Questions":
        """The same with its tensors on a device."""
        tensors = (self.existence, self.counted, self.numbers, self.pair, self.direction)
        return Questions(self.names, *(t.to(device) for t in tensors))


@dataclass(frozen=True, slots=True)
class Detections:
    """What a detector found in a batch: Q boxes a picture, each with a score for every name."""

    boxes: Tensor
    """(B, Q, 4) fp32, corners x_min, y_min, x_max, y_max in pixels."""
    scores: Tensor
    """(B, P, Q) fp32 confidence that box q shows name p; 0 where it does not count as found."""


def asked_names(row: Row, *, attributes: bool = True) -> list[str]:
    """The objects a prompt row asks for, with their attributes ("red cat") where it has them.

    Args: attributes: False prefers the bare nouns ("cat").
    Raises: ValueError for a row that has neither.
    """
    kinds = ("attr_nouns", "nouns") if attributes else ("nouns", "attr_nouns")
    names = row.get(kinds[0]) or row.get(kinds[1])
    if not names:
        raise ValueError(f"prompt {row.get('prompt')!r} has neither 'attr_nouns' nor 'nouns'")
    return names


def questions_of(rows: list[Row], *, attributes: bool = True) -> Questions:
    """What B rows ask, as tensors on the CPU.

    Args:
        rows: prompt rows; `numeracy_info`, else `spatial_info`, choose the formula.
        attributes: whether the existence of "red cat" or of "cat" is asked.
    Raises: ValueError naming the prompt that names nothing, or the unknown locality.
    """
    names: list[dict[str, int]] = []
    asked, counts, pairs, directions = [], [], [], []
    for row in rows:
        counting, relation = row.get("numeracy_info"), row.get("spatial_info")
        # A counting row may do without nouns: its counts name what to look for.
        named = [] if counting and not _has_names(row) else asked_names(row, attributes=attributes)
        index: dict[str, int] = {}
        asked.append([index.setdefault(name, len(index)) for name in named])
        count, pair, direction = [], (-1, -1), (0.0, 0.0)
        if counting:
            count = [(index.setdefault(c["obj_name"], len(index)), c["num"]) for c in counting]
        elif relation:
            direction = _direction(relation["locality"])
            first, second = (index.setdefault(relation[k], len(index)) for k in ("obj1", "obj2"))
            pair = (first, second)
        names.append(index)
        counts.append(count)
        pairs.append(pair)
        directions.append(direction)
    existence = torch.zeros(len(rows), max(map(len, names), default=0))
    counted = torch.full((len(rows), max(map(len, counts), default=0)), -1)
    numbers = torch.zeros_like(counted)
    for b in range(len(rows)):
        for p in asked[b]:
            existence[b, p] += 1
        for m, (p, number) in enumerate(counts[b]):
            counted[b, m], numbers[b, m] = p, number
    return Questions(
        [list(index) for index in names],
        existence,
        counted,
        numbers,
        torch.tensor(pairs, dtype=torch.int64).view(-1, 2),
        torch.tensor(directions, dtype=torch.float32).view(-1, 2),
    )


def _has_names(row: Row) -> bool:
    return bool(row.get("attr_nouns") or row.get("nouns"))


def _direction(locality: str) -> tuple[float, float]:
    if locality not in LOCALITIES:
        raise ValueError(f"unknown locality {locality!r}; known: {', '.join(LOCALITIES)}")
    side = LOCALITIES[locality]
    if side is None:
        return 0.0, 0.0
    axis, sign = side
    return (float(sign), 0.0) if axis == 0 else (0.0, float(sign))


def to_corners(boxes: Tensor, *, width: float, height: float) -> Tensor:
    """A DETR's boxes as corners in pixels.

    Args:
        boxes: (..., 4) centre x, centre y, width, height, as shares of the picture.
        width, height: of the picture in pixels.
    Returns: (..., 4) fp32.
    """
    boxes = boxes.float()
    return box_convert(boxes, "cxcywh", "xyxy") * boxes.new_tensor([width, height] * 2)


def iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Intersection over union of (..., 4) corner-format boxes, broadcast; 0 of two empty ones."""
    low = torch.maximum(boxes1[..., :2], boxes2[..., :2])
    high = torch.minimum(boxes1[..., 2:], boxes2[..., 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    areas = [(b[..., 2:] - b[..., :2]).prod(-1) for b in (boxes1, boxes2)]
    union = areas[0] + areas[1] - shared
    return torch.where(union > 0, shared / union, 0.0)


def suppress(found: Detections, iou_threshold: float = 0.5) -> Detections:
    """Without the boxes that repeat a more confident one of the same name.

    Greedy non-maximum suppression on corners, for all pictures and names at once: a box goes
    if a better one that stays overlaps it. Starting from all boxes and applying that rule until
    nothing changes ends at the greedy answer, in as many rounds as suppressions depend on each
    other (Cluster-NMS, arXiv:2005.03572).
    """
    B, P, Q = found.scores.shape
    # Stable: of equals the first one wins, as in the published loop.
    scores, order = found.scores.flatten(0, 1).sort(descending=True, stable=True)  # (B*P, Q)
    hits = int((scores > 0).sum(-1).max()) if scores.numel() else 0
    if hits < 2:
        return found
    scores, order = scores[:, :hits], order[:, :hits]
    kept = torch.zeros_like(found.scores).flatten(0, 1)
    for group in torch.arange(B * P, device=order.device).split(
        max(1, SUPPRESSION_LIMIT // hits**2)
    ):
        boxes = found.boxes[(group // P)[:, None], order[group]]  # (G, K, 4)
        hit = scores[group] > 0
        # [i, j]: box i would be a repetition of the more confident box j
        over = (iou(boxes[:, :, None], boxes[:, None]) > iou_threshold).tril(-1)
        stays = hit
        while True:
            still = hit & ~(over & stays[:, None]).any(-1)
            if torch.equal(still, stays):
                break
            stays = still
        kept[group] = kept[group].scatter(1, order[group], scores[group] * stays)
    return Detections(found.boxes, kept.view(B, P, Q))


def relation_scores(
    direction: Tensor, boxes1: Tensor, boxes2: Tensor, *, image_size: tuple[int, int]
) -> Tensor:
    """How well boxes 1 stand in their relation to boxes 2, in [0, 1].

    The centres' difference must lie along the relation's axis more than across it and point
    the right way; full marks while the boxes barely overlap, else 0.1 / IoU. Any side: full
    marks within `NEAR` of the picture in x or in y, else `NEAR` over the larger distance.

    Args:
        direction: (B, 2) as in `Questions`.
        boxes1, boxes2: (B, 4) corners in pixels.
        image_size: height and width in pixels.
    Returns: (B,) fp32.
    """
    delta = (boxes2[:, :2] + boxes2[:, 2:] - boxes1[:, :2] - boxes1[:, 2:]) / 2
    along = (delta * direction).sum(-1)
    across = (delta * (1 - direction.abs())).abs().sum(-1)
    apart = IOU_THRESHOLD / iou(boxes1, boxes2).clamp(min=IOU_THRESHOLD)
    reach = NEAR * max(image_size)
    distance = delta.abs()
    near = torch.where(distance.amin(-1) < reach, 1.0, reach / distance.amax(-1).clamp(min=reach))
    any_side = (direction == 0).all(-1)
    return torch.where(any_side, near, torch.where(along > across, apart, 0.0))


def detection_scores(
    questions: Questions, found: Detections, *, image_size: tuple[int, int]
) -> Tensor:
    """The detector reward of B pictures, (B,) fp32 in [0, 1].

    Args:
        questions: on the detections' device.
        found: duplicates already suppressed.
        image_size: height and width in pixels.
    """
    hits = found.scores > 0
    existence = (hits.any(-1) * questions.existence).sum(-1)
    existence = existence / questions.existence.sum(-1).clamp(min=1)
    wanted = questions.counted >= 0
    counts = hits.sum(-1).gather(1, questions.counted.clamp(min=0))
    right = ((counts == questions.numbers) | ~wanted).all(-1)

    row = torch.arange(len(hits), device=hits.device)
    first, second = found.scores[row[:, None], questions.pair.clamp(min=0)].unbind(1)  # (B, Q)
    best1, index1 = first.max(-1)
    # Two of the same kind ("a cup left of a cup") must be two boxes.
    best2, index2 = second.scatter(1, index1[:, None], 0.0).max(-1)
    relation = relation_scores(
        questions.direction,
        found.boxes[row, index1],
        found.boxes[row, index2],
        image_size=image_size,
    )
    relation = relation * ((best1 > 0) & (best2 > 0))
    spatial = SPATIAL_WEIGHT * relation + EXISTENCE_WEIGHT * existence
    scores = torch.where(questions.pair[:, 0] >= 0, spatial, existence)
    return torch.where(wanted.any(-1), right.float(), scores)
