"""A small random GroundingDINO, its weights under the authors' names, and the plain procedure."""

import re

import torch
from PIL import Image
from torchvision.ops import nms
from transformers import (
    BertConfig,
    BertTokenizer,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    SwinConfig,
)
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import (
    GroundingDinoImageProcessorPil,
)

from rewards.detection import questions_of
from tests.rewards.detector_problem import plain_score

EDGES = {"shortest_edge": 96, "longest_edge": 160}
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789'-,.?"


def write_vocabulary(path):
    """A vocab.txt that has bert-base-uncased's special tokens at their ids, words and letters."""
    words = ["cat", "dog", "red", "cube", "stop", "sign", "cafe", "pi", "##nata", "猫"]
    pieces = ["[PAD]"] + [f"[unused{i}]" for i in range(99)] + ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces += words + [c for c in LETTERS if c not in ".?"] + [f"##{c}" for c in LETTERS]
    pieces += [f"[unused{i}]" for i in range(99, 99 + 1012 - len(pieces))] + ["."]
    pieces += [f"[unused{i}]" for i in range(2000, 2000 + 1029 - len(pieces))] + ["?"]
    assert pieces.index(".") == 1012 and pieces.index("?") == 1029
    path.write_text("\n".join(pieces) + "\n", encoding="utf-8")
    return len(pieces)


def make_model(vocab_size):
    """A small random model whose boxes and confidences vary with picture and caption."""
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            image_size=64,
            embed_dim=16,
            depths=[1, 1, 2, 1],
            num_heads=[1, 2, 4, 8],
            window_size=4,
            out_indices=[2, 3, 4],
        ),
        text_config=BertConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
        ),
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_queries=20,
        disable_custom_kernels=True,
    )
    model = GroundingDinoForObjectDetection(config).eval()
    torch.manual_seed(0)  # after the initialisation, which draws as the version pleases
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.7 * parameter.shape[1] ** -0.5)
            elif "norm" not in name.lower():
                parameter.normal_(std=0.05)
        model.model.text_backbone.embeddings.word_embeddings.weight.normal_(std=0.3)
        model.model.query_position_embeddings.weight.normal_(std=2)
        for layer in model.model.encoder.layers:
            layer.fusion_layer.vision_param.fill_(0.3)
            layer.fusion_layer.text_param.fill_(0.3)
        # A logit is a product of decoder and text states. These constants make it
        # 0.8 of a centred product, less 0.4 * 0.5 * 32: about three boxes a phrase.
        model.model.decoder.layer_norm.weight.fill_(0.8)
        model.model.decoder.layer_norm.bias.fill_(-0.4)
        model.model.encoder.layers[-1].text_enhancer_layer.layer_norm_after.bias.fill_(0.5)
    return model


