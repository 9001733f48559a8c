"""config.json of either layout as transformers' JanusConfig.

The original's config.json names the image tokenizer and the understanding tower but gives no
widths: those are what the names stand for (VQ-16, siglip_large_patch16_384), or, where the
weights are at hand, what their shapes say.

Source of the fields: github.com/deepseek-ai/Janus, janus/models.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from transformers import JanusConfig, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig
from transformers.configuration_utils import PreTrainedConfig

from engine.model.rope import head_dimension
from engine.settings.errors import UserError
from engine.weights.files import read_json
from engine.weights.layout import MAX_DEPTH, ORIGINAL, TRANSFORMERS

Config = TypeVar("Config", bound=PreTrainedConfig)
Shapes = Mapping[str, tuple[int, ...]]
MODEL_TYPES = {"multi_modality": ORIGINAL, "janus": TRANSFORMERS}
# Names of before transformers 5 that its classes still understand.
_LEGACY = {"rope_theta", "rope_scaling", "torch_dtype"}
# Whole numbers of at least 1 and at most this: far beyond any model, and safe to compute with.
LIMITS = {
    "text_config": {
        "hidden_size": 2**16, "intermediate_size": 2**18, "num_hidden_layers": 2**10,
        "num_attention_heads": 2**10, "num_key_value_heads": 2**10, "vocab_size": 2**22,
        "max_position_embeddings": 2**24,
    },
    "vision_config": {
        "hidden_size": 2**16, "num_hidden_layers": 2**10, "num_attention_heads": 2**10,
        "image_size": 2**14, "patch_size": 2**14, "depth": MAX_DEPTH,
    },
    "vq_config": {
        "embed_dim": 2**12, "num_embeddings": 2**22, "latent_channels": 2**12,
        "base_channels": 2**12, "in_channels": 16, "out_channels": 16, "num_res_blocks": 16,
        "projection_dim": 2**16, "image_token_embed_dim": 2**16, "num_hidden_layers": MAX_DEPTH,
        "num_patches": 2**10,
    },
}  # fmt: skip
# Where the original's config.json has what JanusConfig calls otherwise, and is not to be asked
# for: the image tokenizer's widths come from its tensors' shapes.
_ORIGINAL_PLACES = {
    "text_config": "language_config",
    "vision_config.image_size": "vision_config.params.image_size",
    "vq_config": "gen_vision_model's tensors",
    "vq_config.embed_dim": "gen_vision_config.params.n_embed",
    "vq_config.num_embeddings": "gen_vision_config.params.image_token_size",
    "vq_config.projection_dim": "gen_aligner_config.params.n_embed",
    "vq_config.num_hidden_layers": "gen_aligner_config.params.depth",
    "vq_config.image_token_embed_dim": "gen_head_config.params.image_token_embed",
}


def layout_of(values: Mapping[str, Any], file: Path) -> str:
    """The layout of a config.json's content. Raises: UserError naming the file."""
    found = values.get("model_type")
    if not isinstance(found, str) or found not in MODEL_TYPES:
        wanted = " or ".join(map(repr, MODEL_TYPES))
        raise UserError(f"{file}: wanted model_type {wanted}, got {found!r:.80}")
    return MODEL_TYPES[found]


def janus_config(values: Mapping[str, Any], file: Path, shapes: Shapes) -> JanusConfig:
    """A config.json's content, of either layout, as a checked JanusConfig.

    Args:
        file: where it is from, for errors.
        shapes: of the folder's tensors, by key; empty where there are none.
    Raises: UserError naming file and key of what is missing, absurd or not supported.
    """
    layout = layout_of(values, file)
    if layout == ORIGINAL:
        config = _from_original(values, file, shapes)
    else:
        config = _from_transformers(values, file)
    _check(config, file, layout)
    return config


def _from_transformers(values: Mapping[str, Any], file: Path) -> JanusConfig:
    text = _section(values, "text_config", file)
    _require_llama(text, "text_config", file)
    return _built(
        JanusConfig,
        {
            **values,
            "text_config": _built(LlamaConfig, text, "text_config", file),
            "vision_config": _built(
                JanusVisionConfig, _section(values, "vision_config", file), "vision_config", file
            ),
            "vq_config": _built(
                JanusVQVAEConfig, _section(values, "vq_config", file), "vq_config", file
            ),
        },
        "",
        file,
    )


