"""Human preference score (HPSv2): the cosine of a tuned CLIP's image and text features."""

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.model import CLIP, CustomTextCLIP
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from rewards.checkpoint import read_pickle

CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE = (
    "open_clip_config.json",
    "open_clip_model.safetensors",
    "tokenizer.json",
)


class HPS:
    """The human-preference expert; one class for the published checkpoint and local folders."""

    name = "hps"

    def __init__(
        self,
        checkpoint: Path | str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        model_name: str = "ViT-H-14",
        batch_size: int = 64,
    ) -> None:
        """
        Args:
            checkpoint: `HPS_v2.1_compressed.pt` or another file holding {"state_dict": ...}, or
                a folder with open_clip_config.json, open_clip_model.safetensors, tokenizer.json.
            device: where it runs.
            dtype: of the matrix products, bf16 and fp16 through autocast, as T2I-R1 runs it;
                weights and scores stay fp32.
            model_name: open_clip's name for the architecture of a file; a folder names its own.
            batch_size: pictures in one forward; bounds the memory.
        Raises: ValueError naming the file that is missing, unreadable or of another shape.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        path = Path(checkpoint)
        if path.is_dir():
            model, tokenize, preprocess = _load_folder(path)
        else:
            model, tokenize, preprocess = _load_file(path, model_name)
        self._model = model.to(device).eval().requires_grad_(False)
        # Prompts come back every epoch, and each of them in every picture of its group.
        self._encode = lru_cache(maxsize=65536)(lambda prompt: tokenize([prompt])[0])
        self._device = torch.device(device)
        self._dtype = dtype
        self._batch_size = batch_size
        size = model.visual.image_size
        self._image_size = size if isinstance(size, int) else size[0]
        mean, std = preprocess["mean"], preprocess["std"]
        self._mean = torch.tensor(mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(std, device=device).view(1, 3, 1, 1)

    def prepare(self, prompts: list[str], metadata: list[dict[str, Any]]) -> None:
        """Tokenise ahead, while the pictures are still being drawn; `score` finds it done."""
        for prompt in prompts:
            self._encode(prompt)

    @torch.inference_mode()
    def score(self, prompts: list[str], images: Tensor, metadata: list[dict[str, Any]]) -> Tensor:
        """Cosine of picture and prompt, (B,) fp32 in [-1, 1]. Metadata is not used.

        Args:
            prompts: B; each distinct one is encoded once.
            images: (B, 3, H, W) float in [0, 1].
        """
        distinct = list(dict.fromkeys(prompts))
        row = {prompt: i for i, prompt in enumerate(distinct)}
        tokens = torch.stack([self._encode(prompt) for prompt in distinct]).to(self._device)
        index = torch.tensor([row[p] for p in prompts], device=self._device)
        with torch.autocast(self._device.type, self._dtype, enabled=self._dtype != torch.float32):
            text = F.normalize(self._model.encode_text(tokens).float(), dim=-1)  # (distinct, D)
            parts = [
                self._model.encode_image(self.preprocess(part.to(self._device)))
                for part in images.split(self._batch_size)
            ]
        image = F.normalize(torch.cat(parts).float(), dim=-1)  # (B, D)
        return (image * text[index]).sum(-1).to(images.device)

    def preprocess(self, images: Tensor) -> Tensor:
        """HPSv2's own: longest side to the model's size, zero pad, then normalise.

        open_clip's default crops instead, which changes the score of a wide picture.

        Args: images: (B, 3, H, W) float in [0, 1].
        Returns: (B, 3, S, S) fp32.
        """
        size = self._image_size
        height, width = images.shape[-2:]
        images = images.float()
        if max(height, width) != size:
            scale = size / max(height, width)
            height, width = round(height * scale), round(width * scale)
            images = F.interpolate(
                images, (height, width), mode="bicubic", antialias=True, align_corners=False
            )
        left, top = (size - width) // 2, (size - height) // 2
        images = F.pad(images, (left, size - width - left, top, size - height - top))
        return (images - self._mean) / self._std


Loaded = tuple[CLIP | CustomTextCLIP, Callable[[list[str]], Tensor], dict[str, Any]]


def _load_file(path: Path, model_name: str) -> Loaded:
    if not path.is_file():
        raise ValueError(f"{path}: no such HPS checkpoint")
    config = open_clip.get_model_config(model_name)
    if config is None:
        raise ValueError(f"open_clip knows no model {model_name!r}")
    content = read_pickle(path)
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise ValueError(f"{path}: holds no 'state_dict'")
    model = _build(config)
    _fill(model, content["state_dict"], path)
    mean_std = {"mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD}
    return model, open_clip.get_tokenizer(model_name), mean_std


def _load_folder(folder: Path) -> Loaded:
    for name in (CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: missing from the HPS folder")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
        model_config, preprocess = config["model_cfg"], config["preprocess_cfg"]
        model = _build(model_config)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG_FILE}: not an open_clip config ({error!r})") from error
    try:
        state = load_file(folder / WEIGHTS_FILE)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS_FILE}: not a safetensors file ({error})") from error
    _fill(model, state, folder / WEIGHTS_FILE)
    tokenize = FolderTokenizer(
        folder / TOKENIZER_FILE, context_length=model_config["text_cfg"]["context_length"]
    )
    return model, tokenize, preprocess


def _build(config: dict[str, Any]) -> CLIP | CustomTextCLIP:
    """The architecture, with random weights that are about to be overwritten."""
    config = dict(config)
    return (CustomTextCLIP if config.pop("custom_text", False) else CLIP)(**config)


def _fill(model: torch.nn.Module, state: dict[str, Tensor], path: Path) -> None:
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    for key, value in state.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise ValueError(f"{path}: {key!r} is no weight but {type(value).__name__}")
    given = {key: tuple(value.shape) for key, value in state.items()}
    for key in wanted.keys() | given.keys():
        if wanted.get(key) != given.get(key):
            raise ValueError(
                f"{path}: weight {key!r} is {given.get(key, 'absent')}, "
                f"the model has {wanted.get(key, 'none of that name')}"
            )
    model.load_state_dict(state)


class FolderTokenizer:
    """A `tokenizer.json` used the way CLIP's text tower needs it.

    The end token is one id past the tokenizer's own: CLIP pools at the highest id. Padding
    is 0, which the causal mask keeps the end token from seeing.
    """

    def __init__(self, path: Path, *, context_length: int) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        # The tokenizers library raises a bare Exception for a file it cannot read.
        except Exception as error:
            raise ValueError(f"{path}: not a tokenizers file ({error})") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.context_length = context_length
        self.end_id = self._tokenizer.get_vocab_size()
        self.vocab_size = self.end_id + 1

    def __call__(self, texts: list[str]) -> Tensor:
        """(B, context_length) int64: ids, end token, zeros. A longer text loses its tail."""
        tokens = torch.zeros(len(texts), self.context_length, dtype=torch.int64)
        encoded = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        for row, encoding in zip(tokens, encoded, strict=True):
            ids = [*encoding.ids[: self.context_length - 1], self.end_id]
            row[: len(ids)] = torch.tensor(ids)
        return tokens
