"""Settings: one dataclass a command, its command line and its YAML file.

A settings class is a `@dataclass(kw_only=True, slots=True)` whose fields are made by `option`
and whose `__post_init__` calls `check_fields`. `parse_args` builds `--help`, the flags and the
YAML keys from it. Flag names are those of T2I-R1 and TRL; `-` and `_` are the same in a flag.
"""

# ruff: noqa: RUF009  `option` makes a dataclasses.field, which ruff cannot know

import dataclasses
import difflib
import math
import operator
import os
import re
import reprlib
import types
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from engine.errors import UserError

T = TypeVar("T")
BOUNDS = {
    "at_least": (">=", operator.ge),
    "above": (">", operator.gt),
    "at_most": ("<=", operator.le),
    "below": ("<", operator.lt),
}

# Reward experts by name; engine/experts.py says what each one is.
EXPERTS = ("hps", "gdino", "owl", "git", "blip", "orm")

# Settings whose default depends on the model: the embedded one's, T2I-R1's.
BY_MODEL = {"max_steps": (80, 1600), "beta": (0.1, 0.01), "learning_rate": (4e-4, 1e-6)}


def option(
    default: Any,
    help: str,
    *,
    group: str = "",
    aliases: Sequence[str] = (),
    **limits: float,
) -> Any:
    """A settings field.

    Args:
        default: its value when not given, a tuple for a list; `dataclasses.MISSING`: mandatory.
        help: its line in `--help`.
        group: a heading of `--help` that starts at this field.
        aliases: other names of the flag and YAML key.
        limits: of a number or of each in a list: `at_least`, `above`, `at_most`, `below`.
    """
    bounds = [(*BOUNDS[name], limit) for name, limit in limits.items()]
    metadata = {"help": help, "group": group, "aliases": tuple(aliases), "bounds": bounds}
    if isinstance(default, tuple):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """Settings of `python -m engine.train`. Raises: UserError naming key, wanted and got."""

    # fmt: off
    model: str = option("tiny", "a Janus-Pro checkpoint folder, a hub id, or tiny", group="run", aliases=["model_name_or_path"])
    dataset_name: str = option("tiny", "training prompts: a .json, .jsonl or .txt file, or tiny")
    output_dir: str = option("runs", "folder that holds the run folders")
    run_name: str = option("", "name of the run folder; empty: <model>-<seed>")
    seed: int = option(0, "seed of prompt order and sampling", at_least=0, below=2**32)
    resume: bool = option(False, "continue the run folder from its last checkpoint")
    plan: bool = option(False, "print the model's weights and the memory it takes, and stop")
    max_steps: int | None = option(None, "training steps; none: 80 for tiny, else T2I-R1's 1600", group="batch", at_least=1)
    prompts_per_step: int = option(8, "prompts in a step", at_least=1)
    num_generations: int = option(8, "plans (semantic CoTs) sampled for a prompt", at_least=1)
    images_per_plan: int = option(1, "images sampled for a plan", at_least=1, aliases=["new_generations_image"])
    num_iterations: int = option(1, "updates made with one rollout", at_least=1)
    micro_batch_size: int = option(0, "images in one forward and backward; 0: all at once", at_least=0)
    max_prompt_length: int = option(512, "longest prompt in tokens", group="rollout", at_least=1)
    max_completion_length: int = option(40, "longest plan in tokens", at_least=1)
    temperature: float = option(1.0, "sampling temperature of plans and images", above=0)
    cfg_weight: float | None = option(None, "guidance weight; 1: no guidance; none: the checkpoint's own", at_least=0)
    reasoning_prompt_path: str | None = option(None, "file with the instruction to plan; {} is the prompt")
    reward_funcs: list[str] = option(("hps", "gdino", "git", "orm"), f"reward experts: {', '.join(EXPERTS)}, or package.module:Class", group="rewards")
    reward_weights: list[float] = option((), "a weight for each expert; none: all equal", at_least=0)
    hps_ckpt_path: str | None = option(None, "weights of the human-preference expert")
    git_ckpt_path: str | None = option(None, "weights of the VQA expert")
    blip_ckpt_path: str | None = option(None, "weights of the VQA expert by BLIP")
    gdino_ckpt_path: str | None = option(None, "weights of the detector")
    gdino_config_path: str | None = option(None, "BERT vocabulary of the detector, with a .pth also its architecture")
    owl_ckpt_path: str | None = option(None, "weights of the detector by OWLv2")
    orm_ckpt_path: str | None = option(None, "weights of the outcome reward model")
    reward_device: str | None = option(None, "cpu, cuda or cuda:N; none: the policy's")
    reward_dtype: Literal["float32", "bfloat16", "float16"] | None = option(None, "precision of experts that have a path; none: each one's own")
    reward_offload: bool = option(False, "keep an expert's weights in host memory while it is not scoring")
    reward_timeout: float = option(600.0, "seconds that the experts may take for a batch; 0: any time", at_least=0)
    on_reward_error: Literal["raise", "skip"] = option("raise", "when an expert fails: stop, or drop it for the batch")
    train_levels: list[Literal["semantic", "token"]] = option(("semantic", "token"), "chains of thought that get a gradient", group="objective")
    logprob_policy: Literal["conditional", "guided", "guided_detached"] = option("conditional", "image log-prob that is trained")
    loss_type: Literal["token", "sequence", "dr_grpo"] = option("token", "mean over tokens, per sequence, or Dr. GRPO's constant")
    ratio_level: Literal["token", "sequence"] = option("token", "importance ratio of a token, or of a sequence (GSPO)")
    beta: float | None = option(None, "weight of the KL term; none: 0.1 for tiny, else T2I-R1's 0.01", at_least=0)
    clip_low: float = option(0.2, "ratios are clipped below 1 - clip_low", at_least=0, at_most=1, aliases=["epsilon"])
    clip_high: float = option(0.2, "ratios are clipped above 1 + clip_high", at_least=0, aliases=["epsilon_high"])
    dual_clip: float | None = option(None, "bound c > 1 of the surrogate where the advantage is negative; none: off", above=1)
    truncated_is: float = option(0.0, "cap of the truncated importance weights; 0: off", at_least=0)
    old_logprobs: Literal["rollout", "recompute"] = option("rollout", "where old log-probs come from")
    share_prompts: bool = option(True, "what sequences begin with in common is computed once, gradient included")
    learning_rate: float | None = option(None, "peak learning rate of AdamW; none: 4e-4 for tiny, else T2I-R1's 1e-6", group="optimizer", at_least=0)
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = option("linear", "learning rate after the warmup")
    warmup_steps: int = option(0, "steps of linear warmup", at_least=0)
    weight_decay: float = option(0.0, "AdamW's weight decay", at_least=0)
    adam_beta1: float = option(0.9, "AdamW's beta1", at_least=0, below=1)
    adam_beta2: float = option(0.95, "AdamW's beta2", at_least=0, below=1)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm", above=0)
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "type of the weights", group="machine", aliases=["torch_dtype"])
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
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
        check_fields(self)
        for name, (tiny, published) in BY_MODEL.items():
            if getattr(self, name) is None:
                setattr(self, name, tiny if self.model == "tiny" else published)
        if self.group_size < 2:
            raise UserError(
                "num_generations * images_per_plan must be >= 2 (a group needs something to "
                f"compare), got {self.num_generations} * {self.images_per_plan}"
            )
        for name in ("reward_funcs", "train_levels"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise UserError(f"{name} must name at least one, each once, got {values}")
        check_reward_funcs(self.reward_funcs)
        weights = self.reward_weights
        if weights and (len(weights) != len(self.reward_funcs) or sum(weights) == 0):
            raise UserError(
                f"reward_weights must be {len(self.reward_funcs)} numbers, one for each of "
                f"reward_funcs and not all 0, got {weights}"
            )
        if self.warmup_steps > self.max_steps:
            raise UserError(f"warmup_steps must be <= max_steps, got {self.warmup_steps}")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise UserError(f"device must be auto, cpu, cuda or cuda:N, got {self.device!r}")
        if self.reward_device and not re.fullmatch(r"cpu|cuda(:\d+)?", self.reward_device):
            raise UserError(
                f"reward_device must be cpu, cuda or cuda:N, got {self.reward_device!r}"
            )
        if self.run_name in (".", "..") or re.search(r"[/\\\0]", self.run_name):
            raise UserError(f"run_name must be a plain folder name, got {self.run_name!r}")

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


def check_reward_funcs(names: list[str]) -> None:
    """Raise UserError unless each is an expert's name or package.module:Class."""
    for name in names:
        if name not in EXPERTS and not re.fullmatch(r"\w+(\.\w+)*:\w+", name):
            raise UserError(
                f"--reward_funcs: expected {', '.join(EXPERTS)} or package.module:Class "
                f"(nearest: {nearest(name, EXPERTS)}), got {name!r}"
            )


def check_fields(config: Any) -> None:
    """Check every field of a settings object against its type, choices and bounds.

    Text that spells a number or a boolean is converted in place.
    Raises: UserError naming the key, what is wanted and what it got.
    """
    hints = get_type_hints(type(config))
    for f in dataclasses.fields(config):
        value = _convert(hints[f.name], getattr(config, f.name), f.name)
        object.__setattr__(config, f.name, value)  # frozen classes too
        bounds = f.metadata["bounds"]
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not all(holds(number, b) for _, holds, b in bounds):
                wanted = " and ".join(f"{sign} {bound}" for sign, _, bound in bounds)
                raise UserError(f"{f.name} must be {wanted}, got {number}")


def parse_args(cls: type[T], argv: Sequence[str], *, description: str) -> T:
    """Settings from a command line.

    Args:
        cls: a settings class (see the module's docstring).
        argv: words after the program's name.
        description: first line of `--help`, which prints and exits with code 0.
    Raises: UserError naming the flag or `file:line: key`, with the nearest valid name.
    """
    if "-h" in argv or "--help" in argv:
        print(_help_text(cls, description))
        raise SystemExit(0)
    flags, config_path = _read_flags(cls, argv)
    values = ({} if config_path is None else _read_yaml(cls, Path(config_path))) | flags
    for f in dataclasses.fields(cls):
        if f.default is MISSING and f.default_factory is MISSING and f.name not in values:
            raise UserError(f"--{f.name} is required: {f.metadata['help']}")
    return cls(**values)


def to_yaml(config: Any) -> str:
    """A settings object as YAML that `--config` reads back to an equal object."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def nearest(name: str, names: Iterable[str]) -> str:
    """The one of `names` that looks most like `name`."""
    return difflib.get_close_matches(name, list(names), n=1, cutoff=0.0)[0]


def _names(cls: type) -> dict[str, str]:
    """Every accepted name -> the field it sets."""
    fields = dataclasses.fields(cls)
    return {name: f.name for f in fields for name in (f.name, *f.metadata["aliases"])}


def _read_flags(cls: type, argv: Sequence[str]) -> tuple[dict[str, Any], str | None]:
    """Field values and the `--config` path of a command line; a later flag wins."""
    names, hints, values = _names(cls), get_type_hints(cls), {}
    config_path, words = None, list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise UserError(f"unexpected argument {word!r}: values follow a --flag")
        flag, has_value, inline = word.partition("=")
        given: Any = [inline] if has_value else []
        while not has_value and words and not words[0].startswith("--"):
            given.append(words.pop(0))
        name = flag[2:].replace("-", "_")
        if name == "config":
            config_path = _single(flag, given)
        elif name in names:
            hint = hints[names[name]]
            if get_origin(hint) is not list:
                given = True if hint is bool and not given else _single(flag, given)
            values[names[name]] = _convert(hint, given, flag)
        elif hints.get(names.get(name.removeprefix("no_"), "")) is bool:
            if given:
                raise UserError(f"{flag} takes no value, got {given[0]!r}")
            values[names[name.removeprefix("no_")]] = False
        else:
            raise UserError(f"unknown flag {flag} (nearest: --{nearest(name, [*names, 'config'])})")
    return values, config_path


def _single(flag: str, given: list[str]) -> str:
    if len(given) != 1:
        raise UserError(f"{flag} takes one value, got {' '.join(given) or 'none'}")
    return given[0]


def _read_yaml(cls: type, path: Path) -> dict[str, Any]:
    """Field values of a YAML file, each checked with its line at hand."""
    names, hints, values = _names(cls), get_type_hints(cls), {}
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else f"{path}"
        raise UserError(f"{where}: not YAML: {getattr(error, 'problem', error)}") from error
    if root is None:
        return values
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}:{root.start_mark.line + 1}: expected lines of 'key: value'")
    for key, node in root.value:
        where = f"{path}:{key.start_mark.line + 1}"
        name = key.value if isinstance(key, yaml.ScalarNode) else str(key.tag)
        if name not in names:
            raise UserError(f"{where}: unknown key {name!r} (nearest: {nearest(name, names)})")
        if names[name] in values:
            raise UserError(f"{where}: {name} is given twice")
        try:
            value = loader.construct_object(node, deep=True)
        except (yaml.YAMLError, ValueError) as error:
            raise UserError(f"{where}: {name}: {getattr(error, 'problem', error)}") from error
        values[names[name]] = _convert(hints[names[name]], value, f"{where}: {name}")
    return values


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint`; text from a command line may spell numbers and booleans.

    Lists of names and numbers are also split at commas: `--train_levels semantic,token`.
    Raises: UserError starting with `where`.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):  # X | None
        return None if value is None else _convert(args[0], value, where)
    if origin is Literal:
        if value in args:
            return value
        wanted = f"one of {', '.join(args)}"
        if isinstance(value, str):
            wanted += f" (nearest: {nearest(value, args)})"
    elif origin is list:
        items = value if isinstance(value, list) else [value]
        if args[0] is not str:
            items = [i for v in items for i in (v.split(",") if isinstance(v, str) else [v])]
        return [_convert(args[0], item, where) for item in items]
    elif hint is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        wanted = "true or false"
    elif hint is str:
        if isinstance(value, str):
            return value
        wanted = "text"
    else:
        numbers = (int, str) if hint is int else (int, float, str)
        if isinstance(value, numbers) and not isinstance(value, bool):
            try:
                number = hint(value)
                if math.isfinite(number):
                    return number
            except (ValueError, OverflowError):
                pass  # text that spells no number is reported below
        wanted = "a whole number" if hint is int else "a number"
    raise UserError(f"{where}: expected {wanted}, got {reprlib.repr(value)}")


def _help_text(cls: type, description: str) -> str:
    hints = get_type_hints(cls)
    rows = [("", ""), ("--config FILE.yaml", "read settings from a file; flags override it")]
    for f in dataclasses.fields(cls):
        hint, text = hints[f.name], f.metadata["help"]
        if f.metadata["group"]:
            rows += [("", ""), (f.metadata["group"] + ":", "")]
        is_list = get_origin(hint) is list
        if is_list or get_origin(hint) in (Union, types.UnionType):
            hint = get_args(hint)[0]
        has_list = f.default_factory is not MISSING
        default = " ".join(map(str, f.default_factory())) if has_list else f.default
        word = {int: " N", float: " X", str: " TEXT", bool: f", --no-{f.name}"}.get(hint, " NAME")
        if get_origin(hint) is Literal:
            text += f" {{{', '.join(get_args(hint))}}}"
        if default is MISSING:
            text += " (required)"
        elif default not in (None, "") and hint is not bool:
            text += f" [{default}]"
        if f.metadata["aliases"]:
            text += f" (also {', '.join('--' + a for a in f.metadata['aliases'])})"
        rows.append((f"--{f.name}{word}{' ...' if is_list else ''}", text))
    width = max(len(flag) for flag, _ in rows) + 2
    lines = [f"  {flag:<{width}}{text}" if text else flag for flag, text in rows]
    return "\n".join([description, *lines])
