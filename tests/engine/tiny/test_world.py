"""The tiny world: splits, held-out combinations, renderer."""

import json
import random

import numpy as np
import pytest

from engine.tiny.prompts import TASK_TYPES, draw, make_splits, write_rows
from engine.tiny.world import (
    BACKGROUND,
    COLORS,
    HELD_OUT_COLORED,
    HELD_OUT_TEXTURED,
    POSITIONS,
    QUADRANTS,
    SHAPES,
    SIZES,
    TEXTURES,
    Obj,
    corrupt,
    plan_text,
    random_object,
    render,
)


@pytest.fixture(scope="module")
def splits():
    return make_splits(train=60, held_out=20, seed=0)


def words_are_held_out(name: str) -> bool:
    """Read the combination off an attribute-noun such as "striped red cross" by its words."""
    words = name.split()
    return any((word, words[-1]) in HELD_OUT_COLORED | HELD_OUT_TEXTURED for word in words[:-1])


def test_splits_share_no_prompt_and_are_full(splits):
    train, held_out = splits
    prompts = [row["prompt"] for row in train + held_out]
    assert len(set(prompts)) == len(prompts)
    for rows, count in ((train, 60), (held_out, 20)):
        counts = {t: sum(row["task_type"] == t for row in rows) for t in TASK_TYPES}
        # "shape" has few prompts that differ; every other type must be full
        assert all(n == count for t, n in counts.items() if t != "shape"), counts
        assert counts["shape"] > count // 2


def test_train_names_no_held_out_combination_and_held_out_does(splits):
    train, held_out = splits
    assert not [r for r in train if any(map(words_are_held_out, r.get("attr_nouns", ())))]
    for task_type in set(TASK_TYPES) - {"shape"}:
        rows = [r for r in held_out if r["task_type"] == task_type]
        named = sum(any(map(words_are_held_out, r.get("attr_nouns", ()))) for r in rows)
        assert named == len(rows) // 2, task_type


def test_train_prompts_are_words_of_the_prompt(splits):
    """attr_nouns say what the prompt says, so checking them checks the prompt."""
    for row in splits[0] + splits[1]:
        if row["task_type"] == "riddle":
            assert not set(row["prompt"].split()) & {*SHAPES, *COLORS}
            continue
        for name in row.get("attr_nouns", ()):
            assert name in row["prompt"], row


def test_splits_and_draws_repeat_themselves(splits):
    assert make_splits(train=60, held_out=20, seed=0) == splits
    assert make_splits(train=60, held_out=20, seed=1) != splits
    assert draw("complex", random.Random(5)) == draw("complex", random.Random(5))


@pytest.mark.parametrize("task_type", TASK_TYPES)
def test_drawn_scenes_hold_no_held_out_combination(task_type):
    rng = random.Random(1)
    for _ in range(400):
        row, scene = draw(task_type, rng)
        assert not any(o.is_held_out() for o in scene), row
        assert row["task_type"] == task_type
        assert len({o.position for o in scene}) == len(scene)
        assert {o.shape for o in scene} == set(row["nouns"])
    assert task_type == "shape" or any(
        o.is_held_out() for _ in range(300) for o in draw(task_type, rng, allow_held_out=True)[1]
    )


def test_numeracy_scene_has_the_counts():
    rng = random.Random(2)
    for _ in range(100):
        row, scene = draw("numeracy", rng)
        for info in row["numeracy_info"]:
            assert sum(o.shape == info["obj_name"] for o in scene) == info["num"]


def test_spatial_scene_has_the_relation():
    rng = random.Random(3)
    for _ in range(200):
        row, scene = draw("spatial", rng)
        info = row["spatial_info"]
        first, second = (next(o for o in scene if o.shape == info[k]) for k in ("obj1", "obj2"))
        (x1, y1), (x2, y2) = POSITIONS[first.position], POSITIONS[second.position]
        holds = {
            "left": x1 < x2,
            "right": x1 > x2,
            "above": y1 < y2,
            "top": y1 < y2,
            "below": y1 > y2,
            "bottom": y1 > y2,
            "next": x1 != x2,
        }
        assert next(v for k, v in holds.items() if k in info["locality"].split()), row


def test_unknown_task_type_is_refused():
    with pytest.raises(ValueError, match="unknown task type 'colour'"):
        draw("colour", random.Random(0))


def test_corrupt_makes_no_held_out_combination():
    rng = random.Random(4)
    changed = 0
    for i in range(1500):
        _, scene = draw(TASK_TYPES[i % len(TASK_TYPES)], rng)
        noted = corrupt(scene, rng, 0.4)
        changed += noted != scene
        assert not any(o.is_held_out() for o in noted), (scene, noted)
        assert 1 <= len(noted) <= 4
        assert len({o.position for o in noted}) == len(noted)
        assert all(o.size == "large" or o.texture == "plain" for o in noted)
    assert changed > 1000


def test_corrupt_at_rate_0_changes_nothing():
    rng = random.Random(5)
    for task_type in TASK_TYPES:
        for _ in range(50):
            _, scene = draw(task_type, rng, allow_held_out=True)
            assert corrupt(scene, rng, 0.0) == scene


def test_random_object_keeps_fixed_words():
    rng = random.Random(6)
    for _ in range(100):
        obj = random_object(rng, allow_held_out=False, shape="circle", texture="dotted")
        assert (obj.shape, obj.texture, obj.size) == ("circle", "dotted", "large")
        assert obj.color != "purple"


def test_render_is_deterministic_and_plausible():
    scene = (
        Obj("star", "red", "striped", "large", "left"),
        Obj("circle", "blue", size="small", position="right"),
    )
    picture = render(scene)
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
    assert np.array_equal(picture, render(scene))
    picture[:] = 0  # a caller's writes do not reach the caches
    assert np.array_equal(render(()), np.broadcast_to(np.uint8(BACKGROUND), (64, 64, 3)))
    assert tuple(render(scene)[32, 48]) == COLORS["blue"]


def test_every_word_shows_in_the_picture():
    pictures = {
        render((Obj(shape, color, texture, size, position),)).tobytes()
        for shape in SHAPES
        for color in COLORS
        for texture, size in [(t, "large") for t in TEXTURES] + [("plain", "small")]
        for position in ("center", *QUADRANTS[:1])
    }
    assert len(pictures) == len(SHAPES) * len(COLORS) * (len(TEXTURES) + len(SIZES) - 1) * 2


def test_objects_stay_where_they_are_put():
    for position, (x, y) in POSITIONS.items():
        for size, side in SIZES.items():
            picture = render((Obj("square", "green", "plain", size, position),))
            ys, xs = np.nonzero((picture != BACKGROUND).any(-1))
            assert (xs.min(), xs.max()) == (x - side // 2, x + side // 2 - 1)
            assert (ys.min(), ys.max()) == (y - side // 2, y + side // 2 - 1)


def test_plan_and_rows_are_written_as_they_are_read(tmp_path, splits):
    scene = (
        Obj("star", "red", "striped", "large", "left"),
        Obj("circle", "blue", position="right"),
    )
    assert plan_text(scene) == "large striped red star left, large plain blue circle right"
    write_rows(tmp_path / "rows.jsonl", splits[1])
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == splits[1]
