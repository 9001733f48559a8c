"""Score a policy on prompts: by the tiny world's judge, or by the reward experts.

    python -m engine.evaluate --model runs/tiny-0/policy

The judge reads the picture by itself and shares nothing with the rewards, so that a policy that
learnt to please the experts rather than the prompt is found out.
"""

# ruff: noqa: RUF009  `option` makes a dataclasses.field, which ruff cannot know

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from engine.checkpoint import atomic_write_text
from engine.config import check_fields, option, parse_args
from engine.conversation import Conversation
from engine.data import Row, load_prompts, load_template
from engine.errors import UserError, run_command
from engine.generate import generate
from engine.pictures import save_picture
from engine.policy import Policy, load_policy
from engine.tiny.experts import build_experts
from engine.tiny.judge import judge
from engine.tiny.world import IMAGE_SIZE
from engine.weights import folder_of, guidance_scale
from rewards import Ensemble

EVAL_SEED = 0x5EED  # the same noise before and after training: differences are paired
BATCH = 128
PICTURES_PER_TASK = 6  # how many pictures of each task type are kept for the report


def build_ensemble(
    names: list[str],
    *,
    device: torch.device,
    hps_ckpt_path: str | None = None,
    other_paths: dict[str, str | None] | None = None,
    weights: list[float] | None = None,
    on_error: Literal["raise", "skip"] = "raise",
) -> Ensemble:
    """The experts called `names`: the tiny world's, but for hps with a checkpoint of its own.

    Raises: UserError naming the flag of an expert that has no implementation here.
    """
    for flag, path in (other_paths or {}).items():
        if path is not None:
            raise UserError(
                f"--{flag}: only the tiny world's expert exists for this reward so far; "
                "leave the flag out"
            )
    tiny = Path(__file__).parent / "tiny" / "weights"
    experts = build_experts([n for n in names if n != "hps" or not hps_ckpt_path], tiny, device)
    if hps_ckpt_path and "hps" in names:
        from rewards import HPS

        try:
            experts.insert(names.index("hps"), HPS(Path(hps_ckpt_path), device=device))
        except ValueError as error:
            raise UserError(f"--hps_ckpt_path: {error}") from error
    by_name = dict(zip(names, weights, strict=True)) if weights else None
    return Ensemble(experts, by_name, on_error)


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
    max_completion_length: int,
    cfg_weight: float,
    temperature: float,
    ensemble: Ensemble,
    seed: int = EVAL_SEED,
    pictures: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Generate and score `generations` pictures of every row.

    Args:
        pictures: folder that gets the first pictures of each task type as PNG; None: none.
        progress: called with (pictures done, pictures in all) after each batch; may raise.
    Returns: summary {"mean", "by_task": {task: {"mean", "n"}}, "rewards": {expert: mean},
        "reward", "scored_by"}, and one record a picture. `mean` is the judge's score averaged
        over task types; for pictures that are not the tiny world's, the ensemble's reward.
    """
    every = [row for row in rows for _ in range(generations)]
    records: list[dict[str, Any]] = []
    experts: dict[str, list[float]] = {}
    kept: dict[str, int] = {}
    for start in range(0, len(every), BATCH):
        part = every[start : start + BATCH]
        made = generate(
            policy,
            conversation,
            [row["prompt"] for row in part],
            sample_ids=torch.arange(start, start + len(part), device=policy.device),
            seed=seed,
            max_completion_length=max_completion_length,
            cfg_weight=cfg_weight,
            temperature=temperature,
        )
        pixels = made.pixels.float()
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
            }
            number = kept.get(task, 0)
            if pictures is not None and number < PICTURES_PER_TASK * generations:
                kept[task] = number + 1
                if (start + i) % generations == 0:
                    name = f"{start + i:05d}.png"
                    save_picture(pictures / name, pixels[i])
                    record["image"] = f"{pictures.name}/{name}"
            records.append(record)
        progress(len(records), len(every))
    tasks = list(dict.fromkeys(r["task_type"] for r in records))
    by_task = {}
    for task in tasks:
        values = [r["score"] for r in records if r["task_type"] == task]
        by_task[task] = {"mean": sum(values) / len(values), "n": len(values)}
    summary = {
        "scored_by": "experts" if judged is None else "judge",
        "mean": sum(task["mean"] for task in by_task.values()) / len(by_task),
        "by_task": by_task,
        "reward": sum(r["reward"] for r in records) / len(records),
        "rewards": {name: sum(v) / len(v) for name, v in experts.items()},
    }
    return summary, records


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    """Settings of `python -m engine.evaluate`."""

    # fmt: off
    model: str = option("tiny", "a Janus-Pro checkpoint folder, or tiny", group="what", aliases=["model_name_or_path"])
    prompts: str = option("tiny:heldout", "prompt file, tiny or tiny:heldout", aliases=["dataset_name"])
    reward_funcs: list[str] = option(("hps", "gdino", "git", "orm"), "reward experts")
    out: str | None = option(None, "JSON file that gets the summary and a record a picture")
    num_generations: int = option(2, "pictures of each prompt", group="how", at_least=1)
    seed: int = option(EVAL_SEED, "seed of the sampling", at_least=0, below=2**32)
    cfg_weight: float | None = option(None, "guidance weight; 1: no guidance; none: the checkpoint's own", at_least=0)
    temperature: float = option(1.0, "sampling temperature", above=0)
    max_completion_length: int = option(40, "longest plan in tokens", at_least=1)
    reasoning_prompt_path: str | None = option(None, "file with the instruction to plan; {} is the prompt")
    device: str = option("cpu", "cpu, cuda or cuda:N")
    # fmt: on

    def __post_init__(self) -> None:
        check_fields(self)


def main(argv: list[str]) -> None:
    """Print the judge's and the experts' mean scores by task type."""
    config = parse_args(EvaluateConfig, argv, description="Score a policy on prompts.")
    rows = load_prompts(config.prompts)
    template = load_template(folder_of(config.model), config.reasoning_prompt_path)
    ensemble = build_ensemble(config.reward_funcs, device=torch.device(config.device))
    policy = load_policy(config.model, device=config.device)
    conversation = Conversation(policy, template)
    conversation.check(
        rows,
        config.prompts,
        max_prompt=policy.context_length,
        max_plan=config.max_completion_length,
    )
    summary, records = evaluate(
        policy,
        conversation,
        rows,
        generations=config.num_generations,
        max_completion_length=config.max_completion_length,
        cfg_weight=guidance_scale(config.model, config.cfg_weight),
        temperature=config.temperature,
        ensemble=ensemble,
        seed=config.seed,
    )
    if config.out:
        try:
            atomic_write_text(
                Path(config.out), json.dumps({"summary": summary, "rows": records}, indent=1)
            )
        except OSError as error:
            raise UserError(f"--out {config.out}: {error.strerror}") from error
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    sys.exit(run_command(main))
