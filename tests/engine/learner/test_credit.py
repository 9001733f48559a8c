"""Advantages against plain numpy, for groups and nested ones."""

import numpy as np
import pytest
import torch

from engine.learner.credit import credit, scaled, zero_std_groups
from engine.settings.errors import UserError
from engine.settings.train import TrainConfig
from rewards import Scores

PROMPTS, PLANS, IMAGES = 3, 4, 2
REWARDS = np.random.default_rng(0).normal(size=(PROMPTS, PLANS, IMAGES))


def config(**overrides) -> TrainConfig:
    sizes = {"prompts_per_step": PROMPTS, "num_generations": PLANS, "images_per_plan": IMAGES}
    return TrainConfig(**(sizes | overrides))


def scores(total: np.ndarray = REWARDS, **by_expert: np.ndarray) -> Scores:
    tensors = {k: torch.from_numpy(v).flatten().float() for k, v in by_expert.items()}
    return Scores(torch.from_numpy(total).flatten().float(), tensors, {})


def test_group_advantages_equal_numpy():
    groups = REWARDS.reshape(PROMPTS, -1)
    centred = groups - groups.mean(1, keepdims=True)
    expected = centred / (groups.std(1, ddof=1, keepdims=True) + 1e-4)
    found = credit(scores(), {}, config())
    for level in ("semantic", "token"):
        np.testing.assert_allclose(found.advantages[level], expected.ravel(), rtol=1e-4, atol=1e-5)
        assert found.advantages[level].dtype == torch.float32 and found.varied[level].all()


def test_nested_advantages_equal_numpy():
    """A plan by its pictures' mean against other plans; a picture within its plan."""
    found = credit(scores(), {}, config(advantages="nested"))
    plans = REWARDS.mean(2)
    centred = plans - plans.mean(1, keepdims=True)
    expected = centred / (plans.std(1, ddof=1, keepdims=True) + 1e-4)
    by_sample = found.advantages["semantic"].view(PROMPTS, PLANS, IMAGES)
    assert torch.equal(by_sample[..., 0], by_sample[..., 1])
    np.testing.assert_allclose(by_sample[..., 0], expected, rtol=1e-4, atol=1e-5)
    centred = REWARDS - plans[..., None]
    expected = centred / (REWARDS.std(2, ddof=1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(
        found.advantages["token"].view(PROMPTS, PLANS, IMAGES), expected, rtol=1e-4, atol=1e-5
    )
    # A plan's luck is none of its pictures': shifting a plan's rewards changes no picture's share.
    moved = REWARDS + np.arange(PLANS)[None, :, None]
    again = credit(scores(moved), {}, config(advantages="nested"))
    torch.testing.assert_close(
        again.advantages["token"], found.advantages["token"], rtol=1e-4, atol=1e-5
    )
    assert not torch.allclose(again.advantages["semantic"], found.advantages["semantic"])


def test_scales_and_baselines():
    rewards = torch.from_numpy(REWARDS.reshape(PROMPTS, -1)).float()
    centred = rewards - rewards.mean(1, keepdim=True)
    assert torch.equal(scaled(rewards, "none"), centred)
    pooled = (centred.square().sum() / (PROMPTS * (PLANS * IMAGES - 1))).sqrt()
    torch.testing.assert_close(scaled(rewards, "pooled"), centred / (pooled + 1e-4))
    alone = scaled(rewards, "none", "leave_one_out")
    for group, row in zip(rewards, alone, strict=True):
        for i in range(len(group)):
            others = torch.cat((group[:i], group[i + 1 :])).mean()
            assert row[i].item() == pytest.approx((group[i] - others).item(), abs=1e-5)


def test_scaling_by_expert_ignores_their_ranges():
    one, two = np.random.default_rng(1).normal(size=(2, *REWARDS.shape))
    found = [
        credit(
            scores(one + factor * two, a=one, b=factor * two + 7),
            {"a": 1.0, "b": 1.0},
            config(advantage_scale="expert"),
        ).advantages["token"]
        for factor in (1, 1000)
    ]
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)
    by_std = credit(scores(one + 1000 * two), {}, config()).advantages["token"]
    assert not torch.allclose(found[1], by_std, atol=0.1)
    # An expert's weight counts.
    alone = credit(scores(a=one, b=two), {"a": 1.0, "b": 0.0}, config(advantage_scale="expert"))
    groups = torch.from_numpy(one.reshape(PROMPTS, -1)).float()
    cosine = torch.cosine_similarity(alone.advantages["token"], scaled(groups).flatten(), dim=0)
    assert cosine > 0.999


def test_equal_rewards_have_no_advantage_and_are_known():
    rewards = REWARDS.copy()
    rewards[1] = 0.5
    rewards[2, 3] = 0.25
    found = credit(scores(rewards), {}, config())
    assert not found.advantages["token"].view(PROMPTS, -1)[1].any()
    assert found.varied["token"].view(PROMPTS, -1).all(1).tolist() == [True, False, True]
    assert zero_std_groups(scores(rewards).total, PLANS * IMAGES) == pytest.approx(1 / 3)
    nested = credit(scores(rewards), {}, config(advantages="nested"))
    varied = nested.varied["token"].view(PROMPTS, PLANS, IMAGES)
    assert varied.all(2).tolist() == [[True] * 4, [False] * 4, [True, True, True, False]]
    assert nested.varied["semantic"].view(PROMPTS, -1).all(1).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"advantages": "nested", "images_per_plan": 1}, "images_per_plan >= 2"),
        ({"advantages": "nested", "num_generations": 1}, "num_generations >= 2"),
        ({"advantages": "nested", "plans": "off"}, "--plans off"),
        ({"plans": "off", "train_levels": ["semantic"]}, "--plans off leaves"),
        ({"level_weights": ["text=1"]}, "level_weights: expected semantic or token"),
        ({"level_weights": ["token=0", "semantic=0"]}, "no level that trains has any"),
        ({"level_beta": ["token=x"]}, "level_beta"),
        ({"level_beta": ["token=1", "token=2"]}, "each once"),
        ({"token_weighting_top": 0.5}, "token_weighting"),
        ({"kl_target": 0.1, "beta": 0.0}, "kl_target"),
    ],
)
def test_impossible_settings_are_refused(wrong, said):
    with pytest.raises(UserError, match=said):
        config(**wrong)


def test_settings_by_level():
    made = config(level_weights=["token=0.3"], level_clip_high=["semantic=0.4"], beta=0.2)
    assert made.at_level("weights", "token") == 0.3 and made.at_level("weights", "semantic") == 1
    assert made.at_level("clip_high", "semantic") == 0.4 and made.at_level("beta", "token") == 0.2
    bare = config(plans="off")
    assert bare.train_levels == ["token"]
