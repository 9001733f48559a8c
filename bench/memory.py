"""The plan's memory against what a run takes: a ladder of models, full and LoRA, with checkpointing and without.

Each row is two commands in processes of their own: `python -m engine.train --plan ...`, whose last
lines name the peak, and the same without --plan, whose summary.json has the peak of the process (the
system's count of resident memory). Two steps, so that a rollout, a reward call and an update run
beside the optimizer's state. The models have the embedded one's architecture, tokenizer and image
tokenizer, random weights, and 256 image tokens. Rewards are one number a picture, without a model.
"""

import copy
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.machine import ROOT
from engine.model.policy import Policy
from engine.model.source import Checkpoint
from engine.policy import load_policy, save_policy
from engine.settings.errors import UserError
from engine.settings.options import check_fields, option

# name: width, layers, heads, feed-forward width
SIZES = {
    "135M": (768, 12, 12, 2048),
    "273M": (1024, 16, 16, 2816),
    "553M": (1536, 16, 12, 4096),
}
VOCAB, SIDE, IMAGES = 32_768, 16, 4
UNITS = {"MiB": 1, "GiB": 1024}


@dataclass(kw_only=True, slots=True)
class Config:
    """Settings of `python -m bench memory`."""

    json: bool = option(False, "print one JSON object instead of a table")
    threads: int = option(0, "torch threads; 0: torch's choice", at_least=0)
    sizes: list[str] = option(("135M", "273M", "553M"), "models, by weights")  # noqa: RUF009
    dtype: str = option("bfloat16", "type of the weights: bfloat16 or float32")
    limit: float = option(0.1, "how far the plan may be from what is measured", above=0)

    def __post_init__(self) -> None:
        check_fields(self)
        for name in self.sizes:
            if name not in SIZES:
                raise UserError(f"--sizes: wanted some of {', '.join(SIZES)}, got {name!r}")


class Contrast:
    """A reward that every picture has another value of: the spread of its pixels."""

    name = "contrast"

    def __init__(self, device: torch.device | str) -> None:
        pass

    def score(self, prompts: list[str], images: Tensor, metadata: list[dict]) -> Tensor:
        return images.float().flatten(1).std(1)


def run(config: Config) -> dict[str, Any]:
    """Plan and measure every row."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for size in config.sizes:
            folder = Path(scratch) / size
            write_model(folder, *SIZES[size])
            for peft in (False, True):
                for checkpointing in (False, True):
                    flags = flags_of(config, folder, peft=peft, checkpointing=checkpointing)
                    planned = planned_mib(flags)
                    measured, seconds = measured_run(flags, Path(scratch))
                    rows.append(
                        {
                            "provider": f"{size} {'LoRA' if peft else 'full'}"
                            + (", checkpointing" if checkpointing else ""),
                            "planned_mib": planned,
                            "measured_mib": measured,
                            "plan_over_measured": planned / measured,
                            "seconds_train": seconds,
                        }
                    )
                    print(f"{rows[-1]}", file=sys.stderr, flush=True)
    found = [row["plan_over_measured"] for row in rows]
    ratios = {"plan_over_measured_min": min(found), "plan_over_measured_max": max(found)}
    correct = all(abs(ratio - 1) <= config.limit for ratio in found)
    return {"rows": rows, "ratios": ratios, "correct": correct}


def write_model(folder: Path, width: int, layers: int, heads: int, inner: int) -> None:
    """A random model like the embedded one, of another size."""
    tiny = load_policy("tiny")
    assert tiny.source is not None
    config = copy.deepcopy(tiny.config)
    text, vq = config.text_config, config.vq_config
    text.hidden_size, text.intermediate_size, text.vocab_size = width, inner, VOCAB
    text.num_hidden_layers, text.num_attention_heads = layers, heads
    text.num_key_value_heads, text.head_dim = heads, width // heads
    text.max_position_embeddings = 2048
    vq.num_patches, vq.projection_dim, vq.image_token_embed_dim = SIDE, width, width
    torch.manual_seed(0)
    policy = Policy(config, tiny.tokenizer).bfloat16()
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    policy.source = Checkpoint(tiny.source.folder, tiny.source.layout, {}, None)
    save_policy(policy, folder)


def flags_of(config: Config, folder: Path, *, peft: bool, checkpointing: bool) -> list[str]:
    """The flags that plan and run have in common."""
    flags = [
        "--model", str(folder), "--dtype", config.dtype, "--dataset_name", "tiny",
        "--prompts_per_step", "1", "--num_generations", str(IMAGES), "--beta", "0",
        "--max_steps", "2", "--eval_generations", "0", "--learning_rate", "1e-4",
        "--reward_funcs", f"{__name__}:Contrast", "--threads", str(config.threads),
    ]  # fmt: skip
    flags += ["--use_peft"] if peft else []
    return flags + (["--gradient_checkpointing"] if checkpointing else [])


def planned_mib(flags: list[str]) -> float:
    """What `--plan` says that the run needs."""
    text = _command([*flags, "--plan"])
    found = re.search(r"as configured, needs ([\d.]+) (MiB|GiB)", text)
    if found is None:
        raise RuntimeError(f"--plan said no peak: {text[-300:]}")
    return float(found[1]) * UNITS[found[2]]


def measured_run(flags: list[str], scratch: Path) -> tuple[float, float]:
    """Peak of the process in MiB, and the last step's seconds of update."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    _command([*flags, "--output_dir", str(folder.parent), "--run_name", folder.name])
    summary = json.loads((folder / "summary.json").read_text())
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    return summary["peak_memory_mib"], last["seconds/train"]


def _command(flags: list[str]) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "engine.train", *flags], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"engine.train failed: {done.stderr[-500:]}")
    return done.stdout
