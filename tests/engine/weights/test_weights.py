"""Checkpoints of both layouts: what they load to."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from bench.rollout.transformers_images import generated_tokens
from engine.policy import load_policy, save_policy
from engine.rollout import sample_images
from tests.engine.weights.conftest import (
    LAYOUTS,
    MODELS,
    equal_states,
    prompts_of,
    their_model,
)
from tests.engine.weights.original_layout import (
    WIDTH,
    original_tensors,
    small_model,
    write_original,
    write_weights,
)

# Parity with transformers


def their_logits(theirs, prompt, image_ids):
    text = theirs.get_input_embeddings()(prompt)
    image = theirs.prepare_embeddings_for_image_generation(image_ids[:-1])
    hidden = theirs.model.language_model(inputs_embeds=torch.cat((text, image))[None])
    return theirs.model.generation_head(hidden.last_hidden_state[0, len(prompt) - 1 :])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_log_probs_tokens_and_pixels_equal_transformers(folders, layout, model):
    theirs, ours = their_model(*model), load_policy(str(folders(layout, model)))
    assert (ours.bos, ours.pad, ours.image_start, ours.image_tokens) == (0, 2, 4, 16)
    prompts = prompts_of(9, 14, 6)
    image_ids = torch.randint(96, (3, 16), generator=torch.Generator().manual_seed(1))
    completion = prompts_of(12)[0][1:-1]

    at = completion[:, None]
    logits = theirs(input_ids=torch.cat((prompts[0], completion))[None]).logits[0]
    text = logits[len(prompts[0]) - 1 : -1].log_softmax(-1).gather(1, at)[:, 0]
    assert text.std() > 0.5  # a uniform model would prove nothing
    got = ours.text_logprobs(prompts[0], completion)
    torch.testing.assert_close(got, text, rtol=0, atol=1e-4)
    for prompt, ids in zip(prompts, image_ids, strict=True):
        blank = torch.tensor([0] + [2] * (len(prompt) - 2) + [4])
        cond, uncond = their_logits(theirs, prompt, ids), their_logits(theirs, blank, ids)
        for weight, wanted in ((None, cond), (5.0, uncond + 5.0 * (cond - uncond))):
            wanted = wanted.log_softmax(-1).gather(1, ids[:, None])[:, 0]
            got = ours.image_logprobs(prompt, ids, cfg_weight=weight)
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)

    theirs.generation_config = GenerationConfig(
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        guidance_scale=3.0,
        generation_kwargs={"boi_token_id": 4},
    )
    alone = [generated_tokens(theirs, p[None], do_sample=False) for p in prompts]
    together = sample_images(ours, prompts, cfg_weight=3.0, greedy=True)
    assert torch.equal(together.ids, torch.cat(alone))
    assert len(set(map(tuple, together.ids.tolist()))) == 3

    pixels = theirs.decode_image_tokens(together.ids).permute(0, 3, 1, 2).clamp(-1, 1) / 2 + 0.5
    torch.testing.assert_close(ours.decode_images(together.ids), pixels, rtol=0, atol=1e-5)
    assert pixels.std() > 0.01


def test_both_layouts_load_to_the_same_policy(folders):
    for model in MODELS:
        one, other = (load_policy(str(folders(layout, model))) for layout in LAYOUTS)
        assert equal_states(one, other)
        text, vision = one.config.text_config, one.config.vision_config
        same = other.config.text_config
        assert text.rope_parameters == same.rope_parameters
        assert text.rms_norm_eps == same.rms_norm_eps
        assert one.config.tie_word_embeddings == other.config.tie_word_embeddings == model[1]
        for section in ("vision_config", "vq_config"):
            a, b = (getattr(p.config, section).to_dict() for p in (one, other))
            assert a == b
        assert vision.num_attention_heads == 1


# Forms of the weights


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("form", ["safetensors", "bin", "old_bin"])
def test_every_form_of_the_weight_files_loads(original, tmp_path, form, shards):
    folder = tmp_path / "checkpoint"
    write_original(folder, their_model(2, False, 2), form=form, shards=shards)
    assert equal_states(load_policy(str(folder)), load_policy(str(original)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_are_kept_unless_asked_and_cast_on_the_way(original, tmp_path, dtype):
    save_policy(load_policy(str(original), dtype=dtype), tmp_path / "cast")
    kept = load_policy(str(tmp_path / "cast"))
    full = load_policy(str(original)).state_dict()
    assert kept.dtype == dtype
    assert all(torch.equal(t, full[k].to(dtype)) for k, t in kept.state_dict().items())
    assert not any(t.is_meta for t in kept.state_dict().values())
    name = str(dtype).removeprefix("torch.")
    config = json.loads((tmp_path / "cast" / "config.json").read_text())
    assert config["torch_dtype"] == config["language_config"]["torch_dtype"] == name
    again = load_policy(str(tmp_path / "cast"), dtype=torch.float32)
    assert again.dtype == torch.float32


def test_what_is_there_decides_whether_embeddings_are_tied(folders, tmp_path):
    """Transformers' default config says tied; the published weights are not."""
    policy = load_policy(str(folders("transformers", (2, False, 2))))
    save_policy(policy, tmp_path / "a")
    file = tmp_path / "a" / "config.json"
    values = json.loads(file.read_text())
    del values["tie_word_embeddings"]
    file.write_text(json.dumps(values))
    again = load_policy(str(tmp_path / "a"))
    assert equal_states(policy, again) and not again.config.tie_word_embeddings
    assert again.lm_head.weight is not again.model.language_model.embed_tokens.weight
    tied = load_policy(str(folders("original", (1, True, 3))))  # whose file has both, and equal
    assert tied.lm_head.weight is tied.model.language_model.embed_tokens.weight


PEAKS = """
import gc, sys, torch
from engine.policy import load_policy

def memory(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

load_policy("tiny")
for folder in sys.argv[1:]:
    for dtype in (torch.float32, torch.bfloat16):
        gc.collect()
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak starts anew
        before = memory("VmRSS:")
        policy = load_policy(folder, dtype=dtype)
        print(memory("VmHWM:") - before)
        del policy
"""


def test_loading_needs_one_model_and_one_file(tmp_path):
    """Peak memory of a fresh process, in the stored dtype and cast to half its size."""
    rows = 250_000  # embeddings and head of 48 MB each in fp32
    theirs = small_model(layers=1)
    tensors = original_tensors(theirs)
    for name in ("model.embed_tokens", "lm_head"):
        tensors[f"language_model.{name}.weight"] = torch.randn(rows, WIDTH)
    folders = [tmp_path / form for form in ("safetensors", "bin")]
    for folder in folders:
        write_original(folder, theirs)
        file = folder / "config.json"
        values = json.loads(file.read_text())
        values["language_config"]["vocab_size"] = rows
        file.write_text(json.dumps(values))
        (folder / "model.safetensors").unlink()
        write_weights(folder, tensors, form=folder.name, shards=3)
    run = subprocess.run(
        [sys.executable, "-c", PEAKS, *map(str, folders)],
        capture_output=True, text=True, check=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
    )  # fmt: skip
    held = sum(t.numel() for k, t in tensors.items() if not k.startswith(("vision", "aligner")))
    used = list(map(float, run.stdout.split()))
    for folder, peaks in zip(folders, (used[:2], used[2:]), strict=True):
        largest = max(f.stat().st_size for f in folder.iterdir())
        for size, peak in zip((4, 2), peaks, strict=True):
            assert 0.9 * held * size < peak < held * size + largest + 8e6, (folder, size, used)
