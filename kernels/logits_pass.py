"""The one pass over a chunk of logits: log-prob, entropy, token loss and the logits' gradient."""

import torch
from torch import Tensor

from kernels.dispatch import use_triton
from kernels.token_loss import Rows, TokenLoss, token_loss

BLOCK_BYTES = (
    4 << 20
)  # that PyTorch passes over together: in cache, and few barriers of its threads


def logits_pass(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    terms: TokenLoss | None = None,
    slopes: Tensor | None = None,
    entropy: bool = True,
    gradient: torch.dtype | None = None,
    scale: float = 1.0,
    scratch: Tensor | None = None,
) -> Rows:
    """What a chunk of logits says about its targets, and its gradient in place of the logits.

    Args:
        logits: (C, V) fp32 or fp64, contiguous, before the temperature. Overwritten.
        targets: (C,) int64.
        terms: the loss of these tokens; or
        slopes: (C,), a derivative that is already known. Neither: log-probs (and entropy) alone.
        entropy: whether the PyTorch path computes it; Triton's pass has it for nothing.
        gradient: dtype to write the gradient in; None: no gradient.
        scale: factor in the written gradient, which keeps fp16 in range.
        scratch: `pass_scratch(logits)`, so that chunks share one; None: allocated here.
    """
    if use_triton(logits) and logits.dtype == torch.float32:
        from kernels.gpu.grpo_loss import launch_grpo_rows

        rows = launch_grpo_rows(
            logits,
            targets,
            temperature=temperature,
            loss=terms,
            slopes=slopes,
            gradient=gradient,
            scale=scale,
        )
        return rows._replace(factor=1 / scale)
    wanted = entropy or gradient is not None
    if scratch is None:
        scratch = pass_scratch(logits)
    assert scratch is not None
    logprobs, entropies = _softmax(logits, targets, temperature, scratch, entropy, keep=wanted)
    loss = kl = clipped = None
    if terms is not None:
        loss, kl, clipped, slopes = token_loss(logprobs, terms)
    rows = Rows(logprobs, entropies, loss, kl, clipped, slopes)
    if gradient is None:
        return rows
    assert slopes is not None
    # One subtraction a row. The slope is a factor of the whole row, and is cheaper to apply to the
    # activations that the gradient meets in its two products than to V entries.
    logits.scatter_add_(1, targets[:, None], logits.new_full((len(targets), 1), -1.0))
    return rows._replace(gradient=logits, factor=-slopes / temperature)


def pass_scratch(logits: Tensor) -> Tensor | None:
    """Working memory of the PyTorch pass over logits (C, V); None where Triton needs none."""
    if use_triton(logits) and logits.dtype == torch.float32:
        return None
    count, vocab = logits.shape
    return logits.new_empty(
        min(count, max(1, BLOCK_BYTES // (vocab * logits.element_size()))), vocab
    )


def _softmax(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    scratch: Tensor,
    entropy: bool,
    *,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of the targets and entropy; with `keep`, probabilities in place of the logits."""
    count, step = len(logits), max(1, len(scratch))
    logprobs = logits.new_empty(count)
    entropies = logits.new_empty(count) if entropy else None
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        x = logits[rows]
        full = scratch[: len(x)]
        if temperature != 1.0:
            x.div_(temperature)
        torch.log_softmax(x, -1, out=full)
        torch.gather(full, 1, targets[rows, None], out=logprobs[rows, None])
        if not keep:
            continue
        torch.softmax(full, -1, out=x)  # cheaper than exp, which does not share softmax's code
        if entropies is not None:
            torch.sum(full.mul_(x), -1, out=entropies[rows])
            if entropies[rows].isnan().any():  # 0 * -inf, of a token that a bias excludes: 0
                torch.sum(torch.xlogy(x, x), -1, out=entropies[rows])
    return logprobs, None if entropies is None else entropies.neg_()
