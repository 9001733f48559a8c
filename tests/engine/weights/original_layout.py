"""Small checkpoints in the original Janus layout, made from transformers' by a table of our own.

Nothing here uses the engine's mapping. `expected_shapes` writes down what the modules of
github.com/deepseek-ai/Janus hold, level by level; `original_tensors` renames a transformers
model's tensors into it.
"""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    JanusConfig,
    JanusForConditionalGeneration,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
)

from engine.tiny.tokenizer import train_tokenizer

VOCAB, WIDTH, INNER, CODES, HEADS = 320, 48, 80, 96, 4
CHANNELS, LATENT, CODE_WIDTH = 32, 24, 8
TOWER, PATCH, SIZE = 64, 2, 8  # the tower's width is one head's

RENAMES = [
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.generation_embeddings\.", "gen_embed."),
    (r"^model\.generation_head\.proj_out\.", "gen_head.output_mlp_projector."),
    (r"^model\.generation_head\.vision_head\.", "gen_head.vision_head."),
    (r"^model\.generation_aligner\.fc1\.", "gen_aligner.layers.0."),
    (r"^model\.generation_aligner\.hidden_layers\.0\.", "gen_aligner.layers.2."),
    (r"^model\.aligner\.fc1\.", "aligner.layers.0."),
    (r"^model\.aligner\.hidden_layers\.0\.", "aligner.layers.2."),
    (r"^model\.vqmodel\.", "gen_vision_model."),
    (r"^(gen_vision_model\.encoder)\.down\.", r"\1.conv_blocks."),
    (r"^(gen_vision_model\.decoder)\.up\.", r"\1.conv_blocks."),
    (r"(\.conv_blocks\.\d+)\.block\.", r"\1.res."),
    (r"\.mid\.block_1\.", ".mid.0."),
    (r"\.mid\.attn_1\.", ".mid.1."),
    (r"\.mid\.block_2\.", ".mid.2."),
    (r"^model\.vision_model\.embeddings\.patch_embedding\.", "V.patch_embed.proj."),
    (r"^model\.vision_model\.embeddings\.position_embedding\.weight", "V.pos_embed"),
    (r"^model\.vision_model\.post_layernorm\.", "V.norm."),
    (r"^model\.vision_model\.encoder\.layers\.(\d+)\.self_attn\.", r"V.blocks.\1.attn."),
    (r"^model\.vision_model\.encoder\.layers\.", "V.blocks."),
    (r"\.attn\.projection_layer\.", ".attn.proj."),
    (r"\.layer_norm([12])\.", r".norm\1."),
    (r"^V\.", "vision_model.vision_tower."),
]


def small_model(
    *, kv_heads: int = 4, tied: bool = False, layers: int = 2, seed: int = 0
) -> JanusForConditionalGeneration:
    """A random Janus of 16 image tokens whose attention and logits are far from uniform."""
    torch.manual_seed(seed)
    model = JanusForConditionalGeneration(
        JanusConfig(
            text_config=LlamaConfig(
                vocab_size=VOCAB,
                hidden_size=WIDTH,
                intermediate_size=INNER,
                num_hidden_layers=layers,
                num_attention_heads=HEADS,
                num_key_value_heads=kv_heads,
                max_position_embeddings=64,
            ),
            vision_config=JanusVisionConfig(
                hidden_size=TOWER,
                num_hidden_layers=2,
                num_attention_heads=1,
                image_size=SIZE,
                patch_size=PATCH,
                mlp_ratio=2.0,
                projection_dim=WIDTH,
                depth=2,
                num_image_tokens=16,
            ),
            vq_config=JanusVQVAEConfig(
                embed_dim=CODE_WIDTH,
                num_embeddings=CODES,
                latent_channels=LATENT,
                base_channels=CHANNELS,
                channel_multiplier=[1, 2],
                num_res_blocks=1,
                projection_dim=WIDTH,
                image_token_embed_dim=WIDTH,
            ),
            tie_word_embeddings=tied,
        )
    ).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
        elif "vqmodel" not in name:
            parameter.data.mul_(8)
    return model


