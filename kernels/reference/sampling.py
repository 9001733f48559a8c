"""The end of a decode step as plain maths: oracle of sample_step and head_sample, and CPU path."""

import torch
from torch import Tensor

from kernels.reference import linear_logits


def finish_step(
    token: Tensor,
    logprob: Tensor,
    guided_logprob: Tensor,
    *,
    step: Tensor,
    table: Tensor,
    x: Tensor,
    tokens: Tensor,
    logprobs: Tensor | None,
    guided_logprobs: Tensor | None,
    error: Tensor,
    eos: int | None,
    alive: Tensor | None,
    pad: int,
) -> None:
    """Write a step's draws (B,), gather the next inputs, advance. See kernels.sample_step."""
    rows, column = len(token), int(step)
    bad = ~(logprob.isfinite() & guided_logprob.isfinite())
    if eos is not None:
        bad &= alive
        logprob = torch.where(alive, logprob, 0)
        guided_logprob = torch.where(alive, guided_logprob, 0)
        written = torch.where(alive, token, pad)
        alive &= token != eos
    else:
        written = token
    if column < tokens.shape[1]:
        tokens[:, column] = written
        if logprobs is not None:
            logprobs[:, column] = logprob
        if guided_logprobs is not None:
            guided_logprobs[:, column] = guided_logprob
    x.view(-1, rows, x.shape[1])[:] = table[written]
    if bad.any() and not error.any():
        error.fill_(1 + column * rows + int(bad.nonzero()[0]))
    step += 1


def head_logits(
    cond: Tensor, uncond: Tensor | None, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Both branches' logits (B, V) from the inputs (B, K) of the head's last layer, in fp32."""
    return linear_logits(cond, weight, bias, 1.0), (
        None if uncond is None else linear_logits(uncond, weight, bias, 1.0)
    )
