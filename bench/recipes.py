"""Writes docs/recipes.md: python -m bench.recipes

Each of recipes/*.yaml with the plan of its memory, stage by stage, by the counts of the published
shapes. Planned, not measured: no card of these sizes is here.
"""

import dataclasses
import sys
import tempfile
from pathlib import Path

import torch
from transformers import JanusConfig, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig

from bench.machine import ROOT
from engine.memory.fits import memory_of
from engine.memory.needs import Memory
from engine.run.checkpoint import atomic_write_text
from engine.settings.errors import run_command
from engine.settings.options import parse_args
from engine.settings.train import TrainConfig

# Published: width, feed-forward width, layers, heads
SHAPES = {
    "deepseek-ai/Janus-Pro-1B": (2048, 5632, 24, 16),
    "deepseek-ai/Janus-Pro-7B": (4096, 11_008, 30, 32),
}
GB = 10**9
HEAD = """# Recipes

What fits which card, made by `python -m bench.recipes` from `recipes/*.yaml`. The plan is that of
`python -m engine.train --plan --config RECIPE`, which counts a prompt's tokens by the checkpoint's
own tokenizer; here a token stands for four letters. **No card has run these.** On a CPU the plan
was 0.92 to 1.02 of the measured peak on twelve rows from 135M to 553M weights, full and LoRA, with
checkpointing and without (`python -m bench memory --json`, bench/results/memory.json), and 0.91 of it for a
LoRA step of a Janus-Pro-1B of true shape (7.7 GiB for 8.5).
Reward experts come on top: on a second card (`--reward_device cuda:1`), or one at a time
(`--reward_offload`).

    python -m engine.train --config recipes/janus-pro-7b-lora-80gb.yaml \\
        --dataset_name prompts.json --reward_funcs hps git gdino --hps_ckpt_path ...

"""


def write_config(folder: Path, model: str) -> None:
    """A config.json of the published shape."""
    width, inner, layers, heads = SHAPES[model]
    config = JanusConfig(
        text_config=LlamaConfig(
            vocab_size=102_400,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=16_384,
        ),
        vision_config=JanusVisionConfig(projection_dim=width),
        vq_config=JanusVQVAEConfig(projection_dim=width, image_token_embed_dim=width),
        tie_word_embeddings=False,
    )
    config.save_pretrained(folder)


def plan_of(recipe: Path) -> tuple[TrainConfig, Memory]:
    """A recipe's settings, and what they need on a GPU."""
    config = parse_args(TrainConfig, ["--config", str(recipe)], description="")
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), config.model)
        # A card that no machine has: nothing is chosen by what is here.
        batch = config.micro_batch_size or config.images_per_step
        asked = dataclasses.replace(config, model=folder, device="cuda:63", dataset_name="tiny")
        dtype = getattr(torch, config.dtype)
        return config, memory_of(asked, dtype, micro_batch_size=batch)


def section(recipe: Path) -> str:
    """One recipe as Markdown."""
    config, memory = plan_of(recipe)
    about = [line[2:] for line in recipe.read_text().splitlines() if line.startswith("# ")]
    images = config.micro_batch_size or config.images_per_step
    lines = [f"## {recipe.stem}", "", *about, ""]
    lines += [f"| GB, {images} images in an update's forward | |", "|---|---|"]
    for label, size in memory.held.items():
        if size:
            lines.append(f"| {label} | {size / GB:.1f} |")
    for name, parts in memory.stages.items():
        lines.append(f"| while in *{name}* | {sum(parts.values()) / GB:.1f} |")
    lines.append(f"| **peak** ({memory.largest}) | **{memory.peak / GB:.1f}** |")
    return "\n".join([*lines, ""])


def main(argv: list[str]) -> None:
    """Write the page."""
    recipes = sorted((ROOT / "recipes").glob("*.yaml"))
    page = HEAD + "\n".join(section(recipe) for recipe in recipes)
    atomic_write_text(ROOT / "docs" / "recipes.md", page)


if __name__ == "__main__":
    sys.exit(run_command(main))
