"""The detector reward's formulas against plain Python, by hand-made boxes and at random."""

import pytest
import torch

from rewards import detection
from rewards.detection import (
    LOCALITIES,
    Detections,
    asked_names,
    detection_scores,
    iou,
    questions_of,
    relation_scores,
    suppress,
    to_corners,
)
from tests.rewards.detector_problem import (
    SIDES,
    plain_relation,
    plain_score,
    plain_suppress,
    rows_of_every_kind,
)

SIZE = (100, 100)


def box(x, y, side=20):
    return [x - side / 2, y - side / 2, x + side / 2, y + side / 2]


LEFT, RIGHT, TOP, BOTTOM = box(20, 50), box(80, 50), box(50, 20), box(50, 80)


def found(row, *labelled, attributes=True):
    """One picture's detections from (name, box) or (name, box, score), each a box of its own."""
    names = questions_of([row], attributes=attributes).names[0]
    scores = torch.zeros(1, len(names), max(1, len(labelled)))
    boxes = torch.zeros(1, max(1, len(labelled)), 4)
    for q, (name, corners, *score) in enumerate(labelled):
        boxes[0, q] = torch.tensor(corners)
        if name in names:
            scores[0, names.index(name), q] = score[0] if score else 0.9
    return Detections(boxes, scores)


def reward(row, *labelled, size=SIZE, attributes=True):
    detections = suppress(found(row, *labelled, attributes=attributes))
    questions = questions_of([row], attributes=attributes)
    return float(detection_scores(questions, detections, image_size=size))


def relation(locality, first, second, size=SIZE):
    row = {"nouns": ["a", "b"], "spatial_info": {"obj1": "a", "obj2": "b", "locality": locality}}
    direction = questions_of([row]).direction
    boxes = (torch.tensor([first]), torch.tensor([second]))
    return float(relation_scores(direction, *boxes, image_size=size))


@pytest.mark.parametrize(
    ("locality", "first", "second"),
    [
        ("left of", LEFT, RIGHT),
        ("on the left of", LEFT, RIGHT),
        ("right of", RIGHT, LEFT),
        ("on the right of", RIGHT, LEFT),
        ("above", TOP, BOTTOM),
        ("on top of", TOP, BOTTOM),
        ("on the top of", TOP, BOTTOM),
        ("below", BOTTOM, TOP),
        ("on the bottom of", BOTTOM, TOP),
    ],
)
def test_directions_score_one_way_only(locality, first, second):
    assert relation(locality, first, second) == 1
    assert relation(locality, second, first) == 0
    across = (LEFT, RIGHT) if first is TOP or first is BOTTOM else (TOP, BOTTOM)
    assert relation(locality, *across) == 0
    assert relation(locality, box(20, 20), box(80, 80)) == 0  # as far across as along
    assert relation(locality, first, first) == 0


@pytest.mark.parametrize("locality", ["next to", "near", "on side of"])
def test_nearness(locality):
    assert relation(locality, LEFT, RIGHT) == relation(locality, BOTTOM, TOP) == 1
    far = relation(locality, box(10, 10), box(90, 70))
    assert far == pytest.approx(150 / 512 * 100 / 80)
    assert relation(locality, box(10, 10), box(90, 70), size=(100, 400)) == 1


def test_every_locality_of_the_published_prompts_is_known():
    published = {"left of", "below", "right of", "above", "next to", "on the left of"}
    published |= {"on the right of", "on the bottom of", "on the top of", "on top of"}
    assert published | {"near", "on side of"} == set(LOCALITIES) == set(SIDES)
    with pytest.raises(ValueError, match="'behind'"):
        relation("behind", LEFT, RIGHT)


def test_overlapping_boxes_earn_less():
    first, second = box(50, 40, 40), box(50, 50, 40)
    overlap = float(iou(torch.tensor(first), torch.tensor(second)))
    assert overlap == pytest.approx(30 * 40 / (2 * 1600 - 1200))
    assert relation("above", first, second) == pytest.approx(0.1 / overlap)
    assert float(iou(torch.zeros(4), torch.zeros(4))) == 0


def spatial(first, second, locality="above", **more):
    info = {"obj1": first, "obj2": second, "locality": locality}
    return {"nouns": [first, second], "spatial_info": info, **more}


def count(**numbers):
    info = [{"obj_name": name, "num": n} for name, n in numbers.items()]
    return {"nouns": list(numbers), "numeracy_info": info}


