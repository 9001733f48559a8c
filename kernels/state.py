"""What ops take as one object: how to draw, a decode step's memory, an optimizer step's settings.

Each is made once a rollout or step. A launcher takes these objects; one function a kernel unpacks them into
the kernel's flat arguments.
"""

import struct
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """How tokens are drawn.

    Attributes:
        cfg_weight: guidance weight; 1 is unguided.
        temperature: > 0; applies to both log-probs.
        seed: 64-bit key of the noise, or (1,) int64 on the device, read at every replay.
        first_step: noise step of a rollout's first token.
        top_k: 0 is off. Ties with the k-th are kept.
        top_p: 1 is off.
        greedy: take the most probable token; no noise.
    """

    cfg_weight: float = 1.0
    temperature: float = 1.0
    seed: int | Tensor = 0
    first_step: int = 0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False

    @property
    def all_tokens(self) -> bool:
        """Whether every token can be drawn: neither top-k nor top-p."""
        return self.top_k == 0 and self.top_p == 1.0


@dataclass(kw_only=True, slots=True)
class StepState:
    """What the end of a step reads and writes: B samples of at most T tokens.

    Attributes:
        step: (1,) int32, in and out: the column to fill. Past the last nothing is written.
        sample_ids: (B,) int64, contiguous: one identity of the noise a sample.
        table: (V' >= V, D) embeddings of the tokens; last stride 1.
        x: (B, D), or (2B, D) under guidance (both halves get the same rows); table's dtype, on a
            CPU fp32 as well. Out.
        tokens: (B, T) int64, out.
        logprobs, guided_logprobs: (B, T) fp32, out; None: not wanted.
        error: (1,) int64, in and out: 0 is fine, else 1 + step * B + row of the first row, by
            step then row, whose logits were NaN or all -inf (see `error_place`).
        eos, alive: the token that ends a row, and (B,) bool, in and out: rows still going.
            Ended rows write pad and 0, and are not read. Both or neither.
        pad: what ended rows write.
        workspace: from `sample_workspace` or `head_workspace`; None: a new one at every call.
    """

    step: Tensor
    sample_ids: Tensor
    table: Tensor
    x: Tensor
    tokens: Tensor
    logprobs: Tensor | None
    guided_logprobs: Tensor | None
    error: Tensor
    eos: int | None = None
    alive: Tensor | None = None
    pad: int = 0
    workspace: Tensor | None = None


@dataclass(kw_only=True, slots=True)
class LayerCache:
    """One layer's keys and values of R rows: a prefix shared by some, and a suffix of each.

    Attributes:
        step: (1,) int32: the suffix slot of the current token.
        first_positions: (R,) int32, contiguous: position of each row's first suffix token.
        keys, values: (R, Hkv, S, hd), equal strides, last stride 1.
        prefix_keys, prefix_values: (U, Hkv, P, hd), likewise; U or P may be 0.
        prefix_lengths: (R,) int32: how much of its prefix a row attends, at most P; 0 for rows in
            no tile.
        tiles: (T, 3) int32, contiguous: first row, rows, prefix index; made by `prefix_tiles`.
        row_prefix: (R,) int32, the prefix of each row, any where its length is 0: what the tiles
            say, for ops that go by row.
    """

    step: Tensor
    first_positions: Tensor
    keys: Tensor
    values: Tensor
    prefix_keys: Tensor
    prefix_values: Tensor
    prefix_lengths: Tensor
    tiles: Tensor
    row_prefix: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class AdamW:
    """The settings of one step of AdamW.

    Attributes:
        step: from 1, the number of the step.
        lr, beta1, beta2, eps, weight_decay: as in the paper; the decay is times lr.
        seed: 64-bit key of the noise that rounds bf16 moments.
    """

    step: int
    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    seed: int = 0

    @property
    def constants(self) -> tuple[float, ...]:
        """What the formula multiplies with, each rounded to fp32 once.

        keep = 1 - lr * weight_decay; mean_rate = 1 - beta1; square_keep = beta2; square_rate =
        1 - beta2; root = sqrt(1 - beta2^step); size = lr / (1 - beta1^step); eps.
        """
        return tuple(
            struct.unpack("f", struct.pack("f", value))[0]
            for value in (
                1 - self.lr * self.weight_decay,
                1 - self.beta1,
                self.beta2,
                1 - self.beta2,
                (1 - self.beta2**self.step) ** 0.5,
                self.lr / (1 - self.beta1**self.step),
                self.eps,
            )
        )
