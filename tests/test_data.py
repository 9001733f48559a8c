"""Prompt files, prompt order and the conversation template."""

import json
from collections import Counter
from pathlib import Path

import pytest

from engine.data import EMBEDDED, PromptSampler, PromptTemplate, load_prompts, load_template
from engine.errors import UserError
from engine.tiny.prompts import TASK_TYPES, make_splits, write_rows


def file(folder: Path, text: str | bytes, name: str = "p.jsonl") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_written_rows_are_read_back(tmp_path):
    train, held_out = make_splits(train=5, held_out=3, seed=1)
    path = tmp_path / "p.json"
    write_rows(path, train + held_out)
    assert load_prompts(path) == train + held_out
    path.write_text(json.dumps(train, indent=1))
    assert load_prompts(str(path)) == train


def test_embedded_splits_cover_all_task_types_and_share_no_prompt():
    train, held_out = load_prompts("tiny"), load_prompts("tiny:heldout")
    assert {row["task_type"] for row in train} == set(TASK_TYPES)
    assert {row["task_type"] for row in held_out} == set(TASK_TYPES)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    assert load_prompts(EMBEDDED["tiny"]) == train


def test_plain_text_and_odd_but_valid_files(tmp_path):
    path = file(tmp_path, "\ufeffa cat\r\n\r\n  [a dog]\n", "p.txt")
    assert load_prompts(path) == [{"prompt": "a cat"}, {"prompt": "[a dog]"}]
    path = file(tmp_path, '{"prompt": "a\u2028b", "mine": 1, "nouns": null}\n\n')
    assert load_prompts(path) == [{"prompt": "a\u2028b", "mine": 1}]


@pytest.mark.parametrize(
    "line, words",
    [
        ("{prompt: 1}", ("not JSON",)),
        ("[" * 100_000, ("not JSON",)),
        ('"a cat"', ("object", "a string")),
        ("{}", ("'prompt' is missing",)),
        ('{"promt": "a"}', ("'prompt' is missing", "'promt'")),
        ('{"prompt": 3}', ("'prompt'", "a number")),
        ('{"prompt": null}', ("'prompt'", "null")),
        ('{"prompt": " \\n"}', ("'prompt' is empty",)),
        ('{"prompt": "\\ud800"}', ("'prompt'", "surrogate")),
        ('{"prompt": "a", "nouns": "cat"}', ("'nouns'",)),
        ('{"prompt": "a", "nouns": [1]}', ("'nouns'",)),
        ('{"prompt": "a", "attr_nouns": [""]}', ("'attr_nouns'",)),
        ('{"prompt": "a", "spatial_info": []}', ("'spatial_info'",)),
        ('{"prompt": "a", "spatial_info": {"obj1": "b", "obj2": "c"}}', ("'locality'",)),
        ('{"prompt": "a", "numeracy_info": {"obj_name": "b", "num": 1}}', ("'numeracy_info'",)),
        ('{"prompt": "a", "numeracy_info": [{"obj_name": "b", "num": 0}]}', ("'num'",)),
        ('{"prompt": "a", "numeracy_info": [{"obj_name": "b", "num": true}]}', ("'num'",)),
        ('{"prompt": "a", "numeracy_info": [{"num": 2}]}', ("'obj_name'",)),
    ],
)
def test_a_bad_row_is_named_with_its_line(tmp_path, line, words):
    path = file(tmp_path, '{"prompt": "fine"}\n\n' + line + "\n")
    with pytest.raises(UserError) as caught:
        load_prompts(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:3: ") and "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "text, name, words",
    [
        ("", "p.jsonl", ("holds no prompts",)),
        ("\n \n", "p.txt", ("holds no prompts",)),
        ("[]", "p.json", ("holds no prompts",)),
        (b'{"prompt": "a"}\n\xff', "p.jsonl", (":2:", "UTF-8")),
        ('[{"prompt": "a"},\n{"prompt": }]', "p.json", (":2:", "not JSON")),
        ('[{"prompt": "a"},\n{"prompt": ""}]', "p.json", ("row 2", "'prompt' is empty")),
    ],
)
def test_bad_files_are_named(tmp_path, text, name, words):
    path = file(tmp_path, text, name)
    with pytest.raises(UserError) as caught:
        load_prompts(path)
    assert str(path) in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match="absent.jsonl: no such prompt file"):
        load_prompts(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match="tinny.*tiny:heldout"):
        load_prompts("tinny")
    with pytest.raises(UserError, match=f"{tmp_path}: Is a directory"):
        load_prompts(tmp_path)


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
    "content", ["{", "[]", '{"system": "S"}', '{"system": 1, "reasoning": "{}"}']
)
def test_bad_checkpoint_templates_are_named(tmp_path, content):
    path = file(tmp_path, content, "prompt_template.json")
    with pytest.raises(UserError, match=f"^{path}"):
        load_template(tmp_path, None)
