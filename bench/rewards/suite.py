"""Reward experts on a batch against the same experts one picture at a time.

Models of the real classes with random weights at a size that a CPU runs (bench/rewards/models.py),
loaded from checkpoints in their published layouts. 16 pictures of 2 prompts, as a training step's
groups are. `batched` is one call of our expert; `single` is the loop of T2I-R1's reward functions,
one picture and its prompt a call, of the very same class: a question of a picture is there in one
forward with its other ones, and nothing of the preprocessing goes through PIL, so the loop is
faster than the published one. Scores must be equal before anything is timed. The two take turns.

`worst_batched_vs_single` and `second_best_batched_vs_single` are single time / batched time,
medians, of the slowest and of the second-best expert; wanted: 1 and 2.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.rewards import models as reward_models
from engine.settings.options import check_fields, option
from rewards import RewardExpert

EXPERTS = ("hps", "imagereward", "gdino", "owl", "git", "blip", "orm")
TOLERANCE = 1e-4  # of a score, between the two ways of asking the same class
SPREAD = 1e-3  # of the scores; without it a wrong order of pictures would go unseen
SIDE = 96  # pixels of the pictures, which every expert resizes
ROWS: tuple[dict[str, Any], ...] = (
    {
        "prompt": "a red cup and a blue dog",
        "nouns": ["cup", "dog"],
        "attr_nouns": ["red cup", "blue dog"],
    },
    {
        "prompt": "a cat to the left of a wooden car",
        "nouns": ["cat", "car"],
        "attr_nouns": ["cat", "wooden car"],
        "spatial_info": {"obj1": "cat", "obj2": "car", "locality": "left of"},
    },
)
Batch = tuple[list[str], Tensor, list[dict[str, Any]]]


@dataclass(kw_only=True, slots=True)
class Config:
    """Settings of `python -m bench rewards`."""

    json: bool = option(False, "print one JSON object instead of a table")
    threads: int = option(0, "torch threads of both; 0: torch's default", at_least=0)
    images: int = option(16, "pictures, half of each prompt", at_least=2)
    repeats: int = option(5, "timed runs of each", at_least=1)
    expert: str = option("", f"only this one of {', '.join(EXPERTS)}; empty: all")

    def __post_init__(self) -> None:
        check_fields(self)


def run(config: Config) -> dict:
    """The suite's {"rows", "ratios", "correct"}."""
    rows, gains = [], []
    batch = make_batch(config.images)
    for name in EXPERTS:
        if config.expert in ("", name):
            with tempfile.TemporaryDirectory() as folder:
                expert = reward_models.write(name, Path(folder))()
            found = compare(expert, batch, config.repeats)
            rows += found
            if found[0]["correct"]:
                gains.append(found[1]["seconds"] / found[0]["seconds"])
    gains.sort(reverse=True)
    ratios = {"worst_batched_vs_single": gains[-1]} if gains else {}
    if len(gains) > 1:
        ratios["second_best_batched_vs_single"] = gains[1]
    return {"rows": rows, "ratios": ratios, "correct": all(row["correct"] for row in rows)}


def make_batch(count: int) -> Batch:
    """`count` pictures of coloured blobs with their prompts and rows, groups adjacent."""
    rng = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 4, 4, generator=rng)
    images = F.interpolate(coarse, (SIDE, SIDE), mode="bicubic").clamp(0, 1)
    images = (images * 255).round() / 255
    rows = [ROWS[i * len(ROWS) // count] for i in range(count)]
    return [row["prompt"] for row in rows], images, rows


def one_at_a_time(expert: RewardExpert, batch: Batch) -> Tensor:
    """The scores by a call for each picture."""
    prompts, images, rows = batch
    return torch.cat(
        [
            expert.score(prompts[i : i + 1], images[i : i + 1], rows[i : i + 1])
            for i in range(len(rows))
        ]
    )


def compare(expert: RewardExpert, batch: Batch, repeats: int) -> list[dict]:
    """Check, then time, both ways of asking an expert. Returns: the two rows, batched first."""
    providers: dict[str, Callable[[], Tensor]] = {
        "batched": lambda: expert.score(*batch),
        "single": lambda: one_at_a_time(expert, batch),
    }
    # The check has warmed both up.
    batched, single = (score() for score in providers.values())
    error, spread = float((batched - single).abs().max()), float(single.std())
    correct = error <= TOLERANCE and spread >= SPREAD
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    for _ in range(repeats if correct else 0):
        for name, score in providers.items():
            started = time.perf_counter()
            score()
            seconds[name].append(time.perf_counter() - started)
    count = len(batch[0])
    rows = []
    for name, values in seconds.items():
        row: dict = {
            "expert": expert.name,
            "provider": name,
            "shape": f"{count} images of {SIDE}x{SIDE}, {len(set(batch[0]))} prompts",
            "correct": correct,
            "max_difference": error,
            "score_spread": spread,
        }
        if correct:
            median = statistics.median(values)
            row |= {
                "seconds": median,
                "fastest_seconds": min(values),
                "images_per_s": count / median,
            }
        rows.append(row)
    return rows
