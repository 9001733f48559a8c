"""The reward experts that the flags name: real ones, the tiny world's, a user's own."""

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from engine.model.image_modules import picture_side
from engine.settings.device import open_device
from engine.settings.errors import UserError
from engine.settings.rewards import EXPERTS, RewardConfig
from engine.tiny.experts import EXPERT_NAMES as TINY_EXPERTS
from engine.tiny.experts import build_experts
from engine.tiny.world import IMAGE_SIZE
from engine.weights.read import folder_of, read_config
from rewards import Ensemble, RewardExpert, RewardPipeline

TINY_WEIGHTS = Path(__file__).parent / "tiny" / "weights"
# Flags that hold the experts' files, by the names of the settings' fields.
PATH_FLAGS = (
    "hps_ckpt_path", "imagereward_ckpt_path", "imagereward_config_path",
    "gdino_ckpt_path", "gdino_config_path", "owl_ckpt_path",
    "git_ckpt_path", "blip_ckpt_path", "orm_ckpt_path",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Source:
    """Where an expert's class is, and what its weights' flag is called; None: it brings its own."""

    module: str
    cls: str
    flag: str | None = None
    config_flag: str | None = None


SOURCES = {
    "hps": Source("rewards.hps", "HPS", "hps_ckpt_path"),
    "imagereward": Source(
        "rewards.image_reward", "ImageReward", "imagereward_ckpt_path", "imagereward_config_path"
    ),
    "gdino": Source("rewards.gdino", "GroundingDino", "gdino_ckpt_path", "gdino_config_path"),
    "owl": Source("rewards.owl", "Owl", "owl_ckpt_path"),
    "git": Source("rewards.git", "GitVQA", "git_ckpt_path"),
    "blip": Source("rewards.blip", "BlipVQA", "blip_ckpt_path"),
    "orm": Source("rewards.orm", "ORM", "orm_ckpt_path"),
    "ocr": Source("rewards.ocr", "OCR"),
}
assert tuple(SOURCES) == EXPERTS


def reward_paths(config: RewardConfig) -> dict[str, str | None]:
    """The files that a settings object names: flag -> path."""
    return {flag: getattr(config, flag) for flag in PATH_FLAGS}


def draws_tiny_world(model: str) -> bool:
    """Whether the model's pictures are of the tiny world's size, which its experts can read.

    Args: model: a checkpoint folder, hub id or "tiny".
    """
    return picture_side(read_config(folder_of(model))) == IMAGE_SIZE


def build_ensemble(
    names: list[str],
    *,
    model: str,
    device: torch.device | str,
    dtype: str | None = None,
    paths: Mapping[str, str | None] | None = None,
    weights: list[float] | None = None,
    on_error: Literal["raise", "skip"] = "raise",
) -> Ensemble:
    """The experts called `names`, in that order.

    An expert whose flag is given, or that has none, is the real one. Without its flag it is the
    tiny world's, if the model draws that world.

    Args:
        names: of `SOURCES`, or "package.module:Class" for a class of the user's own.
        model: whose pictures are scored.
        device: the experts'.
        dtype: of the experts that have a flag, "float32", "bfloat16" or "float16"; None: each
            one's default.
        paths: `reward_paths`; an absent flag counts as not given.
        weights: one for each name.
    Raises: UserError naming the flag, and the file where one is at fault.
    """
    given = {flag: path for flag, path in (paths or {}).items() if path is not None}
    real = [n for n in names if n in SOURCES and SOURCES[n].flag in (None, *given)]
    tiny = [name for name in names if name in SOURCES and name not in real]
    for name in tiny:
        if name not in TINY_EXPERTS or not draws_tiny_world(model):
            raise UserError(f"--{SOURCES[name].flag}: the expert {name!r} needs it{_why(name)}")
    built = dict(zip(tiny, build_experts(tiny, TINY_WEIGHTS, device), strict=True))
    options: dict[str, Any] = {"device": device}
    if dtype is not None:
        options["dtype"] = getattr(torch, dtype)
    for name in names:
        if name in real:
            built[name] = _load(name, given, options)
        elif name not in tiny:
            built[name] = load_own(name, device)
    experts = [built[name] for name in names]
    by_name = None
    if weights:
        by_name = {e.name: weight for e, weight in zip(experts, weights, strict=True)}
    try:
        return Ensemble(experts, by_name, on_error)
    except ValueError as error:
        raise UserError(f"--reward_funcs: {error}") from error


def reward_device(config: RewardConfig, policy: torch.device | str) -> torch.device:
    """The experts' device: the flag's, else the policy's. Raises: UserError naming the flag."""
    device = torch.device(policy)
    if config.reward_device is not None:
        device = open_device("reward_device", config.reward_device)
    if config.reward_offload and device.type == "cpu":
        raise UserError("--reward_offload: the experts are on the CPU already")
    return device


def open_pipeline(ensemble: Ensemble, device: torch.device, config: RewardConfig) -> RewardPipeline:
    """The pipeline that runs an ensemble as the flags say."""
    return RewardPipeline(
        ensemble, device, timeout=config.reward_timeout or None, offload=config.reward_offload
    )


def _why(name: str) -> str:
    if name in TINY_EXPERTS:
        return "; only pictures of the tiny world can be scored without it"
    return "; the tiny world has no expert of that name"


def _load(name: str, given: Mapping[str, str], options: dict[str, Any]) -> RewardExpert:
    """A real expert, from its files where it has a flag for them."""
    source = SOURCES[name]
    if source.config_flag is not None and source.config_flag in given:
        options = {**options, "config": given[source.config_flag]}
    cls = getattr(importlib.import_module(source.module), source.cls)
    try:
        if source.flag is None:
            return cls(device=options["device"])
        return cls(given[source.flag], **options)
    except ValueError as error:
        where = f"--{source.flag}" if source.flag else f"--reward_funcs {name}"
        raise UserError(f"{where}: {error}") from error


def load_own(spec: str, device: torch.device | str) -> RewardExpert:
    """An expert of the user's own, made by its class with nothing but `device`.

    Args: spec: "package.module:Class", importable from where the command is started.
    Raises: UserError naming the flag and what is wrong with the class.
    """
    where = f"--reward_funcs {spec}"
    module, _, name = spec.partition(":")
    try:
        cls = getattr(importlib.import_module(module), name)
        expert = cls(device=device)
    # A module and a class of the user's can raise anything.
    except Exception as error:
        raise UserError(f"{where}: {type(error).__name__}: {_first_line(error)}") from error
    if not re.fullmatch(r"[\w.-]+", str(getattr(expert, "name", ""))):
        raise UserError(f"{where}: wanted an attribute 'name' of letters, digits, _, - and .")
    if not callable(getattr(expert, "score", None)):
        raise UserError(f"{where}: wanted a method score(prompts, images, metadata)")
    return expert


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
