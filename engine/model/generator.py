"""What rollout, scoring and loss ask of a model. Janus (model/policy.py) is one that answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.model.head import Head, LevelName
from engine.model.sequences import Sequences
from engine.model.weight_source import WeightSource


@dataclass(frozen=True, slots=True)
class TrunkShape:
    """Sizes of a decoder.

    Attributes:
        layers: their number.
        width: of the residual stream, D.
        heads, kv_heads, head_dim: of attention.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int

    def kv_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of one token's keys and values, of all layers, in one row."""
        return 2 * self.layers * self.kv_heads * self.head_dim * dtype.itemsize


class Generator(Protocol):
    """An autoregressive generator: a causal decoder, and a head for each level it draws.

    Attributes:
        pad: a token that may fill what is never read.
        context_length: most tokens of a sequence.
        weights: the trunk's weights for decoding.
    """

    pad: int
    weights: WeightSource

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def context_length(self) -> int: ...

    @property
    def image_tokens(self) -> int:
        """Tokens of one picture."""
        ...

    @property
    def shape(self) -> TrunkShape: ...

    def head(self, level: LevelName) -> Head: ...

    def unconditional(self, prompt: Tensor) -> Tensor:
        """The prompt that guidance leads away from, (L,) int64; those of one length are the heads
        of the longest, but for their last token."""
        ...

    def embed_text(self, ids: Tensor) -> Tensor:
        """Text ids (...,) int64 -> (..., D), without positions."""
        ...

    def rotations(self, length: int) -> tuple[Tensor, Tensor]:
        """Rotary cosines and sines of positions 0 .. length - 1, (length, head_dim / 2) fp32.

        A model without rotary embedding gives ones and zeros.
        """
        ...

    def position_table(self) -> Tensor | None:
        """(context_length, D) learned positions, to be added to every embedding; None: none."""
        ...

    def prefill(self, prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values of prompts, each from position 0.

        Args:
            prompts: U tensors (L_i,) int64, L_i >= 0.
        Returns: keys, values (layers, U, Hkv, max L_i, head_dim), keys rotated; positions past L_i
            are junk.
        """
        ...

    def completion_hidden(self, sequences: Sequences) -> Tensor:
        """Hidden states that predict each completion token, (B, T, D); zeros past a row's length."""
        ...
