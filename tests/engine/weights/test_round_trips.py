"""Checkpoints of both layouts: what is written back."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import JanusForConditionalGeneration

from bench.rollout.transformers_images import generated_tokens
from engine import convert
from engine.policy import load_policy, save_policy
from engine.rollout import sample_images
from engine.settings.errors import UserError
from engine.weights.read import guidance_scale
from tests.engine.weights.conftest import (
    LAYOUTS,
    MODELS,
    prompts_of,
    their_model,
    weights_in,
)
from tests.engine.weights.original_layout import (
    expected_shapes,
    small_model,
    write_original,
)


def test_saved_original_has_the_originals_keys_and_shapes(folders, tmp_path):
    for model in MODELS:
        for layout in LAYOUTS:
            policy = load_policy(str(folders(layout, model)))
            out = save_policy(policy, tmp_path / layout / str(model), layout="original")
            found = {k: tuple(t.shape) for k, t in weights_in(out).items()}
            wanted = expected_shapes(policy.config)
            if layout == "transformers":  # which never had them
                only = [k for k in wanted if "attn_pool" in k or k.endswith("codebook_used")]
                wanted = {k: shape for k, shape in wanted.items() if k not in only}
            assert found == wanted


@pytest.mark.parametrize("max_shard_bytes", [10**9, 200_000])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_transformers_layout_loads_there_with_all_its_keys(
    folders, tmp_path, layout, max_shard_bytes
):
    for model in MODELS:
        policy = load_policy(str(folders(layout, model)))
        out = tmp_path / str(model)
        save_policy(policy, out, layout="transformers", max_shard_bytes=max_shard_bytes)
        loaded, info = JanusForConditionalGeneration.from_pretrained(out, output_loading_info=True)
        assert not any(info.values())
        wanted, got = their_model(*model).state_dict(), loaded.state_dict()
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[k], wanted[k]) for k in wanted)
        files = sorted(out.glob("model*.safetensors"))
        sizes = [sum(t.nbytes for t in load_file(f).values()) for f in files]
        largest = max(t.nbytes for t in wanted.values())
        assert (len(files) > 5) == (max_shard_bytes == 200_000)
        assert max(sizes) <= max(max_shard_bytes, largest)
        if len(files) > 1:
            index = json.loads((out / "model.safetensors.index.json").read_text())
            assert index["metadata"]["total_size"] == sum(sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", MODELS)
def test_round_trip_is_bitwise(tmp_path, model, dtype):
    """original -> ours -> transformers -> ours -> original, files and config included."""
    theirs = small_model(kv_heads=model[0], tied=model[1], layers=model[2]).to(dtype)
    first = write_original(tmp_path / "a", theirs, form="bin", shards=2)
    save_policy(
        load_policy(str(tmp_path / "a")),
        tmp_path / "b",
        layout="transformers",
        max_shard_bytes=300_000,
    )
    save_policy(load_policy(str(tmp_path / "b")), tmp_path / "c", layout="original")
    last = weights_in(tmp_path / "c")
    assert last.keys() == first.keys()
    for key, tensor in first.items():
        assert last[key].dtype == tensor.dtype and torch.equal(last[key], tensor), key
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        assert (tmp_path / "c" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    assert not (tmp_path / "b" / "preprocessor_config.json").exists()  # no form of transformers
    one, other = (json.loads((tmp_path / n / "config.json").read_text()) for n in "ac")
    name = str(dtype).removeprefix("torch.")
    one["torch_dtype"] = one["language_config"]["torch_dtype"] = name
    assert one == other


def test_transformers_files_survive_the_other_layout(folders, tmp_path):
    model = (2, False, 2)
    folder = folders("transformers", model)
    policy = load_policy(str(folder))
    (tmp_path / "a").mkdir()
    save_policy(policy, tmp_path / "a")
    (tmp_path / "a" / "chat_template.jinja").write_text("{{ messages }}")
    save_policy(load_policy(str(tmp_path / "a")), tmp_path / "b", layout="original")
    assert not (tmp_path / "b" / "chat_template.jinja").exists()
    save_policy(load_policy(str(tmp_path / "b")), tmp_path / "c", layout="transformers")
    assert (tmp_path / "c" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert weights_in(tmp_path / "c").keys() == weights_in(folder).keys()
    one, other = (load_policy(str(tmp_path / n)).config.text_config.to_dict() for n in "ac")
    assert {k for k in one if one[k] != other[k]} == {
        *("bos_token_id", "eos_token_id", "pad_token_id")  # they are the tokenizer's now
    }


def test_training_changes_only_what_it_trains(original, tmp_path):
    policy = load_policy(str(original))
    with torch.no_grad():
        for parameter in policy.trainable().values():
            parameter.add_(1)
    save_policy(policy, tmp_path / "trained")
    before, after = weights_in(original), weights_in(tmp_path / "trained")
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {k for k in before if k.startswith("language_model.")}


def test_generation_settings_of_the_checkpoint_count(folders, tmp_path):
    out = save_policy(
        load_policy(str(folders("original", (2, False, 2)))), tmp_path / "a", layout="transformers"
    )
    assert guidance_scale(str(out), None) == 5.0 and guidance_scale(str(out), 2.0) == 2.0
    theirs = JanusForConditionalGeneration.from_pretrained(out).eval()
    (prompt,) = prompts_of(8)
    ids = generated_tokens(
        theirs, prompt[None], do_sample=False
    )  # by the generation_config.json that was written
    rollout = sample_images(load_policy(str(out)), [prompt], cfg_weight=5.0, greedy=True)
    assert torch.equal(rollout.ids, ids)
    (out / "generation_config.json").write_text('{"guidance_scale": "5"}')
    with pytest.raises(UserError, match=r"generation_config.json: guidance_scale"):
        guidance_scale(str(out), None)


def test_convert_command(original, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--model", str(original), "--out", str(out), "--layout", "transformers"]
    convert.main([*arguments, "--dtype", "bfloat16", "--max_shard_gb", "0.0003"])
    assert "transformers layout" in capsys.readouterr().out
    assert load_policy(str(out)).dtype == torch.bfloat16
    assert len(list(out.glob("model-*.safetensors"))) > 1
    convert.main(arguments)  # over what it wrote before
    assert load_policy(str(out)).dtype == torch.float32
    assert not list(out.glob("model-*.safetensors"))
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="notes.txt"):
        convert.main(arguments)
    with pytest.raises(UserError, match="layout"):
        convert.main([*arguments[:-1], "hf"])
