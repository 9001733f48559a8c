"""config.json in the original layout, for a model that did not come from one.

Source of the fields: github.com/deepseek-ai/Janus, janus/models.
"""

from typing import Any

from transformers import JanusConfig


def original_values(config: JanusConfig) -> dict[str, Any]:
    """The original layout's config.json of a model that did not come from one."""
    text, vision, vq = config.text_config, config.vision_config, config.vq_config
    language = {
        name: getattr(text, name)
        for name in (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings",
            "hidden_act", "rms_norm_eps", "attention_bias", "mlp_bias",
        )
    }  # fmt: skip
    language["rope_theta"] = text.rope_parameters["rope_theta"]
    language |= {"model_type": "llama", "tie_word_embeddings": config.tie_word_embeddings}
    tower = {
        "image_size": vision.image_size,
        "model_name": "siglip_large_patch16_384",
        "select_feature": "same",
        "select_layer": -1,
    }
    if vision.num_attention_heads != max(1, vision.hidden_size // 64):
        tower["heads"] = vision.num_attention_heads
    width, projector = text.hidden_size, {"projector_type": "mlp_gelu"}
    return {
        "model_type": "multi_modality",
        "architectures": ["MultiModalityCausalLM"],
        "language_config": language,
        "vision_config": _component("CLIPVisionTower", "vision", tower),
        "aligner_config": _component(
            "MlpProjector",
            "aligner",
            projector | {"depth": vision.depth, "input_dim": vision.hidden_size, "n_embed": width},
        ),
        "gen_vision_config": _component(
            "VQ-16",
            "gen_vision",
            {"image_token_size": vq.num_embeddings, "n_embed": vq.embed_dim},
        ),
        "gen_aligner_config": _component(
            "MlpProjector",
            "gen_aligner",
            projector
            | {
                "depth": vq.num_hidden_layers,
                "input_dim": vq.embed_dim,
                "n_embed": vq.projection_dim,
            },
        ),
        "gen_head_config": _component(
            "vision_head",
            "gen_head",
            {
                "image_token_embed": vq.projection_dim,
                "image_token_size": vq.num_embeddings,
                "n_embed": width,
            },
        ),
    }


def _component(cls: str, model_type: str, params: dict[str, Any]) -> dict[str, Any]:
    return {"cls": cls, "model_type": model_type, "params": params}
