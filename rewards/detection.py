"""The detector reward of T2I-R1 as plain formulas over detections, whoever made them.

Spatial prompts: 0.6 * relation + 0.4 * existence. Counting prompts: 1 if every count is
right, else 0. All others: the share of the asked objects that exist.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_convert, nms

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


@dataclass(frozen=True, slots=True)
class Detections:
    """What a detector found in one picture."""

    boxes: Tensor
    """(N, 4) float, corners x_min, y_min, x_max, y_max in pixels."""
    labels: list[str]
    """N phrases or descriptions; a name matches a label that holds all of its words."""
    scores: Tensor
    """(N,) float confidences."""

    def matching(self, name: str) -> list[int]:
        """Indices of the detections of `name`, most confident first."""
        words = set(name.split())
        found = [i for i, label in enumerate(self.labels) if words <= set(label.split())]
        return sorted(found, key=lambda i: -float(self.scores[i]))


def from_centers(
    boxes: Tensor, labels: list[str], scores: Tensor, *, image_size: tuple[int, int]
) -> Detections:
    """Detections from a DETR's centre-format boxes.

    Args:
        boxes: (N, 4) centre x, centre y, width, height, as shares of the picture.
        image_size: height and width in pixels.
    """
    height, width = image_size
    corners = box_convert(boxes, "cxcywh", "xyxy") * boxes.new_tensor([width, height] * 2)
    return Detections(corners, labels, scores)


def suppress(detections: Detections, iou_threshold: float = 0.5) -> Detections:
    """Without the duplicates of a more confident box of the same label (corner-format NMS)."""
    keep: list[int] = []
    for label in dict.fromkeys(detections.labels):
        same = torch.tensor([i for i, other in enumerate(detections.labels) if other == label])
        kept = nms(detections.boxes[same].float(), detections.scores[same].float(), iou_threshold)
        keep += same[kept].tolist()
    keep.sort()
    return Detections(
        detections.boxes[keep], [detections.labels[i] for i in keep], detections.scores[keep]
    )


def iou(box1: Tensor, box2: Tensor) -> float:
    """Intersection over union of two (4,) corner-format boxes; 0 when both are empty."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = box1.tolist(), box2.tolist()
    shared = max(0.0, min(ax1, bx1) - max(ax0, bx0)) * max(0.0, min(ay1, by1) - max(ay0, by0))
    union = (ax1 - ax0) * (ay1 - ay0) + (bx1 - bx0) * (by1 - by0) - shared
    return shared / union if union > 0 else 0.0


def relation_score(
    locality: str, box1: Tensor, box2: Tensor, *, image_size: tuple[int, int]
) -> float:
    """How well box 1 stands in the relation `locality` to box 2, in [0, 1].

    The centres' difference must lie along the relation's axis more than across it and point
    the right way; full marks while the boxes barely overlap, else 0.1 / IoU.

    Args:
        box1, box2: (4,) corners in pixels.
        image_size: height and width in pixels.
    Raises: ValueError naming an unknown locality.
    """
    if locality not in LOCALITIES:
        raise ValueError(f"unknown locality {locality!r}; known: {', '.join(LOCALITIES)}")
    center1, center2 = (box1[:2] + box1[2:]) / 2, (box2[:2] + box2[2:]) / 2
    delta = (center2 - center1).tolist()
    side = LOCALITIES[locality]
    if side is None:
        threshold = NEAR * max(image_size)
        across, along = sorted(map(abs, delta))
        return 1.0 if across < threshold else threshold / along
    axis, sign = side
    if sign * delta[axis] <= abs(delta[1 - axis]):
        return 0.0
    overlap = iou(box1, box2)
    return 1.0 if overlap < IOU_THRESHOLD else IOU_THRESHOLD / overlap


def asked_names(row: dict[str, Any]) -> list[str]:
    """The objects a prompt row asks for, with their attributes where it has them."""
    names = row.get("attr_nouns") or row.get("nouns")
    if not names:
        raise ValueError(f"prompt {row.get('prompt')!r} has neither 'attr_nouns' nor 'nouns'")
    return names


def existence_score(names: list[str], detections: Detections) -> float:
    """The share of `names` that were detected."""
    return sum(bool(detections.matching(name)) for name in names) / len(names)


def detection_score(
    row: dict[str, Any],
    detections: Detections,
    *,
    image_size: tuple[int, int],
    names: list[str] | None = None,
) -> float:
    """The detector reward of one picture, in [0, 1].

    Args:
        row: the prompt row; `spatial_info` or `numeracy_info` choose the formula.
        detections: corner-format, duplicates already suppressed.
        image_size: height and width in pixels.
        names: whose existence is asked; `asked_names(row)` when None.
    """
    if row.get("numeracy_info"):
        right = (
            len(detections.matching(item["obj_name"])) == item["num"]
            for item in row["numeracy_info"]
        )
        return float(all(right))
    existence = existence_score(names or asked_names(row), detections)
    info = row.get("spatial_info")
    if not info:
        return existence
    first = detections.matching(info["obj1"])
    # Two of the same kind ("a cup left of a cup") must be two boxes.
    second = [i for i in detections.matching(info["obj2"]) if first and i != first[0]]
    relation = (
        relation_score(
            info["locality"],
            detections.boxes[first[0]],
            detections.boxes[second[0]],
            image_size=image_size,
        )
        if second
        else 0.0
    )
    return SPATIAL_WEIGHT * relation + EXISTENCE_WEIGHT * existence
