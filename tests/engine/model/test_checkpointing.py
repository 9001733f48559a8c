"""Gradient checkpointing: the same gradients from a fraction of the memory; 16-bit products."""

import pytest
import torch
from torch import Tensor
from transformers import JanusConfig, LlamaConfig

from engine.model import linear
from engine.model.layers import LanguageModel
from engine.model.linear import Linear
from engine.model.rope import rope_tables
from engine.model.sequences import Sequences


def gradients(policy, prompts, checkpointing: bool, share: bool) -> dict[str, Tensor]:
    policy.set_training(attn_implementation="sdpa", gradient_checkpointing=checkpointing)
    policy.zero_grad()
    ids = torch.arange(len(prompts) * 16).view(len(prompts), 16) % 90
    hidden = policy.completion_hidden(Sequences("token", prompts, ids, share=share))
    hidden.square().sum().backward()
    return {k: p.grad.clone() for k, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_identical(new_policy, make_prompts, dtype, share):
    policy = new_policy().to(dtype)
    policy.freeze_generation()
    prompts = make_prompts(30) * 4
    plain, again = (gradients(policy, prompts, c, share) for c in (False, True))
    assert plain.keys() == again.keys() and len(plain) > 15
    assert all(plain[k].equal(again[k]) and plain[k].any() for k in plain)


def test_activations_of_24_layers_are_less_than_an_eighth():
    """What autograd keeps, and with it what one layer keeps while it runs again."""
    text = LlamaConfig(
        vocab_size=8, hidden_size=64, intermediate_size=176, num_hidden_layers=24,
        num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    config = JanusConfig(text_config=text)
    trunk = LanguageModel(config)
    owned = {p.untyped_storage().data_ptr() for p in trunk.parameters()}
    cos, sin = rope_tables(config, 50, torch.device("cpu"))

    def kept(checkpointing: bool) -> int:
        trunk.gradient_checkpointing, seen = checkpointing, {}

        def keep(x: Tensor) -> Tensor:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            trunk(torch.randn(2, 50, 64, requires_grad=True), cos, sin)
        return sum(s.nbytes() for at, s in seen.items() if at not in owned)

    plain, saved = kept(False), kept(True)
    assert saved <= plain / 8


@pytest.mark.parametrize("bias", [True, False])
def test_16_bit_products_without_an_instruction_for_them(monkeypatch, bias):
    """fp32 products, rounded once: the forward and all three gradients, against fp64."""
    torch.manual_seed(0)
    layer = Linear(40, 24, bias=bias).to(torch.bfloat16)
    x = torch.randn(2, 5, 40).bfloat16().requires_grad_()
    plain = layer(x)
    monkeypatch.setattr(linear, "wants_fp32", lambda x: True)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    truth = torch.nn.functional.linear(
        x.double(), layer.weight.double(), layer.bias.double() if bias else None
    )
    error = (y.double() - truth).abs().max()
    assert error <= truth.abs().max() / 256
    assert error <= 1.01 * (plain.double() - truth).abs().max()
    grad = torch.randn(y.shape).bfloat16()
    y.backward(grad)
    rows = grad.double().flatten(0, -2)
    expected = {
        "x": (rows @ layer.weight.double()).view_as(x),
        "weight": rows.T @ x.detach().double().flatten(0, -2),
        "bias": rows.sum(0),
    }
    found = {"x": x.grad, "weight": layer.weight.grad}
    if bias:
        found["bias"] = layer.bias.grad
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1 / 128, atol=1e-2)
