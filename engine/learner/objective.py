"""BiCoT-GRPO: token weights and the clipped loss over both chains of thought."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.learner.levels import Level, LevelRows
from engine.model.adapter import adapted
from engine.model.generator import Generator
from engine.model.policy import Policy
from engine.model.weight_source import OwnWeights
from engine.settings.train import TrainConfig
from kernels import linear_grpo_loss, linear_logprobs


def token_weights(
    levels: Sequence[Level], loss_type: str, level_weights: Sequence[float] = ()
) -> list[Tensor]:
    """Mask, importance and normaliser of every token.

    `token`: one mean over all trained tokens of the batch; `level`: a mean over each level's, added
    up; `sequence`: a mean over each sample's trained tokens, then over samples; `dr_grpo`: the
    longest possible sample as the constant divisor (arXiv:2503.20783).

    Args: level_weights: what each level's are multiplied by; none: 1.
    Returns: (B, T) fp32 of each level; 0 on what was not drawn.
    """
    masks = [level.mask.float() for level in levels]
    for mask, level in zip(masks, levels, strict=True):
        if level.kept is not None:
            mask *= level.kept[:, None]
        if level.importance is not None:
            total = mask.sum()
            mask *= level.importance
            mask *= total / mask.sum().clamp(min=1e-8)  # the level keeps its share of the loss
    count = len(levels)
    if loss_type == "level":
        scales = [1 / mask.sum().clamp(min=1) for mask in masks]
    elif loss_type == "token":
        scales = [1 / sum((m.sum() for m in masks[1:]), masks[0].sum()).clamp(min=1)] * count
    elif loss_type == "sequence":
        lengths = [mask.sum(1, keepdim=True) for mask in masks]
        total = sum(lengths[1:], lengths[0])
        samples = (total > 0).sum().clamp(min=1)
        scales = [1 / (samples * total.clamp(min=1))] * count
    else:
        longest = sum(level.longest for level in levels)
        scales = [masks[0].new_tensor(1 / (len(masks[0]) * longest))] * count
    by_level = level_weights or [1.0] * count
    return [m * s * w for m, s, w in zip(masks, scales, by_level, strict=True)]


def token_importance(values: Tensor, top: float) -> Tensor:
    """What image tokens weigh beside each other, (B, N) fp32 from (B, N) values >= 0.

    Args: top: 1: in proportion to the values; below: that share of each sample's tokens, those of
        the largest values, weigh 1, the others nothing.
    """
    if top == 1:
        return values.float()
    count = max(1, round(top * values.shape[1]))
    chosen = values.topk(count, dim=1).indices
    return torch.zeros_like(values, dtype=torch.float32).scatter_(1, chosen, 1.0)


def guidance_moves(logprobs: Tensor, guided: Tensor) -> Tensor:
    """How far guidance moved each drawn token's distribution, >= 0, nats.

    The estimate k3 (J. Schulman, 2020) of KL(guided || conditional) from the one token that was
    drawn, under the guided distribution; both log-probs come with the rollout.
    """
    gap = (logprobs - guided).clamp(max=20)
    return gap.exp() - gap - 1


def reference_policy(policy: Policy) -> Policy:
    """A frozen copy of the language model that shares everything that does not train.

    Of a policy with an adapter it is the policy itself: score it under `adapter_off`.
    """
    if adapted(policy.model.language_model):
        return policy
    reference = copy.copy(policy)
    reference._modules = dict(policy._modules)
    reference.model = copy.copy(policy.model)
    reference.model._modules = dict(policy.model._modules)
    memo: dict[int, object] = {}  # tied embeddings stay tied
    reference.model.language_model = copy.deepcopy(policy.model.language_model, memo)
    reference.lm_head = copy.deepcopy(policy.lm_head, memo)
    for module in (reference.model.language_model, reference.lm_head):
        module.requires_grad_(False)
    reference.weights = OwnWeights(reference.model.language_model)
    return reference


@torch.no_grad()
def score(generator: Generator, rows: LevelRows, temperature: float) -> Tensor:
    """Log-probs (n,) fp32 nats of a level's drawn tokens, by the training forward.

    Under the distribution that the level trains.
    """
    head = generator.head(rows.level.name)
    cond, uncond = rows.features(generator)
    return linear_logprobs(
        cond,
        head.weight,
        rows.tokens(rows.level.ids),
        bias=head.bias,
        uncond_hidden=uncond,
        cfg_weight=rows.level.cfg_weight,
        temperature=temperature,
    )


def level_loss(
    generator: Generator, rows: LevelRows, config: TrainConfig, loss_scale: float = 1.0
) -> dict[str, Tensor]:
    """The clipped loss of one micro-batch of a level.

    Args:
        rows: their weights are slices of those of the whole batch.
        loss_scale: what the loss is multiplied by for fp16, whose gradients would else underflow.
    Returns: `loss` (scalar, differentiable, scaled) and, detached, `kl`, `entropy`,
        `clip_fraction` (means under the weights) and `policy_drift`: the largest-batch mean of
        |training log-prob - sampler's log-prob|; all already multiplied by the micro-batch's
        share of the weights, so that sums over micro-batches and levels are the batch's values.
    """
    level, head = rows.level, generator.head(rows.level.name)
    assert level.advantages is not None and level.weights is not None
    cond, uncond = rows.features(generator)
    weights, sampled = rows.tokens(level.weights), rows.tokens(level.sampled)
    output = linear_grpo_loss(
        cond,
        head.weight,
        rows.tokens(level.ids),
        rows.tokens(_corrected(level.advantages, level.old, level.sampled, config)),
        bias=head.bias,
        uncond_hidden=uncond,
        cfg_weight=level.cfg_weight,
        old_logprobs=rows.tokens(level.old),
        ref_logprobs=None if level.ref is None else rows.tokens(level.ref),
        token_weights=weights * loss_scale,
        sequence_ids=rows.sample_of() if config.ratio_level == "sequence" else None,
        clip_low=config.at_level("clip_low", level.name),
        clip_high=config.at_level("clip_high", level.name),
        dual_clip=config.dual_clip,
        beta=config.at_level("beta", level.name) if level.beta is None else level.beta,
        temperature=config.temperature,
    )
    share = weights.sum()
    return {
        "loss": output.loss,
        "kl": output.kl * share,
        "entropy": output.entropy * share,
        "clip_fraction": output.clip_fraction * share,
        "policy_drift": ((output.logprobs - sampled).abs() * weights).sum(),
    }


def _corrected(advantages: Tensor, old: Tensor, sampled: Tensor, config: TrainConfig) -> Tensor:
    """Every token's advantage, (B,) -> (B, T).

    With truncated importance sampling, times min(old probability / sampler's, cap): it corrects for
    drift between sampler and trainer, and scales the clipped surrogate but not the KL.
    """
    advantages = advantages[:, None].expand_as(old)
    if config.truncated_is == 0:
        return advantages
    return advantages * (old - sampled).exp().clamp(max=config.truncated_is)
