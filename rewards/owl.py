"""OWLv2 in the detector's slot (arXiv:2306.09683): an open-vocabulary detector for named objects.

Each name is a query of its own, "a photo of a cat", so every distinct name of a batch is encoded
once however many pictures ask for it, and every picture once however many names it is asked.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForZeroShotObjectDetection, Owlv2Config

from rewards.checkpoint import (
    build_model,
    config_from,
    load_weights,
    read_config,
    read_image_settings,
    read_tokenizer,
    weight_files,
)
from rewards.detection import Detections, questions_of, to_corners
from rewards.detector import DetectorExpert
from rewards.preprocess import blur_and_resize, normalize, pad_to_square


class Owl(DetectorExpert):
    """The detector expert on OWLv2, with the formulas and options of the GroundingDINO one."""

    name = "owl"

    def __init__(
        self,
        checkpoint: Path | str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        box_threshold: float = 0.1,
        iou_threshold: float = 0.5,
        attributes: bool = False,
        query: str = "a photo of a {}",
        batch_size: int = 16,
    ) -> None:
        """
        Args:
            checkpoint: a transformers folder of model_type "owlv2", as
                google/owlv2-base-patch16-ensemble: config.json, preprocessor_config.json, the
                tokenizer's files, weights as safetensors or pytorch_model.bin.
            dtype: of the matrix products, bf16 and fp16 through autocast; weights, boxes and
                scores stay fp32.
            box_threshold: a box shows a name above this confidence; the default is
                transformers'.
            iou_threshold: of two boxes of a name that overlap more, the surer one stays.
            attributes: look for "red cube" where a row has it, not for "cube".
            query: what the model is asked, with {} for the name.
            batch_size: pictures in one forward; bounds the memory.
        Raises: ValueError naming the file, and the key, that cannot be used.
        """
        super().__init__(
            device=device,
            dtype=dtype,
            box_threshold=box_threshold,
            iou_threshold=iou_threshold,
            attributes=attributes,
            batch_size=batch_size,
        )
        if query.count("{}") != 1:
            raise ValueError(f"query must hold one {{}} for the name, got {query!r}")
        folder = Path(checkpoint)
        config = config_from(Owlv2Config, read_config(folder, "owlv2"), folder)
        side = config.vision_config.image_size
        self._side, self._mean, self._std = side, *_image_settings(folder, side)
        tokenizer = read_tokenizer(folder, config)
        limit = config.text_config.max_position_embeddings
        # Names come back every epoch, and each of them in every picture of its group.
        self._encode = lru_cache(maxsize=65536)(
            lambda name: tuple(
                tokenizer(query.format(name), truncation=True, max_length=limit).input_ids
            )
        )
        source = folder / "config.json"
        self._model: Any = build_model(
            AutoModelForZeroShotObjectDetection, config, source, device=device, dtype=torch.float32
        )
        load_weights(self._model, weight_files(folder))

    def prepare(self, prompts: list[str], metadata: list[dict[str, Any]]) -> None:
        """Tokenise ahead, while the pictures are still being drawn; `score` finds it done."""
        for names in questions_of(metadata, attributes=self._attributes).names:
            for name in names:
                self._encode(name)

    @torch.inference_mode()
    def detect(self, images: Tensor, names: list[list[str]]) -> Detections:
        """Where each picture shows each of its names; repetitions are not suppressed.

        Args:
            images: (B, 3, H, W) float in [0, 1].
            names: B lists of what to look for.
        Returns: on the expert's device.
        """
        distinct = list(dict.fromkeys(name for row in names for name in row))
        place = {name: i for i, name in enumerate(distinct)}
        width = max(map(len, names), default=0)
        index = torch.full((len(names), width), -1)
        for b, row in enumerate(names):
            index[b, : len(row)] = torch.tensor([place[name] for name in row])
        index = index.to(self._device)
        boxes, scores = [], []
        with self._autocast():
            queries = self._encode_names(distinct)  # (N, D)
        for start in range(0, len(names), self._batch_size):
            part = slice(start, start + self._batch_size)
            pixels, asked = self.preprocess(images[part].to(self._device)), index[part]
            with self._autocast():
                features, _ = self._model.image_embedder(pixels)  # (b, h, w, D)
                # Names that a picture is not asked get the lowest logit.
                logits, _ = self._model.class_predictor(
                    features.flatten(1, 2), queries[asked.clamp(min=0)], asked >= 0
                )  # (b, Q, P)
            confidence = logits.float().sigmoid().mT
            scores.append(confidence.where(confidence > self._box_threshold, 0.0))
            features = features.float()
            boxes.append(self._model.box_predictor(features.flatten(1, 2), features))
        # Boxes are shares of the padded square, whose side is the longer one of the picture.
        side = max(images.shape[-2:])
        return Detections(to_corners(torch.cat(boxes), width=side, height=side), torch.cat(scores))

    def preprocess(self, images: Tensor) -> Tensor:
        """Padded below or to the right to a square, resized to the model's, CLIP's statistics.

        Args: images: (B, 3, H, W) float in [0, 1].
        Returns: (B, 3, S, S) fp32.
        """
        square = pad_to_square(images.float(), centered=False)
        return normalize(blur_and_resize(square, self._side), self._mean, self._std)

    def _encode_names(self, names: list[str]) -> Tensor:
        """(N, D) text features of N names, padded to the longest."""
        rows = [self._encode(name) for name in names]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, tokens, ones in zip(rows, ids, mask, strict=True):
            tokens[: len(row)], ones[: len(row)] = torch.tensor(row), 1
        text = self._model.owlv2.text_model(
            input_ids=ids.to(self._device), attention_mask=mask.to(self._device)
        )
        return self._model.owlv2.text_projection(text.pooler_output)


def _image_settings(folder: Path, side: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation; the size must be the one that the model was built for."""
    settings = read_image_settings(folder)
    try:
        size = {int(settings["size"][key]) for key in ("height", "width")}
        mean, std = ([float(x) for x in settings[key]] for key in ("image_mean", "image_std"))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}: image processor settings: {error!r}") from error
    if size != {side}:
        raise ValueError(
            f"{folder}: image processor settings give {sorted(size)} pixels, config.json wants {side}"
        )
    return mean, std