GRID = [box(10 + 18 * (i % 5), 10 + 22 * (i // 5), 16) for i in range(20)]
POINT = [30.0, 30.0, 30.0, 30.0]
CASES = {
    "above, right": (spatial("cat", "dog"), [("cat", TOP), ("dog", BOTTOM)], 1.0),
    "above, upside down": (spatial("cat", "dog"), [("cat", BOTTOM), ("dog", TOP)], 0.4),
    "one of two": (spatial("cat", "dog"), [("cat", TOP)], 0.2),
    "the other of two": (spatial("cat", "dog"), [("dog", TOP)], 0.2),
    "none found": (spatial("cat", "dog"), [], 0.0),
    "the surest boxes count": (
        spatial("cat", "dog"),
        [("cat", BOTTOM, 0.4), ("cat", TOP, 0.8), ("dog", BOTTOM, 0.9), ("dog", TOP, 0.5)],
        1.0,
    ),
    "a relation among three nouns": (
        {**spatial("cat", "dog"), "nouns": ["cat", "dog", "cow", "hen"]},
        [("cat", TOP), ("dog", BOTTOM)],
        0.6 + 0.4 / 2,
    ),
    "a relation of things not among the nouns": (
        {**spatial("cat", "dog"), "nouns": ["cow"]},
        [("cat", TOP), ("dog", BOTTOM)],
        0.6,
    ),
    "zero-area boxes stand somewhere": (
        spatial("cat", "dog", "left of"),
        [("cat", POINT), ("dog", RIGHT)],
        1.0,
    ),
    "zero-area box twice": (count(cat=2), [("cat", POINT), ("cat", POINT)], 1.0),
    "two cups, two boxes": (spatial("cup", "cup", "left of"), [("cup", LEFT), ("cup", RIGHT, 0.8)], 1.0),
    "two cups, one box": (spatial("cup", "cup", "left of"), [("cup", LEFT)], 0.4),
    "two cups, one box twice": (
        spatial("cup", "cup", "left of"),
        [("cup", LEFT), ("cup", box(21, 50), 0.8)],
        0.4,
    ),
    "count right": (count(cat=2), [("cat", TOP), ("cat", BOTTOM)], 1.0),
    "count short": (count(cat=2), [("cat", TOP)], 0.0),
    "count over": (count(cat=2), [("cat", TOP), ("cat", BOTTOM), ("cat", LEFT)], 0.0),
    "count none of one": (count(cat=1), [], 0.0),
    "count, duplicate boxes": (
        count(cat=2),
        [("cat", TOP), ("cat", box(51, 21), 0.5), ("cat", BOTTOM), ("cat", box(49, 80), 0.95)],
        1.0,
    ),
    "count two kinds": (count(cat=1, dog=2), [("cat", TOP), ("dog", LEFT), ("dog", RIGHT)], 1.0),
    "count one kind wrong": (count(cat=1, dog=2), [("cat", TOP), ("dog", LEFT)], 0.0),
    "counts at odds": (
        {"nouns": ["cat"], "numeracy_info": [{"obj_name": "cat", "num": n} for n in (1, 2)]},
        [("cat", TOP)],
        0.0,
    ),
    "counts without nouns": ({"numeracy_info": count(cat=1)["numeracy_info"]}, [("cat", TOP)], 1.0),
    "20 of a kind": (count(cat=20), [("cat", b) for b in GRID], 1.0),
    "20 of a kind, all twice": (
        count(cat=20),
        [("cat", b) for b in GRID] + [("cat", [x + 1 for x in b], 0.4) for b in GRID],
        1.0,
    ),
    "19 of 20": (count(cat=20), [("cat", b) for b in GRID[1:]], 0.0),
    "half exist": ({"nouns": ["cat", "dog"]}, [("dog", TOP)], 0.5),
    "no relation, no count": ({"nouns": ["cat"], "spatial_info": None}, [("cat", TOP)], 1.0),
    "attributes": ({"nouns": ["cat"], "attr_nouns": ["red cat"]}, [("cat", TOP)], 0.0),
    "multi-word nouns": ({"nouns": ["stop sign", "sign"]}, [("stop sign", TOP)], 0.5),
    "repeated nouns": ({"nouns": ["cup", "cup", "plate"]}, [("cup", TOP)], 2 / 3),
    "punctuation": ({"nouns": ["St. Bernard", "what?", "l'œuf"]}, [("St. Bernard", TOP)], 1 / 3),
    "non-ASCII": ({"nouns": ["piñata", "猫"]}, [("猫", TOP), ("piñata", TOP)], 1.0),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_hand_made_boxes(case):
    row, labelled, expected = CASES[case]
    assert reward(row, *labelled) == pytest.approx(expected)


def test_bare_nouns_when_asked():
    row = {"nouns": ["cat", "dog"], "attr_nouns": ["red cat"]}
    assert reward(row, ("cat", TOP), attributes=False) == 0.5
    assert asked_names(row) == ["red cat"] and asked_names(row, attributes=False) == ["cat", "dog"]
    with pytest.raises(ValueError, match="'an egg' has neither"):
        questions_of([{"prompt": "an egg", "nouns": []}])


def test_centre_boxes_become_corners_in_pixels():
    centres = torch.tensor([[0.2, 0.5, 0.2, 0.4]])
    torch.testing.assert_close(
        to_corners(centres, width=200, height=100), torch.tensor([[20.0, 30.0, 60.0, 70.0]])
    )


def test_suppression_is_within_a_name_and_on_corners():
    # As centre-format boxes misread for corners, these two would not overlap at all.
    boxes = torch.tensor([[box(20, 50), box(21, 50), box(80, 50)]])
    scores = torch.tensor([[[0.5, 0.9, 0.7], [0.6, 0.0, 0.0], [0.0, 0.0, 0.0]]])
    kept = suppress(Detections(boxes, scores))
    assert kept.scores[0].tolist() == [
        [0, pytest.approx(0.9), pytest.approx(0.7)],
        [pytest.approx(0.6), 0, 0],
        [0, 0, 0],
    ]


def test_a_suppressed_box_suppresses_nothing():
    chain = torch.tensor([[[0.0, 0, 10, 10], [3, 0, 13, 10], [6, 0, 16, 10], [9, 0, 19, 10]]])
    kept = suppress(Detections(chain, torch.tensor([[[0.9, 0.8, 0.7, 0.6]]])))
    assert (kept.scores[0, 0] > 0).tolist() == [True, False, True, False]


def random_detections(questions, Q, seed):
    """Crowded boxes of which most names have a few; every picture's padding has none."""
    generator = torch.Generator().manual_seed(seed)
    B, P = questions.existence.shape
    corner = torch.rand(B, Q, 2, generator=generator) * 60
    side = torch.rand(B, Q, 2, generator=generator) * 40
    side[torch.rand(B, Q, generator=generator) < 0.1] = 0
    scores = torch.rand(B, P, Q, generator=generator)
    # 8 levels, so that equal scores occur
    scores = torch.where(scores > 0.5, (scores * 8).round() / 8, 0.0)
    scores[torch.rand(B, P, generator=generator) < 0.2] = 0
    for b, names in enumerate(questions.names):
        scores[b, len(names) :] = 0
    return Detections(torch.cat((corner, corner + side), -1), scores)


@pytest.mark.parametrize(
    ("attributes", "limit"), [(True, detection.SUPPRESSION_LIMIT), (False, 100)]
)
def test_batch_equals_one_at_a_time(attributes, limit, monkeypatch):
    monkeypatch.setattr(detection, "SUPPRESSION_LIMIT", limit)
    rows, size = rows_of_every_kind(256), (100, 160)
    questions = questions_of(rows, attributes=attributes)
    raw = random_detections(questions, Q=12, seed=0)
    scores = detection_scores(questions, suppress(raw), image_size=size)
    assert scores.dtype == torch.float32
    expected = []
    for b, row in enumerate(rows):
        left = {}
        for p, name in enumerate(questions.names[b]):
            pairs = zip(raw.scores[b, p].tolist(), raw.boxes[b].tolist(), strict=True)
            left[name] = [box for _, box in plain_suppress([pair for pair in pairs if pair[0] > 0])]
        expected.append(plain_score(row, left, size=size, attributes=attributes))
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=0, atol=1e-5)
    assert len(set(expected)) > 10  # the rows do not all score alike


def test_relations_equal_the_plain_ones():
    generator = torch.Generator().manual_seed(1)
    corner = torch.rand(2, 600, 2, generator=generator) * 70
    boxes = torch.cat((corner, corner + torch.rand(2, 600, 2, generator=generator) * 30), -1)
    names = list(LOCALITIES)
    rows = [spatial("a", "b", names[i % len(names)]) for i in range(600)]
    got = relation_scores(questions_of(rows).direction, *boxes, image_size=(90, 100))
    expected = [
        plain_relation(names[i % len(names)], boxes[0, i].tolist(), boxes[1, i].tolist(), 90, 100)
        for i in range(600)
    ]
    torch.testing.assert_close(got, torch.tensor(expected), rtol=0, atol=1e-5)
    assert {0.0, 1.0} < set(expected)


def test_boxes_everywhere():
    generator = torch.Generator().manual_seed(2)
    corner = torch.rand(2, 900, 2, generator=generator) * 90
    raw = Detections(
        torch.cat((corner, corner + 20), -1), torch.rand(2, 1, 900, generator=generator)
    )
    kept = suppress(raw)
    for b in range(2):
        plain = plain_suppress(
            list(zip(raw.scores[b, 0].tolist(), raw.boxes[b].tolist(), strict=True))
        )
        assert sorted(kept.scores[b, 0][kept.scores[b, 0] > 0].tolist()) == sorted(
            s for s, _ in plain
        )
