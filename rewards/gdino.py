"""GroundingDINO as the detector expert (arXiv:2303.05499): boxes for named phrases, batched.

A caption lists what to look for, "red cube . cat ."; each phrase's confidence in a box is the
mean probability of the phrase's tokens there, as in the authors' given-phrase mode and T2I-R1's
reward. Departures from T2I-R1's `gdino` reward, apart from those of rewards/detection.py: all
words of a multi-word phrase count, not its first and last alone; the phrases' places are known
from building the caption, not read from the prompt file by `eval`; names are cut free of "." and
"?", which would end the phrase inside the name.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GroundingDinoConfig
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.modeling_outputs import BaseModelOutput

from rewards.bert_vocabulary import BERT_IDS, read_vocabulary
from rewards.checkpoint import config_from, read_config, read_image_settings, read_json
from rewards.detection import Detections, questions_of, to_corners
from rewards.detector import DetectorExpert
from rewards.gdino_weights import load_folder, load_official, swin_t_config
from rewards.preprocess import normalize, resize, shortest_edge_size

# transformers finds the phrases of a caption by bert-base-uncased's ids, whatever the vocabulary.
CLS, SEP, STOP = BERT_IDS["[CLS]"], BERT_IDS["[SEP]"], BERT_IDS["."]
SETTINGS_FILE = "preprocessor_config.json"
PUBLISHED_SETTINGS = {
    "size": {"shortest_edge": 800, "longest_edge": 1333},
    "image_mean": IMAGENET_DEFAULT_MEAN,
    "image_std": IMAGENET_DEFAULT_STD,
}


class Captions(NamedTuple):
    """B captions of up to L tokens that list up to P phrases each."""

    ids: Tensor
    """(B, L) int64, 0 on padding."""
    mask: Tensor
    """(B, L) int64, 1 on tokens."""
    phrases: Tensor
    """(B, P, L) fp32, 1 / its number of tokens on each token of a phrase; padding is all zeros."""


class GroundingDino(DetectorExpert):
    """The detector expert; one class for the authors' file and transformers' folders."""

    name = "gdino"

    def __init__(
        self,
        checkpoint: Path | str,
        *,
        config: Path | str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        box_threshold: float = 0.3,
        iou_threshold: float = 0.5,
        attributes: bool = False,
        batch_size: int = 16,
    ) -> None:
        """
        Args:
            checkpoint: `groundingdino_swint_ogc.pth`, or a transformers folder of model_type
                "grounding-dino" as IDEA-Research/grounding-dino-tiny: config.json, weights as
                safetensors or pytorch_model.bin.
            config: bert-base-uncased's vocabulary, which neither layout can do without: its
                vocab.txt or tokenizer.json, or a folder with one of the two. None: the folder
                of the checkpoint. A folder given for a .pth may also hold a config.json of
                model_type "grounding-dino", for another architecture than the Swin-T one, and
                a preprocessor_config.json, for other sizes than 800 by at most 1333.
                The authors' GroundingDINO_SwinT_OGC.py is neither needed nor read.
            dtype: of the matrix products; bf16 and fp16 through autocast. Weights, coordinates
                and scores stay fp32: transformers would keep box coordinates in the weights'
                dtype, where bf16 moves them by pixels. On the tests' random model fp16 changes
                2 rewards of 64 and bf16 6 (a reward is a step function of near-ties), hence
                fp32 unless told.
            box_threshold: a box shows a phrase above this confidence.
            iou_threshold: of two boxes of a phrase that overlap more, the surer one stays.
            attributes: look for "red cube" where a row has it; False looks for "cube", as the
                paper does, which leaves attributes to the VQA expert.
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
        path = Path(checkpoint)
        # First, or a wrong path would be reported as a missing vocabulary.
        if not path.exists():
            raise ValueError(f"{path}: no such GroundingDINO checkpoint")
        extra = Path(config) if config is not None else path if path.is_dir() else path.parent
        architecture = _architecture(path) if path.is_dir() else _architecture_beside(extra)
        vocab_size = architecture.text_config.vocab_size
        tokenizer = read_vocabulary(extra, vocab_size, model="GroundingDINO")
        # Prompts come back every epoch, and each of them in every picture of its group.
        self._encode = lru_cache(maxsize=65536)(
            lambda name: tuple(tokenizer.encode(_phrase(name), add_special_tokens=False).ids)
        )
        if path.is_dir():
            settings = read_image_settings(path)
            model = load_folder(path, architecture, device)
        else:
            beside = (extra / SETTINGS_FILE).is_file()
            settings = read_image_settings(extra) if beside else PUBLISHED_SETTINGS
            model = load_official(path, architecture, extra / "config.json", device)
        self._edges, self._mean, self._std = _image_settings(settings, path)
        self._max_tokens = architecture.max_text_len
        model.model.text_backbone = OncePerCaption(model.model.text_backbone)
        self._model: Any = model

    def prepare(self, prompts: list[str], metadata: list[dict[str, Any]]) -> None:
        """Tokenise ahead, while the pictures are still being drawn; `score` finds it done."""
        for names in questions_of(metadata, attributes=self._attributes).names:
            self._caption(names)

    @torch.inference_mode()
    def detect(self, images: Tensor, names: list[list[str]]) -> Detections:
        """Where each picture shows each of its names; repetitions are not suppressed.

        Args:
            images: (B, 3, H, W) float in [0, 1].
            names: B lists of what to look for.
        Returns: on the expert's device; every box above the threshold for some name has scores.
        """
        width = max(map(len, names), default=0)
        boxes, scores = [], []
        for start in range(0, len(names), self._batch_size):
            part = slice(start, start + self._batch_size)
            captions = self.captions(names[part], width)
            pixels = self.preprocess(images[part].to(self._device))
            with self._autocast():
                out = self._model(
                    pixel_values=pixels, input_ids=captions.ids, attention_mask=captions.mask
                )
            # Columns past the tokens are padding up to the model's longest text.
            tokens = out.logits[..., : captions.ids.shape[1]].float().sigmoid()  # (b, Q, L)
            confidence = captions.phrases @ tokens.mT  # (b, P, Q)
            scores.append(confidence.where(confidence > self._box_threshold, 0.0))
            boxes.append(out.pred_boxes)
        height, wide = images.shape[-2:]
        return Detections(
            to_corners(torch.cat(boxes), width=wide, height=height), torch.cat(scores)
        )

    def preprocess(self, images: Tensor) -> Tensor:
        """The shorter side to 800 unless the longer one passes 1333, then ImageNet's statistics.

        Args: images: (B, 3, H, W) float in [0, 1].
        Returns: (B, 3, H', W') fp32.
        """
        size = shortest_edge_size(images.shape[-2], images.shape[-1], *self._edges)
        return normalize(resize(images, size), self._mean, self._std)

    def captions(self, names: list[list[str]], width: int) -> Captions:
        """Captions on the expert's device.

        Args:
            names: B lists of names.
            width: P, at least the longest list.
        """
        rows = [self._caption(row) for row in names]
        longest = max(2 + sum(len(ids) + 1 for ids in row) for row in rows)
        tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        phrases = torch.zeros(len(rows), width, longest)
        for b, row in enumerate(rows):
            ids = [CLS]
            for p, phrase in enumerate(row):
                if phrase:  # a name without a letter is never found
                    phrases[b, p, len(ids) : len(ids) + len(phrase)] = 1 / len(phrase)
                    ids += [*phrase, STOP]
            ids.append(SEP)
            tokens[b, : len(ids)] = torch.tensor(ids)
            mask[b, : len(ids)] = 1
        return Captions(*(x.to(self._device) for x in (tokens, mask, phrases)))

    def _caption(self, names: list[str]) -> list[tuple[int, ...]]:
        phrases = [self._encode(name) for name in names]
        length = 2 + sum(len(ids) + 1 for ids in phrases)
        if length > self._max_tokens:
            raise ValueError(
                f"a caption of {names} has {length} tokens, {self.name} takes {self._max_tokens}"
            )
        return phrases


