"""Whose credit a reward is: advantages of plans and of pictures."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.model.head import LevelName
from engine.settings.train import TrainConfig
from rewards import Scores

EPS = 1e-4


@dataclass(frozen=True, slots=True)
class Credit:
    """What a batch's rewards say of each sample's two chains of thought.

    Attributes:
        advantages: (B,) fp32 of each level.
        varied: (B,) bool of each level: the rewards that the sample is compared with differ.
    """

    advantages: dict[LevelName, Tensor]
    varied: dict[LevelName, Tensor]


def credit(scores: Scores, weights: Mapping[str, float], config: TrainConfig) -> Credit:
    """Advantages of the levels that train.

    Args:
        scores: of B samples: prompts, their plans, a plan's pictures, each adjacent.
        weights: of the experts, for advantages scaled by expert.
    """
    advantages, varied = {}, {}
    for level in config.train_levels:
        rewards = _compared(scores.total, level, config)
        if config.advantage_scale == "expert":
            # Each expert's own spread is taken out before they are added, and the sum's after it
            # (GDPO), so that none rules by the range of its numbers.
            total = torch.zeros_like(rewards)
            for name, values in scores.by_expert.items():
                own = _compared(values, level, config)
                total += weights.get(name, 1.0) * scaled(own, "std", config.advantage_baseline)
            found = total / (_pooled(total) + EPS)
        else:
            found = scaled(rewards, config.advantage_scale, config.advantage_baseline)
        advantages[level] = _by_sample(found, level, config)
        varied[level] = _by_sample((~all_same(rewards))[:, None].expand_as(rewards), level, config)
    return Credit(advantages, varied)


def all_same(groups: Tensor) -> Tensor:
    """(groups,) bool: the rewards (groups, members) of which are all the same and teach nothing."""
    return (groups == groups[:, :1]).all(1)


def zero_std_groups(rewards: Tensor, group_size: int) -> float:
    """The share of the groups whose rewards (B,) are all the same."""
    return float(all_same(rewards.float().view(-1, group_size)).float().mean())


def _compared(rewards: Tensor, level: str, config: TrainConfig) -> Tensor:
    """(B,) -> (groups, members) fp32: what is compared with each other."""
    rewards = rewards.float()
    if config.advantages == "group":
        return rewards.view(-1, config.group_size)
    by_plan = rewards.view(-1, config.num_generations, config.images_per_plan)
    return by_plan.mean(2) if level == "semantic" else by_plan.flatten(0, 1)


def _by_sample(values: Tensor, level: str, config: TrainConfig) -> Tensor:
    """(groups, members) -> (B,): a plan's value is that of each of its pictures' samples."""
    if config.advantages == "nested" and level == "semantic":
        return values.flatten().repeat_interleave(config.images_per_plan)
    return values.flatten()


def centred(rewards: Tensor, baseline: str) -> Tensor:
    """(groups, members) less their group's mean, or the mean of the group's others (RLOO,
    arXiv:2402.14740)."""
    found = rewards - rewards.mean(1, keepdim=True)
    count = rewards.shape[1]
    return found if baseline == "mean" else found * (count / (count - 1))


def scaled(rewards: Tensor, scale: str = "std", baseline: str = "mean") -> Tensor:
    """Advantages (groups, members) of rewards (groups, members).

    `std`: GRPO's (arXiv:2402.03300), by the group's unbiased standard deviation plus 1e-4, as in
    T2I-R1; `pooled`: by that of all groups together; `none`: Dr. GRPO's (arXiv:2503.20783).
    """
    found = centred(rewards, baseline)
    if scale == "std":
        return found / (rewards.std(1, keepdim=True) + EPS)
    if scale == "pooled":
        return found / (_pooled(rewards - rewards.mean(1, keepdim=True)) + EPS)
    return found


def _pooled(deviations: Tensor) -> Tensor:
    """The standard deviation within groups (groups, members) of deviations from their means."""
    groups, members = deviations.shape
    return (deviations.square().sum() / (groups * (members - 1))).sqrt()
