"""OWLv2 in the detector's slot: scores against one picture at a time, and its folder's faults."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from torchvision.ops import nms
from transformers import (
    CLIPTokenizer,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    Owlv2TextConfig,
    Owlv2VisionConfig,
)

from rewards.detection import iou, questions_of
from rewards.owl import Owl
from tests.rewards.detector_problem import make_pictures, plain_score, rows_of_every_kind

SIDE = 80
THRESHOLD = 0.3
ROWS = rows_of_every_kind(64, seed=1)
PROMPTS = [row["prompt"] for row in ROWS]


def make_tokenizer():
    """CLIP's, with single bytes for a vocabulary; "!" pads, the end token has the highest id."""
    letters = sorted(ByteLevel.alphabet())
    pieces = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    assert vocabulary["!"] == 0
    return CLIPTokenizer(vocab=vocabulary, merges=[], pad_token="!")


def make_model(vocab_size):
    """A small random model whose boxes and confidences vary with picture and name."""
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = Owlv2Config(
        text_config=Owlv2TextConfig(vocab_size=vocab_size, max_position_embeddings=40, **shape),
        vision_config=Owlv2VisionConfig(image_size=SIDE, patch_size=16, **shape),
        projection_dim=32,
    )
    model = Owlv2ForObjectDetection(config).eval()
    torch.manual_seed(0)  # after the initialisation, which draws as the version pleases
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
            elif "norm" not in name:
                parameter.normal_(std=0.1)
        # The logit is a cosine plus the shift, times 1 + elu(scale): a few boxes a name.
        model.class_head.logit_shift.bias.fill_(-1.8)
        model.class_head.logit_scale.bias.fill_(5)
        model.box_head.dense2.bias[2:].fill_(1)  # wide enough to overlap
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("owl")
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Owlv2ImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def expert(files):
    return Owl(files[1], box_threshold=THRESHOLD)


class Plain:
    """One picture with its own names at a time, through transformers' processor."""

    def __init__(self, model):
        self.model = model
        self.tokenizer = make_tokenizer()
        self.processor = Owlv2ImageProcessor(size={"height": SIDE, "width": SIDE})

    @torch.no_grad()
    def score(self, image, row, attributes=False):
        """The reward and the boxes of each name."""
        height, width = image.shape[1:]
        names = questions_of([row], attributes=attributes).names[0]
        picture = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
        pixels = self.processor(picture, return_tensors="pt")
        texts = [f"a photo of a {name}" for name in names]
        tokens = self.tokenizer(texts, padding="max_length", max_length=40, return_tensors="pt")
        out = self.model(**pixels, input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        found = {}
        for p, name in enumerate(names):
            scores = out.logits[0, :, p].sigmoid()
            kept = scores > THRESHOLD
            cx, cy, w, h = out.pred_boxes[0, kept].unbind(-1)
            boxes = torch.stack((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), -1)
            boxes = boxes * max(height, width)
            found[name] = boxes[nms(boxes, scores[kept], 0.5)].tolist()
        return plain_score(row, found, size=(height, width), attributes=attributes), found


@pytest.mark.parametrize(("size", "attributes"), [((64, 64), False), ((60, 100), True)])
def test_scores_equal_the_plain_ones(files, size, attributes):
    images = make_pictures(64, *size)
    expert = Owl(files[1], box_threshold=THRESHOLD, attributes=attributes, batch_size=24)
    scores = expert.score(PROMPTS, images, ROWS)
    plain, expected, found = Plain(files[0]), [], []
    for image, row in zip(images, ROWS, strict=True):
        score, boxes = plain.score(image, row, attributes)
        expected.append(score)
        found += map(len, boxes.values())
    assert scores.shape == (64,) and scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=0, atol=1e-3)
    assert len(set(expected)) >= 5 and found.count(0) > 10 and len(set(found)) > 4


def test_preprocessing_is_the_processors(expert):
    processor = Owlv2ImageProcessor(size={"height": SIDE, "width": SIDE})
    for size in ((64, 64), (40, 64), (80, 80), (200, 150)):
        images = make_pictures(2, *size)
        pictures = [
            Image.fromarray((i * 255).round().byte().permute(1, 2, 0).numpy()) for i in images
        ]
        theirs = processor(pictures, return_tensors="pt").pixel_values
        torch.testing.assert_close(expert.preprocess(images), theirs, rtol=0, atol=1e-5)


