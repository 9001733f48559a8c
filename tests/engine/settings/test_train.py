"""Command line and YAML of the settings."""

from dataclasses import MISSING, dataclass
from pathlib import Path

import pytest

from engine.settings.errors import UserError
from engine.settings.options import check_fields, option, parse_args, to_yaml
from engine.settings.train import TrainConfig


def parse(*argv: str) -> TrainConfig:
    return parse_args(TrainConfig, argv, description="Train.")


def refused(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(*argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def yaml_file(folder: Path, text: str) -> str:
    path = folder / "c.yaml"
    path.write_text(text)
    return str(path)


def test_defaults_follow_the_model():
    """A real checkpoint must not be trained at the embedded model's rate."""
    assert (TrainConfig().max_steps, TrainConfig().learning_rate) == (80, 4e-4)
    real = TrainConfig(model="Janus-Pro-1B")
    assert (real.max_steps, real.learning_rate, real.beta) == (1600, 1e-6, 0.01)
    assert TrainConfig(model="Janus-Pro-1B", beta=0, learning_rate=2e-6).beta == 0


def test_defaults_make_the_tiny_run():
    config = parse()
    assert config == TrainConfig()
    assert (config.group_size, config.images_per_step) == (8, 64)
    assert config.run_dir == Path("runs/tiny-0")
    assert config.eval_dataset == "tiny:heldout"
    assert parse("--dataset_name", "a.jsonl").eval_dataset == "a.jsonl"


def test_every_kind_of_flag():
    config = parse(
        *("--num-generations", "4", "--learning_rate=1e-6", "--resume", "--seed", "7"),
        *("--reward_funcs", "hps", "orm", "--reward_weights", "1", "0.5"),
        *("--train_levels", "semantic,token", "--reasoning_prompt_path", "r.txt"),
        *("--model", "deepseek-ai/Janus-Pro-1B", "--beta", "0"),
    )
    assert config.num_generations == 4 and config.learning_rate == 1e-6 and config.resume
    assert config.reward_funcs == ["hps", "orm"] and config.reward_weights == [1.0, 0.5]
    assert config.train_levels == ["semantic", "token"]
    assert config.reasoning_prompt_path == "r.txt" and config.beta == 0.0
    assert config.run_dir == Path("runs/Janus-Pro-1B-7")


def test_published_names_are_aliases():
    config = parse(
        *("--model_name_or_path", "m", "--new_generations_image", "2", "--epsilon", "0.1"),
        *("--epsilon_high", "0.3", "--torch_dtype", "bfloat16"),
    )
    assert (config.model, config.images_per_plan, config.dtype) == ("m", 2, "bfloat16")
    assert (config.clip_low, config.clip_high) == (0.1, 0.3)


def test_yaml_round_trip_and_flags_override_it(tmp_path):
    config = TrainConfig(learning_rate=1e-6, resume=True, reward_weights=[1, 2, 3, 4])
    path = yaml_file(tmp_path, to_yaml(config))
    assert parse("--config", path) == config
    changed = parse("--no-resume", "--config", path, "--beta", "0.5")
    assert changed.learning_rate == 1e-6 and not changed.resume and changed.beta == 0.5


def test_yaml_exponent_without_a_point_is_a_number(tmp_path):
    assert parse("--config", yaml_file(tmp_path, "epsilon: 1e-1")).clip_low == 0.1


@pytest.mark.parametrize(
    "argv, words",
    [
        (("--num_generation", "4"), ("--num_generation ", "--num_generations")),
        (("--lr", "1"), ("--lr",)),
        (("--no-beta",), ("--no-beta",)),
        (("--no-resume", "1"), ("--no-resume",)),
        (("tiny",), ("'tiny'",)),
        (("--max_steps", "ten"), ("--max_steps", "whole number", "'ten'")),
        (("--max_steps", "1.5"), ("--max_steps", "1.5")),
        (("--max_steps",), ("--max_steps", "one value")),
        (("--max_steps", "1", "2"), ("--max_steps", "1 2")),
        (("--learning_rate", "nan"), ("--learning_rate", "nan")),
        (("--resume", "maybe"), ("--resume", "maybe")),
        (("--loss_type", "tokens"), ("--loss_type", "'tokens'", "nearest: token)")),
        (("--reward_funcs", "hps", "gdno"), ("--reward_funcs", "'gdno'", "nearest: gdino")),
        (("--reward_funcs",), ("reward_funcs",)),
        (("--reward_funcs", "hps", "hps"), ("reward_funcs", "once")),
        (("--reward_weights", "1"), ("reward_weights", "4 numbers")),
        (("--reward_weights", "1", "1", "-1", "1"), ("reward_weights", ">= 0", "-1")),
        (("--num_generations", "1"), ("num_generations", ">= 2")),
        (("--temperature", "0"), ("temperature", "> 0", "got 0")),
        (("--clip_low", "1.5"), ("clip_low", "<= 1", "1.5")),
        (("--adam_beta1", "1"), ("adam_beta1", "< 1")),
        (("--seed", "-1"), ("seed", "-1")),
        (("--warmup_steps", "91"), ("warmup_steps", "max_steps", "91")),
        (("--device", "gpu"), ("device", "'gpu'")),
        (("--run_name", "../x"), ("run_name", "'../x'")),
        (("--config", "absent.yaml"), ("absent.yaml", "No such file")),
    ],
)
def test_bad_flags_are_named(argv, words):
    message = refused(*argv)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "text, words",
    [
        ("seed: 1\nmax_step: 3", (":2:", "'max_step'", "max_steps")),
        ("seed: [1]", (":1: seed", "[1]")),
        ("seed: 1\nclip_low: 0.1\nepsilon: 0.2", (":3:", "epsilon", "twice")),
        ("seed: true", (":1: seed", "True")),
        ("run_name: 5", (":1: run_name", "text")),
        ("- a\n- b", (":1:", "key: value")),
        ("seed: 1\nbeta: [", (":2:", "not YAML")),
        ("seed: !!python/object/apply:os.getcwd []", (":1: seed",)),
        ("max_steps: 0", ("max_steps", ">= 1", "got 0")),
    ],
)
def test_bad_yaml_is_named_with_its_line(tmp_path, text, words):
    path = yaml_file(tmp_path, text)
    message = refused("--config", path)
    assert all(word in message for word in words), message


def test_construction_in_python_is_checked_too():
    with pytest.raises(UserError, match="loss_type.*'mean'"):
        TrainConfig(loss_type="mean")


def test_help_has_a_line_for_every_flag(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    for name in TrainConfig.__dataclass_fields__:
        assert sum(line.startswith(f"  --{name}") for line in lines) >= 1, name
    line = next(line for line in lines if line.startswith("  --logprob_policy"))
    assert "{conditional, guided, guided_detached}" in line and "[conditional]" in line


def test_another_settings_class():
    @dataclass(kw_only=True, slots=True)
    class Generate:
        prompt: list[str] = option(MISSING, "what to draw")  # noqa: RUF009
        count: int = option(4, "pictures", at_least=1)

        def __post_init__(self) -> None:
            check_fields(self)

    made = parse_args(Generate, ["--prompt", "a cat, a dog", "b"], description="Generate.")
    assert made.prompt == ["a cat, a dog", "b"]  # text is not split at commas
    with pytest.raises(UserError, match="--prompt is required"):
        parse_args(Generate, [], description="Generate.")
    with pytest.raises(SystemExit):
        parse_args(Generate, ["-h"], description="Generate.")
