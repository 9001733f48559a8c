"""Checkpoints that must be refused, in one line naming file and key."""

import json
import os
import pickle
import re
import zipfile
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import JanusForConditionalGeneration

import engine.weights.hub
import engine.weights.save
from engine.policy import load_policy, save_policy
from engine.settings.errors import UserError
from tests.engine.weights.original_layout import (
    edit_weights,
    small_model,
    write_original,
    write_weights,
)

KEY = "language_model.model.layers.0.mlp.up_proj.weight"


@cache
def model() -> JanusForConditionalGeneration:
    return small_model(layers=1)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A good checkpoint in the original layout, to be spoilt."""
    write_original(tmp_path / "checkpoint", model())
    return tmp_path / "checkpoint"


@pytest.fixture
def pickled(tmp_path) -> Path:
    """The same with pickled weights."""
    write_original(tmp_path / "checkpoint", model(), form="bin")
    return tmp_path / "checkpoint"


def refused(folder: Path, *wanted: str) -> str:
    """Loading must fail with one line that names all of `wanted`."""
    with pytest.raises(UserError) as caught:
        load_policy(str(folder))
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    for text in (str(folder), *wanted):
        assert text in message, message
    return message


def edit_config(folder: Path, *place: str, value: object) -> None:
    file = folder / "config.json"
    values = section = json.loads(file.read_text())
    for name in place[:-1]:
        section = section[name]
    section[place[-1]] = value
    file.write_text(json.dumps(values))


# Code in a checkpoint


class Attack:
    def __init__(self, touch: Path) -> None:
        self.touch = touch

    def __reduce__(self):
        return os.system, (f"touch {self.touch}",)


@pytest.mark.parametrize("form", ["zip", "raw", "state"])
def test_a_malicious_pickle_runs_nothing(pickled, tmp_path, form):
    file, mark = pickled / "pytorch_model.bin", tmp_path / "attacked"
    if form == "raw":
        file.write_bytes(pickle.dumps({KEY: Attack(mark)}, protocol=2))
    else:
        torch.save(Attack(mark) if form == "zip" else {KEY: Attack(mark)}, file)
    refused(pickled, "pytorch_model.bin", "system")
    assert not mark.exists()


def test_remote_code_and_kernels_from_the_hub_are_not_asked_for(folder, tmp_path):
    save_policy(load_policy(str(folder)), tmp_path / "t", layout="transformers")
    mark = tmp_path / "ran"
    for where in (folder, tmp_path / "t"):
        (where / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
        for name in ("config.json", "tokenizer_config.json"):
            values = json.loads((where / name).read_text())
            values["auto_map"] = {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
            for section in (values, *(v for v in values.values() if isinstance(v, dict))):
                section["attn_implementation"] = "someone/kernel"
            (where / name).write_text(json.dumps(values))
        policy = load_policy(str(where))
        assert policy.config.vq_config._attn_implementation != "someone/kernel"
        assert policy.config._attn_implementation is None
    assert not mark.exists()


# Weights


def test_wrong_shapes_and_keys_are_named(folder):
    edit_weights(folder, **{KEY: torch.zeros(3, 5)})
    refused(folder, "model.safetensors", KEY, "(3, 5)", "(80, 48)")
    edit_weights(folder, **{KEY: None})
    refused(folder, KEY, "missing")
    edit_weights(
        folder, **{KEY: torch.zeros(80, 48), "gen_vision_model.encoder.down.0": torch.ones(1)}
    )
    refused(folder, "model.safetensors", "gen_vision_model.encoder.down.0", "unexpected")
    edit_weights(folder, **{"gen_vision_model.encoder.down.0": None})
    edit_weights(folder, **{KEY: torch.zeros((80, 48), dtype=torch.int64)})
    refused(folder, KEY, "floating point")


def test_image_tokenizer_that_does_not_fit_its_own_shapes_is_named(folder):
    key = "gen_vision_model.encoder.conv_in.weight"
    edit_weights(folder, **{key: torch.zeros(64, 3, 3, 3)})
    refused(folder, "channel_multiplier")
    edit_weights(folder, **{key: None})
    refused(folder, "gen_vision_model.")


@pytest.mark.parametrize("size", [0, 3, 8, 900, -1])
@pytest.mark.parametrize("form", ["safetensors", "bin", "old_bin"])
def test_truncated_files_are_named(tmp_path, form, size):
    write_original(tmp_path, model(), form=form)
    (file,) = (*tmp_path.glob("*.bin"), *tmp_path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:size])
    refused(tmp_path, file.name)


@pytest.mark.parametrize(
    "content",
    [
        [torch.ones(2)],
        {KEY: "text"},
        {3: torch.ones(2)},
        {KEY: torch.ones(3, 3).to_sparse()},
        {KEY: torch.ones(2, device="meta")},
        {KEY: torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8)},
        {KEY: torch.ones(2, dtype=torch.complex64)},
        {"state_dict": {KEY: torch.ones(2)}},
    ],
)
def test_pickles_of_anything_but_dense_tensors_are_refused(pickled, content):
    torch.save(content, pickled / "pytorch_model.bin")
    refused(pickled, "pytorch_model.bin")


def test_a_zip_that_is_no_checkpoint_is_named(pickled):
    with zipfile.ZipFile(pickled / "pytorch_model.bin", "w") as file:
        file.writestr("readme.txt", "hello")
    refused(pickled, "pytorch_model.bin")


def test_key_twice_in_a_header_and_in_two_files(folder):
    file = folder / "model.safetensors"
    entry = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    header = b"{" + entry + b"," + entry + b"}"
    whole = file.read_bytes()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    refused(folder, "model.safetensors", "'a'", "twice")
    file.write_bytes(whole)
    tensors = load_file(file)
    file.unlink()
    write_weights(folder, tensors, form="safetensors", shards=2)
    second = folder / "model-00002-of-00002.safetensors"
    key = min(tensors)
    save_file(load_file(second) | {key: tensors[key]}, second)
    refused(folder, second.name, key, "model-00001-of-00002.safetensors")


# Indexes


@pytest.fixture
def sharded(tmp_path) -> Path:
    write_original(tmp_path / "checkpoint", model(), shards=2)
    return tmp_path / "checkpoint"


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", ".safetensors", "x.pt",
     "con\0.safetensors", "..\\outside.safetensors", 7, None, ["model.safetensors"], "a" * 5000],
)  # fmt: skip
def test_an_index_cannot_point_elsewhere(sharded, name):
    outside = sharded.parent / "outside.safetensors"
    outside.write_bytes((sharded / "model-00001-of-00002.safetensors").read_bytes())
    file = sharded / "model.safetensors.index.json"
    values = json.loads(file.read_text())
    values["weight_map"][KEY] = name
    file.write_text(json.dumps(values))
    refused(sharded, "model.safetensors.index.json", KEY)


def test_indexes_and_their_files_must_agree(sharded):
    file = sharded / "model.safetensors.index.json"
    text = file.read_text()
    values = json.loads(text)
    place = values["weight_map"][KEY]
    other = next(n for n in values["weight_map"].values() if n != place)
    values["weight_map"][KEY] = other
    file.write_text(json.dumps(values))
    refused(sharded, other, KEY)
    values["weight_map"][KEY] = "model-00009-of-00002.safetensors"
    file.write_text(json.dumps(values))
    refused(sharded, "model-00009-of-00002.safetensors", "no such file")
    file.write_text(text.replace('"weight_map": {', f'"weight_map": {{"{KEY}": "x",', 1))
    refused(sharded, "model.safetensors.index.json", KEY, "twice")
    for content in (
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        "{",
        "\xff",
        "[" * 9999,
    ):
        file.write_text(content, encoding="latin-1")
        refused(sharded, "model.safetensors.index.json")


# Settings


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        ("language_config.hidden_size", 10**12, "hidden_size"),
        ("language_config.num_hidden_layers", 10**9, "num_hidden_layers"),
        ("language_config.vocab_size", 10**15, "vocab_size"),
        ("language_config.hidden_size", -48, "hidden_size"),
        ("language_config.hidden_size", "48", "hidden_size"),
        ("language_config.num_attention_heads", 0, "language_config"),
        ("language_config.num_key_value_heads", 3, "num_key_value_heads"),
        ("language_config.hidden_act", "gelu", "hidden_act"),
        ("language_config.model_type", "qwen2", "model_type"),
        ("language_config.rope_scaling", {"type": "linear", "factor": 2.0}, "rope"),
        ("language_config.rms_norm_eps", -1.0, "rms_norm_eps"),
        ("language_config", [], "language_config"),
        ("gen_vision_config.params", None, "gen_vision_config.params"),
        ("gen_vision_config.params.n_embed", 10**11, "gen_vision_config.params.n_embed"),
        ("gen_vision_config.params.image_token_size", None, "image_token_size"),
        ("gen_vision_config.cls", "VQ-8", "VQ-8"),
        ("gen_aligner_config.params.depth", 10**6, "gen_aligner_config.params.depth"),
        ("gen_aligner_config.params.projector_type", "linear", "projector_type"),
        ("gen_head_config.params.image_token_embed", 64, "image_token_embed"),
        ("vision_config.params.image_size", 10**9, "image_size"),
        ("vision_config.params.image_size", 7, "image_size"),
        ("model_type", "llama", "model_type"),
        ("model_type", ["janus"], "model_type"),
    ],
)  # fmt: skip
def test_impossible_settings_are_named(folder, place, value, named):
    edit_config(folder, *place.split("."), value=value)
    refused(folder, "config.json", named)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "null", '{"model_type": "janus", "model_type": "janus"}', "[" * 99999,
     '{"model_type": "multi_modality", "a": NaN}', '{"a": ' + "9" * 5000 + "}"],
)  # fmt: skip
def test_a_config_that_is_no_json_object_is_named(folder, text):
    (folder / "config.json").write_text(text)
    refused(folder, "config.json")


def test_a_tokenizer_that_lacks_what_janus_needs_is_named(folder):
    file, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    text, own = file.read_text(), settings.read_text()
    file.write_text(text.replace("<begin_of_image>", "<begin_of_something>"))
    refused(folder, "tokenizer.json", "<begin_of_image>")
    for damaged in ("{", "[]", "", text[:-40]):
        file.write_text(damaged)
        refused(folder, "tokenizer")
    values = json.loads(text)
    values["model"]["continuing_subword_prefix"] = "x" * 5000
    file.write_text(json.dumps(values))  # at which tokenizers panics, with no Exception
    refused(folder, "tokenizer")
    file.write_text(text)
    settings.write_text(own.replace('"model_max_length": 64', '"model_max_length": "64"'))
    refused(folder, "tokenizer")  # which would show at the first text
    settings.write_text(re.sub(r'"bos_token": "[^"]*",', "", own))
    refused(folder, "tokenizer_config.json", "bos_token")
    settings.write_text(own)
    edit_config(folder, "language_config", "vocab_size", value=100)
    refused(folder, "tokenizer.json", "vocab_size", "100")


# The hub


def test_a_hub_id_that_cannot_be_fetched_is_one_clear_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as caught:
        load_policy("deepseek-ai/Janus-Pro-1B")
    message = str(caught.value)
    assert message.startswith("deepseek-ai/Janus-Pro-1B: no such folder") and "\n" not in message


def test_a_hub_id_is_fetched_once_and_without_pickles_where_it_can(folder, monkeypatch):
    asked = []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr(engine.weights.hub, "snapshot_download", fetch)
    engine.weights.hub.hub_folder.cache_clear()
    assert load_policy("someone/model-1.0").dtype == torch.float32
    load_policy("someone/model-1.0")
    ((name, patterns),) = asked
    assert name == "someone/model-1.0" and "*.safetensors" in patterns and "*.bin" not in patterns
    (folder / "model.safetensors").rename(folder / "hidden")
    asked.clear()
    with pytest.raises(UserError, match="no such file"):
        load_policy("someone/other")
    assert ["*.bin" in patterns for _, patterns in asked] == [False, True]
    engine.weights.hub.hub_folder.cache_clear()


@pytest.mark.parametrize("path", ["nowhere", "./a/b", "/a/b", "a/b/c", "a/", "../b"])
def test_other_paths_are_folders(monkeypatch, path):
    monkeypatch.setattr(engine.weights.hub, "snapshot_download", lambda *a, **k: 1 / 0)
    with pytest.raises(UserError, match="no such checkpoint folder"):
        load_policy(path)