def test_scores_do_not_depend_on_batch_mates(expert):
    images, names = make_pictures(8, 64, 64), questions_of(ROWS[:8]).names
    whole = expert.detect(images, names)
    for b in range(8):
        alone = expert.detect(images[b : b + 1], names[b : b + 1])
        P = alone.scores.shape[1]
        torch.testing.assert_close(whole.boxes[b], alone.boxes[0], rtol=0, atol=1e-3)
        torch.testing.assert_close(whole.scores[b, :P], alone.scores[0], rtol=0, atol=1e-5)
        assert not whole.scores[b, P:].any()


def test_names_are_tokenised_ahead_and_encoded_once(files, monkeypatch):
    expert = Owl(files[1], query="{}!")
    rows = [{"nouns": ["red cube", "cat"]}, {"nouns": ["cat", "dog"]}] * 4
    expert.prepare([""] * 8, rows)
    tokenised = expert._encode.cache_info().misses
    seen = []
    text = expert._model.owlv2.text_model
    forward = text.forward
    monkeypatch.setattr(
        text,
        "forward",
        lambda input_ids, **kw: seen.append(len(input_ids)) or forward(input_ids=input_ids, **kw),
    )
    expert.score([""] * 8, make_pictures(8, 64, 64), rows)
    assert expert._encode.cache_info().misses == tokenised == 3 and seen == [3]
    ids = tuple(make_tokenizer()("cat!").input_ids)
    assert expert._encode("cat") == ids


@pytest.mark.parametrize(
    ("dtype", "equal", "overlap", "moved"),
    [(torch.float16, 63, 0.99, 0.005), (torch.bfloat16, 58, 0.97, 0.05)],
)
def test_half_precision_products(files, expert, dtype, equal, overlap, moved):
    """How many of 64 rewards stay, and by how much boxes and confidences move.

    In bfloat16 that depends on the machine: 60 on AVX2 with torch 2.11.
    """
    images = make_pictures(64, 64, 64)
    half = Owl(files[1], box_threshold=THRESHOLD, dtype=dtype)
    same = (half.score(PROMPTS, images, ROWS) - expert.score(PROMPTS, images, ROWS)).abs() < 1e-3
    names = questions_of(ROWS).names
    full = Owl(files[1], box_threshold=0).detect(images, names)
    ours = Owl(files[1], box_threshold=0, dtype=dtype).detect(images, names)
    assert ours.boxes.dtype == ours.scores.dtype == torch.float32
    assert int(same.sum()) >= equal
    assert iou(ours.boxes, full.boxes).min() > overlap
    assert (ours.scores - full.scores).abs().max() < moved


def test_broken_folders_are_named(files, tmp_path):
    folder = files[1]

    def refused(said, **contents):
        broken = tmp_path / str(len(list(tmp_path.iterdir())))
        broken.mkdir()
        for file in folder.iterdir():
            (broken / file.name).write_bytes(contents.get(file.stem, file.read_bytes()))
        with pytest.raises(ValueError, match=said) as raised:
            Owl(broken)
        assert "\n" not in str(raised.value)

    weights = (folder / "model.safetensors").read_bytes()
    refused("model.safetensors: not a safetensors file", model=weights[:-100])
    refused("config.json: not JSON", config=b"{")
    refused("model_type is 'bert'", config=b'{"model_type": "bert"}')
    refused("image processor settings: KeyError", preprocessor_config=b'{"size": {}}')
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings["size"] = {"height": 64, "width": 64}
    refused("give .64. pixels", preprocessor_config=json.dumps(settings).encode())
    state = load_file(folder / "model.safetensors")
    key = "class_head.dense0.weight"
    without = {k: v for k, v in state.items() if k != key}
    for content, said in (
        (without, f"model.safetensors: key '{key}' is missing"),
        ({**state, key: state[key][1:]}, f"model.safetensors: '{key}' is .31, 32."),
        ({**without, key + "s": state[key]}, f"unexpected key '{key}s'"),
    ):
        save_file(content, tmp_path / "model.safetensors")
        data = (tmp_path / "model.safetensors").read_bytes()
        (tmp_path / "model.safetensors").unlink()
        refused(said, model=data)
    for options in ({"batch_size": 0}, {"query": "a photo"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            Owl(folder, **options)
    with pytest.raises(ValueError, match="no such checkpoint folder"):
        Owl(tmp_path / "absent")
