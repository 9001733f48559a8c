"""Clipped GRPO loss on a linear head in one pass, guidance-aware, without N x V logits."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.chunked_head import Gradients, HeadInputs, Needs, check_inputs, run_head
from kernels.token_loss import Rows, TokenLoss


class LossOutput(NamedTuple):
    """What `linear_grpo_loss` returns; only `loss` carries a gradient.

    Attributes:
        loss: scalar, the weighted sum of the token losses.
        logprobs: (N,) fp32 nats of the targets.
        kl, clip_fraction, entropy: scalars, means under the token weights; KL and entropy in nats.
    """

    loss: Tensor
    logprobs: Tensor
    kl: Tensor
    clip_fraction: Tensor
    entropy: Tensor


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    *,
    bias: Tensor | None = None,
    uncond_hidden: Tensor | None = None,
    cfg_weight: float | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    beta: float = 0.0,
    temperature: float = 1.0,
    token_weights: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    chunk_rows: int | None = None,
) -> LossOutput:
    """sum_i token_weights_i * l_i with the clipped GRPO token loss and k3 KL.

    l = -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + beta * (e^d - d - 1),
    r = exp(logp - old), d = ref - logp (GRPO, arXiv:2402.03300). The forward pass computes the
    gradients, chunk by chunk; the backward pass scales them.

    Published losses are settings of this one, with M trained tokens in B sequences:
        T2I-R1, DAPO (arXiv:2503.14476): token_weights 1 / M; DAPO: clip_high > clip_low.
        GRPO: 1 / (B * tokens of the sequence).
        Dr. GRPO (arXiv:2503.20783): 1 / (B * longest length).
        GSPO (arXiv:2507.18071): sequence_ids (a forward pass more, for the ratios).
        Truncated importance sampling: advantages times min(exp(old - sampler's), cap), which is
            right because min(r A, ...) is linear in a positive factor of A, and leaves the KL alone.
        Dual clip (arXiv:1912.09729): dual_clip.

    Args:
        hidden: (N, D) input of the head's last linear layer (conditional branch).
        weight: (V, D).
        targets: (N,) int64.
        advantages: (N,) floating.
        bias: (V,) or None.
        uncond_hidden: (N, D); with cfg_weight, scores the guided distribution. The head is
            linear and the guidance weights sum to one, so the branches are mixed before the
            GEMM: hidden gets cfg_weight and uncond_hidden 1 - cfg_weight of its gradient.
        old_logprobs: (N,) nats of the policy that drew the targets; None: the current ones
            (ratio 1, on-policy).
        ref_logprobs: (N,) nats of the reference policy; None: no KL.
        dual_clip: c > 1: where A < 0 the surrogate is at least c A; None: no such bound.
        token_weights: (N,) mask and normaliser in one; None: 1 / N. What a token of weight 0
            holds elsewhere does not matter.
        sequence_ids: (N,) int64; given, the ratio is one a sequence, over its tokens of non-zero
            weight.
        chunk_rows: see `linear_logprobs`.
    Returns: see LossOutput; differentiable once in hidden, uncond_hidden, weight and bias.
    Raises: ValueError naming the argument.
    """
    head = HeadInputs(
        hidden, weight, targets, bias, uncond_hidden, cfg_weight, temperature, chunk_rows
    )
    check_inputs(head)
    per_token = {
        "advantages": advantages,
        "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs,
        "token_weights": token_weights,
        "sequence_ids": sequence_ids,
    }
    for name, value in per_token.items():
        if value is not None and value.shape != targets.shape:
            raise ValueError(f"{name}: wanted {tuple(targets.shape)}, got {tuple(value.shape)}")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip: wanted > 1, got {dual_clip}")
    if token_weights is None:
        token_weights = hidden.new_full(targets.shape, 1 / max(len(targets), 1))
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32

    def detached(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.detach().to(dtype)

    terms = TokenLoss(
        advantages.detach().to(dtype),
        token_weights.detach().to(dtype),
        detached(old_logprobs),
        detached(ref_logprobs),
        clip_low,
        clip_high,
        dual_clip,
        beta,
    )
    if sequence_ids is not None and old_logprobs is not None:
        terms = terms._replace(old_logprobs=_sequence_old(head, terms, sequence_ids))
    # A function under no_grad is asked for gradients all the same, and would compute them.
    wanted = torch.is_grad_enabled()
    return LossOutput(
        *_LinearGrpoLoss.apply(hidden, uncond_hidden, weight, bias, head, terms, wanted)
    )


@torch.no_grad()
def _sequence_old(head: HeadInputs, terms: TokenLoss, sequence_ids: Tensor) -> Tensor:
    """Old log-probs that give every token its sequence's mean difference, (N,)."""
    assert terms.old_logprobs is not None
    logprobs = run_head(head)[0].logprobs
    counted = terms.token_weights != 0
    delta = torch.where(counted, logprobs - terms.old_logprobs, 0)
    totals = logprobs.new_zeros(int(sequence_ids.max()) + 1 if len(sequence_ids) else 0)
    sizes = totals.index_add(0, sequence_ids, counted.to(delta.dtype)).clamp(min=1)
    return logprobs - (totals.index_add(0, sequence_ids, delta) / sizes)[sequence_ids]


class _LinearGrpoLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        uncond_hidden: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        head: HeadInputs,
        terms: TokenLoss,
        wanted: bool,
    ) -> tuple[Tensor, ...]:
        needs = Needs(*(wanted and need for need in ctx.needs_input_grad[:4]))
        rows, ctx.gradients = run_head(head, terms=terms, entropy=True, needs=needs)
        ctx.save_for_backward(hidden, uncond_hidden, weight, bias, head.targets)
        ctx.settings, ctx.terms = head[5:], terms
        output = _summed(rows, terms)
        ctx.mark_non_differentiable(*output[1:])
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            # A second pass over a retained graph: the first one's tensors are the parameters' now.
            hidden, uncond_hidden, weight, bias, targets = ctx.saved_tensors
            head = HeadInputs(hidden, weight, targets, bias, uncond_hidden, *ctx.settings)
            gradients = run_head(head, terms=ctx.terms, needs=Needs(*ctx.needs_input_grad[:4]))[1]
        return (*_scaled(gradients, scale), None, None, None)


def _summed(rows: Rows, terms: TokenLoss) -> tuple[Tensor, ...]:
    """The fields of a LossOutput from the tokens' values."""
    weights = terms.token_weights
    assert rows.loss is not None and rows.kl is not None
    assert rows.clipped is not None and rows.entropy is not None
    shares = weights / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)
    entropy = rows.entropy.masked_fill(weights == 0, 0)
    return (
        (weights * rows.loss).sum(),
        rows.logprobs,
        (shares * rows.kl).sum(),
        (shares * rows.clipped).sum(),
        (shares * entropy).sum(),
    )


def _scaled(gradients: Gradients, scale: Tensor) -> Gradients:
    """The gradients times a scalar, in place; on a CPU, where looking is free, 1 costs nothing."""
    if scale.device.type == "cpu" and scale == 1:
        return gradients
    return Gradients(*(None if x is None else x.mul_(scale) for x in gradients))
