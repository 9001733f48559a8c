"""An adapter on a policy: what trains, what the rollout reads, and what is left when it is off."""

import builtins
import copy
import weakref

import pytest
import torch

import engine.rollout.step_weights
from engine.model.adapter import (
    TARGETS,
    MergedWeights,
    adapted,
    adapter_dropout,
    adapter_off,
    attach_adapter,
)
from engine.model.weight_source import OwnWeights
from engine.policy import load_policy, save_policy
from engine.rollout import sample_images
from engine.settings.errors import UserError
from tests.engine.adapters import with_adapter


def logprobs(policy, prompts):
    ids = torch.arange(16) * 7 % 128
    with torch.no_grad():
        return torch.stack([policy.image_logprobs(p, ids, cfg_weight=3.0) for p in prompts])


def test_a_fresh_adapter_trains_alone_and_changes_nothing(new_policy, make_prompts):
    policy, prompts = new_policy(), make_prompts(6, 9)
    before, state = logprobs(policy, prompts), copy.deepcopy(policy.state_dict())
    attach_adapter(policy, r=4, alpha=8, targets=["q_proj", "down_proj"])
    assert torch.equal(logprobs(policy, prompts), before)
    names = [
        f"model.language_model.layers.{i}.{name}.lora_{part}.default.weight"
        for i in range(2)
        for name in ("self_attn.q_proj", "mlp.down_proj")
        for part in "AB"
    ]
    assert list(policy.trainable()) == names
    for name, tensor in policy.state_dict().items():
        if ".lora_" not in name:
            assert torch.equal(tensor, state[name.replace(".base_layer.", ".")]), name


def test_all_linear_layers_of_the_language_model_are_the_default(new_policy):
    policy = new_policy()
    attach_adapter(policy, r=2, alpha=4)
    assert len(adapted(policy)) == 2 * len(TARGETS)
    assert {name.rsplit(".", 1)[1] for name in adapted(policy)} == set(TARGETS)


def test_a_is_a_function_of_the_seed_alone(new_policy):
    drawn = []
    for seed in (1, 1, 2):
        torch.rand(3)
        state, policy = torch.get_rng_state(), new_policy()
        attach_adapter(policy, r=2, alpha=4, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        drawn.append(next(iter(policy.trainable().values())))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_rollout_draws_from_the_merged_weights(new_policy, make_prompts, kv_heads):
    policy, prompts = with_adapter(new_policy(kv_heads)), make_prompts(6, 9)
    drawn = sample_images(policy, prompts, cfg_weight=3.0, seed=2)
    with torch.no_grad():
        for prompt, ids, found in zip(prompts, drawn.ids, drawn.guided_logprobs, strict=True):
            scored = policy.image_logprobs(prompt, ids, cfg_weight=3.0)
            torch.testing.assert_close(found, scored, rtol=0, atol=1e-4)
            with adapter_off(policy):
                base = policy.image_logprobs(prompt, ids, cfg_weight=3.0)
            assert (base - scored).abs().mean() > 0.1  # the base would be noticed


def test_merged_weights_are_fp32_sums_rounded_once(new_policy):
    policy = with_adapter(new_policy().bfloat16())
    assert {p.dtype for p in policy.trainable().values()} == {torch.float32}
    own = next(policy.model.language_model.decoder_layers())
    wanted = []
    for m in (own.self_attn.q_proj, own.self_attn.k_proj, own.self_attn.v_proj):
        product = m.lora_B["default"].weight @ m.lora_A["default"].weight * 2.0
        wanted.append((m.base_layer.weight.float() + product).bfloat16())
    found = next(policy.weights.layers()).qkv.weight
    assert found.dtype == torch.bfloat16 and torch.equal(found, torch.cat(wanted))


def test_layers_without_an_adapter_are_read_where_they_are(new_policy):
    policy = with_adapter(new_policy(), targets=["q_proj", "up_proj"])
    own, found = next(policy.model.language_model.decoder_layers()), next(policy.weights.layers())
    assert found.out.weight.data_ptr() == own.self_attn.o_proj.weight.data_ptr()
    assert found.down.weight.data_ptr() == own.mlp.down_proj.weight.data_ptr()
    rows = len(own.self_attn.q_proj.base_layer.weight)
    assert torch.equal(found.qkv.weight[rows : 2 * rows], own.self_attn.k_proj.weight)
    assert not torch.equal(found.qkv.weight[:rows], own.self_attn.q_proj.base_layer.weight)


def test_the_merged_copy_is_gone_with_its_rollout(new_policy, make_prompts, monkeypatch):
    """Neither a second copy while it lasts nor any afterwards."""
    policy, alive = with_adapter(new_policy()), []
    read = MergedWeights.layers

    def layers(self):
        for layer in read(self):
            alive.append(weakref.ref(layer.down.weight))
            yield layer

    monkeypatch.setattr("kernels.cpu.build.library", lambda: None)  # those read them in place
    monkeypatch.setattr(MergedWeights, "layers", layers)
    for seed in range(2):
        sample_images(policy, make_prompts(6, 9), seed=seed)
        assert len(alive) == 2 * (seed + 1) and not any(ref() is not None for ref in alive)


def test_version_follows_updates_and_the_switch(new_policy):
    policy = with_adapter(new_policy())
    list(policy.weights.layers())
    seen = [policy.weights.version]
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=1e-3)
    for p in policy.trainable().values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    seen.append(policy.weights.version)
    with adapter_off(policy):
        seen.append(policy.weights.version)
    assert policy.weights.version == seen[1]  # the same weights as before
    assert len(set(seen)) == 3


