"""The judge and the exact experts read rendered scenes, and share nothing."""

import ast
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engine.settings.errors import UserError
from engine.tiny import clip, scene_reader
from engine.tiny.experts import build_experts
from engine.tiny.judge import judge, read_scene
from engine.tiny.prompts import TASK_TYPES, corpus, draw
from engine.tiny.scene_reader import SceneReader
from engine.tiny.tokenizer import train_tokenizer
from engine.tiny.world import BACKGROUND, Obj, corrupt, render

ROOT = Path(__file__).parents[3]


def pictures(scenes):
    return torch.stack([torch.from_numpy(render(s)).permute(2, 0, 1).float() / 255 for s in scenes])


def soften(images, generator):
    """A 3x3 blur at half strength, and noise of +-25 of 255."""
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    noise = (torch.rand(images.shape, generator=generator) - 0.5) * 50 / 255
    return ((images + blurred) / 2 + noise).clamp(0, 1)


@pytest.fixture(scope="module")
def world():
    """300 rows over every task type, their scenes and pictures."""
    rng = random.Random(5)
    drawn = [draw(TASK_TYPES[i % 7], rng, allow_held_out=True) for i in range(300)]
    rows, scenes = [r for r, _ in drawn], [s for _, s in drawn]
    return rows, scenes, pictures(scenes)


@pytest.fixture(scope="module")
def part(world):
    """A third of it, every task type alike."""
    rows, scenes, images = world
    return rows[:105], scenes[:105], images[:105]


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    return build_experts(["gdino", "git", "orm"], tmp_path_factory.mktemp("none"), "cpu")


def scores(expert, images, rows):
    return expert.score([r["prompt"] for r in rows], images, rows)


def test_judge_is_exact_on_rendered_scenes(world):
    rows, _, images = world
    perfect = judge(images, rows) == 1
    for task in TASK_TYPES:
        of_task = np.array([r["task_type"] == task for r in rows])
        assert perfect[of_task].mean() >= 0.99, task


def test_judge_survives_the_image_tokenizer(part):
    rows, _, images = part
    softened = soften(images, torch.Generator().manual_seed(0))
    assert judge(softened, rows).mean() > 0.95


def test_judge_is_low_on_corrupted_scenes(part):
    rows, scenes, _ = part
    rng = random.Random(0)
    assert judge(pictures([corrupt(s, rng, 0.5) for s in scenes]), rows).mean() < 0.35


def test_read_scene_names_everything():
    scene = (
        Obj("star", "pink", "checked", "large", "left"),
        Obj("cross", "blue", "plain", "small", "right"),
    )
    read = read_scene(pictures([scene])[0])
    words = [(o["shape"], o["color"], o["texture"], o["size"]) for o in read]
    assert words == [("star", "pink", "checked", "large"), ("cross", "blue", "plain", "small")]
    assert read[0]["x"] == pytest.approx(16, abs=1.5) and read[1]["x"] == pytest.approx(48, abs=1)


@pytest.mark.parametrize(
    ("scene", "score"),
    [
        ((Obj("star", "pink", position="left"), Obj("cross", "blue", position="right")), 1.0),
        ((Obj("star", "pink", position="right"), Obj("cross", "blue", position="left")), 0.5),
        ((Obj("star", "red", position="left"), Obj("cross", "blue", position="right")), 0.75),
        ((Obj("star", "pink"),), 0.125),  # half exists, no relation, one object too few
    ],
)
def test_judge_grades_spatial_rows(scene, score):
    row = {
        "nouns": ["star", "cross"],
        "attr_nouns": ["pink star", "blue cross"],
        "spatial_info": {"obj1": "star", "obj2": "cross", "locality": "on the left of"},
    }
    assert judge(pictures([scene]), [row])[0] == pytest.approx(score)


def test_judge_counts_and_halves_for_extra_objects():
    row = {"nouns": ["star"], "numeracy_info": [{"obj_name": "star", "num": 2}]}
    two = (Obj("star", "red", position="left"), Obj("star", "red", position="right"))
    places = ("upper left", "upper right", "lower left")
    three = tuple(Obj("star", "red", position=p) for p in places)
    extra = (*three[:2], Obj("circle", "blue", position="lower left"))
    assert judge(pictures([two, three, extra]), [row] * 3).tolist() == [1.0, 0.0, 0.5]
    red = {**row, "attr_nouns": ["blue star"]}
    assert judge(pictures([two]), [red])[0] == 0


def garbage():
    blank = torch.tensor(BACKGROUND).view(1, 3, 1, 1) / 255 * torch.ones(1, 3, 64, 64)
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    red = torch.tensor([218.0, 38, 38]).view(1, 3, 1, 1) / 255 * torch.ones(1, 3, 64, 64)
    return torch.cat([blank, noise, red, torch.zeros(1, 3, 64, 64)])


