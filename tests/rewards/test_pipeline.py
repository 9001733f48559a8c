"""The reward pipeline under faults: whatever an expert does, it is named and training goes on."""

import subprocess
import sys
import textwrap
import threading
import time
import weakref

import pytest
import torch
from torch import nn

import rewards.ensemble
from rewards import Ensemble, RewardError, RewardPipeline
from rewards.offload import Offload
from tests.rewards.expert_faults import out_of_memory, wait_until

BATCH = (["a", "b"], torch.zeros(2, 3, 8, 8), [{}, {}])


class Good:
    name = "good"

    def score(self, prompts, images, metadata):
        return torch.arange(len(prompts)).float()


class Stuck:
    """Answers, but not before it is let go."""

    name = "stuck"

    def __init__(self):
        self.go, self.calls = threading.Event(), 0

    def score(self, prompts, images, metadata):
        self.calls += 1
        assert self.go.wait(30)
        return torch.zeros(len(prompts))


class Answers:
    name = "bad"

    def __init__(self, answer):
        self.answer = answer

    def score(self, prompts, images, metadata):
        return self.answer(len(prompts))


def reward_threads():
    return [t for t in threading.enumerate() if t.name == "rewards"]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    wait_until(lambda: not reward_threads())


def test_submit_blocks_while_depth_batches_wait():
    stuck, submitted = Stuck(), []
    with RewardPipeline(Ensemble([stuck]), "cpu", depth=2) as pipeline:

        def submit_four():
            for _ in range(4):
                submitted.append(pipeline.submit(*BATCH))

        thread = threading.Thread(target=submit_four)
        thread.start()
        wait_until(lambda: len(submitted) == 3)  # one is being scored, two wait
        time.sleep(0.05)
        assert len(submitted) == 3
        stuck.go.set()
        thread.join(10)
        assert [h.result().total.tolist() for h in submitted] == [[0, 0]] * 4


def test_a_hanging_expert_is_named_and_its_thread_replaced():
    stuck = Stuck()
    with RewardPipeline(Ensemble([Good(), stuck]), "cpu", timeout=0.1) as pipeline:
        handle = pipeline.submit(*BATCH)
        with pytest.raises(RewardError, match=r"'stuck' did not answer within 0\.1 s"):
            handle.result()
        with pytest.raises(RewardError, match="'stuck' has not come back"):
            pipeline.submit(*BATCH).result()
        assert stuck.calls == 1  # a model cannot be in two threads at a time
        stuck.go.set()
        wait_until(lambda: len(reward_threads()) == 1)
        assert pipeline.submit(*BATCH).result().total.tolist() == [0, 0.5]
        with pytest.raises(RewardError, match="did not answer"):
            handle.result()  # what came too late changes nothing


def test_a_hanging_expert_is_skipped_and_counted():
    stuck = Stuck()
    ensemble = Ensemble([Good(), stuck], on_error="skip")
    with RewardPipeline(ensemble, "cpu", timeout=0.1) as pipeline:
        for _ in range(2):
            scores = pipeline.submit(*BATCH).result()
            assert scores.total.tolist() == [0, 1] and scores.skipped == {"stuck": 2}
        stuck.go.set()
        wait_until(lambda: len(reward_threads()) == 1)
        assert pipeline.submit(*BATCH).result().skipped == {}


def test_the_timeout_of_a_batch_starts_with_its_scoring():
    class Slow(Good):
        def score(self, prompts, images, metadata):
            time.sleep(0.15)
            return super().score(prompts, images, metadata)

    with RewardPipeline(Ensemble([Slow()]), "cpu", timeout=0.35) as pipeline:
        handles = [pipeline.submit(*BATCH) for _ in range(3)]
        assert handles[-1].result().total.tolist() == [0, 1]


