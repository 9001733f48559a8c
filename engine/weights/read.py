"""Checkpoint folders, in the original or in transformers' layout: from a folder to a policy.

The policy is built without memory and filled tensor by tensor from mapped files, so that loading
takes the policy in its target dtype and no more than one mapped file beside it. All keys, shapes
and dtypes are checked before the first tensor is read. Nothing of a checkpoint is executed: no
remote code, no unpickling but torch's weights-only one.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import JanusConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from engine.model.policy import Policy
from engine.model.source import Checkpoint
from engine.settings.errors import UserError
from engine.weights.config import janus_config, layout_of, read_values
from engine.weights.files import (
    Entry,
    Reader,
    find_weights,
    has_weights,
    one_line,
    open_weights,
    read_json,
)
from engine.weights.hub import hub_folder, is_hub_id
from engine.weights.layout import (
    ORIGINAL,
    TRANSFORMERS,
    is_aside,
    is_original_only,
    is_tower,
    renamed,
)
from engine.weights.save import ORIGINAL_ONLY
from engine.weights.save import write_policy as write_policy

TINY = Path(__file__).parents[1] / "tiny" / "weights" / "policy"
PAD = "<｜▁pad▁｜>"  # Janus pads with it whatever the tokenizer's own pad is
IMAGE_START, IMAGE = "<begin_of_image>", "<image_placeholder>"
_EMBEDDING, _HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"


def folder_of(path: str) -> Path:
    """The checkpoint folder that a --model value names: a folder, a hub id, or "tiny".

    Raises: UserError naming a hub id that cannot be fetched.
    """
    if path == "tiny":
        return TINY
    return hub_folder(path) if is_hub_id(path) else Path(path)


def read_config(folder: Path) -> JanusConfig:
    """The folder's config.json, of either layout; weights, if there are any, are not loaded."""
    values = read_values(folder)
    # Only the original's config.json leaves anything to the weights.
    named = layout_of(values, folder / "config.json") == ORIGINAL and has_weights(folder)
    return janus_config(values, folder / "config.json", _shapes(folder) if named else {})


def count_tower(folder: Path) -> int:
    """Weights of the folder's understanding tower, which the policy does not hold; 0 without."""
    if not has_weights(folder):
        return 0
    layout = layout_of(read_values(folder), folder / "config.json")
    entries = find_weights(folder)
    return sum(math.prod(e.shape) for key, e in entries.items() if is_tower(key, layout))


def guidance_scale(path: str, given: float | None) -> float:
    """The guidance weight to use: the given one, else the checkpoint's own, else Janus' 5.

    Transformers' Janus keeps its own in generation_config.json as `guidance_scale`.
    """
    file = folder_of(path) / "generation_config.json"
    if given is not None or not file.exists():
        return 5.0 if given is None else given
    found = read_json(file).get("guidance_scale")
    if found is None:
        return 5.0
    if isinstance(found, bool) or not isinstance(found, (int, float)) or found < 0:
        raise UserError(f"{file}: guidance_scale: wanted a number >= 0, got {found!r:.80}")
    return float(found)


def read_policy(
    path: str, *, dtype: torch.dtype | None, device: str | torch.device | None
) -> Policy:
    """See engine.policy.load_policy."""
    folder = folder_of(path)
    values = read_values(folder)
    file = folder / "config.json"
    layout = layout_of(values, file)
    entries = find_weights(folder)
    config = janus_config(values, file, {key: e.shape for key, e in entries.items()})
    tokenizer = read_tokenizer(folder, config)
    if layout == ORIGINAL:
        _take_token_ids(config, tokenizer)
    with torch.device("meta"):
        policy = Policy(config, tokenizer)
    names = _matched(policy, entries, layout, folder)
    _fill(policy, entries, names, dtype, device)
    policy.source = _checkpoint(folder, layout, values, entries)
    policy.freeze_generation()
    return policy.eval()


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return {key: entry.shape for key, entry in find_weights(folder).items()}


