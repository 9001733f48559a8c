"""The policy against transformers' Janus, and its checkpoint folders."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, JanusForConditionalGeneration

import engine.model.policy
from engine.model.policy import Policy
from engine.model.sequences import Sequences
from engine.policy import load_policy
from engine.rollout import sample_images, sample_text
from engine.settings.errors import UserError
from engine.tiny.tokenizer import train_tokenizer
from engine.weights.read import write_policy

SHAPES = [(4, False), (2, False), (4, True)]  # (key/value heads, tied): MHA, GQA, tied


# Parity with transformers


@pytest.mark.parametrize(("kv_heads", "tied"), SHAPES)
@torch.no_grad()
def test_text_logprobs_equal_transformers(pair, make_prompts, kv_heads, tied):
    theirs, ours = pair(kv_heads, tied)
    prompt, completion = make_prompts(9, 12)
    logits = theirs(input_ids=torch.cat((prompt, completion))[None]).logits[0]
    expected = logits[len(prompt) - 1 : -1].log_softmax(-1).gather(1, completion[:, None])[:, 0]
    assert expected.std() > 0.5  # a uniform model would prove nothing
    got = ours.text_logprobs(prompt, completion)
    assert got.dtype == torch.float32 and got.shape == completion.shape
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def their_image_logits(theirs, prompt, image_ids):
    text = theirs.get_input_embeddings()(prompt)
    image = theirs.prepare_embeddings_for_image_generation(image_ids[:-1])
    hidden = theirs.model.language_model(inputs_embeds=torch.cat((text, image))[None])
    return theirs.model.generation_head(hidden.last_hidden_state[0, len(prompt) - 1 :])


@pytest.mark.parametrize(("kv_heads", "tied"), SHAPES)
@torch.no_grad()
def test_image_logprobs_equal_transformers(pair, make_prompts, kv_heads, tied):
    theirs, ours = pair(kv_heads, tied)
    (prompt,), image_ids = make_prompts(11), torch.randint(128, (16,))
    blank = torch.tensor([ours.bos] + [ours.pad] * 9 + [ours.image_start])
    cond = their_image_logits(theirs, prompt, image_ids)
    uncond = their_image_logits(theirs, blank, image_ids)
    assert cond.log_softmax(-1).std() > 0.5
    at = image_ids[:, None]
    torch.testing.assert_close(
        ours.image_logprobs(prompt, image_ids),
        cond.log_softmax(-1).gather(1, at)[:, 0],
        rtol=0,
        atol=1e-4,
    )
    torch.testing.assert_close(
        ours.image_logprobs(prompt, image_ids, cfg_weight=5.0),
        (uncond + 5.0 * (cond - uncond)).log_softmax(-1).gather(1, at)[:, 0],
        rtol=0,
        atol=1e-4,
    )


@torch.no_grad()
def test_decoded_pixels_equal_transformers(pair):
    theirs, ours = pair()
    ids = torch.randint(128, (3, 16))
    pixels = ours.decode_images(ids)
    expected = theirs.decode_image_tokens(ids).permute(0, 3, 1, 2).clamp(-1, 1) / 2 + 0.5
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-5)
    assert pixels.shape == (3, 3, 8, 8) and pixels.min() >= 0 and pixels.max() <= 1
    assert pixels.std() > 0.01


def test_pictures_are_decoded_a_few_at_a_time(pair, monkeypatch):
    _, ours = pair()
    ids = torch.randint(128, (5, 16))
    whole = ours.decode_images(ids)
    decode, seen = ours.model.vqmodel.decode, []
    monkeypatch.setattr(ours.model.vqmodel, "decode", lambda x: (seen.append(len(x)), decode(x))[1])
    monkeypatch.setattr(engine.model.policy, "DECODED_PIXELS", 2 * 8 * 8)
    # Convolutions of other batch sizes round otherwise: 1.7e-6 on AVX2 with torch 2.11.
    torch.testing.assert_close(ours.decode_images(ids), whole, rtol=0, atol=1e-5)
    assert seen == [2, 2, 1]


def test_rows_of_a_padded_batch_mean_what_they_mean_alone(pair, make_prompts):
    _, ours = pair()
    prompts = make_prompts(5, 14, 9)
    completions = torch.randint(5, 300, (3, 7))
    together = ours.completion_hidden(Sequences("semantic", prompts, completions))
    for i, prompt in enumerate(prompts):
        alone = ours.completion_hidden(Sequences("semantic", [prompt], completions[i : i + 1, :4]))
        torch.testing.assert_close(together[i, :4], alone[0], rtol=0, atol=1e-5)


def test_only_the_language_model_trains(pair):
    _, ours = pair()
    names = ours.trainable()
    assert "lm_head.weight" in names and "model.language_model.embed_tokens.weight" in names
    assert all(n.startswith(("model.language_model.", "lm_head.")) for n in names)
    _, tied = pair(4, True)
    assert "lm_head.weight" not in tied.trainable()  # tied ones once


@pytest.mark.parametrize(("kv_heads", "tied"), SHAPES)
def test_decoding_follows_the_weights(new_policy, make_prompts, kv_heads, tied):
    """Decode reads packed views: they must survive optimizer steps, casts and loads."""
    policy = new_policy(kv_heads, tied)
    prompts = make_prompts(6, 9)

    def decode_equals_forward() -> torch.Tensor:
        images = sample_images(policy, prompts, seed=1)
        text = sample_text(policy, prompts, max_new_tokens=6, seed=1)
        for i, prompt in enumerate(prompts):
            n = int(text.mask[i].sum())
            with torch.no_grad():
                image = policy.image_logprobs(prompt, images.ids[i])
                words = policy.text_logprobs(prompt, text.ids[i, :n])
            torch.testing.assert_close(images.logprobs[i], image, rtol=0, atol=1e-4)
            torch.testing.assert_close(text.logprobs[i, :n], words, rtol=0, atol=1e-4)
        return images.logprobs

    before = decode_equals_forward()
    start = {k: v.clone() for k, v in policy.state_dict().items()}
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=0.03)
    policy.image_logprobs(prompts[0], torch.arange(16)).sum().backward()
    policy.text_logprobs(prompts[0], torch.arange(5, 12)).sum().backward()
    optimizer.step()
    assert not torch.allclose(decode_equals_forward(), before, atol=1e-2)
    policy.to(torch.bfloat16).to(torch.float32)
    decode_equals_forward()
    policy.load_state_dict(start)
    torch.testing.assert_close(decode_equals_forward(), before, rtol=0, atol=1e-5)


# Checkpoint folders


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["a red circle and a blue star"] * 3, folder)
    return folder


@pytest.fixture
def folder(pair, tokenizer_folder, tmp_path) -> Path:
    """A valid checkpoint folder to be spoilt."""
    path = tmp_path / "checkpoint"
    write_policy(pair()[1], path, companions=tokenizer_folder)
    return path


@pytest.mark.parametrize(("kv_heads", "tied"), SHAPES)
@torch.no_grad()
def test_saved_folder_opens_in_transformers_and_here(
    new_policy, make_prompts, tokenizer_folder, tmp_path, kv_heads, tied
):
    policy = new_policy(kv_heads, tied)
    policy.tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_folder))
    prompts = make_prompts(8)
    sample_images(policy, prompts)  # packs the weights: views of one storage must be saved whole
    write_policy(policy, tmp_path / "saved", companions=tokenizer_folder)
    again = load_policy(str(tmp_path / "saved"))
    state = policy.state_dict()
    assert state.keys() == again.state_dict().keys()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert not again.training and again.image_start == 4
    assert again.trainable().keys() == policy.trainable().keys()
    assert again.tokenizer.decode(again.tokenizer("a red star").input_ids) == "a red star"

    theirs = JanusForConditionalGeneration.from_pretrained(str(tmp_path / "saved")).eval()
    image_ids = torch.arange(16)
    expected = their_image_logits(theirs, prompts[0], image_ids).log_softmax(-1)
    got = again.image_logprobs(prompts[0], image_ids)
    torch.testing.assert_close(got, expected.diagonal(), rtol=0, atol=1e-4)
    logits = theirs(input_ids=prompts[0][None]).logits[0, :-1].log_softmax(-1)
    got = again.text_logprobs(prompts[0][:1], prompts[0][1:])
    torch.testing.assert_close(got, logits.gather(1, prompts[0][1:, None])[:, 0], rtol=0, atol=1e-4)


def test_dtype_is_the_checkpoints_unless_asked(folder):
    file = folder / "model.safetensors"
    save_file({k: v.bfloat16() for k, v in load_file(file).items()}, file, {"format": "pt"})
    assert load_policy(str(folder)).dtype == torch.bfloat16
    assert load_policy(str(folder), dtype=torch.float32).dtype == torch.float32


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_policy(str(folder))
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    return message


def test_missing_folder_and_files_are_named(folder, tmp_path):
    assert "no such checkpoint folder" in refused(tmp_path / "nowhere")
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        (folder / name).rename(tmp_path / name)
        assert name in refused(folder)
        (tmp_path / name).rename(folder / name)
    assert isinstance(load_policy(str(folder)), Policy)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"model_type": "llama"}', '{"model_type": "janus", "text_config": 3}']
)
def test_bad_config_is_named(folder, text):
    (folder / "config.json").write_text(text)
    assert "config.json" in refused(folder)


def spoil(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


KEY = "model.language_model.layers.1.mlp.up_proj.weight"


def test_missing_extra_and_misshapen_keys_are_named(folder):
    spoil(folder, lambda tensors: tensors.pop(KEY))
    assert KEY in refused(folder)
    spoil(folder, lambda tensors: tensors.update({KEY: torch.zeros(3, 5)}))
    message = refused(folder)
    assert KEY in message and "(3, 5)" in message and "(96, 64)" in message
    spoil(
        folder, lambda tensors: tensors.update({KEY: torch.zeros(96, 64), "surplus": torch.ones(1)})
    )
    assert "surplus" in refused(folder)


def test_understanding_tower_in_the_file_is_ignored(folder):
    spoil(folder, lambda t: t.update({"model.vision_model.post_layernorm.bias": torch.ones(2)}))
    load_policy(str(folder))


@pytest.mark.parametrize("size", [0, 4, 1000, -50])
def test_truncated_weights_are_named(folder, size):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert "model.safetensors" in refused(folder)


def test_sharded_folder_loads_and_its_missing_shard_is_named(folder, pair):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, keys in shards.items():
        save_file({k: tensors[k] for k in keys}, folder / shard, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {k: s for s, keys in shards.items() for k in keys}}))
    loaded, state = load_policy(str(folder)).state_dict(), pair()[1].state_dict()
    assert all(torch.equal(loaded[k], state[k]) for k in state)
    (folder / "b.safetensors").unlink()
    assert "b.safetensors" in refused(folder)
    shutil.copyfile(folder / "config.json", folder / "b.safetensors")
    assert "b.safetensors" in refused(folder)
    index.write_text("[]")
    assert "index.json" in refused(folder)
