"""docs/migrating-from-t2i-r1.md names every flag of T2I-R1's commands, and only flags that exist."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from engine.generate.__main__ import GenerateConfig
from engine.prompts.data import load_template
from engine.settings.options import parse_args
from engine.settings.train import TrainConfig

PAGE = (Path(__file__).parents[3] / "docs" / "migrating-from-t2i-r1.md").read_text()

# src/scripts/run_grpo.sh and infer/reason_inference.py of CaraJ7/T2I-R1.
TRAINING = """
    use_vllm deepspeed output_dir model_name_or_path dataset_name max_prompt_length
    max_completion_length temperature num_generations per_device_train_batch_size
    gradient_accumulation_steps logging_steps bf16 torch_dtype report_to gradient_checkpointing
    attn_implementation max_steps run_name save_steps new_generations_image
    image_token_num_per_image cfg_weight reasoning_prompt_path reward_funcs beta tf32 learning_rate
    hps_ckpt_path git_ckpt_path gdino_ckpt_path gdino_config_path orm_ckpt_path
"""
INFERENCE = "model_path data_path reasoning_prompt_path save_dir num_generation"


def section(title):
    return PAGE.partition(f"## {title}\n")[2].split("\n## ")[0]


def table(title):
    rows = [line.strip("|").split("|") for line in section(title).splitlines() if line[:1] == "|"]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def flags_of(config):
    fields = dataclasses.fields(config)
    return {name for f in fields for name in (f.name, *f.metadata["aliases"])} | {"resume"}


@pytest.mark.parametrize(
    "title, config, theirs",
    [
        ("Training flags", TrainConfig, TRAINING),
        ("Inference flags", GenerateConfig, INFERENCE),
    ],
)
def test_tables_name_all_of_theirs_and_only_flags_of_ours(title, config, theirs):
    rows = table(title)
    assert [len(row) for row in rows] == [3] * len(rows)
    assert sorted(row[0] for row in rows) == sorted(f"`--{name}`" for name in theirs.split())
    for old, new, note in rows:
        named = re.findall(r"`--(\w+)", new)
        assert named or (new == "none" and note.startswith("leave it out")), old
        assert set(named) <= flags_of(config), (old, new)


def test_every_flag_in_the_text_exists():
    told_of_theirs = {
        row[0] for title in ("Training flags", "Inference flags") for row in table(title)
    }
    known = flags_of(TrainConfig) | flags_of(GenerateConfig)
    known |= {flag.strip("`-") for flag in told_of_theirs}
    assert set(re.findall(r"--(\w+)", PAGE)) <= known


def test_the_long_command_is_accepted(tmp_path):
    command = re.search(r"python -m engine\.train (--model .*?)\n```", PAGE, re.DOTALL)[1]
    config = parse_args(TrainConfig, command.replace("\\\n", " ").split(), description="")
    assert config.prompts_per_step == 16 and config.max_completion_length == 1024
    assert config.reward_funcs == ["hps", "git", "gdino", "orm"]


def test_the_template_file_gives_their_words(tmp_path):
    text = re.search(r"```json\n(.*?)\n```", PAGE, re.DOTALL)[1]
    (tmp_path / "prompt_template.json").write_text(text)
    (tmp_path / "instruction.txt").write_text('Draw "{}" {now}. ')
    template = load_template(tmp_path, str(tmp_path / "instruction.txt"))
    system = json.loads(text)["system"]
    # What apply_sft_template_for_multi_turn_prompts of Janus writes for roles User and Assistant.
    assert template.stage1_text("a cat") == (
        f'{system}\n\nUser: Draw "a cat" {{now}}.\n\nAssistant:'
    )
    assert template.stage2_text("a cat", "It sits.") == "User: a cat. It sits.\n\nAssistant:"
