"""ImageReward (arXiv:2304.05977): a human-preference score by BLIP, HPS's alternative.

BLIP's text encoder reads the prompt and, by cross-attention, the picture; a linear head makes a
number of its [CLS] state. The published ImageReward.pt is mapped onto transformers' BLIP modules,
because the `image-reward` package does not run beside transformers 5.
"""

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor, nn
from transformers import BlipConfig, BlipTextModel, BlipVisionModel

from rewards.bert_vocabulary import BERT_IDS, read_vocabulary
from rewards.checkpoint import build_model, load_weights, read_tensors
from rewards.preprocess import normalize, resize, shortest_edge_size

CLS, SEP = BERT_IDS["[CLS]"], BERT_IDS["[SEP]"]
# BLIP's own tokens, the two last rows of its embeddings. ImageReward leads with [CLS].
ADDED_TOKENS = ("[DEC]", "[ENC]")
MAX_TOKENS = 35  # of a prompt, [CLS] and [SEP] included; a longer one loses its tail
HEAD_WIDTH = 64
HEAD = (1024, 128, 64, 16, 1)
# The authors' statistics of the head's output, which bring scores to mean 0 and deviation 1.
SCORE_MEAN, SCORE_STD = 0.16717362830052426, 1.0333394966054072

Shapes = dict[str, tuple[int, ...]]
VISION, TEXT = "blip.visual_encoder.", "blip.text_encoder."
# (name here, the authors'), applied in turn to a name of ImageRewardModel's.
RENAMED = (
    ("vision.embeddings.class_embedding", VISION + "cls_token"),
    ("vision.embeddings.position_embedding", VISION + "pos_embed"),
    ("vision.embeddings.patch_embedding.", VISION + "patch_embed.proj."),
    ("vision.post_layernorm.", VISION + "norm."),
    ("vision.encoder.layers.", VISION + "blocks."),
    (".layer_norm1.", ".norm1."),
    (".layer_norm2.", ".norm2."),
    (".self_attn.qkv.", ".attn.qkv."),
    (".self_attn.projection.", ".attn.proj."),
    ("text.", TEXT),
    ("head.", "mlp.layers."),
)
# In the file, not in the score: the heads of BLIP's contrastive training.
UNUSED = re.compile(r"blip\.(vision|text)_proj\.(weight|bias)")


class ImageReward:
    """The human-preference expert by ImageReward; takes the published file and ones like it."""

    name = "imagereward"

    def __init__(
        self,
        checkpoint: Path | str,
        *,
        config: Path | str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 64,
    ) -> None:
        """
        Args:
            checkpoint: `ImageReward.pt` (THUDM/ImageReward), or another state dict with its
                names: width, depth, picture size and vocabulary are read off the shapes, and
                attention heads are 64 wide, as in BLIP. Its med_config.json is not needed.
            config: bert-base-uncased's vocabulary, which the file does not hold: its vocab.txt
                or tokenizer.json, or a folder with one of the two. None: the checkpoint's folder.
            dtype: of the matrix products, bf16 and fp16 through autocast; weights, the head and
                scores stay fp32.
            batch_size: pictures in one forward; bounds the memory.
        Raises: ValueError naming the file, and the key, that cannot be used.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        path = Path(checkpoint)
        if not path.is_file():
            raise ValueError(f"{path}: no such ImageReward checkpoint")
        shapes = {key: tuple(tensor.shape) for key, tensor in read_tensors(path)}
        architecture = _architecture(shapes, path)
        tokenizer = read_vocabulary(
            path.parent if config is None else Path(config),
            architecture.text_config.vocab_size,
            model="ImageReward",
            added=ADDED_TOKENS,
            exact=True,
        )
        # Prompts come back every epoch, and each of them in every picture of its group.
        self._encode = lru_cache(maxsize=65536)(
            lambda prompt: (
                CLS,
                *tokenizer.encode(prompt, add_special_tokens=False).ids[: MAX_TOKENS - 2],
                SEP,
            )
        )
        self._model: Any = build_model(
            ImageRewardModel, architecture, path, device=device, dtype=torch.float32
        )
        names = {official_name(key): key for key in self._model.state_dict()}
        absent = [key for key in names if key not in shapes]
        if absent:
            raise ValueError(f"{path}: key {absent[0]!r} is missing ({len(absent)} in all)")
        # A key of no name of ours becomes "", which no model has.
        load_weights(
            self._model, [path], lambda key: None if UNUSED.fullmatch(key) else names.get(key, "")
        )
        self._side = architecture.vision_config.image_size
        self._device = torch.device(device)
        self._dtype = dtype
        self._batch_size = batch_size

    def prepare(self, prompts: list[str], metadata: list[dict[str, Any]]) -> None:
        """Tokenise ahead, while the pictures are still being drawn; `score` finds it done."""
        for prompt in prompts:
            self._encode(prompt)

    @torch.inference_mode()
    def score(self, prompts: list[str], images: Tensor, metadata: list[dict[str, Any]]) -> Tensor:
        """ImageReward's score, (B,) fp32, about 0 on average and of deviation 1 over many pictures.

        Args:
            prompts: B; of a long one the first 33 tokens count. Metadata is not used.
            images: (B, 3, H, W) float in [0, 1].
        """
        scores = [torch.zeros(0, device=self._device)]
        for start in range(0, len(prompts), self._batch_size):
            part = slice(start, start + self._batch_size)
            ids, real = self._tokens(prompts[part])
            pixels = self.preprocess(images[part].to(self._device))
            with torch.autocast(
                self._device.type, self._dtype, enabled=self._dtype != torch.float32
            ):
                state = self._model(pixels, ids, real)
            scores.append((self._model.head(state.float()).squeeze(1) - SCORE_MEAN) / SCORE_STD)
        return torch.cat(scores).to(images.device)

    def preprocess(self, images: Tensor) -> Tensor:
        """The shorter side to the model's size, the middle cut out, CLIP's statistics.

        Args: images: (B, 3, H, W) float in [0, 1].
        Returns: (B, 3, S, S) fp32.
        """
        side = self._side
        size = shortest_edge_size(images.shape[-2], images.shape[-1], side)
        # Half an odd margin goes to the even number, as torchvision's CenterCrop rounds it.
        top, left = (round((edge - side) / 2) for edge in size)
        images = resize(images, size, mode="bicubic")[..., top : top + side, left : left + side]
        return normalize(images, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)

    def _tokens(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """(B, T) int64 ids, 0 on padding, and (B, T) bool, True on tokens, on the device.

        The authors pad to 35; a padded position is not attended, so its number is no matter.
        """
        rows = [self._encode(prompt) for prompt in prompts]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        real = torch.zeros_like(ids, dtype=torch.bool)
        for b, row in enumerate(rows):
            ids[b, : len(row)] = torch.tensor(row)
            real[b, : len(row)] = True
        return ids.to(self._device), real.to(self._device)


class ImageRewardModel(nn.Module):
    """BLIP's vision tower and text encoder, and the linear head, with ImageReward's names."""

    def __init__(self, config: BlipConfig) -> None:
        super().__init__()
        self.vision = BlipVisionModel(config.vision_config)
        self.text = BlipTextModel(config.text_config, add_pooling_layer=False)
        widths = (config.text_config.hidden_size, *HEAD)
        a, b, c, d, e = (nn.Linear(*pair) for pair in zip(widths, HEAD, strict=False))
        # Training has dropout in the places of the identities, and nothing else is in between.
        self.head = nn.Sequential(a, nn.Identity(), b, nn.Identity(), c, nn.Identity(), d, e)

    @classmethod
    def from_config(cls, config: BlipConfig, *, dtype: torch.dtype) -> "ImageRewardModel":
        """As transformers' Auto classes have it, for `build_model`."""
        return cls(config).to(dtype)

    def forward(self, pixels: Tensor, ids: Tensor, real: Tensor) -> Tensor:
        """(B, D), the [CLS] state of each prompt after it has read its picture.

        Args:
            pixels: (B, 3, S, S), preprocessed.
            ids: (B, T) int64.
            real: (B, T) bool, False on padding.
        """
        image = self.vision(pixels).last_hidden_state  # (B, P, D of the tower)
        text = self.text.embeddings(ids)
        hidden = real.logical_not()[:, None, None]
        bias = text.new_zeros(hidden.shape).masked_fill(hidden, torch.finfo(text.dtype).min)
        encoded = self.text.encoder(text, attention_mask=bias, encoder_hidden_states=image)
        return encoded.last_hidden_state[:, 0]


