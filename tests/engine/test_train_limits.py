"""Training at the limits: no memory, no variance, 16 bits, layers that wait on the host."""

import copy
import sys
import types

import pytest
import torch

import engine.learner.learner
import engine.rollout.decoder
from engine.learner.credit import zero_std_groups
from engine.learner.objective import reference_policy, score
from engine.learner.offload import LayerStream
from engine.model.adapter import MergedWeights, attach_adapter
from engine.policy import load_policy
from engine.rollout import sample_images
from engine.rollout.decoder import Decoder
from engine.settings.errors import run_command
from engine.settings.out_of_memory import is_out_of_memory
from engine.train import Trainer, main, train
from rewards import RewardPipeline
from tests.engine.test_train import SMALL, assert_same_run, metrics, small

ROWS = [{"prompt": p, "nouns": ["circle"]} for p in ("two circles", "a red circle", "a cross")]


def failing(function, times: int, seen: list[int], error: type[Exception]):
    """`function`, whose first calls run out of memory."""

    def wrapped(*args: object, **more: object):
        seen.append(len(seen))
        if len(seen) <= times:
            raise error("CUDA out of memory. Tried to allocate 2.00 GiB")
        return function(*args, **more)

    return wrapped


def one_step(tmp_path, name, *flags):
    trainer = Trainer(small(tmp_path, name, "--max_steps=2", *flags), ROWS, ROWS)
    with RewardPipeline(trainer.ensemble, "cpu") as pipeline:
        found, made, _ = trainer.step(1, pipeline)
    return trainer, found, made


def test_a_rollout_that_runs_out_of_memory_goes_on_with_half(tmp_path, monkeypatch, capsys):
    _, _, expected = one_step(tmp_path, "whole")
    seen: list[int] = []
    decode = failing(Decoder.decode, 2, seen, torch.OutOfMemoryError)
    monkeypatch.setattr(Decoder, "decode", decode)
    _, _, made = one_step(tmp_path, "halved")
    assert made.image.ids.equal(expected.image.ids) and made.text.ids.equal(expected.text.ids)
    assert made.plans == expected.plans
    said = capsys.readouterr().err
    assert "out of memory with 4 samples of a rollout at a time; going on with 2" in said
    assert "with 2 samples of a rollout at a time; going on with 1" in said
    assert len(seen) == 2 + 4 + 1  # two failures, four plans one by one, pictures together


def test_an_update_that_runs_out_of_memory_goes_on_with_half(tmp_path, monkeypatch, capsys):
    trainer, expected, made = one_step(tmp_path, "whole", "--micro_batch_size=2")
    weights = {k: p.detach().clone() for k, p in trainer.learner.parameters.items()}
    seen: list[int] = []
    # The second call: the first level's gradients are there already, and must go.
    loss = engine.learner.learner.level_loss

    def second(*args, **more):
        seen.append(0)
        if len(seen) == 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")
        return loss(*args, **more)

    monkeypatch.setattr(engine.learner.learner, "level_loss", second)
    again, found, same = one_step(tmp_path, "halved", "--micro_batch_size=0")
    assert same.image.ids.equal(made.image.ids)
    assert "out of memory with 4 images of an update at a time; going on with 2" in (
        capsys.readouterr().err
    )
    assert again.learner.micro_batch_size == 2
    assert found["grad_norm"].equal(expected["grad_norm"])
    for name, p in again.learner.parameters.items():
        # Adam makes a step of any gradient, of rounding's as well: few may differ, by little.
        assert (p - weights[name]).abs().mean() < 1e-7, name
    assert all(p.grad is None for p in again.learner.parameters.values())


def test_what_cannot_be_halved_is_told(tmp_path, monkeypatch):
    error = torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(Decoder, "decode", failing(None, 99, [], torch.OutOfMemoryError))
    with pytest.raises(torch.OutOfMemoryError):
        sample_images(load_policy("tiny"), [torch.tensor([1, 9, 4])])
    assert is_out_of_memory(error) and is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    monkeypatch.setattr(Decoder, "decode", failing(None, 99, [], ValueError))
    with pytest.raises(ValueError):
        sample_images(load_policy("tiny"), [torch.tensor([1, 9, 4])] * 2)


@pytest.fixture
def own_reward(monkeypatch):
    """A module `own` with a reward that is always the same."""

    class Same:
        name = "same"

        def __init__(self, device: object) -> None:
            pass

        def score(self, prompts, images, metadata):
            return torch.full((len(prompts),), 0.25)

    module = types.ModuleType("own")
    module.Same = Same
    monkeypatch.setitem(sys.modules, "own", module)


def test_a_constant_reward_stops_the_run_and_is_named(tmp_path, own_reward, monkeypatch, capsys):
    flags = [*SMALL, f"--output_dir={tmp_path}", "--run_name=c", "--max_steps=6"]
    flags += ["--reward_funcs=own:Same", "--max_zero_std_steps=3"]
    monkeypatch.setattr(sys, "argv", ["train", *flags])
    assert run_command(main) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert "in 3 steps in a row no group's rewards differed (last: same 0.25)" in line
    rows = metrics(tmp_path / "c")
    assert [row["zero_std_groups"] for row in rows] == [1.0] * 3
    assert (tmp_path / "c" / "checkpoints" / "step-000003").is_dir()
    train(
        small(tmp_path, "on", "--max_steps=9", "--reward_funcs=own:Same", "--max_zero_std_steps=0")
    )


