"""Log-probs of targets under a linear head."""

from torch import Tensor

from kernels import reference


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """log softmax((hidden @ weight.T + bias) / temperature) at targets.

    Args:
        hidden: (N, D) floating.
        weight: (V, D); row slices welcome.
        targets: (N,) int64 in [0, V).
        bias: (V,) or None.
        temperature: > 0.
    Returns: (N,) fp32 nats (fp64 for fp64 inputs); differentiable in hidden, weight and bias.
    Raises: ValueError naming the argument.
    """
    check_head(hidden, weight, targets, bias, temperature)
    logits = reference.linear_logits(hidden, weight, bias, temperature)
    return reference.log_softmax_at(logits, targets)


def check_head(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float
) -> None:
    """Raise ValueError naming the argument whose shape or value cannot be."""
    if hidden.ndim != 2:
        raise ValueError(f"hidden: wanted (N, D), got {tuple(hidden.shape)}")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight: wanted (V, {hidden.shape[1]}), got {tuple(weight.shape)}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets: wanted ({len(hidden)},), got {tuple(targets.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: wanted ({len(weight)},), got {tuple(bias.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature: wanted > 0, got {temperature}")