class OncePerCaption(nn.Module):
    """A text backbone that reads each distinct caption of a batch once.

    The pictures of a prompt's group share their caption. Everything a backbone is given follows
    from the ids, so equal ids mean equal rows.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor,
        position_ids: Tensor,
        return_dict: bool = True,
    ) -> BaseModelOutput:
        """As transformers calls it: (B, L) ids, (B, 1, L, L) mask -> last_hidden_state (B, L, D)."""
        distinct, row = input_ids.unique(dim=0, return_inverse=True)  # (b, L), (B,)
        first = torch.zeros(len(distinct), dtype=row.dtype, device=row.device)
        first[row] = torch.arange(len(row), device=row.device)  # any of the equal rows will do
        hidden = self.backbone(
            distinct, attention_mask[first], token_type_ids[first], position_ids[first]
        ).last_hidden_state
        return BaseModelOutput(last_hidden_state=hidden[row])


def _architecture(folder: Path) -> GroundingDinoConfig:
    return config_from(GroundingDinoConfig, read_config(folder, "grounding-dino"), folder)


def _architecture_beside(folder: Path) -> GroundingDinoConfig:
    """The published architecture, unless a folder of the vocabulary names another one."""
    file = folder / "config.json"
    # A folder of BERT has a config too; it says nothing of the detector.
    if not file.is_file() or read_json(file).get("model_type") == "bert":
        return swin_t_config()
    return _architecture(folder)


def _image_settings(
    settings: dict[str, Any], path: Path
) -> tuple[tuple[int, int], list[float], list[float]]:
    """Shortest and longest edge, mean and standard deviation."""
    size: Any = settings.get("size")
    try:
        edges = int(size["shortest_edge"]), int(size["longest_edge"])
        mean, std = ([float(x) for x in settings[key]] for key in ("image_mean", "image_std"))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: image processor settings: {error!r}") from error
    return edges, mean, std


def _phrase(name: str) -> str:
    return name.replace(".", " ").replace("?", " ")
