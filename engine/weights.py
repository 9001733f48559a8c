"""Checkpoint folders in transformers' Janus layout: read and write."""

import json
import shutil
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer, JanusConfig

from engine.errors import UserError
from engine.policy import Policy

TINY = Path(__file__).parent / "tiny" / "weights" / "policy"
# The understanding tower plays no part in generation.
IGNORED = ("model.vision_model.", "model.aligner.")
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "prompt_template.json",
)


def folder_of(path: str) -> Path:
    """The checkpoint folder that a --model value names."""
    return TINY if path == "tiny" else Path(path)


def read_config(folder: Path) -> JanusConfig:
    """The folder's config.json, checked to be a Janus one."""
    file = folder / "config.json"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such checkpoint folder")
    try:
        values = json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not JSON: {error}") from None
    if not isinstance(values, dict) or values.get("model_type") != "janus":
        raise UserError(f"{file}: wanted model_type 'janus'")
    try:
        return JanusConfig(**values)
    except (TypeError, ValueError, KeyError, StrictDataclassError) as error:
        raise UserError(f"{file}: {str(error).splitlines()[0]}") from None


def guidance_scale(path: str, given: float | None) -> float:
    """The guidance weight to use: the given one, else the checkpoint's own, else Janus' 5.

    Transformers' Janus keeps its own in generation_config.json as `guidance_scale`.
    """
    file = folder_of(path) / "generation_config.json"
    if given is not None or not file.exists():
        return 5.0 if given is None else given
    try:
        found = json.loads(file.read_text()).get("guidance_scale", 5.0)
        return float(5.0 if found is None else found)
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, TypeError, ValueError):
        raise UserError(f"{file}: wanted a JSON object with a number guidance_scale") from None


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError):
        raise UserError(f"{index}: wanted a JSON object with a weight_map") from None
    return [folder / Path(name).name for name in sorted(names)]


def read_policy(
    path: str, *, dtype: torch.dtype | None, device: str | torch.device | None
) -> Policy:
    """See engine.policy.load_policy."""
    folder = folder_of(path)
    config = read_config(folder)
    if not (folder / "tokenizer.json").exists():
        raise UserError(f"{folder / 'tokenizer.json'}: no such file")
    policy = Policy(config, AutoTokenizer.from_pretrained(str(folder)))
    wanted = policy.state_dict()
    found: set[str] = set()
    stored: torch.dtype | None = None
    for shard in _shards(folder):
        try:
            with safe_open(shard, framework="pt") as file:
                for key in file.keys():
                    if key.startswith(IGNORED):
                        continue
                    if key not in wanted:
                        raise UserError(f"{shard}: unexpected key {key!r}")
                    tensor = file.get_tensor(key)
                    if tensor.shape != wanted[key].shape:
                        raise UserError(
                            f"{shard}: {key}: wanted shape {tuple(wanted[key].shape)}, "
                            f"got {tuple(tensor.shape)}"
                        )
                    wanted[key].copy_(tensor)
                    found.add(key)
                    stored = stored or tensor.dtype
        except FileNotFoundError:
            raise UserError(f"{shard}: no such file") from None
        except SafetensorError as error:
            raise UserError(f"{shard}: not a safetensors file: {error}") from None
    if config.tie_word_embeddings:
        found.add("lm_head.weight")
    missing = sorted(wanted.keys() - found)
    if missing:
        raise UserError(f"{folder}: key {missing[0]!r} is missing ({len(missing)} in all)")
    policy.freeze_generation()
    return policy.to(device=device, dtype=dtype or stored).eval()


def write_policy(policy: Policy, folder: Path, *, companions: Path | None = None) -> None:
    """Write the policy in transformers' layout; tokenizer files come from `companions`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in policy.state_dict().items()}
    if policy.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    policy.config.architectures = ["JanusForConditionalGeneration"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    policy.config.save_pretrained(folder)
    for name in COMPANIONS if companions else ():
        if (companions / name).exists():
            shutil.copyfile(companions / name, folder / name)
