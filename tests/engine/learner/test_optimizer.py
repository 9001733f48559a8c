"""The optimizer that a run gets, what it refuses, and what it tells of its updates."""

import builtins

import pytest
import torch

from engine.learner.optimizer import ExactAdamW, build_optimizer, master_of
from engine.learner.probe import Probe
from engine.run.checkpoint import load_optimizer_tensors, optimizer_tensors
from engine.settings.errors import UserError
from engine.settings.train import TrainConfig


def parameters(dtype: torch.dtype, count: int = 3, size: int = 4000):
    rng = torch.Generator().manual_seed(0)
    made = [torch.randn(size, generator=rng) * 0.02 for _ in range(count)]
    return {f"p{i}": torch.nn.Parameter(t.to(dtype)) for i, t in enumerate(made)}


def steps(optimizer, named, first: int, last: int) -> None:
    for step in range(first, last):
        for i, p in enumerate(named.values()):
            rng = torch.Generator().manual_seed(100 * step + i)
            p.grad = torch.randn(p.shape, generator=rng).to(p.dtype)
        optimizer.step()


def test_which_optimizer_the_flags_give():
    def made(dtype: torch.dtype, **flags: object) -> torch.optim.Optimizer:
        return build_optimizer(parameters(dtype), TrainConfig(**flags))

    assert type(made(torch.float32)) is torch.optim.AdamW
    assert type(made(torch.bfloat16)) is ExactAdamW
    assert type(made(torch.bfloat16, optim="adamw_torch")) is torch.optim.AdamW
    half = made(torch.float32, optim_state_dtype="bfloat16")
    assert type(half) is ExactAdamW and half.state_dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "flags", "said"),
    [
        ("bfloat16", {"learning_rate": 1e-12}, "learning_rate 1e-12: too small for float32"),
        ("float32", {"learning_rate": 1e-12}, "learning_rate 1e-12: too small for float32"),
        (
            "bfloat16",
            {"learning_rate": 1e-6, "optim": "adamw_torch", "dtype": "bfloat16"},
            "learning_rate 1e-06: too small for bfloat16.*or --optim adamw",
        ),
        ("float16", {}, "--dtype float16: adamw keeps the missing bits of bfloat16"),
        (
            "float32",
            {"optim": "adamw_torch", "optim_state_dtype": "bfloat16"},
            "--optim_state_dtype: belongs to --optim adamw",
        ),
    ],
)
def test_settings_that_would_train_nothing_are_refused(dtype, flags, said):
    with pytest.raises(UserError, match=said) as caught:
        build_optimizer(parameters(getattr(torch, dtype)), TrainConfig(**flags))
    assert "\n" not in str(caught.value)


def test_t2i_r1_s_rate_is_taken_where_it_can_be_held():
    config = TrainConfig(learning_rate=1e-6, lr_scheduler_type="constant")
    build_optimizer(parameters(torch.bfloat16), config)
    build_optimizer(parameters(torch.float32), config)


def test_a_frozen_model_is_refused():
    with pytest.raises(UserError, match="nothing to train"):
        build_optimizer({}, TrainConfig())


