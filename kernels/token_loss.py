"""The clipped GRPO loss of single tokens, with its derivative in closed form.

Old and reference log-probs and advantages are known before the logits are, so a token's share of the
gradient follows from its log-prob alone, and one pass over the logits is enough.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.reference import EXPONENT_CAP, capped_exp


class TokenLoss(NamedTuple):
    """What the loss of N tokens depends on besides their log-probs.

    Attributes:
        advantages, token_weights: (N,) fp32 (fp64 for fp64). Weight 0 masks a token, whose other
            values may then be anything.
        old_logprobs: (N,) nats; None: ratio 1.
        ref_logprobs: (N,) nats; None: no KL.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        dual_clip: lower bound of the surrogate in units of a negative advantage; None: none.
        beta: weight of the KL.
    """

    advantages: Tensor
    token_weights: Tensor
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    clip_low: float
    clip_high: float
    dual_clip: float | None
    beta: float

    def rows(self, start: int, stop: int) -> "TokenLoss":
        """Tokens start .. stop - 1."""
        old, ref = self.old_logprobs, self.ref_logprobs
        return self._replace(
            advantages=self.advantages[start:stop],
            token_weights=self.token_weights[start:stop],
            old_logprobs=None if old is None else old[start:stop],
            ref_logprobs=None if ref is None else ref[start:stop],
        )


class Rows(NamedTuple):
    """What one pass over a chunk of C rows of logits gives.

    Attributes:
        logprobs: (C,) nats of the targets.
        entropy: (C,) nats; None when it was not asked for.
        loss, kl, clipped: (C,) of `token_loss`; None without a TokenLoss.
        slopes: (C,) d loss / d logprob with the token weight in it; None in a forward pass.
        gradient: (C, V), in the memory of the logits. Times `factor`, a number or (C,), it is
            d loss / d logits; None in a forward pass.
    """

    logprobs: Tensor
    entropy: Tensor | None = None
    loss: Tensor | None = None
    kl: Tensor | None = None
    clipped: Tensor | None = None
    slopes: Tensor | None = None
    gradient: Tensor | None = None
    factor: Tensor | float = 1.0


def token_loss(logprobs: Tensor, terms: TokenLoss) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.grpo_token_loss` and its derivative.

    Args:
        logprobs: (N,) nats under the policy.
    Returns: (N,) each, 0 on masked tokens: loss, KL, 1 where the clip removed the gradient, and
        token_weight * d loss / d logprob.
    """
    weights, advantages = terms.token_weights, terms.advantages
    masked = weights == 0
    ratio = growth = torch.ones_like(logprobs)
    if terms.old_logprobs is not None:
        delta = logprobs - terms.old_logprobs
        ratio, growth = capped_exp(delta), delta.clamp(max=EXPONENT_CAP).exp()
    bounded = ratio.clamp(1 - terms.clip_low, 1 + terms.clip_high) * advantages
    surrogate = ratio * advantages
    clipped = bounded < surrogate
    surrogate = torch.where(clipped, bounded, surrogate)
    if terms.dual_clip is not None:
        too_low = (advantages < 0) & (ratio > terms.dual_clip)
        surrogate = torch.where(too_low, terms.dual_clip * advantages, surrogate)
        clipped = clipped | too_low
    loss, slopes = -surrogate, -(growth * advantages).masked_fill(clipped, 0)
    kl = torch.zeros_like(logprobs)
    if terms.ref_logprobs is not None:
        gap = terms.ref_logprobs - logprobs
        kl = capped_exp(gap) - gap - 1
        loss = loss + terms.beta * kl
        slopes = slopes + terms.beta * (1 - gap.clamp(max=EXPONENT_CAP).exp())
    loss, kl, slopes = (x.masked_fill(masked, 0) for x in (loss, kl, slopes * weights))
    return loss, kl, (clipped & ~masked).to(logprobs.dtype), slopes
