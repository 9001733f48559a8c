"""Training under faults of an expert: the state is that of the step before, and it goes on."""

import time

import pytest
import torch

from engine.run.checkpoint import optimizer_tensors
from engine.settings.options import parse_args
from engine.settings.train import TrainConfig
from engine.train import Trainer
from rewards import Ensemble, RewardError, RewardPipeline
from tests.rewards.expert_faults import out_of_memory, wait_until


def raises(count):
    raise RuntimeError("boom")


def hangs(count):
    time.sleep(1)
    return torch.zeros(count)


FAULTS = {
    "raises": (raises, "boom"),
    "hangs": (hangs, "did not answer"),
    "nan": (lambda count: torch.full((count,), float("nan")), "NaN or infinite"),
    "inf": (lambda count: torch.full((count,), -float("inf")), "NaN or infinite"),
    "shape": (lambda count: torch.zeros(count, 1), r"returned \(4, 1\)"),
    "memory": (out_of_memory, "ran out of memory"),
}


@pytest.fixture(scope="module")
def make_trainer(tmp_path_factory):
    flags = "--prompts_per_step=2 --num_generations=2 --threads=1 --reward_funcs=gdino".split()
    flags.append(f"--output_dir={tmp_path_factory.mktemp('runs')}")
    rows = [{"prompt": p, "nouns": ["circle"]} for p in ("two circles", "a star")]

    def make(expert):
        trainer = Trainer(parse_args(TrainConfig, flags, description=""), rows, rows)
        trainer.ensemble = Ensemble([expert])
        return trainer

    return make


class Redness:
    name = "bad"

    def score(self, prompts, images, metadata):
        return images[:, 0].mean((1, 2))


class Fails(Redness):
    """Redness, but with the fault while there is one."""

    fault = None

    def score(self, prompts, images, metadata):
        if self.fault is not None:
            return self.fault(len(prompts))
        return super().score(prompts, images, metadata)


def state_of(trainer):
    learner = trainer.learner
    found = {f"policy/{k}": v.clone() for k, v in trainer.policy.state_dict().items()}
    moments = optimizer_tensors(learner.optimizer, list(learner.parameters))
    return found | {f"optimizer/{k}": v.clone() for k, v in moments.items()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(v, b[k]) for k, v in a.items())


def test_training_state_survives_every_fault(make_trainer):
    whole, broken = make_trainer(Redness()), make_trainer(Fails())
    with RewardPipeline(whole.ensemble, "cpu") as pipeline:
        for step in (1, 2):
            whole.step(step, pipeline)
    with RewardPipeline(broken.ensemble, "cpu", timeout=20) as pipeline:
        broken.step(1, pipeline)
        before = state_of(broken)
        assert any(k.startswith("optimizer/") for k in before)
        for fault, said in FAULTS.values():
            broken.ensemble.experts[0].fault = fault
            pipeline._timeout = 0.2 if fault is hangs else 20
            with pytest.raises(RewardError, match=f"'bad'.*{said}"):
                broken.step(2, pipeline)
            assert_equal(state_of(broken), before)
            wait_until(lambda: not pipeline._stuck)
        broken.ensemble.experts[0].fault, pipeline._timeout = None, 20
        broken.step(2, pipeline)
    assert_equal(state_of(broken), state_of(whole))
