"""From the reward flags to experts: real classes, the tiny world's, a user's own."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch

import engine.experts
from engine.experts import SOURCES, build_ensemble, draws_tiny_world
from engine.run.checkpoint import latest_checkpoint, load_checkpoint
from engine.settings.errors import UserError
from engine.settings.options import parse_args
from engine.settings.rewards import EXPERTS
from engine.settings.train import TrainConfig
from engine.train import train
from rewards import HPS
from tests.conftest import small_config

PAGE = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
SMALL = """--prompts_per_step=2 --num_generations=2 --eval_generations=0 --threads=1 --save_steps=50
    --sample_steps=100 --lr_scheduler_type=constant""".split()


class Built:
    """Stands for the class of an expert: keeps what it was made with."""

    def __init__(self, *paths, **options):
        self.paths, self.options = paths, options

    def score(self, prompts, images, metadata):
        return torch.zeros(len(prompts))


@pytest.fixture
def classes(monkeypatch):
    """The real classes replaced by ones that load nothing."""
    for name, source in SOURCES.items():
        module = __import__(source.module, fromlist=[source.cls])
        assert getattr(module, source.cls).name == name
        monkeypatch.setattr(module, source.cls, type(source.cls, (Built,), {"name": name}))


def test_every_real_expert_gets_its_own_flags(classes):
    paths = {s.flag: f"/{name}" for name, s in SOURCES.items() if s.flag}
    paths["gdino_config_path"] = "/bert"
    ensemble = build_ensemble(
        list(EXPERTS), model="tiny", device="cpu", dtype="bfloat16", paths=paths
    )
    assert [e.name for e in ensemble.experts] == list(EXPERTS)
    for expert in ensemble.experts:
        assert type(expert).__name__ == SOURCES[expert.name].cls
        if SOURCES[expert.name].flag is None:
            assert expert.paths == () and expert.options == {"device": "cpu"}
            continue
        assert expert.paths == (f"/{expert.name}",)
        wanted = {"device": "cpu", "dtype": torch.bfloat16}
        if expert.name == "gdino":
            wanted["config"] = "/bert"
        assert expert.options == wanted
    (alone,) = build_ensemble(["hps"], model="tiny", device="cpu", paths=paths).experts
    assert alone.options == {"device": "cpu"}  # each class's own default


def test_the_classes_take_what_they_are_given():
    import inspect

    for source in SOURCES.values():
        cls = getattr(__import__(source.module, fromlist=[source.cls]), source.cls)
        named = inspect.signature(cls).parameters
        assert "device" in named and ("dtype" in named) == (source.flag is not None), source
        assert ("config" in named) == (source.config_flag is not None), source


def test_without_paths_the_tiny_world_has_its_experts_and_mixes_with_real_ones(classes):
    names = ["orm", "git", "hps", "gdino"]
    ensemble = build_ensemble(
        names, model="tiny", device="cpu", paths={"git_ckpt_path": "/g"}, weights=[1, 2, 0, 1]
    )
    assert [e.name for e in ensemble.experts] == names
    assert ensemble.weights == {"orm": 1, "git": 2, "hps": 0, "gdino": 1}
    kinds = [type(e).__module__ for e in ensemble.experts]
    assert kinds == ["engine.tiny.experts", __name__, "rewards.hps", "engine.tiny.experts"]
    assert isinstance(ensemble.experts[2], HPS)


@pytest.mark.parametrize("name", ["hps", "gdino", "owl", "git", "blip", "orm"])
def test_a_real_model_needs_the_path_of_every_expert(name, tmp_path):
    small_config().save_pretrained(tmp_path)
    assert draws_tiny_world("tiny") and not draws_tiny_world(str(tmp_path))
    with pytest.raises(UserError, match=f"--{name}_ckpt_path: the expert '{name}' needs it"):
        build_ensemble([name], model=str(tmp_path), device="cpu")


@pytest.mark.parametrize("name", ["owl", "blip"])
def test_the_tiny_world_has_no_alternatives(name):
    with pytest.raises(UserError, match=f"--{name}_ckpt_path: .*the tiny world has no"):
        build_ensemble([name], model="tiny", device="cpu")


@pytest.mark.parametrize("name", ["hps", "gdino", "owl", "git", "blip", "orm"])
def test_an_unusable_path_is_named_with_its_flag(name, tmp_path):
    flag = f"{name}_ckpt_path"
    absent = str(tmp_path / "absent")
    with pytest.raises(UserError, match=f"--{flag}: {re.escape(str(tmp_path))}") as error:
        build_ensemble([name], model="tiny", device="cpu", paths={flag: absent})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["gdinoo", "", "a:", ":B", "a b:C", "a.b", "a:b.c"])
def test_unknown_rewards_are_refused_with_the_nearest(name):
    with pytest.raises(UserError, match="--reward_funcs: .*nearest"):
        parse_args(TrainConfig, ["--reward_funcs", "hps", name], description="")


def own_module(**members):
    module = types.ModuleType("own_experts")
    vars(module).update(members)
    return module


def broken(device):
    raise OSError("no weights\nat all")


@pytest.mark.parametrize(
    "spec, said",
    [
        ("no_such_module:Expert", "ModuleNotFoundError"),
        ("own_experts:Absent", "AttributeError"),
        ("own_experts:broken", "OSError: no weights$"),
        ("own_experts:Nameless", "'name'"),
        ("own_experts:Scoreless", "score"),
        ("own_experts:NoDevice", "TypeError"),
    ],
)
def test_a_faulty_class_of_the_users_is_one_clear_line(spec, said, monkeypatch):
    def make(title, /, **members):
        init = {"__init__": lambda self, device: None}
        return type(title, (), init | members)

    score = {"score": lambda *_: None}
    module = own_module(
        broken=broken,
        Nameless=make("Nameless", **score),
        Scoreless=make("Scoreless", name="x"),
        NoDevice=type("NoDevice", (), {"name": "x", **score}),
    )
    monkeypatch.setitem(sys.modules, "own_experts", module)
    with pytest.raises(UserError, match=f"^--reward_funcs {re.escape(spec)}: .*{said}"):
        build_ensemble([spec], model="tiny", device="cpu")


def test_a_name_taken_twice_is_refused(monkeypatch):
    cls = type("Mine", (Built,), {"name": "gdino"})
    monkeypatch.setitem(sys.modules, "own_experts", own_module(Mine=cls))
    with pytest.raises(UserError, match="--reward_funcs: .*twice"):
        build_ensemble(["gdino", "own_experts:Mine"], model="tiny", device="cpu")


def example():
    return re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]


def run_flags(tmp_path, name, *extra):
    flags = [*SMALL, f"--output_dir={tmp_path}", f"--run_name={name}", *extra]
    return parse_args(TrainConfig, flags, description="")


def forget(*modules):
    for module in modules:
        sys.modules.pop(module, None)


def test_the_example_of_the_page_trains_as_it_stands(tmp_path, monkeypatch):
    code = example()
    assert len(code.strip().splitlines()) <= 12
    package = tmp_path / "mypkg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "myexpert.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    flags = re.search(r"engine\.train (--reward_funcs [^\n]*)", PAGE)[1].split()
    try:
        train(run_flags(tmp_path, "own", "--max_steps=1", *flags))
    finally:
        forget("mypkg", "mypkg.myexpert")
    row = (tmp_path / "own" / "metrics.jsonl").read_text()
    assert '"rewards/red"' in row and '"rewards/gdino"' in row
    sys.path.remove(str(tmp_path))


FLAKY = """
from pathlib import Path