def test_a_rollout_prepared_while_the_adapter_is_off_is_refused_once_it_is_on(
    new_policy, make_prompts, monkeypatch
):
    policy = with_adapter(new_policy())
    real = engine.rollout.step_weights.StepWeights.__init__

    def off(self, source, head):
        with adapter_off(policy):
            real(self, source, head)

    monkeypatch.setattr(engine.rollout.step_weights.StepWeights, "__init__", off)
    with pytest.raises(ValueError, match="weights have changed"):
        sample_images(policy, make_prompts(6))


def test_off_is_the_base_model_and_ends_whatever_happens(new_policy, make_prompts):
    base, policy, prompts = new_policy(), with_adapter(new_policy()), make_prompts(6, 9)
    wanted, on = logprobs(base, prompts), logprobs(policy, prompts)
    trainable = list(policy.trainable())
    with pytest.raises(RuntimeError, match="inside"), adapter_off(policy):
        with adapter_off(policy):
            assert torch.equal(logprobs(policy, prompts), wanted)
        assert torch.equal(logprobs(policy, prompts), wanted)  # an inner one does not end it
        drawn = sample_images(policy, prompts, seed=1)
        assert torch.equal(drawn.ids, sample_images(base, prompts, seed=1).ids)
        raise RuntimeError("inside")
    assert torch.equal(logprobs(policy, prompts), on)
    assert list(policy.trainable()) == trainable
    with adapter_off(base):
        assert torch.equal(logprobs(base, prompts), wanted)


def test_dropout_works_in_its_context_alone_and_by_its_seeds(new_policy, make_prompts):
    policy, prompts = with_adapter(new_policy(), dropout=0.5), make_prompts(6)
    still = logprobs(policy, prompts)
    assert torch.equal(logprobs(policy, prompts), still)
    found = []
    for seeds in ((0, 1, 0), (0, 1, 0), (0, 2, 0)):
        state = torch.get_rng_state()
        with adapter_dropout(policy, *seeds):
            found.append(logprobs(policy, prompts))
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2]) and not torch.equal(found[0], still)
    assert torch.equal(logprobs(policy, prompts), still)


@pytest.mark.parametrize("layout", ["original", "transformers"])
def test_an_adapted_policy_is_saved_merged(tmp_path, layout):
    """Under the names of a plain one, without being changed by it."""
    policy = with_adapter(load_policy("tiny"))
    before = copy.deepcopy(policy.state_dict())
    save_policy(policy, tmp_path / "saved", layout=layout)
    after = policy.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    plain, ids = load_policy(str(tmp_path / "saved")), torch.arange(64)
    prompt = torch.tensor([policy.bos, 9, 11, policy.image_start])
    assert isinstance(plain.weights, OwnWeights) and not adapted(plain)
    with torch.no_grad():
        torch.testing.assert_close(
            plain.image_logprobs(prompt, ids), policy.image_logprobs(prompt, ids), rtol=0, atol=1e-4
        )


def test_without_peft_one_line_names_the_extra(new_policy, monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.partition(".")[0] == "peft":
            raise ModuleNotFoundError("No module named 'peft'", name="peft")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match=r'pip install "t2i-engine\[peft\]"$'):
        attach_adapter(new_policy(), r=2, alpha=4)
