"""Advantages, token weights and the two-level loss against plain numpy and fp64."""

import pytest
import torch
from torch import Tensor

from engine.learner.levels import Experience, Level
from engine.learner.objective import guidance_moves, token_importance, token_weights
from engine.model.policy import Policy
from engine.model.sequences import Sequences
from engine.rollout import sample_images
from engine.settings.train import TrainConfig
from tests.engine.learner.conftest import BOTH, CFG, changed, make_config, run, scores, shifted

# Weights


@pytest.mark.parametrize("levels", [BOTH, ["semantic"], ["token"]])
@pytest.mark.parametrize("loss_type", ["token", "sequence", "dr_grpo"])
def test_token_weights(loss_type, levels):
    mask = torch.arange(6) < torch.tensor([[6], [2], [3]])  # 11 of at most 3 * 6 text tokens
    drawn = {"semantic": (mask, 6), "token": (torch.ones(3, 10, dtype=torch.bool), 10)}
    made = [
        Level(name, [], m.long(), m, longest, m.float(), m.float())
        for name, (m, longest) in drawn.items()
        if name in levels
    ]
    found = dict(zip(levels, token_weights(made, loss_type), strict=True))
    text, image = (found.get(n, torch.zeros(m.shape)) for n, (m, _) in drawn.items())
    has_text, has_image = "semantic" in levels, "token" in levels
    assert torch.equal(text > 0, mask & has_text) and torch.equal(
        image > 0, torch.full((3, 10), has_image)
    )
    lengths = torch.tensor([6.0, 2.0, 3.0]) * has_text + 10 * has_image
    per_sample = text.sum(1) + image.sum(1)
    expected = {
        "token": lengths / lengths.sum(),
        "sequence": torch.full((3,), 1 / 3),
        "dr_grpo": lengths / (3 * (6 * has_text + 10 * has_image)),
    }[loss_type]
    torch.testing.assert_close(per_sample, expected)
    for sample in range(3):  # equal within a sample, across both levels
        values = torch.cat((text[sample], image[sample])).unique()
        assert len(values[values > 0]) == 1


def drawn_levels() -> list[Level]:
    mask = torch.arange(6) < torch.tensor([[6], [2], [3]])
    whole = torch.ones(3, 10, dtype=torch.bool)
    return [
        Level("semantic", [], mask.long(), mask, 6, mask.float(), mask.float()),
        Level("token", [], whole.long(), whole, 10, whole.float(), whole.float()),
    ]


def test_a_level_s_mean_is_its_own_times_its_weight():
    text, image = token_weights(drawn_levels(), "level", [1.0, 0.1])
    assert text.sum().item() == pytest.approx(1) and image.sum().item() == pytest.approx(0.1)
    assert len(text[text > 0].unique()) == len(image.unique()) == 1


@pytest.mark.parametrize("loss_type", ["token", "level", "sequence", "dr_grpo"])
def test_samples_left_out_leave_the_normaliser(loss_type):
    whole, found = token_weights(drawn_levels(), loss_type), drawn_levels()
    for level in found:
        level.kept = torch.tensor([True, False, True])
    for level, all_of_it, left in zip(found, whole, token_weights(found, loss_type), strict=True):
        assert not left[1].any() and torch.equal(left > 0, level.mask & level.kept[:, None])
        if loss_type == "dr_grpo":  # its divisor is a constant
            assert torch.equal(left[0], all_of_it[0])
        else:
            assert (left[0][level.mask[0]] > all_of_it[0][level.mask[0]]).all()


@pytest.mark.parametrize("loss_type", ["token", "level", "dr_grpo"])
def test_importance_moves_weight_within_its_level(loss_type):
    plain, found = token_weights(drawn_levels(), loss_type), drawn_levels()
    found[1].importance = torch.rand(3, 10) + 0.1
    text, image = token_weights(found, loss_type)
    assert torch.equal(text, plain[0])
    assert image.sum().item() == pytest.approx(plain[1].sum().item())
    torch.testing.assert_close(image / image[0, 0], found[1].importance / found[1].importance[0, 0])


def test_importance_of_a_share_of_the_tokens():
    values = torch.tensor([[0.1, 0.5, 0.2, 0.9, 0.0], [3.0, 1.0, 2.0, 0.0, 0.0]])
    assert torch.equal(token_importance(values, 1), values)
    expected = torch.tensor([[0, 1.0, 0, 1, 0], [1, 0, 1, 0, 0]])
    assert torch.equal(token_importance(values, 0.4), expected)
    assert token_importance(values, 0.01).sum(1).tolist() == [1, 1]