class Flaky:
    name = "flaky"

    def __init__(self, device):
        pass

    def score(self, prompts, images, metadata):
        Flaky.calls = getattr(Flaky, "calls", 0) + 1
        if Flaky.calls == 2 and Path({flag!r}).exists():
            raise RuntimeError("the disk is gone")
        return images[:, 0].mean((1, 2))
"""


def tensors_of(run):
    groups, state = load_checkpoint(latest_checkpoint(run))
    return {f"{g}/{k}": v for g, named in groups.items() for k, v in named.items()}, state["step"]


def test_a_run_stopped_by_its_expert_goes_on_as_if_nothing_had_been(tmp_path, monkeypatch):
    flag = tmp_path / "broken"
    (tmp_path / "flaky_expert.py").write_text(FLAKY.format(flag=str(flag)))
    monkeypatch.syspath_prepend(tmp_path)
    own = "--reward_funcs=flaky_expert:Flaky"
    flag.touch()
    with pytest.raises(UserError, match="after step 1: expert 'flaky' failed: .*--resume") as error:
        train(run_flags(tmp_path, "parts", "--max_steps=2", own))
    assert "\n" not in str(error.value)
    details = (tmp_path / "parts" / "reward_error.txt").read_text()
    assert "flaky_expert.py" in details and "the disk is gone" in details
    assert tensors_of(tmp_path / "parts")[1] == 1
    flag.unlink()
    train(run_flags(tmp_path, "parts", "--max_steps=2", own, "--resume"))
    train(run_flags(tmp_path, "whole", "--max_steps=2", own))
    forget("flaky_expert")
    (parts, step), (whole, _) = (tensors_of(tmp_path / name) for name in ("parts", "whole"))
    assert step == 2 and parts.keys() == whole.keys()
    assert all(torch.equal(v, whole[k]) for k, v in parts.items())


def test_offload_and_device_flags(tmp_path):
    with pytest.raises(UserError, match="--reward_offload"):
        train(run_flags(tmp_path, "off", "--reward_funcs=gdino", "--reward_offload"))
    with pytest.raises(UserError, match="reward_device"):
        run_flags(tmp_path, "off", "--reward_device=gpu1")
    assert engine.experts.reward_paths(run_flags(tmp_path, "x"))["gdino_config_path"] is None
