"""GIT against the library's model, one picture and one question at a time through PIL."""

import copy
import json
import os

import pytest
import torch
from safetensors.torch import save_file
from transformers import GitConfig, GitForCausalLM, GitVisionConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from rewards.checkpoint import load_weights, read_image_settings, read_tensors
from rewards.git import GitVQA
from rewards.preprocess import Transform
from rewards.yes_no import questions_of
from tests.rewards.vqa_problem import bert_tokenizer, make_batch, pil_picture, stir

SIZE = 32
TOLERANCE = 1e-3


def official_weights(model):
    """The keys of microsoft/git-large-vqav2's pytorch_model.bin."""
    git = model.git
    vision = git.image_encoder.vision_model
    tower, text = "git.image_encoder.vision_model", "git.embeddings"
    projection = git.visual_projection.visual_projection
    table = {
        f"{text}.word_embeddings": git.embeddings.word_embeddings,
        f"{text}.position_embeddings": git.embeddings.position_embeddings,
        f"{text}.LayerNorm": git.embeddings.LayerNorm,
        f"{tower}.embeddings.patch_embedding": vision.embeddings.patch_embedding,
        f"{tower}.embeddings.position_embedding": vision.embeddings.position_embedding,
        f"{tower}.pre_layrnorm": vision.pre_layrnorm,
        f"{tower}.post_layernorm": vision.post_layernorm,
        "git.visual_projection.visual_projection.0": projection[0],
        "git.visual_projection.visual_projection.1": projection[1],
        "output": model.output,
    }
    for i, layer in enumerate(vision.encoder.layers):
        at = f"{tower}.encoder.layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            table[f"{at}.self_attn.{part}"] = getattr(layer.self_attn, part)
        table |= {f"{at}.layer_norm1": layer.layer_norm1, f"{at}.layer_norm2": layer.layer_norm2}
        table |= {f"{at}.mlp.fc1": layer.mlp.fc1, f"{at}.mlp.fc2": layer.mlp.fc2}
    for i, layer in enumerate(git.encoder.layer):
        at = f"git.encoder.layer.{i}"
        for part in ("query", "key", "value"):
            table[f"{at}.attention.self.{part}"] = getattr(layer.attention.self, part)
        table[f"{at}.attention.output.dense"] = layer.attention.output.dense
        table[f"{at}.attention.output.LayerNorm"] = layer.attention.output.LayerNorm
        table[f"{at}.intermediate.dense"] = layer.intermediate.dense
        table[f"{at}.output.dense"] = layer.output.dense
        table[f"{at}.output.LayerNorm"] = layer.output.LayerNorm
    weights = {
        f"{key}.{name}": tensor.clone()
        for key, module in table.items()
        for name, tensor in module.state_dict().items()
    }
    weights[f"{tower}.embeddings.class_embedding"] = vision.embeddings.class_embedding.detach()
    # Older versions of transformers saved these tables too.
    weights[f"{text}.position_ids"] = torch.arange(64)[None]
    weights[f"{tower}.embeddings.position_ids"] = torch.arange(17)[None]
    return weights


def write_official(folder, model, vocabulary):
    folder.mkdir()
    (folder / "vocab.txt").write_text(vocabulary)
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    ).save_pretrained(folder)
    model.config.save_pretrained(folder)
    torch.save(official_weights(model), folder / "pytorch_model.bin")
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The library's model and tokenizer, and a checkpoint in the published layout."""
    folder = tmp_path_factory.mktemp("git")
    tokenizer = bert_tokenizer(folder)
    vision = GitVisionConfig(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=8,
    )
    config = GitConfig(
        vision_config=vision.to_dict(),
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = GitForCausalLM(config).eval().requires_grad_(False)
    stir(model, 1.8)
    vocabulary = (folder / "vocab.txt").read_text()
    return model, tokenizer, write_official(folder / "official", model, vocabulary)


@torch.no_grad()
def plain_score(model, tokenizer, prompt, image, row):
    """T2I-R1's way: the whole model again for every question of every picture."""
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    )
    pixels = processor(images=pil_picture(image), return_tensors="pt").pixel_values
    yes, no = tokenizer.encode("yes")[1], tokenizer.encode("no")[1]
    answers = []
    for name in row.get("attr_nouns") or row.get("nouns") or [prompt]:
        ids = tokenizer(f"{name}?", add_special_tokens=False).input_ids
        ids = torch.tensor([[tokenizer.cls_token_id, *ids]])
        logits = model(pixel_values=pixels.to(model.dtype), input_ids=ids).logits[0, -1]
        probabilities = logits.float().softmax(-1)
        answers.append(probabilities[yes] / (probabilities[yes] + probabilities[no]))
    return float(sum(answers) / len(answers))