def official_name(key: str) -> str:
    """The name in ImageReward.pt of a weight of `ImageRewardModel`."""
    for ours, theirs in RENAMED:
        if ours.startswith("."):
            key = key.replace(ours, theirs)
        elif key.startswith(ours):
            key = theirs + key.removeprefix(ours)
    return key


def _architecture(shapes: Shapes, path: Path) -> BlipConfig:
    """The sizes of a file's model; those that no shape tells are the published ones."""

    def size(key: str, dimensions: int) -> tuple[int, ...]:
        if key not in shapes:
            raise ValueError(f"{path}: key {key!r} is missing")
        if len(shapes[key]) != dimensions:
            raise ValueError(f"{path}: {key!r} is {shapes[key]}, wanted {dimensions} dimensions")
        return shapes[key]

    def tower(embedding: str, layers: str, inner: str) -> dict[str, Any]:
        """A transformer's sizes: of an embedding's last axis, and a matrix of the first layer."""
        width = shapes[embedding][-1]
        if width == 0 or width % HEAD_WIDTH:
            raise ValueError(
                f"{path}: {embedding!r} is {shapes[embedding]}, wanted a width of whole "
                f"attention heads, {HEAD_WIDTH} each"
            )
        numbers = re.compile(re.escape(layers) + r"\.(\d+)\.")
        found = {match[1] for match in map(numbers.match, shapes) if match}
        return {
            "hidden_size": width,
            "intermediate_size": size(f"{layers}.0.{inner}", 2)[0],
            "num_hidden_layers": len(found),
            "num_attention_heads": width // HEAD_WIDTH,
        }

    patches, words = VISION + "pos_embed", TEXT + "embeddings.word_embeddings.weight"
    grid = round((size(patches, 3)[1] - 1) ** 0.5)
    patch = size(VISION + "patch_embed.proj.weight", 4)[-1]
    vocab_size = size(words, 2)[0]
    table = TEXT + "embeddings.position_embeddings.weight"
    positions = size(table, 2)[0]
    if positions < MAX_TOKENS:
        raise ValueError(f"{path}: {table!r} has {positions} rows, a prompt needs {MAX_TOKENS}")
    return BlipConfig(
        vision_config={
            **tower(patches, VISION + "blocks", "mlp.fc1.weight"),
            "image_size": grid * patch,
            "patch_size": patch,
            "layer_norm_eps": 1e-6,
        },
        text_config={
            **tower(words, TEXT + "encoder.layer", "intermediate.dense.weight"),
            "vocab_size": vocab_size,
            "max_position_embeddings": positions,
            "bos_token_id": None,  # nothing is generated
            "layer_norm_eps": 1e-12,
        },
    )
