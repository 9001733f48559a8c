"""BLIP-VQA against the library's generate, one picture and one question at a time through PIL."""

import copy
import json

import pytest
import torch
from transformers import BlipConfig, BlipForQuestionAnswering, BlipProcessor
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from rewards.blip import BlipVQA
from tests.rewards.vqa_problem import bert_tokenizer, make_batch, pil_picture, stir

SIZE = 32
TOLERANCE = 1e-3


def text_table(prefix, model):
    """A BLIP text model's modules under the names of Salesforce/blip-vqa-base."""
    embeddings = model.embeddings
    table = {
        f"{prefix}.embeddings.word_embeddings": embeddings.word_embeddings,
        f"{prefix}.embeddings.position_embeddings": embeddings.position_embeddings,
        f"{prefix}.embeddings.LayerNorm": embeddings.LayerNorm,
    }
    for i, layer in enumerate(model.encoder.layer):
        at = f"{prefix}.encoder.layer.{i}"
        for kind in ("attention", "crossattention"):
            attention = getattr(layer, kind)
            for part in ("query", "key", "value"):
                table[f"{at}.{kind}.self.{part}"] = getattr(attention.self, part)
            table[f"{at}.{kind}.output.dense"] = attention.output.dense
            table[f"{at}.{kind}.output.LayerNorm"] = attention.output.LayerNorm
        table[f"{at}.intermediate.dense"] = layer.intermediate.dense
        table[f"{at}.output.dense"] = layer.output.dense
        table[f"{at}.output.LayerNorm"] = layer.output.LayerNorm
    return table