def test_garbage_scores_low_everywhere(world, exact):
    for images in garbage():
        batch, rows = images.expand(70, -1, -1, -1), world[0][:70]
        assert judge(batch[:20], rows[:20]).max() == 0
        for expert in exact:
            assert scores(expert, batch, rows).max() < 0.1, expert.name


def test_experts_read_rendered_scenes(part, exact):
    rows, _, images = part
    detector, attributes, whole = (scores(e, images, rows) for e in exact)
    assert (detector == 1).float().mean() >= 0.99
    assert attributes.mean() > 0.93 and whole.mean() > 0.88
    softened = soften(images, torch.Generator().manual_seed(1))
    assert scores(exact[0], softened, rows).mean() > 0.97
    assert scores(exact[1], softened, rows).mean() > 0.7


def test_experts_tell_the_right_scene_from_a_corrupted_one(part, exact):
    rows, scenes, images = part
    rng = random.Random(1)
    wrong = pictures([corrupt(s, rng, 0.5) for s in scenes])
    judged = judge(wrong, rows)
    is_wrong = torch.from_numpy(judged < 1)
    for expert in exact:
        right, low = scores(expert, images, rows), scores(expert, wrong, rows)
        assert (right - low)[is_wrong].mean() > 0.5, expert.name
        assert np.corrcoef(low, judged)[0, 1] > 0.5, expert.name


def test_reward_rises_with_each_thing_made_right(exact):
    row = {"prompt": "", "nouns": ["star"], "attr_nouns": ["large striped pink star"]}
    steps = pictures(
        [
            (Obj("circle", "green", "plain", "small"),),
            (Obj("star", "green", "plain", "small"),),
            (Obj("star", "pink", "plain", "large"),),
            (Obj("star", "pink", "striped", "large"),),
        ]
    )
    for expert in exact:
        answer = scores(expert, steps, [row] * 4)
        assert (answer.diff() > -1e-6).all() and answer[-1] > 0.9 > answer[0], expert.name


def test_the_batch_is_analysed_once(world, monkeypatch):
    reader, calls = SceneReader(), []
    real = scene_reader._read
    monkeypatch.setattr(scene_reader, "_read", lambda x: calls.append(1) or real(x))
    first = reader.read(world[2])
    assert reader.read(world[2]) is first
    assert reader.read(world[2].clone()) is not first
    assert len(calls) == 2


def test_bad_input_is_named(exact, tmp_path):
    with pytest.raises(UserError, match="'gdinoo'.*'gdino'"):
        build_experts(["gdinoo"], tmp_path, "cpu")
    with pytest.raises(UserError, match="hps"):
        build_experts(["hps"], tmp_path, "cpu")
    row = {"prompt": "", "nouns": ["teapot"]}
    with pytest.raises(UserError, match="teapot"):
        scores(exact[1], torch.zeros(1, 3, 64, 64), [row])
    with pytest.raises(UserError, match="teapot"):
        judge(pictures([(Obj("star", "red"),)]), [row])
    with pytest.raises(UserError, match="'a cat'"):
        judge(torch.zeros(1, 3, 64, 64), [{"prompt": "a cat"}])
    with pytest.raises(ValueError, match="'a cat'"):
        scores(exact[1], torch.zeros(1, 3, 64, 64), [{"prompt": "a cat"}])
    with pytest.raises(ValueError, match="64"):
        scores(exact[1], torch.zeros(1, 3, 32, 32), [row])


def test_wrong_captions_differ_in_what_they_claim():
    rng = random.Random(0)
    _, right, wrong, tasks = clip.draw_batch(200, rng, negatives=2)
    assert len(wrong) == 400 and set(tasks) == set(TASK_TYPES)
    for i, caption in enumerate(wrong):
        assert caption != right[i // 2] and len(caption) > 5
    row = "a red circle and a blue square"
    lies = {clip.wrong_caption(row, rng) for _ in range(500)}
    assert "a blue circle and a red square" in lies and row not in lies


def test_trained_clip_loads_through_the_published_class(tmp_path, monkeypatch):
    train_tokenizer(corpus()[:500], tmp_path)
    monkeypatch.setattr(clip, "BATCH", 4)
    monkeypatch.setattr(clip, "EVALUATED", 14)
    lines: list[str] = []
    accuracy = clip.train_clip(
        tmp_path / "hps", tokenizer_path=tmp_path / "tokenizer.json", steps=2, log=lines.append
    )
    assert 0 <= accuracy["mean"] <= 1 and "held_out" in accuracy and lines
    (expert,) = build_experts(["hps"], tmp_path, "cpu")
    images, captions, _, _ = clip.draw_batch(4, random.Random(0))
    answer = expert.score(captions, images, [{}] * 4)
    assert answer.shape == (4,) and answer.std() > 0


def test_judge_imports_nothing_of_the_rewards():
    tree = ast.parse((ROOT / "engine/tiny/judge.py").read_text())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module)
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    ours = {m for m in imported if m.split(".")[0] in ("engine", "rewards", "kernels")}
    assert ours == {"engine.settings.errors", "engine.tiny.world"}
