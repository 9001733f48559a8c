"""The reward suites of `python -m bench`: their JSON, their checks, their ratios."""

import json

import pytest
import torch
from PIL import Image

from bench.__main__ import main
from bench.rewards import overlap
from bench.rewards import suite as rewards


class Slow:
    """An expert whose scores depend on the picture; `leak` makes them depend on the batch too."""

    name = "slow"

    def __init__(self, leak=0.0):
        self.leak = leak

    def score(self, prompts, images, metadata):
        return images[:, 0].mean((1, 2)) + self.leak * len(prompts)


def test_rewards_suite_prints_one_json_object(capsys):
    argv = ["rewards", "--json", "--expert=hps", "--images=4", "--repeats=1", "--threads=1"]
    main(argv)
    report = json.loads(capsys.readouterr().out)
    assert report["correct"] is True and report["suite"] == "rewards"
    assert [row["provider"] for row in report["rows"]] == ["batched", "single"]
    batched, single = report["rows"]
    assert report["ratios"] == {
        "worst_batched_vs_single": pytest.approx(single["seconds"] / batched["seconds"])
    }
    assert batched["images_per_s"] == pytest.approx(4 / batched["seconds"])


def test_wrong_or_flat_scores_carry_no_speed():
    batch = rewards.make_batch(4)
    assert rewards.compare(Slow(), batch, 1)[0]["correct"]
    flat = (batch[0], batch[1][:1].expand(4, -1, -1, -1), batch[2])
    for rows in (rewards.compare(Slow(leak=1e-3), batch, 1), rewards.compare(Slow(), flat, 1)):
        assert not any(row["correct"] for row in rows)
        assert not any("seconds" in row for row in rows)


def test_overlap_suite_states_its_bound_and_draws_the_timeline(tmp_path):
    threads = torch.get_num_threads()
    file = tmp_path / "timeline.png"
    report = overlap.run(overlap.Config(prompts=1, repeats=3, write=str(file)))
    torch.set_num_threads(threads)
    assert report["correct"] is True
    sequential, pipeline = report["rows"]
    assert sequential["exposed_seconds"] > 0.9 * sequential["reward_seconds"]
    bound = min(sequential["reward_seconds"], sequential["reference_seconds"])
    hidden = sequential["seconds"] - pipeline["seconds"]
    assert report["ratios"] == {"hidden_share_of_possible": pytest.approx(hidden / bound)}
    with Image.open(file) as picture:
        colors = {color for _, color in picture.convert("RGB").getcolors(1 << 16)}
    assert len(colors) > 5


def test_ratios_are_of_the_worst_and_the_second_best(monkeypatch):
    seconds = dict(zip(rewards.EXPERTS, (4.0, 2.0, 1.5, 2.5, 3.0, 1.0, 2.0), strict=True))

    def compare(name, batch, repeats):
        return [{"correct": True, "seconds": 1.0}, {"correct": True, "seconds": seconds[name]}]

    monkeypatch.setattr(rewards.reward_models, "write", lambda name, folder: lambda: name)
    monkeypatch.setattr(rewards, "compare", compare)
    ratios = rewards.run(rewards.Config())["ratios"]
    assert ratios == {"worst_batched_vs_single": 1.0, "second_best_batched_vs_single": 3.0}
