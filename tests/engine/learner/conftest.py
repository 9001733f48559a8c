"""Four samples of a small policy as an experience, and what the objective makes of it."""

import dataclasses

import pytest
import torch
from torch import Tensor

from engine.learner.levels import Experience, Level, LevelRows
from engine.learner.objective import (
    level_loss,
    score,
    token_weights,
)
from engine.model.policy import Policy
from engine.rollout import sample_images, sample_text
from engine.settings.train import TrainConfig

CFG = 3.0
BOTH = ["semantic", "token"]


def make_config(**overrides) -> TrainConfig:
    return TrainConfig(**({"cfg_weight": CFG, "max_completion_length": 6, "beta": 0.0} | overrides))


@pytest.fixture
def experience(new_policy, make_prompts):
    """Four samples of the untouched policy, of different lengths, one ended early."""
    policy = new_policy()
    stage1, stage2 = make_prompts(6, 9, 6, 11), make_prompts(8, 5, 8, 12, seed=1)
    free = sample_text(policy, stage1, max_new_tokens=6, seed=1)
    policy.eos = int(free.ids[1, 2])
    text = sample_text(policy, stage1, max_new_tokens=6, seed=1)
    assert not text.mask.all()
    images = sample_images(policy, stage2, cfg_weight=CFG, seed=1)
    whole = torch.ones_like(images.ids, dtype=torch.bool)
    pairs = (text.logprobs, text.logprobs), (images.logprobs, images.logprobs)
    levels = [
        Level("semantic", stage1, text.ids, text.mask, 6, *pairs[0]),
        Level("token", stage2, images.ids, whole, 16, *pairs[1]),
    ]
    experience = Experience(levels)
    experience.credit(dict.fromkeys(BOTH, torch.tensor([1.2, -0.7, 0.4, -1.5])))
    return experience


def changed(experience: Experience, **by_level) -> Experience:
    """A copy whose levels have other tensors: name -> {field: value}."""
    levels = [dataclasses.replace(v, **by_level.get(v.name, {})) for v in experience.levels]
    return Experience(levels)


def shifted(experience: Experience) -> Experience:
    """The experience as of an older policy, so that the clip works, with a reference."""
    torch.manual_seed(11)
    found = {}
    for level in experience.levels:
        old = level.old
        moved = old + torch.randn_like(old) * 0.3
        found[level.name] = {"old": moved, "ref": old + torch.randn_like(old) * 0.5}
    return changed(experience, **found)


def trained(e: Experience, config: TrainConfig, size: int = 0) -> Experience:
    """The levels that the settings train, as they train them."""
    guided = config.logprob_policy != "conditional"
    image = {"cfg_weight": config.cfg_weight if guided else None}
    image["detached"] = config.logprob_policy == "guided_detached"
    levels = [level for level in e.levels if level.name in config.train_levels]
    levels = [dataclasses.replace(v, **(image if v.name == "token" else {})) for v in levels]
    for level, weights in zip(levels, token_weights(levels, config.loss_type), strict=True):
        level.weights = weights
    return Experience(levels, size)


def scores(policy: Policy, e: Experience, config: TrainConfig) -> dict[str, Tensor]:
    """(B, T) log-probs of each level that trains, 0 where nothing was drawn."""
    found = {}
    for part in trained(e, config).parts:
        for rows in part:
            found[rows.level.name] = torch.zeros_like(rows.level.sampled)
            rows.write(found[rows.level.name], score(policy, rows, config.temperature))
    return found


def policy_loss(policy: Policy, part: list[LevelRows], config: TrainConfig) -> dict[str, Tensor]:
    """level_loss summed over a micro-batch's levels."""
    found = [level_loss(policy, rows, config) for rows in part]
    return {name: sum((f[name] for f in found[1:]), found[0][name]) for name in found[0]}


def run(policy: Policy, e: Experience, config: TrainConfig, chunks: int = 1):
    """Totals and gradients of policy_loss summed over micro-batches."""
    policy.zero_grad()
    totals: dict[str, float] = {}
    for part in trained(e, config, 4 // chunks).parts:
        output = policy_loss(policy, part, config)
        output["loss"].backward()
        totals = {k: totals.get(k, 0.0) + v.item() for k, v in output.items()}
    return totals, {k: p.grad.clone() for k, p in policy.trainable().items() if p.grad is not None}
