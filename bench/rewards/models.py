"""Random checkpoints of the experts' real classes, in the layouts that they are published in.

Small enough for a CPU. The weights are drawn wide, so that scores depend on picture and prompt:
with transformers' own initialisation every picture would get the same one.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import open_clip
import torch
from open_clip.model import CLIP
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    BertConfig,
    BlipConfig,
    BlipForQuestionAnswering,
    CLIPTokenizer,
    GitConfig,
    GitForCausalLM,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Owlv2Config,
    Owlv2ForObjectDetection,
    SwinConfig,
)

from rewards import HPS, RewardExpert
from rewards.blip import BlipVQA
from rewards.gdino import GroundingDino
from rewards.git import GitVQA
from rewards.image_reward import HEAD_WIDTH, ImageReward, ImageRewardModel, official_name
from rewards.orm import AFTER_IMAGE, BEFORE_IMAGE, ORM
from rewards.owl import Owl

Made = Callable[..., RewardExpert]  # a class with its files; takes device and dtype
SIDE = 64  # pixels of the towers' input
PATCH = 8
WIDTH = 128
LAYERS = 4
HEADS = 4
WORDS = "yes no a of the two red blue round wooden cat dog car cup and left above".split()
# bert-base-uncased's ids, which GroundingDINO finds the phrases of a caption by.
FIXED = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, ".": 1012, "?": 1029}
VOCABULARY = 1100
CLIP_PICTURES = {
    "do_resize": True,
    "size": {"height": SIDE, "width": SIDE},
    "do_center_crop": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "resample": 3,
}


def write(name: str, folder: Path) -> Made:
    """Write a checkpoint of the expert called `name`. Returns: what loads it, with its options."""
    builders = {
        "hps": _hps,
        "imagereward": _imagereward,
        "gdino": _gdino,
        "owl": _owl,
        "git": _git,
        "blip": _blip,
        "orm": _orm,
    }
    return builders[name](folder)


def stir(model: nn.Module, gain: float) -> nn.Module:
    """The model with weights of variance gain^2 / fan-in, norms and biases moved a little."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            else:
                table = "embedding" in name and "patch" not in name
                fan_in = parameter.shape[-1] if table else parameter[0].numel()
                parameter.normal_(std=gain * fan_in**-0.5)
    return model.eval()


def _hps(folder: Path) -> Made:
    config = {
        "embed_dim": WIDTH,
        "vision_cfg": {
            "image_size": SIDE,
            "patch_size": PATCH,
            "layers": LAYERS,
            "width": WIDTH,
            "head_width": WIDTH // HEADS,
        },
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": WIDTH,
            "heads": HEADS,
            "layers": LAYERS,
        },
    }
    (folder / "bench-hps.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "bench-hps.json")
    model = stir(CLIP(**config), 1.5)
    torch.save({"state_dict": model.state_dict()}, folder / "hps.pt")
    return partial(HPS, folder / "hps.pt", model_name="bench-hps")


def _write_bert(folder: Path) -> None:
    """bert-base-uncased's vocabulary, as far as it matters here."""
    words = [f"[unused{i}]" for i in range(VOCABULARY)]
    for word, i in FIXED.items():
        words[i] = word
    for i, word in enumerate(WORDS):
        words[200 + i] = word
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _write_pictures(folder: Path, settings: dict) -> None:
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def _tower() -> dict:
    return {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "image_size": SIDE,
        "patch_size": PATCH,
    }


def _text() -> dict:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 64,
    }


def _git(folder: Path) -> Made:
    _write_bert(folder)
    _write_pictures(folder, CLIP_PICTURES)
    config = GitConfig(vision_config=_tower(), pad_token_id=0, **_text())
    stir(GitForCausalLM(config), 1.5).save_pretrained(folder)
    return partial(GitVQA, folder)


def _blip(folder: Path) -> Made:
    _write_bert(folder)
    _write_pictures(folder, CLIP_PICTURES)
    special = {"bos_token_id": 101, "sep_token_id": 102, "eos_token_id": 102, "pad_token_id": 0}
    text = {**_text(), **special, "encoder_hidden_size": WIDTH}
    config = BlipConfig(text_config=text, vision_config=_tower())
    stir(BlipForQuestionAnswering(config), 1.5).save_pretrained(folder)
    return partial(BlipVQA, folder)


def _imagereward(folder: Path) -> Made:
    _write_bert(folder)
    heads = {"num_attention_heads": WIDTH // HEAD_WIDTH}
    text = _text() | heads | {"vocab_size": VOCABULARY + 2, "bos_token_id": VOCABULARY}
    model = stir(
        ImageRewardModel(BlipConfig(text_config=text, vision_config=_tower() | heads)), 1.5
    )
    state = {official_name(key): value for key, value in model.state_dict().items()}
    torch.save(state, folder / "ImageReward.pt")
    return partial(ImageReward, folder / "ImageReward.pt")


def _gdino(folder: Path) -> Made:
    _write_bert(folder)
    pictures = {"size": {"shortest_edge": 2 * SIDE, "longest_edge": 4 * SIDE}}
    _write_pictures(folder, CLIP_PICTURES | pictures)
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            image_size=2 * SIDE,
            embed_dim=WIDTH // 4,
            depths=[1, 1, 1, 1],
            num_heads=[1, 2, 4, 4],
            window_size=4,
            out_features=["stage2", "stage3", "stage4"],
        ),
        text_config=BertConfig(**_text() | {"max_position_embeddings": 256}),
        d_model=WIDTH,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=2 * WIDTH,
        decoder_ffn_dim=2 * WIDTH,
        num_queries=50,
        disable_custom_kernels=True,
    )
    model = stir(GroundingDinoForObjectDetection(config), 0.6)
    with torch.no_grad():
        for layer in model.model.encoder.layers:
            layer.fusion_layer.vision_param.fill_(0.3)
            layer.fusion_layer.text_param.fill_(0.3)
        # The product of decoder and text states is the logit: this sets its spread.
        model.model.decoder.layer_norm.weight.fill_(0.3)
    model.save_pretrained(folder)
    return partial(GroundingDino, folder)


def _owl(folder: Path) -> Made:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    CLIPTokenizer(vocab=vocabulary, merges=[], pad_token="!").save_pretrained(folder)
    _write_pictures(folder, CLIP_PICTURES)
    text = _text() | {"vocab_size": len(vocabulary)}
    config = Owlv2Config(text_config=text, vision_config=_tower(), projection_dim=WIDTH)
    model = stir(Owlv2ForObjectDetection(config), 1.0)
    with torch.no_grad():
        # The logit is a cosine plus the shift, times 1 + elu(scale): a few boxes a name.
        model.class_head.logit_shift.bias.fill_(-0.6)
        model.class_head.logit_scale.bias.fill_(5)
    model.save_pretrained(folder)
    return partial(Owl, folder)


def _orm(folder: Path) -> Made:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator([BEFORE_IMAGE, AFTER_IMAGE, *WORDS], trainer)
    core.add_tokens(["yes", "no"])
    core.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    _write_pictures(folder, CLIP_PICTURES)
    text = _text() | {
        "model_type": "qwen2",
        "vocab_size": core.get_vocab_size(),
        "num_key_value_heads": HEADS,
        "max_position_embeddings": 512,
    }
    tower = _tower() | {"model_type": "siglip_vision_model", "vision_use_head": False}
    config = LlavaOnevisionConfig(
        text_config=text,
        vision_config=tower,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )
    stir(LlavaOnevisionForConditionalGeneration(config), 1.5).save_pretrained(folder)
    return partial(ORM, folder)
