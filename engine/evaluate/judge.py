"""Score a policy on prompts: by the tiny world's judge, or by the reward experts.

The judge reads the picture by itself and shares nothing with the rewards, so that a policy that
learnt to please the experts rather than the prompt is found out. The command,
python -m engine.evaluate, is in engine/evaluate/__main__.py.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from engine.generate.pictures import Settings, generate
from engine.model.policy import Policy
from engine.prompts.conversation import Conversation
from engine.prompts.data import Row
from engine.run.grids import save_picture
from engine.run.inside import inside
from engine.tiny.judge import judge
from engine.tiny.world import IMAGE_SIZE
from rewards import Ensemble, RewardPipeline

EVAL_SEED = 0x5EED  # the same noise before and after training: differences are paired
BATCH = 128
THUMB = 32  # side of the pictures that are compared with each other
PICTURES_PER_TASK = 6  # how many pictures of each task type are kept for the report


def judge_scores(pixels: torch.Tensor, rows: list[Row]) -> np.ndarray | None:
    """The tiny world's judge on (B, 3, H, W) in [0, 1]; None for pictures of another world."""
    if pixels.shape[-1] != IMAGE_SIZE:
        return None
    return judge(pixels.float().cpu(), rows)


@torch.no_grad()
def evaluate(
    policy: Policy,
    conversation: Conversation,
    rows: list[Row],
    *,
    generations: int,
    settings: Settings,
    ensemble: Ensemble | RewardPipeline,
    pictures: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Generate and score `generations` pictures of every row.

    Args:
        settings: how they are drawn; a plan a picture.
        pictures: folder that gets the first pictures of each task type as PNG; None: none.
        progress: called with (pictures done, pictures in all) after each batch; may raise.
    Returns: summary {"mean", "by_task": {task: {"mean", "n"}}, "rewards": {expert: mean},
        "reward", "scored_by", "diversity"}, and one record a picture. `mean` is the judge's score
        averaged over task types; for pictures that are not the tiny world's, the ensemble's reward.
    """
    every = [row for row in rows for _ in range(generations)]
    records: list[dict[str, Any]] = []
    experts: dict[str, list[float]] = {}
    kept: dict[str, int] = {}
    thumbs: list[torch.Tensor] = []
    for start in range(0, len(every), BATCH):
        part = every[start : start + BATCH]
        made = generate(
            policy,
            conversation,
            [row["prompt"] for row in part],
            torch.arange(start, start + len(part), device=policy.device),
            settings,
        )
        pixels = made.pixels.float()
        thumbs.append(F.adaptive_avg_pool2d(pixels, THUMB).cpu())
        rewards = ensemble.score([row["prompt"] for row in part], pixels, part)
        for name, values in rewards.by_expert.items():
            experts.setdefault(name, []).extend(values.tolist())
        judged = judge_scores(pixels, part)
        scores = rewards.total.tolist() if judged is None else judged.tolist()
        for i, row in enumerate(part):
            task = row.get("task_type", "prompt")
            record = {
                "prompt": row["prompt"],
                "task_type": task,
                "plan": made.plans[i],
                "score": scores[i],
                "reward": float(rewards.total[i]),
                "rewards": {name: float(v[i]) for name, v in rewards.by_expert.items()},
                "scored_by": "experts" if judged is None else "judge",
            }
            number = kept.get(task, 0)
            if pictures is not None and number < PICTURES_PER_TASK * generations:
                kept[task] = number + 1
                if (start + i) % generations == 0:
                    name = f"{start + i:05d}.png"
                    save_picture(inside(pictures, name), pixels[i])
                    record["image"] = f"{pictures.name}/{name}"
            records.append(record)
        progress(len(records), len(every))
    tasks = list(dict.fromkeys(r["task_type"] for r in records))
    by_task = {}
    for task in tasks:
        of_task = [r["score"] for r in records if r["task_type"] == task]
        by_task[task] = {"mean": sum(of_task) / len(of_task), "n": len(of_task)}
    summary = {
        "scored_by": "experts" if judged is None else "judge",
        "mean": sum(task["mean"] for task in by_task.values()) / len(by_task),
        "by_task": by_task,
        "reward": sum(r["reward"] for r in records) / len(records),
        "rewards": {name: sum(v) / len(v) for name, v in experts.items()},
    }
    if generations > 1:
        summary["diversity"] = diversity(
            [r["plan"] for r in records], torch.cat(thumbs), generations
        )
    return summary, records


def diversity(plans: list[str], pixels: torch.Tensor, generations: int) -> dict[str, float]:
    """How much a prompt's samples differ: reinforcement narrows it.

    Args:
        plans: of the pictures (B, C, H, W); `generations` of a prompt are adjacent.
    Returns: `distinct_plans`, their share; `pixel_distance`, the mean absolute difference of two
        pictures of a prompt, which share neither plan nor noise. Means over the prompts.
    """
    groups = [plans[i : i + generations] for i in range(0, len(plans), generations)]
    pictures = pixels.view(len(groups), generations, *pixels.shape[1:])
    return {
        "distinct_plans": sum(len(set(g)) for g in groups) / len(plans),
        "pixel_distance": pair_distance(pictures[:, :8]),
    }


def pair_distance(pictures: torch.Tensor) -> float:
    """The mean absolute difference of two pictures of a group, of (groups, members >= 2, ...)."""
    pairs = itertools.combinations(range(pictures.shape[1]), 2)
    found = [(pictures[:, i] - pictures[:, j]).abs().mean() for i, j in pairs]
    return float(torch.stack(found).mean())