def plain_scores(model, tokenizer, batch):
    return torch.tensor([plain_score(model, tokenizer, *x) for x in zip(*batch, strict=True)])


@pytest.fixture(scope="module")
def batch():
    return make_batch(64, 40, 57)


@pytest.fixture(scope="module")
def plain(world, batch):
    return plain_scores(*world[:2], batch)


def test_official_layout_equals_the_library(world, batch, plain):
    scores = GitVQA(world[2]).score(*batch)
    assert scores.shape == (64,) and scores.dtype == torch.float32
    assert plain.std() > 0.05
    assert (scores - plain).abs().max() < TOLERANCE


def test_pictures_of_the_models_size_leave_only_rounding(world):
    batch = make_batch(8, SIZE, SIZE)
    wanted = plain_scores(*world[:2], batch)
    torch.testing.assert_close(GitVQA(world[2]).score(*batch), wanted, rtol=0, atol=1e-5)


def test_safetensors_folder_scores_the_same(world, batch, tmp_path):
    model, _, official = world
    for file in official.iterdir():
        if file.name != "pytorch_model.bin":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    model.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read beside safetensors")
    part = [p[:5] for p in batch]
    wanted = GitVQA(official).score(*part)
    assert torch.equal(GitVQA(tmp_path).score(*part), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_no_more_than_the_library(world, batch, plain, dtype):
    model, tokenizer, folder = world
    part, exact = [p[:32] for p in batch], plain[:32]
    expert = GitVQA(folder, dtype=dtype)
    assert {p.dtype for p in expert._model.parameters()} == {dtype}
    theirs = (plain_scores(copy.deepcopy(model).to(dtype), tokenizer, part) - exact).abs()
    ours = (expert.score(*part) - exact).abs()
    assert ours.max() < 2 * theirs.max() + TOLERANCE
    assert ours.mean() < 1.5 * theirs.mean() + TOLERANCE


def test_batches_change_nothing_and_a_picture_is_read_once(world, batch):
    part = [p[:11] for p in batch]
    whole, apart = GitVQA(world[2]), GitVQA(world[2], batch_size=4)
    read = []
    apart._model.git.image_encoder.register_forward_hook(
        lambda module, args, output: read.append(len(args[0]))
    )
    torch.testing.assert_close(apart.score(*part), whole.score(*part), rtol=0, atol=1e-5)
    assert read == [4, 4, 3]
    assert whole.score([], batch[1][:0], []).shape == (0,)


def test_preparing_leaves_nothing_to_tokenise(world, batch):
    prompts, images, rows = (part[:11] for part in batch)
    expert = GitVQA(world[2])
    expert.prepare(prompts, rows)
    misses = expert._encode.cache_info().misses
    assert misses > 0
    expert.score(prompts, images, rows)
    assert expert._encode.cache_info().misses == misses


@pytest.mark.parametrize(
    ("row", "questions"),
    [
        ({"attr_nouns": ["red cat", "wooden dog"], "nouns": ["cat"]}, ["red cat?", "wooden dog?"]),
        ({"attr_nouns": None, "nouns": ["cat", "cat"]}, ["cat?", "cat?"]),
        ({"attr_nouns": [], "nouns": ["猫"]}, ["猫?"]),
        ({"nouns": []}, ["a cat, sitting.?"]),
        ({}, ["a cat, sitting.?"]),
    ],
)
def test_questions(row, questions):
    assert questions_of("a cat, sitting.", row) == questions


def test_unusable_questions_and_arguments_are_named(world, batch):
    expert = GitVQA(world[2])
    with pytest.raises(ValueError, match="question 'cat cat.*has 72 tokens, git takes 64"):
        expert.score(["p"], batch[1][:1], [{"nouns": ["cat " * 70]}])
    with pytest.raises(ValueError, match="batch_size"):
        GitVQA(world[2], batch_size=0)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("was-run",)


def drop(folder, weights):
    del weights["output.bias"]
    torch.save(weights, folder / "pytorch_model.bin")


def change_config(**values):
    def change(folder, weights):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return change


def change_settings(**values):
    def change(folder, weights):
        file = folder / "preprocessor_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def write(name, content):
    return lambda folder, weights: (folder / name).write_bytes(content)


def save(**more):
    return lambda folder, weights: torch.save(
        weights | {k.replace("__", "."): v for k, v in more.items()}, folder / "pytorch_model.bin"
    )


def truncate(folder, weights):
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-500])