def test_guidance_moves_tokens_by_its_kl():
    """Under guided draws its mean is KL(guided || conditional)."""
    torch.manual_seed(0)
    cond, uncond = torch.randn(2, 32).log_softmax(-1)
    guided = (uncond + 2.0 * (cond - uncond)).log_softmax(-1)
    drawn = torch.multinomial(guided.exp(), 200_000, replacement=True)
    found = guidance_moves(cond[drawn], guided[drawn])
    assert (found >= 0).all()
    expected = (guided.exp() * (guided - cond)).sum()
    assert found.mean().item() == pytest.approx(expected.item(), rel=0.03)


# The loss against plain fp64


def plain_image_logprobs(
    policy: Policy, prompt: Tensor, ids: Tensor, config: TrainConfig
) -> Tensor:
    """Guidance on logits, where the engine mixes features."""
    head = policy.model.generation_head
    cond = head(policy.completion_hidden(Sequences("token", [prompt], ids[None]))[0])
    if config.logprob_policy != "conditional":
        blank = policy.unconditional(prompt)
        uncond = head(policy.completion_hidden(Sequences("token", [blank], ids[None]))[0])
        if config.logprob_policy == "guided_detached":
            uncond = uncond.detach()
        cond = uncond + config.cfg_weight * (cond - uncond)
    return cond.log_softmax(-1).gather(1, ids[:, None])[:, 0]


def plain_loss(policy: Policy, e: Experience, config: TrainConfig) -> Tensor:
    """One sample and one token at a time; a sequence ratio is one a chain of thought."""
    losses: list[list[Tensor]] = []
    text, image = e.levels
    for b, advantage in enumerate(text.advantages.double()):
        levels = []
        if "semantic" in config.train_levels:
            n = int(text.mask[b].sum())
            asked = Sequences("semantic", [text.prompts[b]], text.ids[b : b + 1, :n])
            logps = policy.lm_head(policy.completion_hidden(asked)[0]).log_softmax(-1)
            logps = logps.gather(1, text.ids[b, :n, None])[:, 0]
            levels.append((logps, text.old, text.ref, text.sampled))
        if "token" in config.train_levels:
            logps = plain_image_logprobs(policy, image.prompts[b], image.ids[b], config)
            levels.append((logps, image.old, image.ref, image.sampled))
        losses.append([])
        for logps, old, ref, sampled in levels:
            mean = (logps.detach() - old[b, : len(logps)].double()).mean()
            for i, logp in enumerate(logps):
                ratio = (logp - old[b, i].double()).exp()
                if config.ratio_level == "sequence":
                    ratio = (mean + logp - logp.detach()).exp()
                bounded = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
                token = -torch.minimum(ratio * advantage, bounded * advantage)
                if config.dual_clip and advantage < 0:
                    token = torch.minimum(token, -config.dual_clip * advantage)
                if config.truncated_is:
                    drift = (old[b, i] - sampled[b, i]).exp().item()
                    token = token * min(drift, config.truncated_is)
                if ref is not None:
                    gap = ref[b, i].double() - logp
                    token = token + config.beta * (gap.exp() - gap - 1)
                losses[-1].append(token)
    if config.loss_type == "sequence":
        return torch.stack([torch.stack(sample).mean() for sample in losses]).mean()
    if config.loss_type == "dr_grpo":
        longest = config.max_completion_length + image.ids.shape[1]
        return torch.stack([torch.stack(sample).sum() / longest for sample in losses]).mean()
    return torch.stack([token for sample in losses for token in sample]).mean()


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"loss_type": "sequence", "beta": 0.2, "truncated_is": 1.1},
        {"loss_type": "dr_grpo", "clip_high": 0.4},
        {"ratio_level": "sequence", "clip_low": 0.02, "clip_high": 0.03, "beta": 0.1},
        {"dual_clip": 1.1, "clip_low": 0.5},
        {"train_levels": ["semantic"], "beta": 0.1},
        {"train_levels": ["token"], "clip_low": 0.05, "clip_high": 0.3},
        {"logprob_policy": "guided"},
        {"logprob_policy": "guided_detached", "beta": 0.1},
    ],
    ids=str,
)
def test_loss_and_gradients_equal_plain_fp64(new_policy, experience, overrides):
    config = make_config(**overrides)
    e = shifted(experience)
    if config.logprob_policy != "conditional":
        guided = scores(new_policy(), e, config)["token"]
        old = e.levels[1].old - experience.levels[1].old + guided
        e = changed(e, token={"old": old, "ref": guided})
    policy = new_policy()
    totals, grads = run(policy, e, config)
    exact = new_policy().double()
    expected = plain_loss(exact, e, config)
    expected.backward()
    assert totals["loss"] == pytest.approx(expected.item(), rel=1e-4, abs=1e-5)
    assert 0 < totals["clip_fraction"] < 1
    wanted = {k: p.grad for k, p in exact.trainable().items() if p.grad is not None}
    # A level that is not trained leaves its head without a gradient, or with zeros.
    assert all(k in wanted or not g.any() for k, g in grads.items())
    norm = torch.stack([g.norm() for g in wanted.values()]).norm()
    ours = torch.stack([g.double().norm() for g in grads.values()]).norm()
    assert ours.item() == pytest.approx(norm.item(), rel=1e-3)
    for name, want in wanted.items():
        assert (grads[name] - want).norm() <= 1e-3 * norm, name


