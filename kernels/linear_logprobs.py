"""Log-probs of targets under a linear head, without the logits of all rows at once."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.chunked_head import HeadInputs, Needs, check_inputs, run_head


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    uncond_hidden: Tensor | None = None,
    cfg_weight: float | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """log softmax((x @ weight.T + bias) / temperature) at targets, x = hidden or the guided mix.

    The backward pass computes the logits again (four vocabulary GEMMs in all): what will be done
    with a log-prob is not known when it is made. `linear_grpo_loss` knows, and needs three.

    Args:
        hidden: (N, D) floating.
        weight: (V, D); row slices welcome.
        targets: (N,) int64 in [0, V).
        bias: (V,) or None.
        temperature: > 0.
        uncond_hidden: (N, D); with cfg_weight, scores the guided distribution: x is
            uncond_hidden + cfg_weight * (hidden - uncond_hidden), mixed in fp32.
        chunk_rows: rows whose logits are held at a time; None: about 32 MiB (CUDA: 64 MiB) of
            them, or a quarter of what a trainable weight's gradient takes.
    Returns: (N,) fp32 nats (fp64 for an fp64 weight); differentiable once in hidden,
        uncond_hidden, weight and bias.
    Raises: ValueError naming the argument.
    """
    head = HeadInputs(
        hidden, weight, targets, bias, uncond_hidden, cfg_weight, temperature, chunk_rows
    )
    check_inputs(head)
    return _LinearLogprobs.apply(hidden, uncond_hidden, weight, bias, head)


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        uncond_hidden: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        head: HeadInputs,
    ) -> Tensor:
        ctx.save_for_backward(hidden, uncond_hidden, weight, bias, head.targets)
        ctx.settings = head[5:]
        return run_head(head)[0].logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor | None, ...]:
        hidden, uncond_hidden, weight, bias, targets = ctx.saved_tensors
        head = HeadInputs(hidden, weight, targets, bias, uncond_hidden, *ctx.settings)
        needs = Needs(*ctx.needs_input_grad[:4])
        gradients = run_head(head, slopes=slopes.contiguous(), needs=needs)[1]
        return (*gradients, None)