def official_weights(model):
    vision, head = model.vision_model, model.text_decoder.cls.predictions
    table = {
        "vision_model.embeddings.patch_embedding": vision.embeddings.patch_embedding,
        "vision_model.post_layernorm": vision.post_layernorm,
        "text_decoder.cls.predictions.transform.dense": head.transform.dense,
        "text_decoder.cls.predictions.transform.LayerNorm": head.transform.LayerNorm,
        "text_decoder.cls.predictions.decoder": head.decoder,
        **text_table("text_encoder", model.text_encoder),
        **text_table("text_decoder.bert", model.text_decoder.bert),
    }
    for i, layer in enumerate(vision.encoder.layers):
        at = f"vision_model.encoder.layers.{i}"
        table[f"{at}.self_attn.qkv"] = layer.self_attn.qkv
        table[f"{at}.self_attn.projection"] = layer.self_attn.projection
        table |= {f"{at}.layer_norm1": layer.layer_norm1, f"{at}.layer_norm2": layer.layer_norm2}
        table |= {f"{at}.mlp.fc1": layer.mlp.fc1, f"{at}.mlp.fc2": layer.mlp.fc2}
    weights = {
        f"{key}.{name}": tensor.clone()
        for key, module in table.items()
        for name, tensor in module.state_dict().items()
    }
    for name in ("class_embedding", "position_embedding"):
        weights[f"vision_model.embeddings.{name}"] = getattr(vision.embeddings, name).detach()
    weights["text_decoder.cls.predictions.bias"] = head.bias.detach().clone()
    for prefix in ("text_encoder", "text_decoder.bert"):
        weights[f"{prefix}.embeddings.position_ids"] = torch.arange(64)[None]
    return weights


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The library's model and processor, and a checkpoint in the published layout."""
    folder = tmp_path_factory.mktemp("blip")
    tokenizer = bert_tokenizer(folder)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    text = {
        "vocab_size": len(tokenizer),
        "encoder_hidden_size": 32,
        "num_hidden_layers": 2,
        "max_position_embeddings": 64,
        "bos_token_id": tokenizer.convert_tokens_to_ids("[DEC]"),
        "sep_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"num_hidden_layers": 3, "image_size": SIZE, "patch_size": 8}
    config = BlipConfig(text_config={**shape, **text}, vision_config={**shape, **vision})
    torch.manual_seed(0)
    model = BlipForQuestionAnswering(config).eval().requires_grad_(False)
    stir(model, 1.5)
    images = BlipImageProcessorPil(size={"height": SIZE, "width": SIZE})
    images.save_pretrained(folder)
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    model.config.save_pretrained(folder)
    torch.save(official_weights(model), folder / "pytorch_model.bin")
    return model, BlipProcessor(images, tokenizer), folder


@torch.no_grad()
def plain_score(model, processor, prompt, image, row):
    yes, no = processor.tokenizer.convert_tokens_to_ids(["yes", "no"])
    answers = []
    for name in row.get("attr_nouns") or row.get("nouns") or [prompt]:
        inputs = processor(images=pil_picture(image), text=f"{name}?", return_tensors="pt")
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        generated = model.generate(
            **inputs,
            max_new_tokens=1,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        probabilities = generated.logits[0][0].float().softmax(-1)
        answers.append(probabilities[yes] / (probabilities[yes] + probabilities[no]))
    return float(sum(answers) / len(answers))


def plain_scores(model, processor, batch):
    return torch.tensor([plain_score(model, processor, *x) for x in zip(*batch, strict=True)])


@pytest.fixture(scope="module")
def batch():
    return make_batch(64, 40, 57)


@pytest.fixture(scope="module")
def plain(world, batch):
    return plain_scores(*world[:2], batch)


def test_official_layout_equals_the_library(world, batch, plain):
    scores = BlipVQA(world[2]).score(*batch)
    assert scores.shape == (64,) and scores.dtype == torch.float32
    assert plain.std() > 0.05
    assert (scores - plain).abs().max() < TOLERANCE


def test_pictures_of_the_models_size_leave_only_rounding(world):
    batch = make_batch(8, SIZE, SIZE)
    wanted = plain_scores(*world[:2], batch)
    torch.testing.assert_close(BlipVQA(world[2]).score(*batch), wanted, rtol=0, atol=1e-5)


def test_saved_folder_scores_the_same(world, batch, tmp_path):
    model, processor, official = world
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)  # settings in processor_config.json, a tokenizer.json
    part = [p[:5] for p in batch]
    assert torch.equal(BlipVQA(tmp_path).score(*part), BlipVQA(official).score(*part))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_no_more_than_the_library(world, batch, plain, dtype):
    model, processor, folder = world
    part, exact = [p[:32] for p in batch], plain[:32]
    expert = BlipVQA(folder, dtype=dtype)
    assert {p.dtype for p in expert._model.parameters()} == {dtype}
    theirs = (plain_scores(copy.deepcopy(model).to(dtype), processor, part) - exact).abs()
    ours = (expert.score(*part) - exact).abs()
    assert ours.max() < 2 * theirs.max() + TOLERANCE
    assert ours.mean() < 1.5 * theirs.mean() + TOLERANCE


def test_questions_beside_it_change_no_answer(world, batch):
    """A short question next to a long one is padded, and its pads must not be read."""
    expert = BlipVQA(world[2])
    image = batch[1][:1]
    ask = lambda *names: float(expert.score(["p"], image, [{"nouns": list(names)}]))  # noqa: E731
    short, long = ask("cat"), ask("semi-transparent old man's hat")
    both = ask("cat", "semi-transparent old man's hat")
    assert abs(short - long) > 0.01
    assert both == pytest.approx((short + long) / 2, abs=1e-5)


def test_batches_change_nothing(world, batch):
    part = [p[:11] for p in batch]
    whole, apart = BlipVQA(world[2]), BlipVQA(world[2], batch_size=4)
    torch.testing.assert_close(apart.score(*part), whole.score(*part), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c, w: w.pop("text_decoder.cls.predictions.transform.dense.bias"), "missing"),
        (lambda c, w: w["text_decoder.cls.predictions.bias"].add_(1), "decoder.bias.*tied"),
        (lambda c, w: c["text_config"].update(bos_token_id=10**6), "no usable bos_token_id"),
        (lambda c, w: c.update(model_type="blip-2"), "model_type is 'blip-2', wanted 'blip'"),
        (lambda c, w: c["vision_config"].update(image_size=64), "config.json wants 64"),
    ],
)
def test_unusable_files_are_named(world, tmp_path, change, said):
    model, _, official = world
    for file in official.glob("*.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config, weights = json.loads((official / "config.json").read_text()), official_weights(model)
    change(config, weights)
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=said) as caught:
        BlipVQA(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
