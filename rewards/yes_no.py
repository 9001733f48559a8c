"""What the experts that answer yes/no questions share: the questions, their grid, P(yes).

A prompt row asks one question for each thing it names; its score is the mean over them of
P(yes) / (P(yes) + P(no)) (T2I-R1, arXiv:2505.00703).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewards.checkpoint import read_image_settings
from rewards.preprocess import Transform

Row = dict[str, Any]


def questions_of(prompt: str, row: Row) -> list[str]:
    """What is asked about a picture, in T2I-R1's words.

    "{name}?" for each of `attr_nouns`, else of `nouns`; of a row with neither, the whole prompt
    is the question.
    """
    return [f"{name}?" for name in row.get("attr_nouns") or row.get("nouns") or [prompt]]


@dataclass(frozen=True, slots=True)
class QuestionGrid:
    """The questions of B pictures, up to K each of up to T tokens, padded on the right."""

    ids: Tensor
    """(B, K, T) int64."""
    lengths: Tensor
    """(B, K) int64, at least 1: a question that is not asked is one pad token."""
    asked: Tensor
    """(B, K) fp32, 1 where a question is asked."""

    @classmethod
    def of(cls, rows: list[list[tuple[int, ...]]], pad: int) -> "QuestionGrid":
        """The grid of each picture's questions as token ids, on the CPU."""
        size = (len(rows), max(map(len, rows)))
        ids = torch.full((*size, max(len(ids) for row in rows for ids in row)), pad)
        lengths = torch.ones(size, dtype=torch.int64)
        asked = torch.zeros(size)
        for b, row in enumerate(rows):
            for k, question in enumerate(row):
                ids[b, k, : len(question)] = torch.tensor(question)
                lengths[b, k] = len(question)
                asked[b, k] = 1
        return cls(ids, lengths, asked)

    def to(self, device: torch.device) -> "QuestionGrid":
        """The grid on a device."""
        return QuestionGrid(self.ids.to(device), self.lengths.to(device), self.asked.to(device))

    def last(self, hidden: Tensor) -> Tensor:
        """(B, K, D), each question's last real token of hidden (B, K, T, D)."""
        index = (self.lengths - 1)[..., None, None].expand(-1, -1, 1, hidden.shape[-1])
        return hidden.gather(2, index).squeeze(2)


def yes_probability(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, answers: tuple[int, int]
) -> Tensor:
    """P(yes) / (P(yes) + P(no)) without the other logits: the sigmoid of the two's difference.

    Args:
        hidden: (..., D), what the vocabulary's head is applied to.
        weight, bias: (V, D) and (V,) of that head.
        answers: the ids of yes and no.
    Returns: (...) fp32 in [0, 1].
    """
    yes, no = answers
    logit = hidden.float() @ (weight[yes].float() - weight[no].float())
    if bias is not None:
        logit = logit + (bias[yes].float() - bias[no].float())
    return logit.sigmoid()


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, L, D) -> (B, heads, L, D / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, heads, L, d) -> (B, L, heads * d)."""
    return x.transpose(1, 2).flatten(2)


class QuestionExpert:
    """The mean P(yes) over a row's questions. A subclass reads the model and answers them."""

    name: str

    def __init__(
        self,
        encode: Callable[[str], list[int]],
        transform: Transform,
        *,
        pad: int,
        max_tokens: int,
        device: torch.device | str,
        batch_size: int,
    ) -> None:
        """
        Args:
            encode: a question -> its token ids, as the model wants them.
            max_tokens: the longest question the model has positions for.
            batch_size: pictures in one forward; bounds the memory.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        # Prompts come back every epoch, and each of them in every picture of its group.
        self._encode = lru_cache(maxsize=65536)(lambda text: tuple(encode(text)))
        self._transform = transform
        self._pad = pad
        self._max_tokens = max_tokens
        self._device = torch.device(device)
        self._batch_size = batch_size

    def prepare(self, prompts: list[str], metadata: list[Row]) -> None:
        """Tokenise ahead, while the pictures are still being drawn; `score` finds it done."""
        for prompt, row in zip(prompts, metadata, strict=True):
            self._ids(prompt, row)

    @torch.inference_mode()
    def score(self, prompts: list[str], images: Tensor, metadata: list[Row]) -> Tensor:
        """The mean P(yes) over each picture's questions, (B,) fp32 in [0, 1].

        Args:
            prompts: B; asked only for a row without `attr_nouns` and `nouns`.
            images: (B, 3, H, W) float in [0, 1].
            metadata: B prompt rows.
        Raises: ValueError naming a question that is too long for the model.
        """
        rows = [self._ids(p, row) for p, row in zip(prompts, metadata, strict=True)]
        scores = [torch.zeros(0, device=self._device)]
        for start in range(0, len(rows), self._batch_size):
            part = slice(start, start + self._batch_size)
            grid = QuestionGrid.of(rows[part], self._pad).to(self._device)
            yes = self._answer(self._transform(images[part].to(self._device)), grid)  # (b, K)
            scores.append((yes * grid.asked).sum(1) / grid.asked.sum(1))
        return torch.cat(scores).to(images.device)

    def _ids(self, prompt: str, row: Row) -> list[tuple[int, ...]]:
        rows = []
        for question in questions_of(prompt, row):
            ids = self._encode(question)
            if len(ids) > self._max_tokens:
                raise ValueError(
                    f"question {question!r} has {len(ids)} tokens, "
                    f"{self.name} takes {self._max_tokens}"
                )
            rows.append(ids)
        return rows

    def _answer(self, pixels: Tensor, grid: QuestionGrid) -> Tensor:
        """(B, K) fp32 P(yes) of each question of the grid.

        Args: pixels: (B, 3, S, S) fp32, preprocessed.
        """
        raise NotImplementedError


def read_transform(folder: Path, image_size: int) -> Transform:
    """The folder's image processor, checked to give the size the model was built for."""
    settings = read_image_settings(folder)
    try:
        transform = Transform(settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder}: image processor settings: {error}") from error
    if transform.output_size != (image_size, image_size):
        raise ValueError(
            f"{folder}: image processor settings give {transform.output_size} pixels, "
            f"config.json wants {image_size}"
        )
    return transform
