"""The ORM against LLaVA put together by hand from its parts, one picture at a time through PIL."""

import copy
import json
import weakref

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from rewards import checkpoint
from rewards.orm import ORM
from tests.rewards.orm_problem import (
    TEXT,
    VISION,
    Parts,
    conversation,
    make_tokenizer,
    original_weights,
    square_picture,
    write_original,
)
from tests.rewards.vqa_problem import make_batch, stir

TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Parts, tokenizer, the folder of its files, and a checkpoint in the original layout."""
    tokenizer_folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = make_tokenizer(tokenizer_folder)
    torch.manual_seed(0)
    # As in Qwen, the vocabulary has room beyond the tokenizer's words.
    parts = Parts(len(tokenizer) + 7).eval().requires_grad_(False)
    stir(parts, 1.6)
    folder = tmp_path_factory.mktemp("orm") / "original"
    write_original(folder, parts, tokenizer_folder)
    return parts, tokenizer, tokenizer_folder, folder


@torch.no_grad()
def plain_score(world, prompt, image, temperature=1.0):
    parts, tokenizer, *_ = world
    ids = [tokenizer(text).input_ids for text in conversation(prompt)]
    logits = parts.logits(square_picture(image).to(parts.newline.dtype), *ids).float()
    yes, no = (logits / temperature).softmax(-1)[tokenizer.convert_tokens_to_ids(["yes", "no"])]
    return float(yes / (yes + no))


@pytest.fixture(scope="module")
def batch():
    return make_batch(64, 24, 34)


@pytest.fixture(scope="module")
def plain(world, batch):
    prompts, images, _ = batch
    return torch.tensor([plain_score(world, p, i) for p, i in zip(prompts, images, strict=True)])


def test_original_layout_equals_the_parts(world, batch, plain):
    expert = ORM(world[3], vision_config=VISION)
    scores = expert.score(*batch)
    assert scores.shape == (64,) and scores.dtype == torch.float32
    assert plain.std() > 0.1
    assert (scores - plain).abs().max() < TOLERANCE


def test_scores_depend_on_picture_and_prompt(plain, world, batch):
    prompts, images, rows = batch
    expert = ORM(world[3], vision_config=VISION)
    scores = expert.score(prompts, images, rows)
    assert (expert.score(prompts, images.flip(0), rows) - scores).abs().mean() > 0.01
    assert (expert.score(prompts[::-1], images, rows) - scores).abs().mean() > 0.01


def test_pictures_of_the_towers_size_leave_only_rounding(world):
    prompts, images, rows = make_batch(4, 30, 30)
    scores = ORM(world[3], vision_config=VISION).score(prompts, images, rows)
    wanted = [plain_score(world, p, i) for p, i in zip(prompts, images, strict=True)]
    torch.testing.assert_close(scores, torch.tensor(wanted), rtol=0, atol=2e-5)


def test_batches_and_preparation_change_nothing(world, batch):
    prompts, images, rows = (part[:9] for part in batch)
    expert = ORM(world[3], vision_config=VISION)
    whole = expert.score(prompts, images, rows)
    apart = ORM(world[3], vision_config=VISION, batch_size=4)
    apart.prepare(prompts, rows)
    misses = apart._encode.cache_info().misses
    torch.testing.assert_close(apart.score(prompts, images, rows), whole, rtol=0, atol=1e-5)
    assert apart._encode.cache_info().misses == misses + 1  # the part before the picture
    assert expert.score([], images[:0], []).shape == (0,)


def test_temperature(world, batch):
    prompts, images, rows = (part[:4] for part in batch)
    scores = ORM(world[3], vision_config=VISION, temperature=0.3).score(prompts, images, rows)
    wanted = [plain_score(world, p, i, 0.3) for p, i in zip(prompts, images, strict=True)]
    assert (scores - torch.tensor(wanted)).abs().max() < 4 * TOLERANCE  # 1 / 0.3 as steep
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature"):
            ORM(world[3], vision_config=VISION, temperature=wrong)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_no_more_than_the_parts(world, batch, plain, dtype):
    parts, tokenizer, *_ = world
    expert = ORM(world[3], vision_config=VISION, dtype=dtype)
    assert {p.dtype for p in expert._model.parameters()} == {dtype}
    # Angles from rounded frequencies would be wrong far into a long prompt.
    assert expert._model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    half = copy.deepcopy(parts).to(dtype)
    half.qwen.model.rotary_emb = parts.qwen.model.rotary_emb
    (prompts, images, rows), exact = (part[:32] for part in batch), plain[:32]
    rounded = [
        plain_score((half, tokenizer), prompt, image)
        for prompt, image in zip(prompts, images, strict=True)
    ]
    theirs = (torch.tensor(rounded) - exact).abs()
    ours = (expert.score(prompts, images, rows) - exact).abs()
    assert ours.max() < 2 * theirs.max() + TOLERANCE
    assert ours.mean() < 1.5 * theirs.mean() + TOLERANCE


def test_tied_head_and_pickled_shards(world, tmp_path, batch):
    _, tokenizer, tokenizer_folder, _ = world
    torch.manual_seed(1)
    parts = Parts(len(tokenizer) + 7, tied=True).eval().requires_grad_(False)
    stir(parts, 1.6)
    folder = write_original(tmp_path / "tied", parts, tokenizer_folder, pickled=True, shards=2)
    prompts, images, rows = (part[:4] for part in batch)
    scores = ORM(folder, vision_config=VISION).score(prompts, images, rows)
    tied = (parts, tokenizer)
    wanted = [plain_score(tied, p, i) for p, i in zip(prompts, images, strict=True)]
    assert (scores - torch.tensor(wanted)).abs().max() < TOLERANCE


def transformers_model(vocabulary):
    text = {k: v for k, v in TEXT.items() if k != "rope_theta"}
    rope = {"rope_type": "default", "rope_theta": TEXT["rope_theta"]}
    config = LlavaOnevisionConfig(
        text_config={
            "model_type": "qwen2",
            "vocab_size": vocabulary,
            "rope_parameters": rope,
            "tie_word_embeddings": False,
            **text,
        },
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **VISION},
        image_token_index=vocabulary - 1,
        video_token_index=vocabulary - 2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(2)
    model = LlavaOnevisionForConditionalGeneration(config).eval().requires_grad_(False)
    stir(model, 1.6)
    return model


OLD_NAMES = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.image_newline": "image_newline",
}


@pytest.mark.parametrize("layout", ["saved", "before version 5"])
def test_transformers_layout_equals_the_library(world, tmp_path, batch, layout):
    _, tokenizer, tokenizer_folder, _ = world
    model = transformers_model(len(tokenizer) + 7)
    model.save_pretrained(tmp_path)
    for file in tokenizer_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    size = {"height": 30, "width": 30}
    SiglipImageProcessorPil(size=size).save_pretrained(tmp_path)
    if layout != "saved":
        old = {}
        for key, tensor in model.state_dict().items():
            new = next(prefix for prefix in OLD_NAMES if key.startswith(prefix))
            old[OLD_NAMES[new] + key[len(new) :]] = tensor.clone()
        save_file(old, tmp_path / "model.safetensors")
    prompts, images, rows = (part[:6] for part in batch)
    scores = ORM(tmp_path).score(prompts, images, rows)
    answers = tokenizer.convert_tokens_to_ids(["yes", "no"])
    for prompt, image, score in zip(prompts, images, scores, strict=True):
        before, after = (tokenizer(text).input_ids for text in conversation(prompt))
        ids = torch.tensor([before + [model.config.image_token_id] * 17 + after] * 2)
        # Two of the same: the library cuts a lone picture into tiles.
        logits = model(
            input_ids=ids,
            pixel_values=square_picture(image).repeat(2, 1, 1, 1),
            image_sizes=torch.tensor([[30, 30]] * 2),
            batch_num_images=torch.tensor([2]),
        ).logits[0, -1]
        yes, no = logits.softmax(-1)[answers]
        assert float(score) == pytest.approx(float(yes / (yes + no)), abs=TOLERANCE)


def test_an_earlier_feature_layer(world, tmp_path, batch):
    """A tower with its last layer still on, read one layer earlier, is the same model."""
    parts, _, tokenizer_folder, folder = world
    config = json.loads((folder / "config.json").read_text())
    text = {k: config[k] for k in (*TEXT, "vocab_size", "tie_word_embeddings")}
    tower = {**VISION, "num_hidden_layers": 3, "model_type": "siglip_vision_model"}
    config = {
        "model_type": "llava_onevision",
        "text_config": {"model_type": "qwen2", **text},
        "vision_config": {"vision_use_head": False, **tower},
        "vision_feature_layer": -2,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    for file in tokenizer_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    SiglipImageProcessorPil(size={"height": 30, "width": 30}).save_pretrained(tmp_path)
    old = {
        "model.vision_tower.vision_tower.": "model.vision_tower.",
        "model.mm_projector.0": "model.multi_modal_projector.linear_1",
        "model.mm_projector.2": "model.multi_modal_projector.linear_2",
        "model.embed_tokens": "model.language_model.embed_tokens",
        "model.layers": "model.language_model.layers",
        "model.norm": "model.language_model.norm",
    }
    weights = {}
    for key, tensor in original_weights(parts).items():
        found = next((prefix for prefix in old if key.startswith(prefix)), None)
        weights[old[found] + key[len(found) :] if found else key] = tensor
    for name, tensor in parts.siglip.encoder.layers[-1].state_dict().items():
        weights[f"model.vision_tower.vision_model.encoder.layers.2.{name}"] = tensor
    save_file(weights, tmp_path / "model.safetensors")
    prompts, images, rows = (part[:4] for part in batch)
    expert = ORM(tmp_path)
    assert len(expert._model.model.vision_tower.encoder.layers) == 2
    wanted = ORM(folder, vision_config=VISION).score(prompts, images, rows)
    torch.testing.assert_close(expert.score(prompts, images, rows), wanted, rtol=0, atol=1e-5)


def test_weights_are_streamed(world, monkeypatch):
    alive, most = set(), 0

    def watched(file, read=checkpoint.read_tensors):
        nonlocal most
        for key, tensor in read(file):
            alive.add(key)
            weakref.finalize(tensor, alive.discard, key)
            most = max(most, len(alive))
            yield key, tensor
            del tensor

    monkeypatch.setattr(checkpoint, "read_tensors", watched)
    ORM(world[3], vision_config=VISION)
    assert 0 < most <= 2


def test_loading_leaves_the_random_state(world):
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    ORM(world[3], vision_config=VISION)
    assert torch.equal(torch.rand(3), wanted)


def broken(world, tmp_path, change, **options):
    """A copy of the checkpoint after change(folder, weights of its only shard)."""
    parts, _, tokenizer_folder, _ = world
    folder = write_original(tmp_path / "broken", parts, tokenizer_folder, shards=1)
    shard = folder / "model-00001-of-00001.safetensors"
    change(folder, shard, original_weights(parts))
    return ORM(folder, **{"vision_config": VISION, **options})


NEWLINE = "model.image_newline"
NO_FILE = "00001.safetensors: no such file"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d, f, w: save_file({k: w[k] for k in w if k != NEWLINE}, f), f"{NEWLINE}.*missing"),
        (lambda d, f, w: save_file(w | {NEWLINE: torch.zeros(3)}, f), f"{NEWLINE}.*\\(3,\\)"),
        (lambda d, f, w: save_file(w | {"model.odd": torch.zeros(3)}, f), "unexpected.*model.odd"),
        (lambda d, f, w: save_file(w | {NEWLINE: w[NEWLINE].int()}, f), f"{NEWLINE}.*int32"),
        (lambda d, f, w: f.write_bytes(f.read_bytes()[:-100]), "00001.safetensors: not a safe"),
        (lambda d, f, w: f.write_bytes(b""), "00001.safetensors: not a safe"),
        (lambda d, f, w: f.unlink(), NO_FILE),
        (lambda d, f, w: (d / "model.safetensors.index.json").write_text("{}"), "weight_map"),
        (lambda d, f, w: (d / "model.safetensors.index.json").unlink(), "model.safetensors: no"),
        (lambda d, f, w: (d / "config.json").write_text("["), "config.json: not JSON"),
        (lambda d, f, w: (d / "config.json").write_text("{}"), "config.json: model_type is None"),
        (lambda d, f, w: (d / "vocab.json").write_text("{"), "no usable tokenizer"),
    ],
)
def test_unusable_files_are_named(world, tmp_path, change, said):
    with pytest.raises(ValueError, match=said) as caught:
        broken(world, tmp_path, change)
    assert "\n" not in str(caught.value)


def test_another_tower_needs_its_config(world, tmp_path):
    def rename(folder, shard, weights):
        config = json.loads((folder / "config.json").read_text())
        config["mm_vision_tower"] = "openai/clip-vit-large-patch14-336"
        (folder / "config.json").write_text(json.dumps(config))

    with pytest.raises(ValueError, match="config.json: mm_vision_tower is 'openai"):
        broken(world, tmp_path, rename, vision_config=None)


def test_a_tied_head_that_differs_is_refused(world, tmp_path):
    def tie(folder, shard, weights):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))

    with pytest.raises(ValueError, match="lm_head.weight.*tied"):
        broken(world, tmp_path, tie)
