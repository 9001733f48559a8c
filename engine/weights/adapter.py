"""A low-rank adapter's folder in peft's layout: written after training, read to be merged.

The folder holds `adapter_config.json` and `adapter_model.safetensors`, whose keys are
`base_model.model.NAME.lora_A.weight` (r, in) and `...lora_B.weight` (out, r) for a linear layer
called NAME. It may be a stranger's: nothing is unpickled, no pattern of the config is run as a
regular expression (the keys say which layers are adapted), and a setting that changes what the
numbers mean is refused unless it is known here.

Source of the format: github.com/huggingface/peft, PeftModel.save_pretrained.
"""

import math
import re
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import nn

from engine.model.adapter import ADAPTER, adapted, merged
from engine.model.policy import Policy
from engine.settings.errors import UserError
from engine.weights.files import Entry, Reader, open_weights, read_json
from engine.weights.fingerprint import checkpoint_fingerprint
from engine.weights.layout import LAYOUTS, TRANSFORMERS, is_tower, renamed
from engine.weights.save import replace_folder, write_json

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
# The model that peft's AutoPeftModel is to load.
MODEL = {
    "base_model_class": "JanusForConditionalGeneration",
    "parent_library": "transformers.models.janus.modeling_janus",
}
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# rank_pattern and alpha_pattern: the end of a layer's name, or after ^ the whole of it.
_PLAIN = re.compile(r"\^?(\w|\\?\.)+\$?")
# Settings that change nothing of what a finished adapter computes.
_FREE = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
_READ = {
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora",
    "target_modules", "bias", "init_lora_weights",
}  # fmt: skip
# Initialisations that leave the base model's weights as they are; pissa and its like do not.
_INITS = (None, True, False, "gaussian", "eva", "orthogonal")


class _Pair(NamedTuple):
    """The keys of one layer's A and B, and what their product is scaled by."""

    layer: nn.Linear
    a: str
    b: str
    scaling: float


def save_adapter(policy: Policy, folder: Path, *, base: str) -> Path:
    """Write a policy's adapter as peft would, in fp32; whole or not at all.

    Args:
        folder: replaced if it is empty or was written by this function, and nothing was added.
        base: the checkpoint that it belongs to, as the user named it.
    Returns: the folder.
    Raises: UserError naming the folder.
    """
    return replace_folder(folder, partial(_write, policy, base), layout="adapter")


def _write(policy: Policy, base: str, folder: Path) -> None:
    tensors = {}
    for name, layer in adapted(policy).items():
        for part in ("lora_A", "lora_B"):
            tensor = getattr(layer, part)[ADAPTER].weight.detach()
            tensors[f"base_model.model.{name}.{part}.weight"] = tensor.cpu().clone()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config: Any = policy.peft_config
    values = config[ADAPTER].to_dict()
    values |= {"base_model_name_or_path": base, "inference_mode": True, "auto_mapping": MODEL}
    write_json(folder / CONFIG, values)


def adapter_fingerprint(folder: str) -> str:
    """As `checkpoint_fingerprint`. Raises: UserError naming the folder or the file it lacks."""
    _weights_file(Path(folder))
    return checkpoint_fingerprint(Path(folder))


@torch.no_grad()
def merge_adapter(policy: Policy, folder: Path) -> int:
    """Add an adapter's products to a policy's weights, in place: fp32, rounded once.

    Of the understanding tower, which the policy does not hold, adapters are left out; one line on
    stderr says so where they are not zero.

    Returns: the number of layers.
    Raises: UserError naming file and key of what cannot be used; the policy is then unchanged.
    """
    file = _weights_file(folder)
    config = read_json(folder / CONFIG)
    _check(config, folder / CONFIG)
    entries = open_weights(file).entries
    pairs, aside = _matched(policy, entries, config, folder)
    reader = Reader(entries)
    for pair in pairs:
        weight = pair.layer.weight
        a, b = (reader[key].to(weight.device, torch.float32) for key in (pair.a, pair.b))
        weight.copy_(merged(weight, b @ a * pair.scaling))
    policy.forget_image_table()
    if any(reader[key].any() for key in aside):
        first = min(aside)
        print(
            f"note: {file}: {first!r:.200} and {len(aside) - 1} more adapt the understanding "
            "tower, which takes no part in making pictures; they are left out",
            file=sys.stderr,
        )
    return len(pairs)


def _weights_file(folder: Path) -> Path:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such adapter folder")
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder / CONFIG}: no such file")
    if not (folder / WEIGHTS).is_file():
        if (folder / PICKLE).exists():
            raise UserError(
                f"{folder / PICKLE}: pickled adapters are not read; save it as {WEIGHTS}"
            )
        raise UserError(f"{folder / WEIGHTS}: no such file")
    return folder / WEIGHTS


