"""Prompts to plans to pictures: the rollout of both chains of thought, and its command.

python -m engine.generate --prompt "a three-sided shape in the colour of grass"
"""

# ruff: noqa: RUF009  `option` makes a dataclasses.field, which ruff cannot know

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint import atomic_write_text
from engine.config import check_fields, option, parse_args
from engine.conversation import Conversation
from engine.data import load_prompts, load_template
from engine.errors import UserError, run_command
from engine.pictures import save_grid
from engine.policy import Policy, load_policy
from engine.rollout import ImageRollout, TextRollout, sample_images, sample_text
from engine.weights import folder_of, guidance_scale


@dataclass(slots=True)
class Generation:
    """B pictures with the plans they were drawn from.

    Attributes:
        stage1, stage2: B prompts of the text and the image level.
        text: completions, one a sample; samples of one plan repeat it.
        plans: B texts.
        image: image tokens.
        pixels: (B, 3, H, W) in [0, 1].
    """

    stage1: list[Tensor]
    text: TextRollout
    plans: list[str]
    stage2: list[Tensor]
    image: ImageRollout
    pixels: Tensor


def generate(
    policy: Policy,
    conversation: Conversation,
    prompts: Sequence[str],
    *,
    sample_ids: Tensor,
    seed: int,
    max_completion_length: int,
    cfg_weight: float,
    temperature: float,
    images_per_plan: int = 1,
) -> Generation:
    """Sample plan and picture for each prompt.

    Args:
        prompts: B texts; the images_per_plan samples that share a plan are adjacent.
        sample_ids: (B,) int64, the identity of each sample's noise.
    """
    every = images_per_plan
    stage1 = [conversation.stage1(p) for p in prompts[::every]]
    text = sample_text(
        policy,
        stage1,
        max_new_tokens=max_completion_length,
        temperature=temperature,
        seed=seed,
        sample_ids=sample_ids[::every],
    )
    plans = conversation.plans(text.ids, text.mask)
    if every > 1:
        stage1 = [ids for ids in stage1 for _ in range(every)]
        plans = [plan for plan in plans for _ in range(every)]
        text = TextRollout(
            *(getattr(text, f).repeat_interleave(every, 0) for f in ("ids", "mask", "logprobs"))
        )
    stage2 = [conversation.stage2(p, plan) for p, plan in zip(prompts, plans, strict=True)]
    image = sample_images(
        policy,
        stage2,
        cfg_weight=cfg_weight,
        temperature=temperature,
        seed=seed,
        sample_ids=sample_ids,
    )
    pixels = policy.decode_images(image.ids)
    return Generation(stage1, text, plans, stage2, image, pixels)


@dataclass(kw_only=True, slots=True)
class GenerateConfig:
    """Settings of `python -m engine.generate`."""

    # fmt: off
    prompt: list[str] = option((), "prompts", group="what")
    prompts: str | None = option(None, "a prompt file instead: .json, .jsonl or .txt")
    num_generations: int = option(4, "pictures of each prompt", at_least=1)
    out: str = option("generated", "folder for grid.png and plans.json")
    model: str = option("tiny", "a Janus-Pro checkpoint folder, or tiny", group="how", aliases=["model_name_or_path"])
    seed: int = option(0, "seed of the sampling", at_least=0, below=2**32)
    cfg_weight: float | None = option(None, "guidance weight; 1: no guidance; none: the checkpoint's own", at_least=0)
    temperature: float = option(1.0, "sampling temperature", above=0)
    max_completion_length: int = option(40, "longest plan in tokens", at_least=1)
    reasoning_prompt_path: str | None = option(None, "file with the instruction to plan; {} is the prompt")
    batch_size: int = option(64, "pictures sampled at a time", at_least=1)
    device: str = option("cpu", "cpu, cuda or cuda:N")
    # fmt: on

    def __post_init__(self) -> None:
        check_fields(self)
        if bool(self.prompt) == (self.prompts is not None):
            raise UserError("give either --prompt TEXT or --prompts FILE")
        if any(not text.strip() for text in self.prompt):
            raise UserError("--prompt: a prompt is empty")


def main(argv: list[str]) -> None:
    """Write a grid of pictures with their plans, and a JSON file of the same."""
    config = parse_args(GenerateConfig, argv, description="Pictures and plans for prompts.")
    rows = (
        load_prompts(config.prompts) if config.prompts else [{"prompt": p} for p in config.prompt]
    )
    template = load_template(folder_of(config.model), config.reasoning_prompt_path)
    policy = load_policy(config.model, device=config.device)
    conversation = Conversation(policy, template)
    conversation.check(
        rows,
        config.prompts or "--prompt",
        max_prompt=policy.context_length,
        max_plan=config.max_completion_length,
    )
    out = Path(config.out)
    prompts = [row["prompt"] for row in rows for _ in range(config.num_generations)]
    plans: list[str] = []
    pixels: list[Tensor] = []
    for start in range(0, len(prompts), config.batch_size):
        part = prompts[start : start + config.batch_size]
        made = generate(
            policy,
            conversation,
            part,
            sample_ids=torch.arange(start, start + len(part), device=policy.device),
            seed=config.seed,
            max_completion_length=config.max_completion_length,
            cfg_weight=guidance_scale(config.model, config.cfg_weight),
            temperature=config.temperature,
        )
        plans += made.plans
        pixels.append(made.pixels.float().cpu())
    try:
        out.mkdir(parents=True, exist_ok=True)
        captions = [f"{prompt}\n{plan}" for prompt, plan in zip(prompts, plans, strict=True)]
        columns = config.num_generations
        save_grid(out / "grid.png", torch.cat(pixels), captions, columns=columns)
        records = [
            {"prompt": prompt, "plan": plan, "seed": config.seed, "sample_id": i}
            for i, (prompt, plan) in enumerate(zip(prompts, plans, strict=True))
        ]
        atomic_write_text(out / "plans.json", json.dumps(records, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from error
    print(f"{out / 'grid.png'}: {len(plans)} pictures; plans in {out / 'plans.json'}")


if __name__ == "__main__":
    sys.exit(run_command(main))
