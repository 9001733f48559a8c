"""BiCoT-GRPO: advantages, token weights and the clipped loss over both chains of thought."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from engine.model.policy import Policy
from engine.settings.train import TrainConfig
from kernels import LossOutput, linear_grpo_loss, linear_logprobs

ADVANTAGE_EPS = 1e-4


@dataclass(slots=True)
class Experience:
    """What a rollout leaves to train on: B samples, each one plan and one picture.

    Samples that share a plan repeat it; each copy carries its own picture's advantage.

    Attributes:
        stage1, stage2: B prompts (L_i,) int64 of the text and the image level.
        text_ids: (B, T) int64; text_mask: (B, T) bool, True on generated tokens.
        image_ids: (B, N) int64.
        text_rollout, image_rollout: (B, T), (B, N) fp32 log-probs that the sampler returned.
        text_old, image_old: the same of the policy that the ratio compares with.
        text_ref, image_ref: the same of the reference policy; None without KL.
        advantages: (B,) fp32.
    """

    stage1: Sequence[Tensor]
    stage2: Sequence[Tensor]
    text_ids: Tensor
    text_mask: Tensor
    image_ids: Tensor
    text_rollout: Tensor
    image_rollout: Tensor
    text_old: Tensor
    image_old: Tensor
    text_ref: Tensor | None
    image_ref: Tensor | None
    advantages: Tensor

    def rows(self, start: int, stop: int) -> "Experience":
        """Samples start .. stop - 1."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Experience(**{k: None if v is None else v[start:stop] for k, v in values.items()})


def group_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """(R - mean) / (std + 1e-4) over each prompt's group (GRPO, arXiv:2402.03300).

    Args:
        rewards: (B,) with the samples of a prompt adjacent; B a multiple of group_size.
    Returns: (B,) fp32. The standard deviation is the unbiased one, as in T2I-R1.
    """
    groups = rewards.float().view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + ADVANTAGE_EPS)).flatten()


def token_weights(
    text_mask: Tensor, image_tokens: int, config: TrainConfig
) -> tuple[Tensor, Tensor]:
    """Mask and normaliser of every token, shared by both levels.

    `token`: one mean over all trained tokens of the batch; `sequence`: a mean over each sample's
    trained tokens, then over samples; `dr_grpo`: the longest possible sample as the constant
    divisor (arXiv:2503.20783).

    Returns: text (B, T) and image (B, N) fp32 weights; 0 on what is not trained.
    """
    batch = len(text_mask)
    text = text_mask.float() * ("semantic" in config.train_levels)
    image = torch.full(
        (batch, image_tokens), float("token" in config.train_levels), device=text.device
    )
    if config.loss_type == "token":
        scale = 1 / (text.sum() + image.sum()).clamp(min=1)
        return text * scale, image * scale
    if config.loss_type == "sequence":
        scale = 1 / (batch * (text.sum(1, keepdim=True) + image.sum(1, keepdim=True)).clamp(min=1))
        return text * scale, image * scale
    longest = config.max_completion_length * ("semantic" in config.train_levels)
    longest += image_tokens * ("token" in config.train_levels)
    return text / (batch * longest), image / (batch * longest)


def reference_policy(policy: Policy) -> Policy:
    """A frozen copy of the language model that shares everything that does not train."""
    reference = copy.copy(policy)
    reference._modules = dict(policy._modules)
    reference.model = copy.copy(policy.model)
    reference.model._modules = dict(policy.model._modules)
    memo: dict[int, object] = {}  # tied embeddings stay tied
    reference.model.language_model = copy.deepcopy(policy.model.language_model, memo)
    reference.lm_head = copy.deepcopy(policy.lm_head, memo)
    for module in (reference.model.language_model, reference.lm_head):
        module.requires_grad_(False)
    return reference


def _text_hidden(policy: Policy, experience: Experience, config: TrainConfig) -> Tensor:
    """States that predict the plans' tokens, (B, T, D), zeros where masked."""
    return policy.completion_hidden(
        experience.stage1,
        experience.text_ids,
        image=False,
        lengths=experience.text_mask.sum(1),
        share=config.share_prompts,
    )


def _image_features(
    policy: Policy, experience: Experience, config: TrainConfig
) -> tuple[Tensor, Tensor | None]:
    """Inputs of the image head's last layer, conditional and unconditional, (B * N, D) each."""
    head = policy.model.generation_head
    ids, share = experience.image_ids, config.share_prompts
    cond = head.features(policy.completion_hidden(experience.stage2, ids, image=True, share=share))
    if config.logprob_policy == "conditional":
        return cond.flatten(0, 1), None
    detached = config.logprob_policy == "guided_detached"
    blank = [policy.unconditional(p) for p in experience.stage2]
    with torch.set_grad_enabled(torch.is_grad_enabled() and not detached):
        uncond = head.features(policy.completion_hidden(blank, ids, image=True, share=share))
    return cond.flatten(0, 1), uncond.flatten(0, 1)