def official_state(model):
    """The model's weights under the authors' names, as groundingdino_swint_ogc.pth holds them."""
    ours, official = model.state_dict(), {}

    def take(theirs, name):
        found = {k: v for k, v in ours.items() if k == name or k.startswith(name + ".")}
        assert found, name
        for key, value in found.items():
            official["module." + theirs + key.removeprefix(name)] = value.clone()

    def join(theirs, names, separator="."):
        for kind in ("weight", "bias"):
            rows = torch.cat([ours[f"{name}.{kind}"] for name in names])
            official[f"module.{theirs}{separator}{kind}"] = rows

    def attention(theirs, name):
        join(f"{theirs}.in_proj", [f"{name}.{x}" for x in ("query", "key", "value")], "_")
        take(f"{theirs}.out_proj", f"{name}.out_proj")

    config = model.config
    backbone = "model.backbone.conv_encoder.model"
    take("backbone.0.patch_embed.proj", f"{backbone}.swin.embeddings.patch_embeddings.projection")
    take("backbone.0.patch_embed.norm", f"{backbone}.swin.embeddings.norm")
    for i, depth in enumerate(config.backbone_config.depths):
        for j in range(depth):
            old, new = (
                f"backbone.0.layers.{i}.blocks.{j}",
                f"{backbone}.swin.encoder.layers.{i}.blocks.{j}",
            )
            take(f"{old}.norm1", f"{new}.layernorm_before")
            take(f"{old}.norm2", f"{new}.layernorm_after")
            join(f"{old}.attn.qkv", [f"{new}.attention.{x}_proj" for x in "qkv"])
            take(f"{old}.attn.proj", f"{new}.attention.o_proj")
            table = "relative_position_bias_table"
            take(f"{old}.attn.{table}", f"{new}.attention.relative_position_bias.{table}")
            index = torch.zeros(16, 16, dtype=torch.int64)
            official[f"module.{old}.attn.relative_position_index"] = index
            take(f"{old}.mlp", f"{new}.mlp")
        if i < len(config.backbone_config.depths) - 1:
            take(
                f"backbone.0.layers.{i}.downsample",
                f"{backbone}.swin.encoder.layers.{i}.downsample",
            )
    for i in (1, 2, 3):
        take(f"backbone.0.norm{i}", f"{backbone}.hidden_states_norms.stage{i + 1}")
    take("bert", "model.text_backbone")
    official["module.bert.pooler.dense.weight"] = torch.zeros(32, 32)
    official["module.bert.embeddings.position_ids"] = torch.arange(512)[None]
    official["module.label_enc.weight"] = torch.zeros(5, 32)
    take("feat_map", "model.text_projection")
    take("input_proj", "model.input_proj_vision")
    take("transformer.level_embed", "model.level_embed")
    take("transformer.tgt_embed", "model.query_position_embeddings")
    take("transformer.enc_output", "model.enc_output")
    take("transformer.enc_output_norm", "model.enc_output_norm")
    take("transformer.enc_out_bbox_embed", "model.encoder_output_bbox_embed")
    for i in range(config.encoder_layers):
        layer = f"model.encoder.layers.{i}"
        old, new = f"transformer.encoder.layers.{i}", f"{layer}.deformable_layer"
        take(f"{old}.self_attn", f"{new}.self_attn")
        take(f"{old}.norm1", f"{new}.self_attn_layer_norm")
        take(f"{old}.norm2", f"{new}.final_layer_norm")
        take(f"{old}.linear1", f"{new}.fc1")
        take(f"{old}.linear2", f"{new}.fc2")
        old, new = f"transformer.encoder.text_layers.{i}", f"{layer}.text_enhancer_layer"
        attention(f"{old}.self_attn", f"{new}.self_attn")
        take(f"{old}.norm1", f"{new}.layer_norm_before")
        take(f"{old}.norm2", f"{new}.layer_norm_after")
        take(f"{old}.linear1", f"{new}.fc1")
        take(f"{old}.linear2", f"{new}.fc2")
        old, new = f"transformer.encoder.fusion_layers.{i}", f"{layer}.fusion_layer"
        take(f"{old}.gamma_v", f"{new}.vision_param")
        take(f"{old}.gamma_l", f"{new}.text_param")
        take(f"{old}.layer_norm_v", f"{new}.layer_norm_vision")
        take(f"{old}.layer_norm_l", f"{new}.layer_norm_text")
        for a, b in (("v", "vision"), ("l", "text")):
            take(f"{old}.attn.{a}_proj", f"{new}.attn.{b}_proj")
            take(f"{old}.attn.values_{a}_proj", f"{new}.attn.values_{b}_proj")
            take(f"{old}.attn.out_{a}_proj", f"{new}.attn.out_{b}_proj")
    for i in range(config.decoder_layers):
        old, new = f"transformer.decoder.layers.{i}", f"model.decoder.layers.{i}"
        take(f"{old}.cross_attn", f"{new}.encoder_attn")
        take(f"{old}.norm1", f"{new}.encoder_attn_layer_norm")
        attention(f"{old}.ca_text", f"{new}.encoder_attn_text")
        take(f"{old}.catext_norm", f"{new}.encoder_attn_text_layer_norm")
        attention(f"{old}.self_attn", f"{new}.self_attn")
        take(f"{old}.norm2", f"{new}.self_attn_layer_norm")
        take(f"{old}.linear1", f"{new}.fc1")
        take(f"{old}.linear2", f"{new}.fc2")
        take(f"{old}.norm3", f"{new}.final_layer_norm")
    take("transformer.decoder.ref_point_head", "model.decoder.reference_points_head")
    take("transformer.decoder.norm", "model.decoder.layer_norm")
    take("transformer.decoder.bbox_embed", "model.decoder.bbox_embed")
    take("bbox_embed", "bbox_embed")
    return official


class Plain:
    """The published procedure: PIL, one picture and one caption at a time, fp32."""

    def __init__(self, model, folder):
        self.model = model
        self.tokenizer = BertTokenizer(vocab=str(folder / "vocab.txt"), do_lower_case=True)
        self.processor = GroundingDinoImageProcessorPil(size=EDGES)

    @torch.no_grad()
    def score(self, image, row, attributes=False):
        height, width = image.shape[1:]
        names = questions_of([row], attributes=attributes).names[0]
        clean = [" ".join(re.sub(r"[.?]", " ", name).split()) for name in names]
        caption = " . ".join(name for name in clean if name) + " ."
        tokens = self.tokenizer(caption, return_tensors="pt")
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        inputs = self.processor(Image.fromarray(pixels), return_tensors="pt")
        out = self.model(**inputs, **tokens)
        probabilities = out.logits[0].sigmoid()
        found, start = {}, 0
        for name, text in zip(names, clean, strict=True):
            found[name] = []
            if not text:
                continue
            places = {tokens.char_to_token(0, start + i) for i in range(len(text))} - {None}
            start += len(text) + 3
            scores = probabilities[:, sorted(places)].mean(1)
            kept = scores > 0.3
            cx, cy, w, h = out.pred_boxes[0, kept].unbind(-1)
            boxes = torch.stack((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), -1)
            boxes = boxes * torch.tensor([width, height, width, height])
            found[name] = boxes[nms(boxes, scores[kept], 0.5)].tolist()
        return plain_score(row, found, size=(height, width), attributes=attributes), found