def read_tokenizer(folder: Path, config: JanusConfig) -> PreTrainedTokenizerBase:
    """The folder's tokenizer.json as it is, with the special tokens that Janus needs.

    Not AutoTokenizer: the published files name a class that some versions of transformers take
    for a licence to replace tokenizer.json's own splitting.
    """
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder / 'tokenizer.json'}: no such file")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        tokenizer.decode(
            tokenizer.encode("a", add_special_tokens=False)
        )  # some faults wait for use
    except KeyboardInterrupt:
        raise
    # Damaged tokenizer files raise whatever their parser does: the bare Exception, and where the
    # parser itself fails, Rust's panic, which is none.
    except BaseException as error:
        raise UserError(f"{folder}: no usable tokenizer: {one_line(error)}") from None
    if _token_id(tokenizer, PAD) is not None:
        tokenizer.pad_token = PAD
    for name in ("bos_token", "eos_token", "pad_token"):
        if getattr(tokenizer, f"{name}_id") is None:
            raise UserError(f"{folder / 'tokenizer_config.json'}: {name} is missing")
    if _token_id(tokenizer, IMAGE_START) is None:
        raise UserError(f"{folder / 'tokenizer.json'}: token {IMAGE_START!r} is missing")
    size = config.text_config.vocab_size
    if len(tokenizer) > size:
        raise UserError(
            f"{folder / 'tokenizer.json'}: {len(tokenizer)} tokens, but the model's vocab_size "
            f"is {size}"
        )
    return tokenizer


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int | None:
    """The id of a token; None where the vocabulary lacks it."""
    found = tokenizer.convert_tokens_to_ids(token)
    return found if found is not None and tokenizer.convert_ids_to_tokens(found) == token else None


def _take_token_ids(config: JanusConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set what transformers' config.json names and the original's leaves to the tokenizer."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config.text_config, name, getattr(tokenizer, name))
    image = _token_id(tokenizer, IMAGE)
    if image is not None:
        config.image_token_id = image


def _matched(
    policy: Policy, entries: Mapping[str, Entry], layout: str, folder: Path
) -> dict[str, str]:
    """The policy's name of each key it holds, once every key is what it must be."""
    names: dict[str, str] = {}
    wanted = policy.state_dict()
    keys = {name if layout == TRANSFORMERS else renamed(name, ORIGINAL): name for name in wanted}
    for key, entry in entries.items():
        if key not in keys:
            if is_aside(key, layout):
                continue
            raise UserError(f"{entry.file}: unexpected key {key!r:.200}")
        shape = tuple(wanted[keys[key]].shape)
        if entry.shape != shape:
            raise UserError(f"{entry.file}: {key!r}: wanted shape {shape}, got {entry.shape}")
        if not entry.dtype.is_floating_point:
            raise UserError(f"{entry.file}: {key!r}: wanted floating point, got {entry.dtype}")
        names[key] = keys[key]
    optional = {_HEAD} if policy.config.tie_word_embeddings else set()
    missing = [k for k, name in keys.items() if k not in entries and name not in optional]
    if missing:
        raise UserError(f"{folder}: key {missing[0]!r} is missing ({len(missing)} in all)")
    return names


def _fill(
    policy: Policy,
    entries: Mapping[str, Entry],
    names: Mapping[str, str],
    dtype: torch.dtype | None,
    device: str | torch.device | None,
) -> None:
    """Give a policy on the meta device its memory and values, one tensor at a time."""
    reader = Reader(entries)
    stored = next(entries[key].dtype for key, name in names.items() if name == _EMBEDDING)
    state: dict[str, torch.Tensor] = {}
    for key, name in names.items():
        target = torch.empty(entries[key].shape, dtype=dtype or stored, device=device or "cpu")
        state[name] = target.copy_(reader[key])
    head = state.pop(_HEAD, None) if policy.config.tie_word_embeddings else None
    if head is not None and not torch.equal(head, state[_EMBEDDING]):
        # As in transformers: a checkpoint that has both, and different, is not tied whatever
        # its config says. Published configs leave the setting at its default, which is tied.
        policy.config.tie_word_embeddings = False
        policy.lm_head.weight = nn.Parameter(head)
    policy.load_state_dict(state, assign=True, strict=False)
    if policy.config.tie_word_embeddings:
        policy.lm_head.weight = policy.model.language_model.embed_tokens.weight
    assert not any(p.is_meta for p in policy.parameters())


def _checkpoint(
    folder: Path, layout: str, values: dict[str, Any], entries: Mapping[str, Entry]
) -> Checkpoint:
    """What a policy's checkpoint holds beyond the policy."""
    aside = {key: entry for key, entry in entries.items() if is_aside(key, layout)}
    original = values if layout == ORIGINAL else None
    if layout == TRANSFORMERS and (folder / ORIGINAL_ONLY).is_file():
        only = open_weights(folder / ORIGINAL_ONLY)
        for key in only.entries:
            if not is_original_only(key):
                raise UserError(f"{only.path}: unexpected key {key!r:.200}")
        aside |= only.entries
    kept = folder / ORIGINAL / "config.json"
    if layout == TRANSFORMERS and kept.is_file():
        original = read_json(kept)
        language = original.get("language_config", {})
        if layout_of(original, kept) != ORIGINAL or not isinstance(language, dict):
            raise UserError(f"{kept}: not the original's config.json")
    return Checkpoint(folder, layout, aside, original)
