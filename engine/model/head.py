"""A head: how hidden states become logits over a vocabulary, and how its tokens are embedded."""

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

LevelName = Literal["semantic", "token"]  # the plan in text, and the picture's tokens


@dataclass(frozen=True, slots=True)
class Head:
    """One vocabulary of a generator.

    Made anew whenever it is asked for, so that its tensors are the generator's as they are now.

    Attributes:
        weight: (V, K) of the last layer, which is linear; bias: (V,) or None.
        table: (V' >= V, D) embeddings of its tokens, by id.
        inner: a linear layer, D to K, with an exact GELU after it, before the last; None: the
            last layer reads hidden states.
        eos: the token that ends a sequence; None: every sequence has as many tokens as are drawn.
        own_ids: its ids name no text tokens, so that equal numbers are different tokens.
    """

    weight: Tensor
    bias: Tensor | None
    table: Tensor
    inner: nn.Linear | None = None
    eos: int | None = None
    own_ids: bool = False

    def features(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., K), the input of the last layer, in which guidance is linear."""
        return hidden if self.inner is None else F.gelu(self.inner(hidden))

    def embed(self, ids: Tensor) -> Tensor:
        """(...,) int64 -> (..., D)."""
        return F.embedding(ids, self.table)
