"""The part of the trainer that learns: policy, reference, optimizer, and their state on disk."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.generate.pictures import Generation
from engine.learner.credit import Credit
from engine.learner.levels import Experience, Level
from engine.learner.objective import (
    guidance_moves,
    level_loss,
    reference_policy,
    score,
    token_importance,
    token_weights,
)
from engine.learner.offload import LayerStream
from engine.learner.optimizer import ExactAdamW, build_optimizer, set_rate
from engine.learner.probe import GradientShares, Probe
from engine.model.adapter import adapter_off
from engine.model.attention import attention
from engine.model.policy import Policy
from engine.run.checkpoint import (
    load_checkpoint,
    load_named_tensors,
    load_optimizer_tensors,
    optimizer_tensors,
    prune,
    save_checkpoint,
)
from engine.settings.device import give_back_memory
from engine.settings.errors import UserError
from engine.settings.out_of_memory import halved, is_out_of_memory
from engine.settings.train import TrainConfig

BETA_GAIN = 0.1  # of the proportional controller


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
        importance = None
        if config.token_weighting == "guidance":
            importance = guidance_moves(image.logprobs, image.guided_logprobs)
        elif config.token_weighting == "entropy":
            importance = -image.guided_logprobs
        if importance is not None:
            importance = token_importance(importance, config.token_weighting_top)
        found.append(
            Level(
                "token",
                made.stage2,
                image.ids,
                torch.ones_like(image.ids, dtype=torch.bool),
                longest=image.ids.shape[1],
                sampled=sampled,
                old=sampled,
                importance=importance,
                cfg_weight=None if conditional else config.cfg_weight,
                detached=config.logprob_policy == "guided_detached",
                share=config.share_prompts,
            )
        )
    return found


class Learner:
    """Turns experience into updates of a policy.

    Raises: UserError where the settings would train nothing; see build_optimizer.
    """

    def __init__(self, policy: Policy, config: TrainConfig) -> None:
        self.policy, self.config = policy, config
        attention(config.attn_implementation, policy.device, policy.dtype)  # or say why not
        policy.set_training(
            attn_implementation=config.attn_implementation,
            gradient_checkpointing=config.gradient_checkpointing,
        )
        self.reference = reference_policy(policy) if config.has_kl else None
        if config.ref_offload:
            if policy.device.type == "cpu":
                raise UserError("--ref_offload: the reference policy is in host memory already")
            if self.reference is not None:
                layers = self.reference.model.language_model.decoder_layers()
                LayerStream(list(layers), policy.device)
        self.parameters = policy.trainable()
        self.optimizer = build_optimizer(self.parameters, config)
        self.micro_batch_size = config.micro_batch_size
        self.beta = {level: config.at_level("beta", level) for level in config.train_levels}
        # Gradients of fp16 would underflow; halved whenever one overflows.
        self.loss_scale = 2.0**16 if policy.dtype == torch.float16 else 1.0

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
        give_back_memory()
        experience = Experience(levels(made, config), self.micro_batch_size)
        self._weigh(experience.levels)
        for level in experience.levels:
            level.beta = self.beta[level.name]
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

    def credit(self, experience: Experience, earned: Credit) -> None:
        """Give the samples their advantages; those that teach nothing may lose their weights."""
        experience.credit(earned.advantages)
        if self.config.dynamic_sampling == "skip":
            for level in experience.levels:
                level.kept = earned.varied[level.name]
            self._weigh(experience.levels)

    def _weigh(self, levels: list[Level]) -> None:
        by_level = [self.config.at_level("weights", level.name) for level in levels]
        weights = token_weights(levels, self.config.loss_type, by_level)
        for level, each in zip(levels, weights, strict=True):
            level.weights = each

    def update(self, step: int, experience: Experience) -> dict[str, Any]:
        """One optimizer step on the whole experience; its gradients are gone afterwards.

        Out of memory: again with micro-batches of half the size, after a line on stderr.
        Raises: FloatingPointError where the gradient is not finite.
        """
        rate = self.learning_rate(step)
        set_rate(self.optimizer, rate)
        while True:
            totals = self._gradients(experience)
            if totals is None:
                continue
            norm = _norm(self.parameters.values()) / self.loss_scale
            if torch.isfinite(norm):
                break
            if self.loss_scale == 1:
                raise FloatingPointError(f"step {step}: the gradient is not finite")
            self.loss_scale /= 2
        probe = Probe(list(self.parameters.values()), self.optimizer)
        clip = (self.config.max_grad_norm / (norm + 1e-6)).clamp(max=1.0) / self.loss_scale
        if isinstance(self.optimizer, ExactAdamW):
            self.optimizer.step(grad_scale=clip)
        else:
            for p in self.parameters.values():
                if p.grad is not None:
                    p.grad.mul_(clip)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        steered = self._steer(totals)
        return {**totals, **steered, "grad_norm": norm, "lr": rate, **probe.metrics()}

    def _steer(self, totals: Mapping[str, Tensor]) -> dict[str, float]:
        """Move each level's beta towards the KL that is asked for (arXiv:1909.08593, 2.2).

        Returns: the betas of the next rollout, where they move.
        """
        target = self.config.kl_target
        if target is None:
            return {}
        for level, beta in self.beta.items():
            error = float(totals[f"kl/{level}"]) / target - 1
            self.beta[level] = beta * (1 + BETA_GAIN * max(-0.2, min(0.2, error)))
        return {f"beta/{level}": beta for level, beta in self.beta.items()}

    def _gradients(self, experience: Experience) -> dict[str, Tensor] | None:
        """Leave the whole experience's gradient in the parameters. Returns: the losses' totals.

        Level by level, so that one level's activations are held at a time. None: out of memory;
        the micro-batches are smaller now.
        """
        totals: dict[str, Tensor] = {}
        shares = GradientShares(list(self.parameters.values()))
        self.optimizer.zero_grad(set_to_none=True)
        try:
            for i, level in enumerate(experience.levels):
                for part in experience.parts:
                    found = level_loss(self.policy, part[i], self.config, self.loss_scale)
                    found["loss"].backward()
                    found["loss"] = found["loss"] / self.loss_scale
                    for name, value in found.items():
                        key = f"{name}/{level.name}"
                        totals[key] = totals.get(key, 0) + value.detach()
                    if self.policy.device.type == "cpu":
                        give_back_memory()
                shares.close(level.name)
            return _metrics(totals, experience.levels) | shares.metrics()
        except RuntimeError as error:
            if experience.micro_batch_size == 1 or not is_out_of_memory(error):
                raise
        self.micro_batch_size = halved(experience.micro_batch_size, "images of an update")
        experience.cut(self.micro_batch_size)
        return None

    def save(self, step: int) -> None:
        """Checkpoint what a resumed run cannot derive from its settings."""
        tensors: dict[str, Mapping[str, Tensor]] = {
            "policy": self.parameters,
            "optimizer": optimizer_tensors(self.optimizer, list(self.parameters)),
        }
        save_checkpoint(
            self.config.run_dir,
            step,
            tensors=tensors,
            state={
                "seed": self.config.seed,
                "loss_scale": self.loss_scale,
                "beta": self.beta,
            },
        )
        prune(self.config.run_dir, self.config.save_total_limit)

    def restore(self, path: Path) -> int:
        """Continue from a checkpoint. Returns its step."""
        tensors, state = load_checkpoint(path)
        with torch.no_grad():
            load_named_tensors(self.parameters, tensors["policy"], source=path)
        names = list(self.parameters)
        load_optimizer_tensors(self.optimizer, names, tensors["optimizer"], source=path)
        self.loss_scale = state.get("loss_scale", self.loss_scale)
        self.beta |= state.get("beta", {})
        return state["step"]


def _metrics(totals: dict[str, Tensor], levels: Sequence[Level]) -> dict[str, Tensor]:
    """A step's metrics, of all tokens and by level, from what level_loss returned, added up."""
    weights = {level.name: level.weights.sum() for level in levels if level.weights is not None}
    found: dict[str, Tensor] = {}
    for name in ("loss", "kl", "entropy", "clip_fraction", "policy_drift"):
        parts = {level: totals[f"{name}/{level}"] for level in weights}
        found[name] = torch.stack(list(parts.values())).sum()
        if name != "loss":  # means under the weights, whatever these add up to
            found[name] /= torch.stack(list(weights.values())).sum().clamp(min=1e-8)
            for level, total in parts.items():
                found[f"{name}/{level}"] = total / weights[level].clamp(min=1e-8)
    return found


def _norm(parameters: Iterable[torch.nn.Parameter]) -> Tensor:
    """The gradient's norm over all parameters, in fp32."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in grads]
    return torch.linalg.vector_norm(torch.stack(norms))