@pytest.mark.parametrize("loss_type", ["token", "sequence", "dr_grpo"])
def test_micro_batches_sum_to_the_whole(new_policy, experience, loss_type):
    config = make_config(loss_type=loss_type, beta=0.1)
    policy, e = new_policy(), shifted(experience)
    whole, whole_grads = run(policy, e, config)
    for chunks in (2, 4):
        parts, grads = run(policy, e, config, chunks)
        for name in whole:
            assert parts[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-6), name
        for name, grad in whole_grads.items():
            torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-5)


# The three policies whose log-prob can be trained


def test_conditional_runs_no_unconditional_path(new_policy, experience, monkeypatch):
    policy = new_policy()
    monkeypatch.setattr(Policy, "unconditional", lambda *_: pytest.fail("unconditional path ran"))
    _, grads = run(policy, experience, make_config(train_levels=["token"]))
    used = torch.cat(experience.levels[1].prompts).unique()
    rows = grads["model.language_model.embed_tokens.weight"].norm(dim=1).nonzero().flatten()
    assert set(rows.tolist()) <= set(used.tolist()) and policy.pad not in rows


def test_guided_and_detached_agree_in_value_only(new_policy, experience):
    policy = new_policy()
    results = {}
    for mode in ("guided", "guided_detached"):
        config = make_config(logprob_policy=mode, train_levels=["token"])
        old = scores(policy, experience, config)["token"]
        results[mode] = run(policy, changed(experience, token={"old": old}), config)
    (guided, guided_grads), (detached, detached_grads) = results.values()
    assert guided["loss"] == pytest.approx(detached["loss"], abs=1e-6)
    name = "model.language_model.embed_tokens.weight"
    assert guided_grads[name][policy.pad].norm() > 1e-4  # only the unconditional prompt has pads
    assert not detached_grads[name][policy.pad].any()


def test_score_equals_the_rollout(new_policy, experience):
    policy = new_policy()
    text, image = scores(policy, experience, make_config()).values()
    torch.testing.assert_close(text, experience.levels[0].sampled, rtol=0, atol=1e-4)
    torch.testing.assert_close(image, experience.levels[1].sampled, rtol=0, atol=1e-4)
    assert not text.requires_grad and not image.requires_grad
    guided = scores(policy, experience, make_config(logprob_policy="guided"))["token"]
    prompts = experience.levels[1].prompts
    sampled = sample_images(policy, prompts, cfg_weight=CFG, seed=1).guided_logprobs
    torch.testing.assert_close(guided, sampled, rtol=0, atol=1e-4)
    assert list(scores(policy, experience, make_config(train_levels=["token"]))) == ["token"]


def test_first_update_has_ratio_1(new_policy, experience):
    totals, _ = run(new_policy(), experience, make_config())
    assert totals["clip_fraction"] == 0 and 0 <= totals["policy_drift"] < 1e-4
    assert totals["entropy"] > 1 and totals["kl"] == 0
    weights = sum(w.sum(1) for w in token_weights(experience.levels, "token"))
    expected = -(experience.levels[0].advantages * weights).sum().item()
    assert totals["loss"] == pytest.approx(expected, abs=1e-4)


def test_drift_between_sampler_and_trainer_is_seen(new_policy, experience):
    moved = changed(experience, token={"sampled": experience.levels[1].sampled + 0.25})
    totals, _ = run(new_policy(), moved, make_config(train_levels=["token"]))
    assert totals["policy_drift"] == pytest.approx(0.25, abs=1e-4)