@torch.no_grad()
def score(policy: Policy, experience: Experience, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """Log-probs of an experience under a policy, by the training forward.

    Returns: text (B, T), 0 where masked, and image (B, N), fp32 nats; the image level under the
        distribution that `config.logprob_policy` trains. A level that is not trained is zeros.
    """
    text = torch.zeros(experience.text_ids.shape, device=policy.device)
    image = torch.zeros(experience.image_ids.shape, device=policy.device)
    mask = experience.text_mask
    if "semantic" in config.train_levels:
        hidden = _text_hidden(policy, experience, config)
        text[mask] = linear_logprobs(
            hidden[mask],
            policy.lm_head.weight,
            experience.text_ids[mask],
            temperature=config.temperature,
        )
    if "token" in config.train_levels:
        cond, uncond = _image_features(policy, experience, config)
        last = policy.model.generation_head.vision_head
        image = linear_logprobs(
            cond,
            last.weight,
            experience.image_ids.flatten(),
            bias=last.bias,
            uncond_hidden=uncond,
            cfg_weight=None if uncond is None else config.cfg_weight,
            temperature=config.temperature,
        ).view_as(image)
    return text, image


def policy_loss(
    policy: Policy,
    experience: Experience,
    weights: tuple[Tensor, Tensor],
    config: TrainConfig,
) -> dict[str, Tensor]:
    """The clipped loss of one micro-batch over both levels.

    Args:
        experience: the micro-batch's samples.
        weights: its slices of `token_weights`, made for the whole batch.
    Returns: `loss` (scalar, differentiable) and, detached, `kl`, `entropy`, `clip_fraction`
        (means under the weights) and `policy_drift`: the largest-batch mean of
        |training log-prob - sampler's log-prob|; all already multiplied by the micro-batch's
        share of the weights, so that sums over micro-batches are the batch's values.
    """
    common = {
        "clip_low": config.clip_low,
        "clip_high": config.clip_high,
        "dual_clip": config.dual_clip,
        "beta": config.beta,
        "temperature": config.temperature,
    }
    text_weights, image_weights = weights
    text_advantages = _corrected(
        experience.advantages, experience.text_old, experience.text_rollout, config
    )
    image_advantages = _corrected(
        experience.advantages, experience.image_old, experience.image_rollout, config
    )
    batch = torch.arange(len(experience.advantages), device=policy.device)
    parts: list[tuple[LossOutput, Tensor, Tensor]] = []  # output, weights, sampler's log-probs
    mask = experience.text_mask
    if "semantic" in config.train_levels:
        hidden = _text_hidden(policy, experience, config)
        rows = batch[:, None].expand_as(mask)[mask]
        output = linear_grpo_loss(
            hidden[mask],
            policy.lm_head.weight,
            experience.text_ids[mask],
            text_advantages[mask],
            old_logprobs=experience.text_old[mask],
            ref_logprobs=None if experience.text_ref is None else experience.text_ref[mask],
            token_weights=text_weights[mask],
            sequence_ids=rows if config.ratio_level == "sequence" else None,
            **common,
        )
        parts.append((output, text_weights[mask], experience.text_rollout[mask]))
    if "token" in config.train_levels:
        cond, uncond = _image_features(policy, experience, config)
        rows = batch[:, None].expand_as(experience.image_ids).flatten()
        last = policy.model.generation_head.vision_head
        output = linear_grpo_loss(
            cond,
            last.weight,
            experience.image_ids.flatten(),
            image_advantages.flatten(),
            bias=last.bias,
            uncond_hidden=uncond,
            cfg_weight=None if uncond is None else config.cfg_weight,
            old_logprobs=experience.image_old.flatten(),
            ref_logprobs=None if experience.image_ref is None else experience.image_ref.flatten(),
            token_weights=image_weights.flatten(),
            sequence_ids=rows if config.ratio_level == "sequence" else None,
            **common,
        )
        parts.append((output, image_weights.flatten(), experience.image_rollout.flatten()))
    totals = {"loss": sum(output.loss for output, _, _ in parts)}
    for name in ("kl", "entropy", "clip_fraction"):
        totals[name] = sum(getattr(output, name) * w.sum() for output, w, _ in parts)
    totals["policy_drift"] = sum(
        ((output.logprobs - sampled).abs() * w).sum() for output, w, sampled in parts
    )
    return totals


def _corrected(advantages: Tensor, old: Tensor, sampled: Tensor, config: TrainConfig) -> Tensor:
    """Every token's advantage, (B,) -> (B, T).

    With truncated importance sampling, times min(old probability / sampler's, cap): it corrects for
    drift between sampler and trainer, and scales the clipped surrogate but not the KL.
    """
    advantages = advantages[:, None].expand_as(old)
    if config.truncated_is == 0:
        return advantages
    return advantages * (old - sampled).exp().clamp(max=config.truncated_is)