def _check(config: Mapping[str, Any], file: Path) -> None:
    """Refuse what is not plain LoRA."""

    def refuse(name: str, wanted: str) -> None:
        raise UserError(f"{file}: {name}: wanted {wanted}, got {config.get(name)!r:.80}")

    if config.get("peft_type") != "LORA":
        refuse("peft_type", "'LORA'")
    if not _is_rank(config.get("r")):
        refuse("r", "a whole number >= 1")
    if not _is_number(config.get("lora_alpha")):
        refuse("lora_alpha", "a number")
    for name, fits in (("rank_pattern", _is_rank), ("alpha_pattern", _is_number)):
        patterns = config.get(name) or {}
        if not isinstance(patterns, dict) or not all(map(fits, patterns.values())):
            refuse(name, "an object of numbers")
        for pattern in patterns:
            if not _PLAIN.fullmatch(pattern):
                raise UserError(f"{file}: {name}: {pattern!r:.80} is no plain name of layers")
    if not isinstance(config.get("use_rslora", False), bool):
        refuse("use_rslora", "true or false")
    targets = config.get("target_modules")
    names = targets if isinstance(targets, list) else [targets]
    if targets is not None and not all(isinstance(name, str) for name in names):
        refuse("target_modules", "a list of names, or text")
    if config.get("bias", "none") != "none":
        refuse("bias", "'none'")
    init = config.get("init_lora_weights")
    if not (init is None or isinstance(init, (bool, str))) or init not in _INITS:
        refuse("init_lora_weights", "one that leaves the base model's weights as they are")
    for name in config:
        if name not in _FREE | _READ and config[name]:
            raise UserError(
                f"{file}: {name!r:.80}: not supported, only plain LoRA is; got {config[name]!r:.80}"
            )


def _is_rank(value: object) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _matched(
    policy: Policy, entries: Mapping[str, Entry], config: Mapping[str, Any], folder: Path
) -> tuple[list[_Pair], list[str]]:
    """The layers with their tensors, checked; and the tower's B, which are left aside."""
    file = folder / WEIGHTS
    linears = {n: m for n, m in policy.named_modules() if isinstance(m, nn.Linear)}
    pairs, aside = [], []
    owners: dict[str, str] = {}  # a layer's name here -> in the file
    for key, entry in entries.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise UserError(f"{file}: unexpected key {key!r:.200}")
        if not entry.dtype.is_floating_point:
            raise UserError(f"{file}: {key!r:.200}: wanted floating point, got {entry.dtype}")
        name, part = match[1], match[2]
        if any(is_tower(f"{name}.", layout) for layout in LAYOUTS):
            aside += [key] if part == "B" else []
            continue
        partner = f"base_model.model.{name}.lora_{'B' if part == 'A' else 'A'}.weight"
        if partner not in entries:
            raise UserError(f"{file}: key {partner!r:.200} is missing, {key!r:.200} is there")
        own = _own_name(name)
        if owners.setdefault(own, name) != name:
            raise UserError(f"{file}: {key!r:.200} adapts the same layer as {owners[own]!r:.200}")
        layer = linears.get(own)
        if layer is None:
            raise UserError(f"{file}: {key!r:.200} has no counterpart among the linear layers")
        if layer is policy.lm_head and policy.config.tie_word_embeddings:
            raise UserError(f"{file}: {key!r:.200}: the text head is tied to the embedding")
        rank = _of(config.get("rank_pattern"), name, config["r"])
        wanted = (rank, layer.in_features) if part == "A" else (layer.out_features, rank)
        if entry.shape != wanted:
            raise UserError(f"{file}: {key!r:.200}: wanted shape {wanted}, got {entry.shape}")
        if part == "A":
            alpha = _of(config.get("alpha_pattern"), name, config["lora_alpha"])
            scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
            pairs.append(_Pair(layer, key, partner, scaling))
    if not pairs:
        raise UserError(f"{file}: holds no adapter of the model's layers")
    return pairs, aside


def _own_name(name: str) -> str:
    """The policy's name of a layer that may be called as in the original layout."""
    new = renamed(f"{name}.weight", TRANSFORMERS)
    return name if new is None else new.removesuffix(".weight")


def _of(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first pattern that names a layer, taken by the letter."""
    for pattern, value in (patterns or {}).items():
        plain = pattern.replace("\\", "").removesuffix("$")
        if plain.startswith("^"):
            found = plain[1:] == name
        else:
            found = plain == name or name.endswith(f".{plain}")
        if found:
            return value
    return default
