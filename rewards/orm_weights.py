"""ORM checkpoints: LLaVA-OneVision in its original layout (llava_qwen) and in transformers'.

The original layout's config.json describes the language model only. Its vision tower is
SigLIP-so400m without its last layer and its pooling head, both of which LLaVA leaves out.
"""

import re
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    LlavaOnevisionConfig,
    PreTrainedModel,
    Qwen2Config,
)

from rewards.checkpoint import (
    build_model,
    config_from,
    load_weights,
    read_config,
    weight_files,
)
from rewards.preprocess import Transform
from rewards.yes_no import read_transform

SIGLIP_SO400M = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}
SIGLIP_PICTURES = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
QWEN_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "tie_word_embeddings",
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
)
# Beginnings of the keys of either layout -> those of transformers' class. Before its version 5
# transformers wrote "language_model.model" and kept "vision_model" in the tower's keys.
ORIGINAL_KEYS = {
    "model.vision_tower.vision_tower.vision_model.": "model.vision_tower.",
    "model.mm_projector.0.": "model.multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "model.multi_modal_projector.linear_2.",
    "model.image_newline": "model.image_newline",
    "model.embed_tokens.": "model.language_model.embed_tokens.",
    "model.layers.": "model.language_model.layers.",
    "model.norm.": "model.language_model.norm.",
    "lm_head.": "lm_head.",
}
TRANSFORMERS_KEYS = {
    "model.vision_tower.vision_model.": "model.vision_tower.",
    "vision_tower.vision_model.": "model.vision_tower.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
    "image_newline": "model.image_newline",
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "model.language_model.",
    "language_model.": "model.language_model.",
}


def load_orm(
    folder: Path,
    *,
    vision_config: dict[str, Any] | None,
    device: torch.device | str,
    dtype: torch.dtype,
) -> tuple[PreTrainedModel, Transform]:
    """The model of a checkpoint folder, its vision tower cut to the layers that are read, and
    what its square pictures go through.

    Args: vision_config: see `rewards.orm.ORM`.
    Raises: ValueError naming file and key.
    """
    values = read_config(folder, "llava_qwen", "llava_onevision")
    file = folder / "config.json"
    original = values["model_type"] == "llava_qwen"
    if original:
        config = _original_config(values, folder, vision_config)
    else:
        if vision_config is not None:
            raise ValueError(f"{file}: has a vision_config of its own, so none can be given")
        config = config_from(LlavaOnevisionConfig, values, folder)
    if config.vision_feature_select_strategy != "full":
        found = config.vision_feature_select_strategy
        raise ValueError(f"{file}: vision_feature_select_strategy is {found!r}, wanted 'full'")
    depth, layer = config.vision_config.num_hidden_layers, config.vision_feature_layer
    if not isinstance(layer, int) or not -depth <= layer < 0:
        raise ValueError(f"{file}: vision_feature_layer is {layer!r}, wanted -{depth} to -1")
    model: Any = build_model(AutoModelForImageTextToText, config, file, device=device, dtype=dtype)
    table = ORIGINAL_KEYS if original else TRANSFORMERS_KEYS
    load_weights(model, weight_files(folder), lambda key: _rename(key, table, depth))
    tower = model.model.vision_tower
    tower.encoder.layers = tower.encoder.layers[: depth + 1 + layer]
    if not original:
        return model, read_transform(folder, config.vision_config.image_size)
    return model, Transform({**SIGLIP_PICTURES, "size": config.vision_config.image_size})


def _original_config(
    values: dict[str, Any], folder: Path, vision_config: dict[str, Any] | None
) -> LlavaOnevisionConfig:
    tower = str(values.get("mm_vision_tower"))
    if vision_config is None and "siglip-so400m-patch14-384" not in tower:
        raise ValueError(
            f"{folder / 'config.json'}: mm_vision_tower is {tower!r}, "
            "wanted siglip-so400m-patch14-384, or a vision_config given with it"
        )
    text = config_from(Qwen2Config, {k: values[k] for k in QWEN_KEYS if k in values}, folder)
    parts = {
        "text_config": text.to_dict(),
        "vision_config": {**SIGLIP_SO400M, **(vision_config or {})},
        "tie_word_embeddings": text.tie_word_embeddings,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -1,
    }
    return config_from(LlavaOnevisionConfig, parts, folder)


def _rename(key: str, table: dict[str, str], depth: int) -> str | None:
    """The model's name for a file's key; None for parts of the tower that nothing reads."""
    for old, new in table.items():
        if key.startswith(old):
            key = new + key[len(old) :]
            break
    if key.startswith("model.vision_tower.head."):
        return None
    layer = re.match(r"model\.vision_tower\.encoder\.layers\.(\d+)\.", key)
    return None if layer and int(layer[1]) >= depth else key
