"""The trainer's metrics are those of the plain PyTorch objective."""

import pytest

from engine.learner import objective
from engine.train import train
from kernels import reference
from kernels.reference import loss as reference_loss
from tests.engine.test_train import metrics, small


def plain_logprobs(hidden, weight, targets, *, bias, temperature, uncond_hidden, cfg_weight):
    """linear_logprobs with all logits at once, guidance applied to them."""
    logits = reference.linear_logits(hidden, weight, bias, 1.0)
    if uncond_hidden is not None:
        uncond = reference.linear_logits(uncond_hidden, weight, bias, 1.0)
        logits = reference.guide(logits, uncond, cfg_weight)
    return reference.log_softmax_at(logits / temperature, targets)


@pytest.mark.parametrize("logprob_policy", ["conditional", "guided"])
def test_metrics_equal_the_plain_objectives(tmp_path, monkeypatch, logprob_policy):
    flags = ["--max_steps=4", "--num_iterations=2", f"--logprob_policy={logprob_policy}"]
    train(small(tmp_path, "fused", *flags))
    none = {"bias": None, "uncond_hidden": None, "cfg_weight": None}
    monkeypatch.setattr(objective, "linear_grpo_loss", reference_loss.linear_grpo_loss)
    monkeypatch.setattr(
        objective, "linear_logprobs", lambda *args, **kw: plain_logprobs(*args, **(none | kw))
    )
    train(small(tmp_path, "plain", *flags))
    fused, plain = metrics(tmp_path / "fused"), metrics(tmp_path / "plain")
    assert len(fused) == 4 and any(row["clip_fraction"] > 0 for row in plain)
    for a, b in zip(fused, plain, strict=True):
        assert a.keys() == b.keys()
        for name, value in b.items():
            # A loss near 0 and a drift that is rounding itself have no relative precision.
            assert a[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
