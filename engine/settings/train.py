"""The settings of a training run. Flag names are those of T2I-R1 and TRL."""

# ruff: noqa: RUF009  `option` makes a dataclasses.field, which ruff cannot know

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.settings.device import HELP, check_device
from engine.settings.errors import UserError
from engine.settings.options import check_fields, option
from engine.settings.rewards import RewardConfig

# Settings whose default, none until then, depends on the model: the embedded one's, T2I-R1's.
BY_MODEL = {"max_steps": (80, 1600), "beta": (0.1, 0.01), "learning_rate": (4e-4, 1e-6)}
LEVELS = ("semantic", "token")


@dataclass(kw_only=True, slots=True)
class TrainConfig(RewardConfig):
    """Settings of `python -m engine.train`. Raises: UserError naming key, wanted and got."""

    # fmt: off
    model: str = option("tiny", "a Janus-Pro checkpoint folder, a hub id, or tiny", group="run", aliases=["model_name_or_path"])
    dataset_name: str = option("tiny", "training prompts: a .json, .jsonl or .txt file, or tiny")
    output_dir: str = option("runs", "folder that holds the run folders")
    run_name: str = option("", "name of the run folder; empty: <model>-<seed>, numbered on where that run is finished")
    seed: int = option(0, "seed of prompt order and sampling", at_least=0, below=2**32)
    resume: bool = option(False, "continue the run folder from its last checkpoint")
    on_reward_error: Literal["raise", "skip"] = option("raise", "when an expert fails: stop, or drop it for the batch")
    plan: bool = option(False, "print the model's weights and the memory it takes, and stop")
    max_steps: int = option(None, "training steps; none: 80 for tiny, else T2I-R1's 1600", group="batch", at_least=1)
    prompts_per_step: int = option(8, "prompts in a step", at_least=1)
    num_generations: int = option(8, "plans (semantic CoTs) sampled for a prompt", at_least=1)
    images_per_plan: int = option(1, "images sampled for a plan", at_least=1, aliases=["new_generations_image"])
    num_iterations: int = option(1, "updates made with one rollout", at_least=1)
    micro_batch_size: int = option(0, "images in one forward and backward; 0: as many as fit the device", at_least=0)
    max_prompt_length: int = option(512, "longest prompt in tokens", group="rollout", at_least=1)
    max_completion_length: int = option(40, "longest plan in tokens", at_least=1)
    temperature: float = option(1.0, "sampling temperature of plans and images", above=0)
    cfg_weight: float | None = option(None, "guidance weight; 1: no guidance; none: the checkpoint's own", at_least=0)
    plans: Literal["on", "off"] = option("on", "off: from the bare prompt to the picture, in training and evaluation")
    reasoning_prompt_path: str | None = option(None, "file with the instruction to plan; {} is the prompt")
    train_levels: list[Literal["semantic", "token"]] = option(("semantic", "token"), "chains of thought that get a gradient", group="objective")
    logprob_policy: Literal["conditional", "guided", "guided_detached"] = option("conditional", "image log-prob that is trained")
    loss_type: Literal["token", "level", "sequence", "dr_grpo"] = option("token", "mean over all tokens (T2I-R1), over each level's, per sequence, or Dr. GRPO's constant")
    level_weights: list[str] = option((), "weight of a level's loss: semantic=1 token=0.1; a level that is not named: 1")
    level_beta: list[str] = option((), "beta of a level, where it is another: token=0.05")
    level_clip_low: list[str] = option((), "clip_low of a level, where it is another")
    level_clip_high: list[str] = option((), "clip_high of a level, where it is another")
    advantages: Literal["group", "nested"] = option("group", "a prompt's samples are compared with each other; nested: its plans by their pictures' means, and a plan's pictures with each other")
    advantage_scale: Literal["std", "none", "pooled", "expert"] = option("std", "advantages are divided by the group's standard deviation, nothing, the batch's, or each expert's before their sum (GDPO)")
    advantage_baseline: Literal["mean", "leave_one_out"] = option("mean", "what a reward is compared with: its group's mean, or the others' (RLOO)")
    dynamic_sampling: Literal["off", "skip", "resample"] = option("off", "groups whose rewards are all the same: skip: they leave the loss, its normaliser and its KL; resample: they are drawn again, up to twice (DAPO)")
    token_weighting: Literal["none", "guidance", "entropy"] = option("none", "image tokens weigh by how far guidance moved them, or by their surprisal, which entropy is the mean of")
    token_weighting_top: float = option(1.0, "below 1: that share of a picture's tokens alone, by token_weighting, equally", above=0, at_most=1)
    kl_target: float | None = option(None, "nats a token that each level's KL is steered to by its beta; none: beta stays", above=0)
    ratio_level: Literal["token", "sequence"] = option("token", "importance ratio of a token, or of a sequence (GSPO)")
    beta: float = option(None, "weight of the KL term; none: 0.1 for tiny, else T2I-R1's 0.01", at_least=0)
    clip_low: float = option(0.2, "ratios are clipped below 1 - clip_low", at_least=0, at_most=1, aliases=["epsilon"])
    clip_high: float = option(0.2, "ratios are clipped above 1 + clip_high", at_least=0, aliases=["epsilon_high"])
    dual_clip: float | None = option(None, "bound c > 1 of the surrogate where the advantage is negative; none: off", above=1)
    truncated_is: float = option(0.0, "cap of the truncated importance weights; 0: off", at_least=0)
    old_logprobs: Literal["rollout", "recompute"] = option("rollout", "where old log-probs come from")
    share_prompts: bool = option(True, "what sequences begin with in common is computed once, gradient included")
    max_zero_std_steps: int = option(8, "stop after so many steps in which no group's rewards differed; 0: never", at_least=0)
    learning_rate: float = option(None, "peak learning rate of AdamW; none: 4e-4 for tiny, else T2I-R1's 1e-6", group="optimizer", at_least=0)
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = option("linear", "learning rate after the warmup")
    warmup_steps: int = option(0, "steps of linear warmup", at_least=0)
    weight_decay: float = option(0.0, "AdamW's weight decay", at_least=0)
    adam_beta1: float = option(0.9, "AdamW's beta1", at_least=0, below=1)
    adam_beta2: float = option(0.95, "AdamW's beta2", at_least=0, below=1)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm", above=0)
    optim: Literal["adamw", "adamw_torch", "adamw_8bit"] = option("adamw", "adamw keeps what 16-bit weights lack, exactly; adamw_torch does not; adamw_8bit is torchao's")
    optim_state_dtype: Literal["float32", "bfloat16"] = option("float32", "type of adamw's moments; bfloat16 is rounded stochastically")
    use_peft: bool = option(False, "train a low-rank adapter (LoRA) in place of the weights; the run folder gets adapter/", group="adapter")
    lora_r: int = option(16, "the adapter's rank", at_least=1)
    lora_alpha: float = option(32, "the adapter's product is scaled by lora_alpha / lora_r", above=0)
    lora_dropout: float = option(0.0, "dropout of the adapter's input, in updates alone", at_least=0, below=1)
    lora_target_modules: list[Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "all-linear"]] = option((), "layers that get an adapter; none, or all-linear: all")
    lora_merge: Literal["copy", "in_place"] = option("copy", "merged weights of a rollout: a copy, or in place of the base, which waits in host memory")
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "type of the weights", group="machine", aliases=["torch_dtype"])
    gradient_checkpointing: bool = option(False, "keep a layer's input alone for its backward pass, which runs the layer again")
    attn_implementation: Literal["sdpa", "flash_attention_2", "xformers"] = option("sdpa", "attention of the training forward")
    ref_offload: bool = option(False, "the reference policy's layers wait in host memory and stream to the device")
    device: str = option("auto", HELP)
    threads: int = option(0, "CPU threads; 0: torch's choice", at_least=0)
    logging_steps: int = option(1, "steps between metrics", group="output", at_least=1)
    sample_steps: int = option(16, "steps between sample grids", at_least=1)
    save_steps: int = option(16, "steps between checkpoints", at_least=1)
    save_total_limit: int = option(2, "checkpoints kept", at_least=1)
    eval_dataset_name: str | None = option(None, "evaluation prompts; none: tiny:heldout for tiny, else the training prompts")
    eval_prompts: int = option(0, "prompts evaluated before and after; 0: all", at_least=0)
    eval_generations: int = option(2, "images for an evaluation prompt; 0: no evaluation", at_least=0)
    # fmt: on

    def __post_init__(self) -> None:
        for name, (tiny, published) in BY_MODEL.items():
            if getattr(self, name) is None:
                setattr(self, name, tiny if self.model == "tiny" else published)
        check_fields(self)
        if self.plans == "off":
            # A plan that is not drawn cannot train.
            self.train_levels = [name for name in self.train_levels if name != "semantic"]
        self._check_levels()
        if self.group_size < 2:
            raise UserError(
                "num_generations * images_per_plan must be >= 2 (a group needs something to "
                f"compare), got {self.num_generations} * {self.images_per_plan}"
            )
        self.check_rewards()
        if self.warmup_steps > self.max_steps:
            raise UserError(f"warmup_steps must be <= max_steps, got {self.warmup_steps}")
        check_device("device", self.device)
        if self.run_name in (".", "..") or re.search(r"[/\\\0]", self.run_name):
            raise UserError(f"run_name must be a plain folder name, got {self.run_name!r}")

    def _check_levels(self) -> None:
        levels = self.train_levels
        if not levels or len(set(levels)) < len(levels):
            without = " that --plans off leaves" if self.plans == "off" else ""
            raise UserError(
                f"train_levels must name at least one{without}, each once, got {levels}"
            )
        for name in ("level_weights", "level_beta", "level_clip_low", "level_clip_high"):
            _by_level(name, getattr(self, name))
        if not any(self.at_level("weights", level) for level in levels):
            raise UserError(
                f"level_weights: no level that trains has any, got {self.level_weights}"
            )
        if self.advantages == "nested" and self.plans == "off":
            raise UserError("--advantages nested: compares plans, which --plans off does without")
        if self.advantages == "nested" and "token" in levels and self.images_per_plan < 2:
            raise UserError(
                "--advantages nested: compares a plan's pictures with each other; wanted "
                f"images_per_plan >= 2, got {self.images_per_plan}"
            )
        if self.advantages == "nested" and "semantic" in levels and self.num_generations < 2:
            raise UserError(
                "--advantages nested: compares a prompt's plans with each other; wanted "
                f"num_generations >= 2, got {self.num_generations}"
            )
        if self.token_weighting_top < 1 and self.token_weighting == "none":
            raise UserError("--token_weighting_top: wanted --token_weighting guidance or entropy")
        if self.kl_target is not None and not self.has_kl:
            raise UserError("--kl_target: steers beta, which must not start at 0")

    def at_level(self, setting: str, level: str) -> float:
        """A setting at a level: "weights" (1 where none is given), "beta", "clip_low", "clip_high"."""
        name = f"level_{setting}"
        given = _by_level(name, getattr(self, name))
        return given[level] if level in given else float(getattr(self, setting, 1.0))

    @property
    def has_kl(self) -> bool:
        """Whether a level that trains has a KL term, and so a reference policy."""
        return any(self.at_level("beta", level) > 0 for level in self.train_levels)

    @property
    def adapted_layers(self) -> list[str]:
        """Names of the layers that get an adapter; none: all."""
        names = self.lora_target_modules
        return [] if "all-linear" in names else list(dict.fromkeys(map(str, names)))

    @property
    def group_size(self) -> int:
        """Images that share a prompt and are compared with each other."""
        return self.num_generations * self.images_per_plan

    @property
    def images_per_step(self) -> int:
        return self.prompts_per_step * self.group_size

    @property
    def run_dir(self) -> Path:
        """The run folder; unnamed runs are called after model and seed."""
        model = os.path.basename(os.path.abspath(self.model))
        return Path(self.output_dir) / (self.run_name or f"{model}-{self.seed}")

    @property
    def eval_dataset(self) -> str:
        """Evaluation prompts: as asked, or the held-out split where there is one."""
        own = "tiny:heldout" if self.dataset_name == "tiny" else self.dataset_name
        return self.eval_dataset_name or own


def _by_level(name: str, pairs: list[str]) -> dict[str, float]:
    """`semantic=1 token=0.1` as numbers. Raises: UserError naming the setting."""
    found: dict[str, float] = {}
    for pair in (p for word in pairs for p in word.split(",")):
        level, _, text = pair.partition("=")
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if level not in LEVELS or level in found or not 0 <= value < float("inf"):
            raise UserError(
                f"{name}: expected {' or '.join(LEVELS)}, each once, and a number >= 0, as in "
                f"token=0.1, got {pair!r}"
            )
        found[level] = value
    return found