def escape(folder, weights):
    """An index that points out of the folder, at a file that exists."""
    (folder / "pytorch_model.bin").rename(folder.parent / "elsewhere.bin")
    content = {"weight_map": {"output.bias": "../elsewhere.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop, "pytorch_model.bin: key 'output.bias' is missing"),
        (save(output__bias=torch.zeros(3)), r"bin: 'output.bias' is \(3,\), wanted \(\d+,\)"),
        (save(output__scale=torch.zeros(3)), "bin: unexpected key 'output.scale'"),
        (save(output__bias="a string"), "bin: 'output.bias' is a str"),
        (save(output__bias=Malicious()), "bin: not a weights file .*GLOBAL posix.mkdir"),
        (truncate, "bin: not a weights file"),
        (escape, "official/elsewhere.bin: no such file"),
        (write("pytorch_model.bin", b"PK\3\4 not a zip"), "bin: not a weights file"),
        (write("pytorch_model.bin", b""), "bin: not a weights file"),
        (write("vocab.txt", b"[PAD]\n[UNK]\n[CLS]\nyes\n"), "no token 'no'"),
        (write("config.json", b'{"model_type": "bert"}'), "config.json: model_type is 'bert'"),
        (change_config(num_image_with_embedding=6), "config.json: a GIT for video"),
        (change_config(hidden_size="wide"), "config.json: .*hidden_size"),
        (change_config(num_attention_heads=5), "config.json: no model can be built"),
        (write("preprocessor_config.json", b"{}"), "image_mean: wanted three numbers, got None"),
        (change_settings(do_normalize=False), "settings: do_normalize"),
        (change_settings(rescale_factor=1.0), "settings: rescale_factor"),
        (change_settings(crop_size=16), r"settings give \(16, 16\) pixels, config.json wants 32"),
        (change_settings(crop_size=64), "settings: crop_size"),
        (change_settings(size=None), "settings: size: wanted a number"),
        (change_settings(resample=0), "settings: resample"),
    ],
)
def test_unusable_files_are_named(world, tmp_path, monkeypatch, change, said):
    model, _, official = world
    folder = write_official(tmp_path / "official", model, (official / "vocab.txt").read_text())
    monkeypatch.chdir(tmp_path)
    change(folder, official_weights(model))
    with pytest.raises(ValueError, match=said) as caught:
        GitVQA(folder)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "was-run").exists()


def test_absent_folders_and_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such checkpoint folder"):
        GitVQA(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"config.json: no such file"):
        GitVQA(tmp_path)


def test_old_pickles_load(world, tmp_path):
    """Files from before torch's zip format, which cannot be mapped."""
    file = tmp_path / "old.bin"
    torch.save({"a": torch.ones(2)}, file, _use_new_zipfile_serialization=False)
    assert torch.equal(dict(read_tensors(file))["a"], torch.ones(2))


def test_a_key_of_two_shards_is_refused(tmp_path):
    files = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    for file in files:
        save_file({"weight": torch.ones(2, 2), "bias": torch.ones(2)}, file)
    with pytest.raises(ValueError, match="2.safetensors: key 'bias' is given twice"):
        load_weights(torch.nn.Linear(2, 2), files)


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"shortest_edge": 24}, "crop_size": {"height": 20, "width": 21}},
        {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}, "resample": 2},
        {"size": {"height": 30, "width": 26}, "do_center_crop": False},
        {"size": 22, "crop_size": 21},
    ],
)
@pytest.mark.parametrize("shape", [(40, 57), (57, 40), (33, 33), (12, 17)])
def test_transform_is_the_librarys(settings, shape, tmp_path):
    """Within one step of 8 bits, at ties."""
    processor = CLIPImageProcessorPil(**settings)
    processor.save_pretrained(tmp_path)
    _, images, _ = make_batch(3, *shape)
    ours = Transform(read_image_settings(tmp_path))(images)
    for picture, image in zip(ours, images, strict=True):
        theirs = processor(pil_picture(image), return_tensors="pt").pixel_values[0]
        steps = (picture - theirs).abs() * torch.tensor(processor.image_std).view(3, 1, 1) * 255
        assert steps.max() < 1.01 and (steps > 0.01).float().mean() < 0.02
