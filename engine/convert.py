"""A checkpoint in another layout, dtype or shard size, or with an adapter merged.

python -m engine.convert --model deepseek-ai/Janus-Pro-1B --out janus-1b --layout transformers
python -m engine.convert --model tiny --merge runs/tiny-0/adapter --out merged --layout transformers
"""

import sys
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

import torch

from engine.policy import load_policy, save_policy
from engine.settings.errors import run_command
from engine.settings.options import check_fields, option, parse_args
from engine.weights.save import require_replaceable


@dataclass(kw_only=True, slots=True)
class ConvertConfig:
    """Settings of `python -m engine.convert`."""

    # fmt: off
    model: str = option(MISSING, "a checkpoint folder of either layout, a hub id, or tiny", aliases=["model_name_or_path"])
    out: str = option(MISSING, "folder to write; replaced if it holds nothing but a saved policy")
    layout: Literal["original", "transformers"] = option(MISSING, "deepseek-ai/Janus-Pro's layout, or JanusForConditionalGeneration's")
    merge: str | None = option(None, "an adapter folder in peft's layout, merged into the weights")
    dtype: Literal["float32", "bfloat16", "float16"] | None = option(None, "type of the weights; none: the checkpoint's", aliases=["torch_dtype"])
    max_shard_gb: float = option(5.0, "most GB (1e9 bytes) of weights in a file", above=0)
    # fmt: on

    def __post_init__(self) -> None:
        check_fields(self)


def main(argv: list[str]) -> None:
    """Read a checkpoint and write it as another."""
    config = parse_args(ConvertConfig, argv, description="Write a checkpoint in another layout.")
    require_replaceable(Path(config.out))
    dtype = None if config.dtype is None else getattr(torch, config.dtype)
    policy = load_policy(config.model, dtype=dtype, adapter=config.merge)
    size = max(1, int(config.max_shard_gb * 1e9))
    save_policy(policy, config.out, layout=config.layout, max_shard_bytes=size)
    count = sum(p.numel() for p in policy.parameters())
    assert policy.source is not None  # load_policy's have one
    beside = "" if policy.source.aside else "; it had no understanding tower to carry over"
    print(f"{config.out}: {config.layout} layout, {count:,} weights of the policy{beside}")


if __name__ == "__main__":
    sys.exit(run_command(main))