def test_torchao_s_absence_is_one_line(monkeypatch):
    find = builtins.__import__

    def without(name: str, *args: object, **more: object):
        if name.startswith("torchao"):
            raise ImportError("No module named 'torchao'")
        return find(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"--optim adamw_8bit: needs pip install .*torchao"):
        build_optimizer(parameters(torch.bfloat16), TrainConfig(optim="adamw_8bit"))


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_state_goes_to_a_checkpoint_and_comes_back(state_dtype):
    """Six steps are three, a checkpoint and three, bit for bit."""
    config = TrainConfig(learning_rate=1e-4, optim_state_dtype=state_dtype, seed=5)
    named = parameters(torch.bfloat16)
    whole = build_optimizer(named, config)
    steps(whole, named, 0, 3)
    kept = {k: v.clone() for k, v in optimizer_tensors(whole, list(named)).items()}
    weights = [p.detach().clone() for p in named.values()]
    assert {k.split(".")[1] for k in kept} == {"step", "low", "exp_avg", "exp_avg_sq"}
    steps(whole, named, 3, 6)
    again = {n: torch.nn.Parameter(w) for n, w in zip(named, weights, strict=True)}
    resumed = build_optimizer(again, config)
    load_optimizer_tensors(resumed, list(again), kept, source="c")
    steps(resumed, again, 3, 6)
    for a, b in zip(named.values(), again.values(), strict=True):
        assert a.equal(b) and whole.state[a]["low"].equal(resumed.state[b]["low"])
    del kept["p1.low"]
    with pytest.raises(UserError, match=r"c: 'p1.low' is missing"):
        load_optimizer_tensors(resumed, list(again), kept, source="c")


def test_torchao_s_state_goes_to_a_checkpoint_and_comes_back():
    """Quantised moments as their parts; the weights are not touched by the loading."""
    pytest.importorskip("torchao")
    named = {"w": torch.nn.Parameter(torch.randn(64, 128)), "b": torch.nn.Parameter(torch.ones(8))}
    config = TrainConfig(optim="adamw_8bit", learning_rate=1e-3)
    whole = build_optimizer(named, config)
    steps(whole, named, 0, 2)
    kept = {k: v.clone() for k, v in optimizer_tensors(whole, list(named)).items()}
    assert kept["w.exp_avg.codes"].dtype == torch.uint8
    again = {n: torch.nn.Parameter(p.detach().clone()) for n, p in named.items()}
    resumed = build_optimizer(again, config)
    load_optimizer_tensors(resumed, list(again), kept, source="c")
    for o, n in ((whole, named), (resumed, again)):
        steps(o, n, 2, 4)
    assert all(a.equal(b) for a, b in zip(named.values(), again.values(), strict=True))
    probe = Probe(list(named.values()), whole)
    steps(whole, named, 4, 5)
    assert probe.metrics()["update_cosine"] > 0.9


def looked_at(optim: str, dtype: torch.dtype, lr: float, monkeypatch) -> dict[str, float]:
    monkeypatch.setattr("engine.learner.optimizer.LEAST_MOVABLE", 0)
    named = parameters(dtype)
    config = TrainConfig(learning_rate=lr, optim=optim, weight_decay=0.1)
    optimizer = build_optimizer(named, config)
    steps(optimizer, named, 0, 2)
    probe = Probe(list(named.values()), optimizer)
    steps(optimizer, named, 2, 3)
    return probe.metrics()


def test_metrics_tell_an_update_that_is_lost(monkeypatch):
    """bf16 weights alone, ours with the missing bits, and fp32."""
    lost = looked_at("adamw_torch", torch.bfloat16, 1e-6, monkeypatch)
    assert lost["update_cosine"] < 0.3 and lost["weights_changed"] < 0.1
    kept = looked_at("adamw", torch.bfloat16, 1e-6, monkeypatch)
    assert kept["update_cosine"] > 0.999 and kept["weights_changed"] < 0.1
    full = looked_at("adamw", torch.float32, 1e-6, monkeypatch)
    assert full["update_cosine"] > 0.999 and full["weights_changed"] > 0.9
    none = looked_at("adamw", torch.float32, 0.0, monkeypatch)
    assert none["weights_changed"] == 0 and none["update_cosine"] != none["update_cosine"]


def test_masters_are_the_weights_with_their_missing_bits():
    named = parameters(torch.bfloat16)
    optimizer = build_optimizer(named, TrainConfig(learning_rate=1e-6))
    before = torch.cat(master_of(optimizer, list(named.values())))
    steps(optimizer, named, 0, 1)
    moved = (torch.cat(master_of(optimizer, list(named.values()))) - before).abs()
    assert ((moved > 0.9e-6) & (moved < 1.1e-6)).float().mean() > 0.99
