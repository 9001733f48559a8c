"""The bench against transformers' generate: its checks see what is wrong, its figures what was run."""

import json

import pytest
import torch

from bench.__main__ import main
from bench.rollout import generate as suite
from bench.rollout.suite import distinct_prompts
from engine.rollout import sample_images


@pytest.fixture
def small(new_policy):
    """A policy of two layers, and three pictures of two prompts."""
    policy = new_policy()
    first, second = distinct_prompts(policy, 2, 9)
    return policy, [first, first, second]


def test_equal_weights_give_times_and_a_ratio(small):
    report = suite.compare(*small, repeats=2)
    assert report["correct"] is True
    ours, theirs = report["rows"]
    assert [ours["provider"], theirs["provider"]] == ["ours", "transformers"]
    assert report["ratios"] == {"vs_transformers": theirs["seconds"] / ours["seconds"]}
    assert ours["images_per_s"] == pytest.approx(3 / ours["seconds"])
    assert "3 images of 2 prompts x 16 tokens, prompt 9" in ours["shape"]


@pytest.mark.parametrize("part", ["layers.1.mlp.down_proj", "generation_head.vision_head"])
def test_other_tokens_are_seen_and_carry_no_speed(small, monkeypatch, part):
    real = suite.in_transformers

    def spoilt(policy):
        model = real(policy)
        weights = [p for name, p in model.named_parameters() if part in name]
        assert weights
        weights[0].data.mul_(1.3)
        return model

    monkeypatch.setattr(suite, "in_transformers", spoilt)
    report = suite.compare(*small, repeats=1)
    assert report["correct"] is False and report["ratios"] == {}
    assert not any("seconds" in row or "images_per_s" in row for row in report["rows"])


def test_other_pixels_are_seen(small):
    policy, prompts = small
    theirs = suite.in_transformers(policy)
    assert suite.agree(policy, theirs, prompts)
    with torch.no_grad():
        theirs.model.vqmodel.decoder.conv_out.bias.add_(0.01)
    assert not suite.agree(policy, theirs, prompts)


def test_tokens_may_part_at_a_tie_only(small, monkeypatch):
    policy, prompts = small
    theirs = suite.in_transformers(policy)
    with torch.no_grad():
        # Two codes that nothing can tell apart.
        for model in (policy, theirs):
            head = model.model.generation_head.vision_head
            head.weight[7], head.bias[7] = head.weight[5], head.bias[5]
            head.bias[[5, 7]] += 1000
    fives = torch.full((3, 16), 5)
    monkeypatch.setattr(suite, "generated_tokens", lambda *args, **more: fives)
    ours = sample_images(policy, prompts, greedy=True)
    for other, allowed in ((7, True), (6, False)):
        drawn = fives.clone()
        drawn[1, 3:] = other
        ours.ids = drawn
        monkeypatch.setattr(suite, "sample_images", lambda *args, **more: ours)
        assert suite.agree(policy, theirs, prompts) is allowed


def test_guided_logits_are_those_of_our_policy(small):
    policy, prompts = small
    ids = torch.tensor([3, 99, 41])
    scores = suite.guided_logits(
        suite.in_transformers(policy), policy.unconditional, prompts[2], ids
    )
    with torch.no_grad():
        wanted = [
            policy.image_logprobs(prompts[2], torch.cat((ids, torch.tensor([code]))), 5.0)[-1]
            for code in (0, 77)
        ]
    got = scores.log_softmax(-1)[[0, 77]]
    torch.testing.assert_close(got, torch.stack(wanted), rtol=0, atol=1e-3)


def test_suite_prints_one_json_object(new_policy, monkeypatch, capsys):
    monkeypatch.setattr(suite, "mini_policy", new_policy)
    monkeypatch.setattr(suite, "PROMPT_TOKENS", 9)
    main(["generate", "--json", "--images", "5", "--num_generations", "2", "--repeats", "1"])
    report = json.loads(capsys.readouterr().out)
    assert report["suite"] == "generate" and report["correct"] is True
    assert report["ratios"].keys() == {"vs_transformers"}
    assert "5 images of 3 prompts" in report["rows"][0]["shape"]