def original_tensors(model: JanusForConditionalGeneration) -> dict[str, Tensor]:
    """The model's tensors under the original's names, with the ones that only it has."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        for pattern, new in RENAMES:
            name = re.sub(pattern, new, name)
        tensors[name] = tensor.clone()
    for name in [n for n in tensors if ".attn.q_proj." in n]:
        parts = [tensors.pop(name.replace("q_proj", f"{p}_proj")) for p in "qkv"]
        tensors[name.replace("q_proj", "qkv")] = torch.cat(parts)
    positions = "vision_model.vision_tower.pos_embed"
    tensors[positions] = tensors[positions][None]
    expected = expected_shapes(model.config)
    for name in expected.keys() - tensors.keys():
        assert "attn_pool" in name or name.endswith("codebook_used"), name
        tensors[name] = torch.randn(expected[name])
    assert {n: tuple(t.shape) for n, t in tensors.items()} == expected
    return tensors


def expected_shapes(config: JanusConfig) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the original's modules."""
    kv = config.text_config.num_key_value_heads * WIDTH // HEADS
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, inputs: int, outputs: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    def conv(name: str, inputs: int, outputs: int, size: int) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs, size, size)
        shapes[f"{name}.bias"] = (outputs,)

    def res(name: str, inputs: int, outputs: int) -> None:
        norm(f"{name}.norm1", inputs)
        conv(f"{name}.conv1", inputs, outputs, 3)
        norm(f"{name}.norm2", outputs)
        conv(f"{name}.conv2", outputs, outputs, 3)
        if inputs != outputs:
            conv(f"{name}.nin_shortcut", inputs, outputs, 1)

    def attention(name: str, width: int) -> None:
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    language = "language_model"
    shapes[f"{language}.model.embed_tokens.weight"] = (VOCAB, WIDTH)
    shapes[f"{language}.lm_head.weight"] = (VOCAB, WIDTH)
    shapes[f"{language}.model.norm.weight"] = (WIDTH,)
    for i in range(config.text_config.num_hidden_layers):
        layer = f"{language}.model.layers.{i}"
        for name, outputs in (("q", WIDTH), ("k", kv), ("v", kv), ("o", WIDTH)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (outputs, WIDTH)
        shapes[f"{layer}.mlp.gate_proj.weight"] = (INNER, WIDTH)
        shapes[f"{layer}.mlp.up_proj.weight"] = (INNER, WIDTH)
        shapes[f"{layer}.mlp.down_proj.weight"] = (WIDTH, INNER)
        shapes[f"{layer}.input_layernorm.weight"] = (WIDTH,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (WIDTH,)
    shapes["gen_embed.weight"] = (CODES, CODE_WIDTH)
    linear("gen_aligner.layers.0", CODE_WIDTH, WIDTH)
    linear("gen_aligner.layers.2", WIDTH, WIDTH)
    linear("gen_head.output_mlp_projector", WIDTH, WIDTH)
    linear("gen_head.vision_head", WIDTH, CODES)

    vq, wide = "gen_vision_model", 2 * CHANNELS
    conv(f"{vq}.encoder.conv_in", 3, CHANNELS, 3)
    res(f"{vq}.encoder.conv_blocks.0.res.0", CHANNELS, CHANNELS)
    conv(f"{vq}.encoder.conv_blocks.0.downsample.conv", CHANNELS, CHANNELS, 3)
    res(f"{vq}.encoder.conv_blocks.1.res.0", CHANNELS, wide)
    attention(f"{vq}.encoder.conv_blocks.1.attn.0", wide)
    norm(f"{vq}.encoder.norm_out", wide)
    conv(f"{vq}.encoder.conv_out", wide, LATENT, 3)
    conv(f"{vq}.decoder.conv_in", LATENT, wide, 3)
    for i in range(2):
        res(f"{vq}.decoder.conv_blocks.0.res.{i}", wide, wide)
        attention(f"{vq}.decoder.conv_blocks.0.attn.{i}", wide)
    conv(f"{vq}.decoder.conv_blocks.0.upsample.conv", wide, wide, 3)
    res(f"{vq}.decoder.conv_blocks.1.res.0", wide, CHANNELS)
    res(f"{vq}.decoder.conv_blocks.1.res.1", CHANNELS, CHANNELS)
    norm(f"{vq}.decoder.norm_out", CHANNELS)
    conv(f"{vq}.decoder.conv_out", CHANNELS, 3, 3)
    for side in ("encoder", "decoder"):
        res(f"{vq}.{side}.mid.0", wide, wide)
        attention(f"{vq}.{side}.mid.1", wide)
        res(f"{vq}.{side}.mid.2", wide, wide)
    conv(f"{vq}.quant_conv", LATENT, CODE_WIDTH, 1)
    conv(f"{vq}.post_quant_conv", CODE_WIDTH, LATENT, 1)
    shapes[f"{vq}.quantize.embedding.weight"] = (CODES, CODE_WIDTH)
    shapes[f"{vq}.quantize.codebook_used"] = (65536,)

    tower = "vision_model.vision_tower"
    shapes[f"{tower}.pos_embed"] = (1, (SIZE // PATCH) ** 2, TOWER)
    conv(f"{tower}.patch_embed.proj", 3, TOWER, PATCH)
    for i in range(2):
        norm(f"{tower}.blocks.{i}.norm1", TOWER)
        linear(f"{tower}.blocks.{i}.attn.qkv", TOWER, 3 * TOWER)
        linear(f"{tower}.blocks.{i}.attn.proj", TOWER, TOWER)
        norm(f"{tower}.blocks.{i}.norm2", TOWER)
        linear(f"{tower}.blocks.{i}.mlp.fc1", TOWER, 2 * TOWER)
        linear(f"{tower}.blocks.{i}.mlp.fc2", 2 * TOWER, TOWER)
    norm(f"{tower}.norm", TOWER)
    shapes[f"{tower}.attn_pool.latent"] = (1, 1, TOWER)
    linear(f"{tower}.attn_pool.q", TOWER, TOWER)
    linear(f"{tower}.attn_pool.kv", TOWER, 2 * TOWER)
    linear(f"{tower}.attn_pool.proj", TOWER, TOWER)
    norm(f"{tower}.attn_pool.norm", TOWER)
    linear(f"{tower}.attn_pool.mlp.fc1", TOWER, 2 * TOWER)
    linear(f"{tower}.attn_pool.mlp.fc2", 2 * TOWER, TOWER)
    linear("aligner.layers.0", TOWER, WIDTH)
    linear("aligner.layers.2", WIDTH, WIDTH)
    return shapes


def original_config(
    *,
    language: dict,
    width: int,
    codes: int = CODES,
    code_width: int = CODE_WIDTH,
    tower: int = TOWER,
    size: int = SIZE,
) -> dict:
    """A config.json as published: it gives no widths of the image tokenizer or the tower."""
    mlp = {"depth": 2, "n_embed": width, "projector_type": "mlp_gelu"}
    return {
        "model_type": "multi_modality",
        "architectures": ["MultiModalityCausalLM"],
        "language_config": {"model_type": "llama", "torch_dtype": "bfloat16", **language},
        "vision_config": {
            "cls": "CLIPVisionTower",
            "model_type": "vision",
            "params": {
                "image_size": size,
                "model_name": "siglip_large_patch16_384",
                "select_feature": "same",
                "select_layer": -1,
            },
        },
        "aligner_config": {
            "cls": "MlpProjector",
            "model_type": "aligner",
            "params": mlp | {"input_dim": tower},
        },
        "gen_vision_config": {
            "cls": "VQ-16",
            "model_type": "gen_vision",
            "params": {"image_token_size": codes, "n_embed": code_width},
        },
        "gen_aligner_config": {
            "cls": "MlpProjector",
            "model_type": "gen_aligner",
            "params": mlp | {"input_dim": code_width},
        },
        "gen_head_config": {
            "cls": "vision_head",
            "model_type": "gen_head",
            "params": {"image_token_embed": width, "image_token_size": codes, "n_embed": width},
        },
        "torch_dtype": "bfloat16",
        "transformers_version": "4.33.1",
    }


def write_tokenizer(folder: Path) -> None:
    """A small tokenizer with the files of the original, whose settings name LlamaTokenizer."""
    train_tokenizer(["a red circle and a blue star"] * 3, folder)
    file = folder / "tokenizer_config.json"
    values = json.loads(file.read_text())
    bos, eos = values["bos_token"], values["eos_token"]
    published = {"tokenizer_class": "LlamaTokenizer", "bos_token": bos, "eos_token": eos}
    file.write_text(json.dumps(published | {"pad_token": eos, "model_max_length": 64}))
    (folder / "preprocessor_config.json").write_text('{"image_size": 8, "min_size": 2}\n')
    (folder / "processor_config.json").write_text('{"processor_class": "VLChatProcessor"}\n')


def write_original(
    folder: Path,
    model: JanusForConditionalGeneration,
    *,
    form: str = "safetensors",
    shards: int = 1,
) -> dict[str, Tensor]:
    """A checkpoint folder in the original layout. Returns its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = original_tensors(model)
    text = model.config.text_config
    values = original_config(
        language={
            "hidden_size": WIDTH,
            "intermediate_size": INNER,
            "max_position_embeddings": 64,
            "num_attention_heads": HEADS,
            "num_hidden_layers": text.num_hidden_layers,
            "num_key_value_heads": text.num_key_value_heads,
            "vocab_size": VOCAB,
            "torch_dtype": "float32",
            **({"tie_word_embeddings": True} if model.config.tie_word_embeddings else {}),
        },
        width=WIDTH,
    )
    (folder / "config.json").write_text(json.dumps(values | {"torch_dtype": "float32"}))
    write_tokenizer(folder)
    write_weights(folder, tensors, form=form, shards=shards)
    return tensors


def write_weights(folder: Path, tensors: dict[str, Tensor], *, form: str, shards: int) -> None:
    """Weight files as Hugging Face's libraries name them: `safetensors`, `bin` or `old_bin`."""
    stem, end = ("model", "safetensors") if form == "safetensors" else ("pytorch_model", "bin")
    names = sorted(tensors)
    places = {}
    for i in range(shards):
        name = f"{stem}.{end}" if shards == 1 else f"{stem}-{i + 1:05}-of-{shards:05}.{end}"
        part = {key: tensors[key] for key in names[i::shards]}
        if form == "safetensors":
            save_file(part, folder / name, {"format": "pt"})
        else:
            torch.save(part, folder / name, _use_new_zipfile_serialization=form == "bin")
        places |= dict.fromkeys(part, name)
    if shards > 1:
        index = json.dumps({"metadata": {"total_size": 0}, "weight_map": places})
        (folder / f"{stem}.{end}.index.json").write_text(index)


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Set tensors of the folder's model.safetensors; None takes one out."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for key, value in changes.items():
        tensors.pop(key, None)
        if value is not None:
            tensors[key] = value
    save_file(tensors, file)
