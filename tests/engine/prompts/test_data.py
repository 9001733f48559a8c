"""Prompt order and the conversation template."""

import json
from collections import Counter
from pathlib import Path

import pytest

from engine.prompts.data import PromptSampler, PromptTemplate, load_template
from engine.settings.errors import UserError


def file(folder: Path, text: str | bytes, name: str) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_an_epoch_draws_every_row_once_and_steps_need_no_history():
    sampler = PromptSampler(num_rows=10, batch=4, seed=3)
    drawn = [row for step in range(5) for row in sampler.rows(step)]  # two epochs
    assert Counter(drawn[:10]) == Counter(drawn[10:]) == Counter(range(10))
    assert drawn[:10] != drawn[10:] != list(range(10))
    assert PromptSampler(10, 4, 3).rows(3) == drawn[12:16]
    assert PromptSampler(10, 4, 4).rows(3) != drawn[12:16]
    assert len(PromptSampler(2, 5, 0).rows(7)) == 5


def test_template_is_the_janus_conversation():
    template = PromptTemplate("Be kind.", "Plan {} as {x} or {}.")
    assert template.stage1_text("a {cat} {}") == (
        "Be kind.\n\n<|User|>: Plan a {cat} {} as {x} or {}.\n\n<|Assistant|>:"
    )
    assert (
        template.stage2_text("a cat", "It sits.") == "<|User|>: a cat. It sits.\n\n<|Assistant|>:"
    )
    assert PromptTemplate("", "{}").stage1_text("a") == "<|User|>: a\n\n<|Assistant|>:"


def test_without_a_plan_the_bare_prompt_is_asked():
    template = PromptTemplate("Be kind.", "Plan {}.")
    assert template.stage2_text("a cat", None) == "<|User|>: a cat\n\n<|Assistant|>:"
    assert template.stage2_text("a cat", "") == "<|User|>: a cat.\n\n<|Assistant|>:"


def test_published_instruction_file_is_used_as_it_is(tmp_path):
    # As in T2I-R1: quotes around the slot, several lines, a blank and no newline at the end.
    path = file(tmp_path, 'Draw "{}".\n1. Be {brief}\nDirectly: ', "reasoning_prompt.txt")
    template = load_template(None, str(path))
    assert template.stage1_text("a {} cat").endswith(
        '<|User|>: Draw "a {} cat".\n1. Be {brief}\nDirectly:\n\n<|Assistant|>:'
    )


def test_roles_are_the_checkpoints_own(tmp_path):
    text = json.dumps({"system": "", "reasoning": "{}", "roles": ["User", "Assistant"]})
    file(tmp_path, text, "prompt_template.json")
    assert load_template(tmp_path, None).stage2_text("a", None) == "User: a\n\nAssistant:"


def test_template_precedence(tmp_path):
    packaged = load_template(None, None)
    assert packaged.reasoning.count("{}") == 1 and packaged.system
    assert load_template(tmp_path, None) == packaged  # no template in this checkpoint
    text = json.dumps({"system": "S", "reasoning": "R {}"})
    file(tmp_path, text, "prompt_template.json")
    assert load_template(tmp_path, None) == PromptTemplate("S", "R {}")
    mine = file(tmp_path, "Mine: {}\n", "r.txt")
    assert load_template(tmp_path, str(mine)) == PromptTemplate("S", "Mine: {}")


@pytest.mark.parametrize("content", ["no slot", b"\xff {}", None])
def test_bad_reasoning_files_are_named(tmp_path, content):
    path = tmp_path / "r.txt" if content is None else file(tmp_path, content, "r.txt")
    with pytest.raises(UserError, match=f"^{path}: "):
        load_template(None, str(path))


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"system": "S"}',
        '{"system": 1, "reasoning": "{}"}',
        '{"system": "", "reasoning": "{}", "roles": ["User"]}',
        '{"system": "", "reasoning": "{}", "roles": "ab"}',
    ],
)
def test_bad_checkpoint_templates_are_named(tmp_path, content):
    path = file(tmp_path, content, "prompt_template.json")
    with pytest.raises(UserError, match=f"^{path}"):
        load_template(tmp_path, None)