def test_a_hanging_expert_keeps_no_process_alive():
    script = """
        import threading, time, torch
        from rewards import Ensemble, RewardError, RewardPipeline

        class Hangs:
            name = "hangs"
            def score(self, prompts, images, metadata):
                time.sleep(600)

        with RewardPipeline(Ensemble([Hangs()]), "cpu", timeout=0.1) as pipeline:
            try:
                pipeline.submit(["a"], torch.zeros(1, 3, 8, 8), [{}]).result()
            except RewardError as error:
                print(error)
        print("closed")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["expert 'hangs' did not answer within 0.1 s", "closed"]
    assert done.stderr == ""


def test_an_error_in_the_block_drops_what_waits():
    stuck = Stuck()
    with pytest.raises(KeyError), RewardPipeline(Ensemble([stuck]), "cpu") as pipeline:
        handles = [pipeline.submit(*BATCH) for _ in range(3)]
        wait_until(lambda: stuck.calls == 1)
        threading.Timer(0.05, stuck.go.set).start()
        raise KeyError
    assert handles[0].result().total.tolist() == [0, 0]
    for handle in handles[1:]:
        with pytest.raises(RewardError, match="closed"):
            handle.result()
    with pytest.raises(RewardError, match="closed"):
        pipeline.submit(*BATCH)
    pipeline.close()  # again


def test_even_an_exit_in_an_expert_reaches_the_caller():
    def leave(count):
        raise SystemExit(3)

    with RewardPipeline(Ensemble([Answers(leave)]), "cpu") as pipeline:
        with pytest.raises(SystemExit):
            pipeline.submit(*BATCH).result()
        with pytest.raises(SystemExit):
            pipeline.submit(*BATCH).result()  # the thread lives


def too_large(count):
    return torch.empty(1 << 52).sum()


@pytest.mark.parametrize("answer", [out_of_memory, too_large])
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_out_of_memory_is_named_or_skipped_and_the_cache_emptied_once(
    answer, on_error, monkeypatch
):
    emptied, held = [], []

    def take_and_fail(count):
        taken = torch.zeros(1000)
        held.append(weakref.ref(taken))
        return answer(count) + taken

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(held[-1]() is None))
    ensemble = Ensemble([Answers(take_and_fail), Good()], on_error=on_error)
    with RewardPipeline(ensemble, "cpu") as pipeline:
        handle = pipeline.submit(*BATCH)
        if on_error == "skip":
            assert handle.result().skipped == {"bad": 2}
        else:
            with pytest.raises(RewardError, match="'bad' ran out of memory on 2 images") as error:
                handle.result()
            assert "\n" not in str(error.value)
    assert emptied == [True]  # and what the call had taken was free by then


def test_every_expert_has_its_nvtx_range_and_span(monkeypatch):
    opened, annotate = [], rewards.ensemble.nvtx.annotate
    monkeypatch.setattr(
        rewards.ensemble.nvtx, "annotate", lambda name: opened.append(name) or annotate(name)
    )
    other = Answers(torch.zeros)
    with RewardPipeline(Ensemble([Good(), other]), "cpu") as pipeline:
        handle = pipeline.submit(*BATCH)
        handle.result()
    assert [n for n in opened if n != "rewards/wait"] == [
        "rewards/score", "rewards/good", "rewards/bad"
    ]  # fmt: skip
    good, bad = handle.spans
    assert (good.expert, bad.expert) == ("good", "bad")
    assert good.start <= good.end <= bad.start <= bad.end


class Tokenizing(Good):
    def __init__(self):
        self.seen = []

    def prepare(self, prompts, metadata):
        if "?" in prompts:
            raise ValueError("no such word")
        self.seen.append((prompts, metadata, threading.current_thread().name))


def test_prompts_are_prepared_in_the_worker_and_failures_reported_with_the_batch():
    expert = Tokenizing()
    with RewardPipeline(Ensemble([expert, Answers(torch.zeros)]), "cpu") as pipeline:
        pipeline.prepare(BATCH[0], BATCH[2])
        assert pipeline.score(*BATCH).total.tolist() == [0, 0.5]
        assert expert.seen == [(BATCH[0], BATCH[2], "rewards")]
        pipeline.prepare(["?"], [{}])
        with pytest.raises(RewardError, match="'good' failed: ValueError: no such word"):
            pipeline.submit(*BATCH).result()
        pipeline.submit(*BATCH).result()  # once


@pytest.mark.parametrize(
    "arguments, said",
    [({"depth": 0}, "depth"), ({"timeout": 0.0}, "timeout"), ({"offload": True}, "offload")],
)
def test_bad_arguments_are_named(arguments, said):
    with pytest.raises(ValueError, match=said):
        RewardPipeline(Ensemble([Good()]), "cpu", **arguments)


class WithModel(Good):
    def __init__(self):
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).requires_grad_(False)
        self.model.append(nn.Linear(4, 3, bias=False)).requires_grad_(False)
        self.model[2].weight = nn.Parameter(self.model[0].weight.T, requires_grad=False)


def test_offloaded_weights_visit_the_device_and_come_back_unchanged():
    expert = WithModel()
    before = {k: v.clone() for k, v in expert.model.state_dict().items()}
    places = {k: v.data_ptr() for k, v in expert.model.state_dict().items()}
    offload = Offload(expert, "cpu")  # no device here is another one: copies stand for it
    assert offload.nbytes == sum(v.nbytes for v in before.values())
    for _ in range(2):
        with torch.inference_mode(), offload.on_device():
            for key, value in expert.model.state_dict().items():
                assert value.data_ptr() != places[key] and torch.equal(value, before[key])
        for key, value in expert.model.state_dict().items():
            assert value.data_ptr() == places[key] and torch.equal(value, before[key])
    with pytest.raises(KeyError), offload.on_device():
        raise KeyError
    assert expert.model[0].weight.data_ptr() == places["0.weight"]
    # Still weights that autograd takes: inference mode left no trace.
    inputs = torch.ones(2, 3, requires_grad=True)
    expert.model.eval()(inputs).sum().backward()
    assert inputs.grad is not None
    expert.model[0].requires_grad_(True)
    with pytest.raises(ValueError, match=r"0\.weight: a trainable"):
        Offload(expert, "cpu")
