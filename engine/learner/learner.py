"""The part of the trainer that learns: policy, reference, optimizer, and their state on disk."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.generate.pictures import Generation
from engine.learner.levels import Experience, Level
from engine.learner.objective import policy_loss, reference_policy, score, token_weights
from engine.model.adapter import adapter_off
from engine.model.policy import Policy
from engine.run.checkpoint import (
    load_checkpoint,
    load_named_tensors,
    load_optimizer_tensors,
    optimizer_tensors,
    prune,
    save_checkpoint,
)
from engine.settings.train import TrainConfig


def levels(made: Generation, config: TrainConfig) -> list[Level]:
    """The chains of thought of a rollout that train: the plans, then the pictures."""
    found = []
    if "semantic" in config.train_levels:
        text = made.text
        found.append(
            Level(
                "semantic",
                made.stage1,
                text.ids,
                text.mask,
                longest=config.max_completion_length,
                sampled=text.logprobs,
                old=text.logprobs,
                share=config.share_prompts,
            )
        )
    if "token" in config.train_levels:
        image, conditional = made.image, config.logprob_policy == "conditional"
        sampled = image.logprobs if conditional else image.guided_logprobs
        found.append(
            Level(
                "token",
                made.stage2,
                image.ids,
                torch.ones_like(image.ids, dtype=torch.bool),
                longest=image.ids.shape[1],
                sampled=sampled,
                old=sampled,
                cfg_weight=None if conditional else config.cfg_weight,
                detached=config.logprob_policy == "guided_detached",
                share=config.share_prompts,
            )
        )
    return found


class Learner:
    """Turns experience into updates of a policy."""

    def __init__(self, policy: Policy, config: TrainConfig) -> None:
        self.policy, self.config = policy, config
        self.reference = reference_policy(policy) if config.beta > 0 else None
        self.names = list(policy.trainable())
        self.optimizer = torch.optim.AdamW(
            policy.trainable().values(),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.weight_decay,
        )

    def learning_rate(self, step: int) -> float:
        """Rate of a step >= 1: a pure function, so that a resumed run has nothing to restore."""
        config = self.config
        if step <= config.warmup_steps:
            return config.learning_rate * step / config.warmup_steps
        after = max(1, config.max_steps - config.warmup_steps)
        done = (step - config.warmup_steps - 1) / after
        shape = {
            "constant": 1.0,
            "linear": 1 - done,
            "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        }
        return config.learning_rate * shape[config.lr_scheduler_type]

    def experience(self, made: Generation) -> Experience:
        """The rollout with old and reference log-probs; advantages are still to come."""
        config = self.config
        experience = Experience(levels(made, config), config.micro_batch_size)
        for level, weights in zip(
            experience.levels, token_weights(experience.levels, config.loss_type), strict=True
        ):
            level.weights = weights
            if config.old_logprobs == "recompute":
                level.old = torch.zeros_like(level.sampled)
            if self.reference is not None:
                level.ref = torch.zeros_like(level.sampled)
        for part in experience.parts:
            for rows in part:
                if config.old_logprobs == "recompute":
                    rows.write(rows.level.old, score(self.policy, rows, config.temperature))
                if self.reference is not None and rows.level.ref is not None:
                    with adapter_off(self.reference):
                        rows.write(rows.level.ref, score(self.reference, rows, config.temperature))
        return experience

    def update(self, step: int, experience: Experience) -> dict[str, Any]:
        """One optimizer step on the whole experience."""
        rate = self.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        totals: dict[str, Tensor] = {}
        for part in experience.parts:
            found = policy_loss(self.policy, part, self.config)
            found["loss"].backward()
            for name, value in found.items():
                totals[name] = totals.get(name, 0) + value.detach()
        norm = torch.nn.utils.clip_grad_norm_(
            self.policy.trainable().values(), self.config.max_grad_norm
        )
        if not torch.isfinite(norm):
            raise FloatingPointError(f"step {step}: the gradient is not finite")
        self.optimizer.step()
        return {**totals, "grad_norm": norm, "lr": rate}

    def save(self, step: int) -> None:
        """Checkpoint what a resumed run cannot derive from its settings."""
        tensors: dict[str, Mapping[str, Tensor]] = {
            "policy": self.policy.trainable(),
            "optimizer": optimizer_tensors(self.optimizer, self.names),
        }
        save_checkpoint(
            self.config.run_dir, step, tensors=tensors, state={"seed": self.config.seed}
        )
        prune(self.config.run_dir, self.config.save_total_limit)

    def restore(self, path: Path) -> int:
        """Continue from a checkpoint. Returns its step."""
        tensors, state = load_checkpoint(path)
        with torch.no_grad():
            load_named_tensors(self.policy.trainable(), tensors["policy"], source=path)
        load_optimizer_tensors(self.optimizer, self.names, tensors["optimizer"], source=path)
        return state["step"]
