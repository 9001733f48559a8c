"""The part of the trainer that learns: policy, reference, optimizer, and their state on disk."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.generate.pictures import Generation
from engine.learner.objective import Experience, policy_loss, reference_policy, score
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
        sampled = made.image.logprobs
        if config.logprob_policy != "conditional":
            sampled = made.image.guided_logprobs
        experience = Experience(
            made.stage1, made.stage2, made.text.ids, made.text.mask, made.image.ids,
            text_rollout=made.text.logprobs, image_rollout=sampled,
            text_old=made.text.logprobs, image_old=sampled,
            text_ref=None, image_ref=None,
            advantages=torch.zeros(len(sampled), device=sampled.device),
        )  # fmt: skip
        if config.old_logprobs == "recompute":
            experience.text_old, experience.image_old = self._score(self.policy, experience)
        if self.reference is not None:
            experience.text_ref, experience.image_ref = self._score(self.reference, experience)
        return experience

    def _slices(self, experience: Experience) -> list[tuple[int, int]]:
        size = self.config.micro_batch_size or len(experience.advantages)
        count = len(experience.advantages)
        return [(start, min(start + size, count)) for start in range(0, count, size)]

    def _score(self, policy: Any, experience: Experience) -> tuple[Tensor, Tensor]:
        parts = [score(policy, experience.rows(*s), self.config) for s in self._slices(experience)]
        return torch.cat([text for text, _ in parts]), torch.cat([image for _, image in parts])

    def update(
        self, step: int, experience: Experience, weights: tuple[Tensor, Tensor]
    ) -> dict[str, Any]:
        """One optimizer step on the whole experience."""
        rate = self.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        totals: dict[str, Tensor] = {}
        for start, stop in self._slices(experience):
            part = policy_loss(
                self.policy,
                experience.rows(start, stop),
                (weights[0][start:stop], weights[1][start:stop]),
                self.config,
            )
            part["loss"].backward()
            for name, value in part.items():
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
        tensors = {
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
