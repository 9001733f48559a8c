"""Adapters that have learnt something, for tests."""

import torch
from torch import nn

from engine.model.adapter import attach_adapter
from engine.model.policy import Policy


def fill(model: nn.Module, scale: float = 0.1) -> None:
    """Give every B random values, so that the adapter does something."""
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=rng) * scale)


def with_adapter(policy: Policy, **settings) -> Policy:
    """The policy with an adapter that is not zero."""
    attach_adapter(policy, **({"r": 4, "alpha": 8} | settings))
    fill(policy)
    return policy
