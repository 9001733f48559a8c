"""With an adapter, the reference is the policy without it, and no second model."""

import pytest
import torch

from engine.generate.pictures import Generation
from engine.learner.learner import Learner
from engine.learner.objective import reference_policy
from engine.model.adapter import attach_adapter
from engine.policy import load_policy
from engine.rollout import sample_images, sample_text
from tests.engine.adapters import fill, with_adapter
from tests.engine.learner.conftest import BOTH, CFG, make_config, scores


@pytest.fixture
def made(make_prompts):
    """What a policy draws, as the trainer holds it."""

    def make(policy) -> Generation:
        stage1, stage2 = make_prompts(6, 9, 6, 11), make_prompts(8, 5, 8, 12, seed=1)
        text = sample_text(policy, stage1, max_new_tokens=6, seed=1)
        image = sample_images(policy, stage2, cfg_weight=CFG, seed=1)
        return Generation(stage1, text, [], stage2, image, torch.empty(0))

    return make


def test_reference_is_the_base_model_s_log_probs(new_policy, experience):
    base, policy, config = new_policy(), with_adapter(new_policy()), make_config(beta=0.1)
    assert reference_policy(policy) is policy
    assert reference_policy(base) is not base
    before = scores(base, experience, config)
    assert all(
        (got - before[name]).abs().max() > 0.1
        for name, got in scores(policy, experience, config).items()
    )


def test_experience_scores_the_reference_without_the_adapter(new_policy, made):
    base, policy, config = new_policy(), with_adapter(new_policy()), make_config(beta=0.1)
    learner = Learner(policy, config)
    assert learner.reference is policy
    experience = learner.experience(made(policy))
    wanted, own = scores(base, experience, config), scores(policy, experience, config)
    for level in experience.levels:
        assert torch.equal(level.ref, wanted[level.name])
        drift = ((level.sampled - own[level.name]) * level.mask).abs().max()
        assert drift < 1e-4  # the rollout and the update have it on


def test_kl_is_0_at_the_first_step_and_grows(new_policy, made):
    policy = new_policy()
    attach_adapter(policy, r=4, alpha=8)
    learner = Learner(policy, make_config(beta=0.1, learning_rate=1e-2))
    found = []
    for step in (1, 2):
        experience = learner.experience(made(policy))
        experience.credit(dict.fromkeys(BOTH, torch.tensor([1.2, -0.7, 0.4, -1.5])))
        found.append(float(learner.update(step, experience)["kl"]))
    assert abs(found[0]) < 1e-6 and found[1] > 1e-4


def test_a_failure_of_the_reference_s_forward_leaves_the_adapter_on(new_policy, made, monkeypatch):
    policy = with_adapter(new_policy())
    learner, generation = Learner(policy, make_config(beta=0.1)), made(policy)
    version, trainable = policy.weights.version, list(policy.trainable())

    def fails(*_args):
        assert policy.weights.version != version  # it is off here
        raise RuntimeError("out of memory")

    monkeypatch.setattr("engine.learner.learner.score", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        learner.experience(generation)
    assert policy.weights.version == version and list(policy.trainable()) == trainable
    assert torch.equal(made(policy).image.ids, generation.image.ids)


def test_an_adapter_of_a_16_bit_model_trains_in_fp32(made):
    """At a rate whose steps a bf16 weight would round away."""
    policy = load_policy("tiny", dtype=torch.bfloat16)
    attach_adapter(policy, r=4, alpha=8)
    fill(policy)
    frozen = {n: p.detach().clone() for n, p in policy.named_parameters() if not p.requires_grad}
    before = {n: p.detach().clone() for n, p in policy.trainable().items()}
    learner = Learner(policy, make_config(beta=0.1, learning_rate=1e-6))
    experience = learner.experience(made(policy))
    experience.credit(dict.fromkeys(BOTH, torch.tensor([1.2, -0.7, 0.4, -1.5])))
    learner.update(1, experience)
    for name, parameter in policy.named_parameters():
        if name in frozen:
            assert parameter.dtype == torch.bfloat16 and torch.equal(parameter, frozen[name])
        else:
            assert parameter.dtype == torch.float32
            assert (parameter != before[name]).float().mean() > 0.5, name
