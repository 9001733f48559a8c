"""The end of a decode step as plain maths: oracle of sample_step and head_sample, and CPU path."""

import torch
from torch import Tensor

from kernels.reference import linear_logits
from kernels.state import StepState


def finish_step(token: Tensor, logprob: Tensor, guided_logprob: Tensor, state: StepState) -> None:
    """Write a step's draws (B,), gather the next inputs, advance. See kernels.sample_step."""
    rows, column = len(token), int(state.step)
    bad = ~(logprob.isfinite() & guided_logprob.isfinite())
    written = token
    if state.alive is not None:
        bad &= state.alive
        logprob = torch.where(state.alive, logprob, 0)
        guided_logprob = torch.where(state.alive, guided_logprob, 0)
        written = torch.where(state.alive, token, state.pad)
        state.alive &= token != state.eos
    if column < state.tokens.shape[1]:
        state.tokens[:, column] = written
        if state.logprobs is not None:
            state.logprobs[:, column] = logprob
        if state.guided_logprobs is not None:
            state.guided_logprobs[:, column] = guided_logprob
    state.x.view(-1, rows, state.x.shape[1])[:] = state.table[written]
    if bad.any() and not state.error.any():
        state.error.fill_(1 + column * rows + int(bad.nonzero()[0]))
    state.step += 1


def head_logits(
    cond: Tensor, uncond: Tensor | None, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Both branches' logits (B, V) from the inputs (B, K) of the head's last layer, in fp32."""
    return linear_logits(cond, weight, bias, 1.0), (
        None if uncond is None else linear_logits(uncond, weight, bias, 1.0)
    )