def test_groups_without_variance_are_counted():
    rewards = torch.tensor([1.0, 1.0, 0.5, 0.25, 0.1, 0.1])
    assert zero_std_groups(rewards, 2) == pytest.approx(2 / 3)
    assert zero_std_groups(torch.full((4,), 0.1), 4) == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--dtype=bfloat16", "--learning_rate=1e-12"], "learning_rate 1e-12: too small"),
        (["--ref_offload"], "--ref_offload: the reference policy is in host memory already"),
        (["--attn_implementation=xformers"], "--attn_implementation xformers: runs on CUDA"),
        (["--dtype=float16"], "--dtype float16: adamw keeps"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(tmp_path, monkeypatch, capsys, flags, said):
    given = [*SMALL, f"--output_dir={tmp_path}", "--run_name=r", "--max_steps=2", *flags]
    monkeypatch.setattr(sys, "argv", ["train", *given])
    assert run_command(main) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "r" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "flags", [(), ("--optim_state_dtype=bfloat16", "--gradient_checkpointing")]
)
def test_a_resumed_run_in_16_bits_is_bit_identical(tmp_path, flags):
    flags = ("--dtype=bfloat16", "--learning_rate=1e-4", *flags)
    train(small(tmp_path, "whole", "--max_steps=3", *flags))
    train(small(tmp_path, "parts", "--max_steps=1", *flags))
    train(small(tmp_path, "parts", "--max_steps=3", "--resume", *flags))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert all(row["update_cosine"] > 0.99 for row in metrics(tmp_path / "whole"))


def test_checkpointing_changes_no_number_of_a_run(tmp_path):
    train(small(tmp_path, "plain", "--max_steps=2"))
    train(small(tmp_path, "again", "--max_steps=2", "--gradient_checkpointing"))
    assert_same_run(tmp_path / "plain", tmp_path / "again")


def test_fp16_adapters_train_with_a_scaled_loss(tmp_path):
    """Scale, unscale, and halve where a gradient overflows; nothing of it shows in the metrics."""
    flags = ("--use_peft", "--learning_rate=1e-3")
    _, plain, _ = one_step(tmp_path, "wide", *flags)
    trainer, half, _ = one_step(tmp_path, "half", "--dtype=float16", *flags)
    assert trainer.learner.loss_scale > 1
    assert float(half["grad_norm"]) == pytest.approx(float(plain["grad_norm"]), rel=0.3)
    assert abs(float(half["loss"])) < 1
    trainer.learner.loss_scale = 2.0**60  # overflows
    with RewardPipeline(trainer.ensemble, "cpu") as pipeline:
        found = trainer.step(2, pipeline)[0]
    assert trainer.learner.loss_scale < 2.0**60 and torch.isfinite(found["grad_norm"])


def test_layers_that_wait_on_the_host_score_the_same(experience_rows):
    policy, rows = experience_rows
    reference = reference_policy(policy)
    expected = [score(reference, r, 1.0) for r in rows]
    layers = list(reference.model.language_model.decoder_layers())
    kept = [p.detach().clone() for layer in layers for p in layer.parameters()]
    LayerStream(layers, policy.device)
    for _ in range(2):
        assert all(score(reference, r, 1.0).equal(e) for r, e in zip(rows, expected, strict=True))
    now = [p for layer in layers for p in layer.parameters()]
    assert all(a.equal(b) for a, b in zip(now, kept, strict=True))
    # The policy's own layers are where they were.
    assert policy.model.language_model.layers[0].mlp.up_proj.weight is not now[0]


@pytest.fixture
def experience_rows(tmp_path):
    """A trained policy's levels, cut into rows."""
    trainer, _, made = one_step(tmp_path, "rows", "--micro_batch_size=2")
    with torch.no_grad():
        experience = trainer.learner.experience(made)
    return trainer.policy, [rows for part in experience.parts for rows in part]


def test_merging_in_place_samples_the_same_and_puts_the_base_back():
    """And comes back after a failure, and while the adapter is off is the base."""
    policy = load_policy("tiny")
    attach_adapter(policy, r=4, alpha=8)
    with torch.no_grad():
        for name, p in policy.trainable().items():
            p.normal_(std=0.05) if "lora_B" in name else None
    prompts = [torch.tensor([1, 9 + i, 4]) for i in range(2)]
    expected = sample_images(policy, prompts)
    twin = copy.deepcopy(policy)
    twin.weights = MergedWeights(twin.model.language_model, in_place=True)
    base = {k: v.clone() for k, v in twin.state_dict().items()}
    for _ in range(2):
        found = sample_images(twin, prompts)
        assert found.ids.equal(expected.ids)
        torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=0, atol=1e-4)
        assert all(v.equal(base[k]) for k, v in twin.state_dict().items())
    prepared = engine.rollout.decoder.Prepared

    def fail(*args: object) -> None:
        prepared(*args)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine.rollout.decoder, "Prepared", fail)
        sample_images(twin, prompts)
    assert all(v.equal(base[k]) for k, v in twin.state_dict().items())
    ids = expected.ids[0]
    torch.testing.assert_close(
        twin.image_logprobs(prompts[0], ids), policy.image_logprobs(prompts[0], ids)
    )