def _from_original(values: Mapping[str, Any], file: Path, shapes: Shapes) -> JanusConfig:
    text = _section(values, "language_config", file)
    _require_llama(text, "language_config", file)
    text_config = _built(LlamaConfig, text, "language_config", file)
    codes = _params(values, "gen_vision_config", file, cls="VQ-16")
    head = _params(values, "gen_head_config", file, cls="vision_head")
    aligner = _params(values, "gen_aligner_config", file, cls="MlpProjector")
    vision = _params(values, "vision_config", file)
    if aligner.get("projector_type", "mlp_gelu") != "mlp_gelu":
        raise UserError(f"{file}: gen_aligner_config.params.projector_type: wanted 'mlp_gelu'")
    vq = _vq_widths(shapes) | {
        "embed_dim": _number(codes, "gen_vision_config.params", "n_embed", file),
        "num_embeddings": _number(codes, "gen_vision_config.params", "image_token_size", file),
        "projection_dim": _number(aligner, "gen_aligner_config.params", "n_embed", file),
        "num_hidden_layers": _number(aligner, "gen_aligner_config.params", "depth", file, 1),
        "image_token_embed_dim": _number(head, "gen_head_config.params", "image_token_embed", file),
    }
    size = _number(vision, "vision_config.params", "image_size", file, 384)
    levels = len(vq.get("channel_multiplier", JanusVQVAEConfig.channel_multiplier))
    tower = _tower_widths(shapes, vision) or {"patch_size": 2 ** (levels - 1)}
    tower |= {"image_size": size, "projection_dim": text_config.hidden_size}
    tower["num_image_tokens"] = (size // max(1, tower["patch_size"])) ** 2
    return _built(
        JanusConfig,
        {
            "text_config": text_config,
            "vision_config": _built(JanusVisionConfig, tower, "vision_config", file),
            "vq_config": _built(JanusVQVAEConfig, vq, "gen_vision_config", file),
            "tie_word_embeddings": text.get("tie_word_embeddings", False),
        },
        "",
        file,
    )


def _vq_widths(shapes: Shapes) -> dict[str, Any]:
    """The image tokenizer's widths by the shapes of its tensors; {}: VQ-16's, the default."""
    encoder = "gen_vision_model.encoder"
    first = shapes.get(f"{encoder}.conv_in.weight", ())
    latent = shapes.get(f"{encoder}.conv_out.weight", ())
    widths: list[int] = []
    while key := shapes.get(f"{encoder}.conv_blocks.{len(widths)}.res.0.conv2.weight"):
        widths.append(key[0])
    if not widths or len(first) != 4 or len(latent) != 4 or not first[0]:
        return {}
    blocks = 0
    while f"{encoder}.conv_blocks.0.res.{blocks}.conv1.weight" in shapes:
        blocks += 1
    return {
        "base_channels": first[0],
        "channel_multiplier": [width // first[0] for width in widths],
        "num_res_blocks": blocks,
        "latent_channels": latent[0],
    }


def _tower_widths(shapes: Shapes, params: Mapping[str, Any]) -> dict[str, Any]:
    """The understanding tower's widths by the shapes of its tensors; {} without a tower."""
    tower = "vision_model.vision_tower"
    patch = shapes.get(f"{tower}.patch_embed.proj.weight", ())
    if len(patch) != 4 or not patch[0]:
        return {}
    layers = 0
    while f"{tower}.blocks.{layers}.attn.proj.weight" in shapes:
        layers += 1
    hidden = shapes.get(f"{tower}.blocks.0.mlp.fc1.weight", (4 * patch[0],))[0]
    depth = sum(re.fullmatch(r"aligner\.layers\.\d+\.weight", key) is not None for key in shapes)
    return {
        "hidden_size": patch[0],
        "patch_size": patch[2],
        "num_hidden_layers": layers,
        # SigLIP's heads are 64 wide; a tower whose are not says so.
        "num_attention_heads": params.get("heads", max(1, patch[0] // 64)),
        "mlp_ratio": hidden / patch[0],
        "attention_bias": f"{tower}.blocks.0.attn.qkv.bias" in shapes,
        "depth": max(1, depth),
    }


def _built(cls: type[Config], values: Mapping[str, Any], section: str, file: Path) -> Config:
    """A config of the fields that its class declares.

    Others are left out: an `attn_implementation` could name code on the hub to be run.
    """
    known = {f.name for f in dataclasses.fields(cls)} | _LEGACY
    try:
        return cls(**{name: value for name, value in values.items() if name in known})
    # A wrong type meets the class's own check, or whatever computes with it first.
    except Exception as error:
        reason = " ".join(str(error).split())  # the class's own checks take several lines
        raise UserError(f"{file}: {section or 'values'}: {reason:.300}") from None


def _section(values: Mapping[str, Any], name: str, file: Path, outer: str = "") -> dict[str, Any]:
    found = values.get(name, {})
    if not isinstance(found, dict):
        raise UserError(f"{file}: {outer}{name}: wanted an object, got {type(found).__name__}")
    return found


def _params(
    values: Mapping[str, Any], name: str, file: Path, *, cls: str | None = None
) -> dict[str, Any]:
    """The parameters of one of the original's components, checked to be of the known class."""
    section = _section(values, name, file)
    if cls is not None and section.get("cls", cls) != cls:
        raise UserError(f"{file}: {name}.cls: wanted {cls!r}, got {section['cls']!r:.80}")
    return _section(section, "params", file, f"{name}.")


def _number(
    values: Mapping[str, Any], section: str, name: str, file: Path, default: int | None = None
) -> int:
    found = values.get(name, default)
    if found is None:
        raise UserError(f"{file}: {section}.{name} is missing")
    if type(found) is not int or found < 1:
        raise UserError(f"{file}: {section}.{name}: wanted a whole number >= 1, got {found!r:.80}")
    return found


def _require_llama(text: Mapping[str, Any], section: str, file: Path) -> None:
    if text.get("model_type", "llama") != "llama":
        raise UserError(f"{file}: {section}.model_type: wanted 'llama'")


def _check(config: JanusConfig, file: Path, layout: str) -> None:
    """Refuse numbers that no model has, and what the policy computes differently."""

    def refuse(section: str, name: str, wanted: str) -> None:
        shown = f"{section}.{name}"
        if layout == ORIGINAL:
            place = _ORIGINAL_PLACES.get(section, section)
            shown = _ORIGINAL_PLACES.get(shown, f"{place}.{name}")
        found = getattr(getattr(config, section), name)
        raise UserError(f"{file}: {shown}: wanted {wanted}, got {found!r:.80}")

    text, vision, vq = config.text_config, config.vision_config, config.vq_config
    for section, limits in LIMITS.items():
        for name, most in limits.items():
            value = getattr(getattr(config, section), name)
            if type(value) is not int or not 1 <= value <= most:
                refuse(section, name, f"a whole number from 1 to {most}")
    if text.head_dim is not None and (type(text.head_dim) is not int or text.head_dim < 1):
        refuse("text_config", "head_dim", "a whole number >= 1")
    if head_dimension(config) % 2 or head_dimension(config) > 2**12:
        refuse("text_config", "num_attention_heads", "one that makes heads of even width")
    if text.num_attention_heads % text.num_key_value_heads:
        refuse("text_config", "num_key_value_heads", "a divisor of num_attention_heads")
    if not (_is_finite(text.rms_norm_eps) and text.rms_norm_eps > 0):
        refuse("text_config", "rms_norm_eps", "a number above 0")
    if text.hidden_act != "silu":
        refuse("text_config", "hidden_act", "'silu'")
    rope = text.rope_parameters
    if not isinstance(rope, dict) or rope.get("rope_type") != "default":
        refuse("text_config", "rope_parameters", "rope_type 'default'")
    if not (_is_finite(rope.get("rope_theta")) and rope["rope_theta"] > 0):
        refuse("text_config", "rope_parameters", "a rope_theta above 0")
    multipliers = vq.channel_multiplier
    if not 1 <= len(multipliers) <= 8 or any(
        type(m) is not int or not 1 <= m <= 64 for m in multipliers
    ):
        refuse("vq_config", "channel_multiplier", "1 to 8 whole numbers from 1 to 64")
    if vq.base_channels % 32:
        refuse("vq_config", "base_channels", "a multiple of 32")
    if vq.hidden_act != "gelu":
        refuse("vq_config", "hidden_act", "'gelu'")
    if not (_is_finite(vq.dropout) and 0 <= vq.dropout <= 1):
        refuse("vq_config", "dropout", "a number from 0 to 1")
    for name in ("projection_dim", "image_token_embed_dim"):
        if getattr(vq, name) != text.hidden_size:
            refuse("vq_config", name, f"the language model's hidden_size {text.hidden_size}")
    if vq.num_patches**2 >= text.max_position_embeddings:
        refuse("vision_config", "image_size", "one whose image tokens fit the context")
    if vision.image_size % vision.patch_size:
        refuse("vision_config", "image_size", f"a multiple of patch_size {vision.patch_size}")


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def read_values(folder: Path) -> dict[str, Any]:
    """The content of the folder's config.json. Raises: UserError naming folder or file."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such checkpoint folder")
    return read_json(folder / "config.json")
