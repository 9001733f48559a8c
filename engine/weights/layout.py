"""The two layouts of Janus checkpoints: key names, and what differs beyond names.

`original` is that of deepseek-ai/Janus-Pro-1B and -7B and of CaraJ/T2I-R1 (model_type
multi_modality), `transformers` that of JanusForConditionalGeneration (model_type janus), whose
names are the policy's own. What the policy holds is the same tensors under other names. The
understanding tower, which it does not hold, has its queries, keys and values fused in the
original, and a leading 1 in the shape of its position embedding. A few of the original's keys
have no counterpart.

Source of the names: the modules of github.com/deepseek-ai/Janus and of transformers' Janus.
"""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from engine.settings.errors import UserError
from engine.weights.files import Entry

ORIGINAL, TRANSFORMERS = "original", "transformers"
LAYOUTS = (ORIGINAL, TRANSFORMERS)
MAX_DEPTH = 16  # layers of an aligner


def _aligner(theirs: str, ours: str) -> list[tuple[str, str]]:
    """An aligner's linear layers: numbered with the activations between them, and without."""
    later = range(1, MAX_DEPTH)
    return [
        (f"{theirs}.layers.0.*", f"model.{ours}.fc1.*"),
        *((f"{theirs}.layers.{2 * n}.*", f"model.{ours}.hidden_layers.{n - 1}.*") for n in later),
    ]


def _vq_side(side: str, levels: str) -> list[tuple[str, str]]:
    theirs, ours = f"gen_vision_model.{side}", f"model.vqmodel.{side}"
    return [
        (f"{theirs}.conv_blocks.#.res.*", f"{ours}.{levels}.#.block.*"),
        (f"{theirs}.conv_blocks.*", f"{ours}.{levels}.*"),
        (f"{theirs}.mid.0.*", f"{ours}.mid.block_1.*"),
        (f"{theirs}.mid.1.*", f"{ours}.mid.attn_1.*"),
        (f"{theirs}.mid.2.*", f"{ours}.mid.block_2.*"),
    ]


_TOWER, _BLOCK = "vision_model.vision_tower", "vision_model.vision_tower.blocks.#"
_VISION, _LAYER = "model.vision_model", "model.vision_model.encoder.layers.#"
_POSITIONS = (f"{_TOWER}.pos_embed", f"{_VISION}.embeddings.position_embedding.weight")
# Original, transformers; # is a number, * the rest of the name. The first match counts.
NAMES = [
    ("language_model.model.*", "model.language_model.*"),
    ("language_model.lm_head.*", "lm_head.*"),
    ("gen_embed.*", "model.generation_embeddings.*"),
    ("gen_head.output_mlp_projector.*", "model.generation_head.proj_out.*"),
    ("gen_head.vision_head.*", "model.generation_head.vision_head.*"),
    *_aligner("gen_aligner", "generation_aligner"),
    *_vq_side("encoder", "down"),
    *_vq_side("decoder", "up"),
    ("gen_vision_model.*", "model.vqmodel.*"),
    *_aligner("aligner", "aligner"),
    _POSITIONS,
    (f"{_TOWER}.patch_embed.proj.*", f"{_VISION}.embeddings.patch_embedding.*"),
    (f"{_TOWER}.norm.*", f"{_VISION}.post_layernorm.*"),
    (f"{_BLOCK}.attn.proj.*", f"{_LAYER}.self_attn.projection_layer.*"),
    (f"{_BLOCK}.norm1.*", f"{_LAYER}.layer_norm1.*"),
    (f"{_BLOCK}.norm2.*", f"{_LAYER}.layer_norm2.*"),
    (f"{_BLOCK}.mlp.*", f"{_LAYER}.mlp.*"),
]
_FUSED = re.compile(r"vision_model\.vision_tower\.blocks\.(\d+)\.attn\.qkv\.(weight|bias)")
_SPLIT = re.compile(
    r"model\.vision_model\.encoder\.layers\.(\d+)\.self_attn\.[qkv]_proj\.(weight|bias)"
)
# A pooling head and a count of used codes that generation leaves alone, and tables that files
# of older libraries carry and current ones compute.
_ORIGINAL_ONLY = re.compile(
    r"vision_model\.vision_tower\.attn_pool\..+"
    r"|gen_vision_model\.quantize\.codebook_used"
    r"|language_model\.model\.(.+\.)?rotary_emb\.inv_freq"
)
_TOWERS = {
    ORIGINAL: ("vision_model.", "aligner."),
    TRANSFORMERS: ("model.vision_model.", "model.aligner."),
}


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\#", r"(\d+)").replace(r"\*", r"(.+)"))


