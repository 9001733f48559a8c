"""GroundingDINO's published weights on transformers' GroundingDinoForObjectDetection.

Two layouts are read: the authors' file (`groundingdino_swint_ogc.pth`: {"model": state dict},
keys prefixed with "module."), and folders in transformers' layout, with the Swin names that the
hub's files have and those of current models. Neither `groundingdino` package runs beside
transformers 5, hence the mapping. It was checked against the authors' modules with random
weights of the published shape: where both choose the same proposals, logits agree to 1e-5.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForZeroShotObjectDetection,
    BertConfig,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    SwinConfig,
)

from rewards.checkpoint import build_model, read_pickle, read_tensors, weight_files

SWIN = "model.backbone.conv_encoder.model.swin."
NORMS = "model.backbone.conv_encoder.model.hidden_states_norms."
Q_K_V = ("query", "key", "value")

# (authors' prefix, prefix here, {module there: module here}). A tuple: the rows of one matrix go
# to that many. Modules that are not named keep their names.
SECTIONS: tuple[tuple[str, str, dict[str, str | tuple[str, ...]]], ...] = (
    (
        r"backbone\.0\.patch_embed\.",
        SWIN + "embeddings.",
        {"proj": "patch_embeddings.projection"},
    ),
    (
        r"backbone\.0\.layers\.(\d+)\.blocks\.(\d+)\.",
        SWIN + r"encoder.layers.\1.blocks.\2.",
        {
            "norm1": "layernorm_before",
            "norm2": "layernorm_after",
            "attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
            "attn.proj": "attention.o_proj",
            "attn": "attention.relative_position_bias",
        },
    ),
    (r"backbone\.0\.layers\.(\d+)\.downsample\.", SWIN + r"encoder.layers.\1.downsample.", {}),
    # The stem is stage 1, so that layer N's output is stage N + 1 counted from 1.
    (r"backbone\.0\.norm1\.", NORMS + "stage2.", {}),
    (r"backbone\.0\.norm2\.", NORMS + "stage3.", {}),
    (r"backbone\.0\.norm3\.", NORMS + "stage4.", {}),
    (r"bert\.", "model.text_backbone.", {}),
    (r"feat_map\.", "model.text_projection.", {}),
    (r"input_proj\.", "model.input_proj_vision.", {}),
    (
        r"transformer\.encoder\.layers\.(\d+)\.",
        r"model.encoder.layers.\1.deformable_layer.",
        {
            "norm1": "self_attn_layer_norm",
            "norm2": "final_layer_norm",
            "linear1": "fc1",
            "linear2": "fc2",
        },
    ),
    (
        r"transformer\.encoder\.text_layers\.(\d+)\.",
        r"model.encoder.layers.\1.text_enhancer_layer.",
        {
            "self_attn.in_proj": tuple(f"self_attn.{x}" for x in Q_K_V),
            "norm1": "layer_norm_before",
            "norm2": "layer_norm_after",
            "linear1": "fc1",
            "linear2": "fc2",
        },
    ),
    (
        r"transformer\.encoder\.fusion_layers\.(\d+)\.",
        r"model.encoder.layers.\1.fusion_layer.",
        {
            "gamma_v": "vision_param",
            "gamma_l": "text_param",
            "layer_norm_v": "layer_norm_vision",
            "layer_norm_l": "layer_norm_text",
            "attn.v_proj": "attn.vision_proj",
            "attn.l_proj": "attn.text_proj",
            "attn.values_v_proj": "attn.values_vision_proj",
            "attn.values_l_proj": "attn.values_text_proj",
            "attn.out_v_proj": "attn.out_vision_proj",
            "attn.out_l_proj": "attn.out_text_proj",
        },
    ),
    (
        r"transformer\.decoder\.layers\.(\d+)\.",
        r"model.decoder.layers.\1.",
        {
            "cross_attn": "encoder_attn",
            "norm1": "encoder_attn_layer_norm",
            "ca_text.in_proj": tuple(f"encoder_attn_text.{x}" for x in Q_K_V),
            "ca_text": "encoder_attn_text",
            "catext_norm": "encoder_attn_text_layer_norm",
            "self_attn.in_proj": tuple(f"self_attn.{x}" for x in Q_K_V),
            "norm2": "self_attn_layer_norm",
            "linear1": "fc1",
            "linear2": "fc2",
            "norm3": "final_layer_norm",
        },
    ),
    (
        r"transformer\.decoder\.",
        "model.decoder.",
        {"ref_point_head": "reference_points_head", "norm": "layer_norm"},
    ),
    (
        r"transformer\.",
        "model.",
        {
            "tgt_embed": "query_position_embeddings",
            "enc_out_bbox_embed": "encoder_output_bbox_embed",
        },
    ),
    (r"bbox_embed\.", "bbox_embed.", {}),
)
# In the files, not in the model: training's label noise, and tables that are computed.
UNUSED = re.compile(
    r"label_enc\.weight|(model\.text_backbone|bert)\.(pooler\..*|embeddings\.position_ids)"
    r"|.*relative_position_index|.*swin\.layernorm\.(weight|bias)"
)
# Hub files of GroundingDINO name the Swin as transformers 4 did.
LEGACY_SWIN = re.compile(r"model\.backbone\.conv_encoder\.model\.(embeddings|encoder)\.")
LEGACY_MODULES = (
    ("attention.self.query", "attention.q_proj"),
    ("attention.self.key", "attention.k_proj"),
    ("attention.self.value", "attention.v_proj"),
    ("attention.self.relative", "attention.relative_position_bias.relative"),
    ("attention.output.dense", "attention.o_proj"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
)


def swin_t_config() -> GroundingDinoConfig:
    """The architecture of groundingdino_swint_ogc.pth (GroundingDINO_SwinT_OGC.py)."""
    return GroundingDinoConfig(
        backbone_config=SwinConfig(
            embed_dim=96,
            depths=[2, 2, 6, 2],
            num_heads=[3, 6, 12, 24],
            window_size=7,
            out_indices=[2, 3, 4],
        ),
        text_config=BertConfig(),
    )


def official_names(key: str) -> tuple[str, ...]:
    """Where a key of the authors' file goes: one name here, three for a joint projection.

    Empty for what has no place here: unused, or unknown.
    """
    key = key.removeprefix("module.")
    # nn.MultiheadAttention's joint projection is a parameter, not a module.
    key = key.replace(".in_proj_weight", ".in_proj.weight").replace(
        ".in_proj_bias", ".in_proj.bias"
    )
    for prefix, target, modules in SECTIONS:
        match = re.match(prefix, key)
        if match is None:
            continue
        rest, leaf = key[match.end() :], ""
        while rest and rest not in modules:
            rest, _, tail = rest.rpartition(".")
            leaf = f".{tail}{leaf}"
        found = modules.get(rest, rest)
        ends = found if isinstance(found, tuple) else (found,)
        return tuple(match.expand(target) + (end + leaf).removeprefix(".") for end in ends)
    return ()


def folder_names(key: str) -> tuple[str, ...]:
    """Where a key of a transformers folder goes: its own name, a legacy Swin one renewed."""
    match = LEGACY_SWIN.match(key)
    if match is None:
        return (key,)
    rest = key[match.start(1) :]
    for old, new in LEGACY_MODULES:
        if old in rest:
            rest = rest.replace(old, new)
            break
    return (SWIN + rest,)


def load_official(
    path: Path, config: GroundingDinoConfig, source: Path, device: torch.device | str
) -> GroundingDinoForObjectDetection:
    """The model of the authors' file, frozen, fp32.

    Args: source: where the config came from, for an error.
    Raises: ValueError naming the file, and the key that is missing, unknown or of another shape.
    """
    return _fill(_build(config, source, device), official_tensors(path), official_names)


def load_folder(
    folder: Path, config: GroundingDinoConfig, device: torch.device | str
) -> GroundingDinoForObjectDetection:
    """The model of a folder in transformers' layout, as `load_official`."""
    model = _build(config, folder / "config.json", device)
    tensors = ((file, k, t) for file in weight_files(folder) for k, t in read_tensors(file))
    return _fill(model, tensors, folder_names)


