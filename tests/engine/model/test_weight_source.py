"""Where weights are: one product of several linears follows its parameters, or is refused."""

import pytest
import torch
from torch import nn

from engine.model.weight_source import OwnWeights, packed


def linears() -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(48, width) for width in (32, 7, 65)]


def test_packed_weights_are_the_linears_side_by_side_and_follow_them():
    modules = linears()
    wanted = torch.cat([m.weight.detach().clone() for m in modules])
    together = packed("here", *modules)
    assert torch.equal(together.weight, wanted)
    with torch.no_grad():
        for module in modules:
            module.weight.mul_(2)
            module.bias.add_(1)
    assert torch.equal(together.weight, 2 * wanted)
    assert torch.equal(together.bias, torch.cat([m.bias for m in modules]))
    assert packed("here", *modules).weight.data_ptr() == together.weight.data_ptr()


class Adapted(nn.Module):
    """A wrapper as adapters put around a layer: its weight alone is the base model's."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.weight = base, base.weight

    def forward(self, x):
        return self.base_layer(x) + 1


def test_an_adapter_s_wrapper_is_refused_and_not_sampled_as_its_base(new_policy):
    policy = new_policy()
    attention = policy.model.language_model.layers[1].self_attn
    attention.o_proj = Adapted(attention.o_proj)
    with pytest.raises(TypeError, match=r"layers\.1: wanted plain linear layers .* Adapted"):
        list(policy.weights.layers())


def test_weights_that_are_held_elsewhere_are_refused():
    (module, *_) = linears()
    module.weight.data = torch.empty(0)
    with pytest.raises(TypeError, match=r"here: wanted plain linear layers that hold"):
        packed("here", module)


def test_version_grows_with_updates_and_loads(new_policy):
    policy = new_policy()
    source = OwnWeights(policy.model.language_model)
    list(source.layers())  # packing is no change
    seen = [source.version]
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=1e-3)
    for p in policy.trainable().values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    seen.append(source.version)
    policy.load_state_dict(policy.state_dict())
    seen.append(source.version)
    assert seen == sorted(set(seen))