def _filled(template: str) -> str:
    """The template as what `re.Match.expand` takes."""
    groups = iter(range(1, 3))
    return re.sub(r"[#*]", lambda _: rf"\g<{next(groups)}>", template)


_RULES = {
    TRANSFORMERS: [(_pattern(old), _filled(new)) for old, new in NAMES],
    ORIGINAL: [(_pattern(new), _filled(old)) for old, new in NAMES],
}


def renamed(name: str, layout: str) -> str | None:
    """The name in `layout` of a key of the other layout; None where names are not all it takes."""
    for pattern, template in _RULES[layout]:
        match = pattern.fullmatch(name)
        if match:
            return match.expand(template)
    return None


def is_aside(name: str, layout: str) -> bool:
    """Whether the policy does not hold a key of that layout, and carries it from file to file."""
    return is_tower(name, layout) or is_original_only(name)


def is_tower(name: str, layout: str) -> bool:
    """Whether a key of that layout belongs to the understanding tower or its aligner."""
    return name.startswith(_TOWERS[layout])


def is_original_only(name: str) -> bool:
    """Whether a key of the original layout has no counterpart."""
    return _ORIGINAL_ONLY.fullmatch(name) is not None


class Made(NamedTuple):
    """A tensor of one layout, made of those of another."""

    sources: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[..., Tensor]


def aside_in(layout: str, entries: Mapping[str, Entry]) -> dict[str, Made]:
    """The understanding tower, and what else is carried along, as `layout` holds it.

    Args:
        layout: of the result.
        entries: keys of either layout for which `is_aside`.
    Returns: by name; keys that only the original has keep theirs.
    Raises: UserError naming file and key of what is not as one of the layouts has it.
    """
    made: dict[str, Made] = {}
    for name, entry in entries.items():
        if is_original_only(name) or is_tower(name, layout):
            made[name] = Made((name,), entry.shape, entry.dtype, torch.clone)
        elif layout == TRANSFORMERS:
            made |= _to_transformers(name, entry)
        else:
            made |= _to_original(name, entry, entries)
    return made


def _to_transformers(name: str, entry: Entry) -> dict[str, Made]:
    fused = _FUSED.fullmatch(name)
    if fused:
        rows, *rest = entry.shape or (1,)
        if rows % 3:
            raise _misfit(name, entry, "queries, keys and values of equal size")
        prefix = f"model.vision_model.encoder.layers.{fused[1]}.self_attn"
        return {
            f"{prefix}.{part}_proj.{fused[2]}": Made(
                (name,),
                (rows // 3, *rest),
                entry.dtype,
                lambda x, i=i: x.tensor_split(3)[i].clone(),
            )
            for i, part in enumerate("qkv")
        }
    new = renamed(name, TRANSFORMERS)
    if new is None:
        raise UserError(f"{entry.file}: unexpected key {name!r}")
    if name != _POSITIONS[0]:
        return {new: Made((name,), entry.shape, entry.dtype, torch.clone)}
    if len(entry.shape) != 3 or entry.shape[0] != 1:
        raise _misfit(name, entry, "(1, positions, width)")
    return {new: Made((name,), entry.shape[1:], entry.dtype, lambda x: x[0].clone())}


def _to_original(name: str, entry: Entry, entries: Mapping[str, Entry]) -> dict[str, Made]:
    split = _SPLIT.fullmatch(name)
    if split:
        prefix = f"model.vision_model.encoder.layers.{split[1]}.self_attn"
        parts = tuple(f"{prefix}.{part}_proj.{split[2]}" for part in "qkv")
        for part in parts:
            if part not in entries:
                raise UserError(f"{entry.file}: key {part!r} is missing, {name!r} is there")
            if entries[part][1:] != entry[1:]:
                raise _misfit(part, entries[part], f"{entry.shape}, as {name}")
        shape = (3 * entry.shape[0], *entry.shape[1:])
        new = f"{_TOWER}.blocks.{split[1]}.attn.qkv.{split[2]}"
        return {new: Made(parts, shape, entry.dtype, lambda *x: torch.cat(x))}
    place = renamed(name, ORIGINAL)
    if place is None:
        raise UserError(f"{entry.file}: {name!r} has no place in the original layout")
    if place != _POSITIONS[0]:
        return {place: Made((name,), entry.shape, entry.dtype, torch.clone)}
    return {place: Made((name,), (1, *entry.shape), entry.dtype, lambda x: x[None].clone())}


def _misfit(name: str, entry: Entry, wanted: str) -> UserError:
    return UserError(f"{entry.file}: {name!r}: wanted shape {wanted}, got {entry.shape}")