def official_tensors(path: Path) -> Iterator[tuple[Path, str, Tensor]]:
    """The file's path, and its keys and tensors; mapped, not read, where the format allows."""
    if not path.is_file():
        raise ValueError(f"{path}: no such GroundingDINO checkpoint")
    content = read_pickle(path)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError(f"{path}: holds no 'model', as groundingdino_swint_ogc.pth does")
    for key, tensor in content["model"].items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{path}: {key!r} is a {type(tensor).__name__}, not a tensor")
        yield path, key, tensor


def _build(
    config: GroundingDinoConfig, source: Path, device: torch.device | str
) -> GroundingDinoForObjectDetection:
    model = build_model(
        AutoModelForZeroShotObjectDetection, config, source, device=device, dtype=torch.float32
    )
    # Swin's last norm serves classification; no detector file has it and nothing reads it.
    model.model.backbone.conv_encoder.model.swin.layernorm = nn.Identity()
    return model


def _fill(
    model: GroundingDinoForObjectDetection,
    tensors: Iterable[tuple[Path, str, Tensor]],
    names_of: Callable[[str], tuple[str, ...]],
) -> GroundingDinoForObjectDetection:
    wanted = model.state_dict()
    loaded: set[str] = set()
    filled: dict[int, str] = {}  # address -> name; the box heads of the layers share theirs
    file = Path()
    for file, key, tensor in tensors:
        if UNUSED.fullmatch(key.removeprefix("module.")):
            continue
        names = names_of(key)
        if not names or any(name not in wanted for name in names):
            raise ValueError(f"{file}: unexpected key {key!r}")
        if loaded.intersection(names):
            raise ValueError(f"{file}: key {key!r} is given twice")
        loaded.update(names)
        shape = (sum(len(wanted[n]) for n in names), *wanted[names[0]].shape[1:])
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise ValueError(
                f"{file}: {key!r} is {tuple(tensor.shape)} {tensor.dtype}, wanted {shape} floats"
            )
        for name, part in zip(names, tensor.chunk(len(names)), strict=True):
            place = wanted[name]
            tied = filled.setdefault(place.data_ptr(), name)
            if tied == name:
                place.copy_(part)
            elif not torch.equal(place, part.to(place)):
                raise ValueError(f"{file}: {key!r} differs from {tied!r}, to which it is tied")
    absent = [name for name, place in wanted.items() if place.data_ptr() not in filled]
    if absent:
        raise ValueError(f"{file}: no key for {absent[0]!r} ({len(absent)} missing in all)")
    return model
