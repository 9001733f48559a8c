"""GroundingDINO: scores against one picture at a time, both checkpoint layouts, faults."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import BertTokenizer, GroundingDinoForObjectDetection
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import (
    GroundingDinoImageProcessorPil,
)

from rewards import gdino
from rewards.detection import detection_scores, iou, questions_of, suppress
from rewards.gdino import GroundingDino
from rewards.gdino_weights import UNUSED, official_names, swin_t_config
from tests.rewards.detector_problem import make_pictures, rows_of_every_kind
from tests.rewards.gdino_problem import EDGES, Plain, make_model, official_state, write_vocabulary


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The model, a folder in transformers' layout, and one with the authors' file."""
    folder = tmp_path_factory.mktemp("hub")
    model = make_model(write_vocabulary(folder / "vocab.txt"))
    model.save_pretrained(folder)
    GroundingDinoImageProcessorPil(size=EDGES).save_pretrained(folder)
    official = tmp_path_factory.mktemp("official")
    for name in ("vocab.txt", "config.json", "preprocessor_config.json"):
        (official / name).write_bytes((folder / name).read_bytes())
    torch.save({"model": official_state(model)}, official / "gdino.pth")
    return model, folder, official / "gdino.pth"


@pytest.fixture(scope="module")
def expert(files):
    return GroundingDino(files[1])


@pytest.fixture(scope="module")
def plain(files):
    return Plain(files[0], files[1])


ROWS = rows_of_every_kind(64)
ROWS[0]["attr_nouns"] = ["St. Bernard", "a red cube!"]
ROWS[3]["nouns"] = ["what?", "???", "猫", "a, b; c"]
PROMPTS = [row["prompt"] for row in ROWS]


@pytest.mark.parametrize(("size", "attributes"), [((64, 64), False), ((60, 100), True)])
def test_scores_equal_the_plain_ones(files, plain, size, attributes):
    images = make_pictures(64, *size)
    expert = GroundingDino(files[1], attributes=attributes, batch_size=24)
    scores = expert.score(PROMPTS, images, ROWS)
    expected, found = [], []
    for image, row in zip(images, ROWS, strict=True):
        score, boxes = plain.score(image, row, attributes)
        expected.append(score)
        found += map(len, boxes.values())
    assert scores.shape == (64,) and scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=0, atol=1e-3)
    assert len(set(expected)) > 6 and found.count(0) > 10 and len(set(found)) > 4


def test_the_authors_file_equals_the_folder(files, expert):
    model, folder, path = files
    official = GroundingDino(path)
    theirs, ours = official._model.state_dict(), expert._model.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in ours)
    original = {
        k.replace("text_backbone.", "text_backbone.backbone."): v
        for k, v in model.state_dict().items()
    }
    assert all(torch.equal(ours[key], original[key]) for key in ours)
    images = make_pictures(8, 64, 64)
    elsewhere = GroundingDino(path, config=folder)
    for other in (official, elsewhere):
        assert torch.equal(
            other.score(PROMPTS[:8], images, ROWS[:8]), expert.score(PROMPTS[:8], images, ROWS[:8])
        )


def test_every_weight_of_the_published_architecture_has_a_place():
    with torch.device("meta"):
        model = GroundingDinoForObjectDetection(swin_t_config())
    state = model.state_dict()
    keys = [key for key in official_state(model) if not UNUSED.fullmatch(key[7:])]
    targets = [name for key in keys for name in official_names(key)]
    assert sorted(targets) == sorted(k for k in state if "swin.layernorm" not in k)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(172e6, rel=0.01)
    assert official_names("module.transformer.decoder.layers.0.self_attn.in_proj_weight") == tuple(
        f"model.decoder.layers.0.self_attn.{x}.weight" for x in ("query", "key", "value")
    )


def test_folders_of_other_vintages(files, expert, tmp_path):
    """Legacy Swin names with a pickle, and current names; the fixture's folder has the former."""
    legacy = load_file(files[1] / "model.safetensors")
    assert any(".attention.self.query." in k and "backbone.conv_encoder" in k for k in legacy)
    current = {k: v.clone() for k, v in files[0].state_dict().items()}
    config = json.loads((files[1] / "config.json").read_text())
    # Keys that transformers 4 wrote beside the ones it used.
    config |= {"backbone": None, "use_timm_backbone": False, "use_pretrained_backbone": False}
    for name, save in (
        ("bin", lambda f: torch.save(legacy, f / "pytorch_model.bin")),
        ("current", lambda f: save_file(current, f / "model.safetensors")),
    ):
        folder = tmp_path / name
        folder.mkdir()
        for file in ("vocab.txt", "preprocessor_config.json"):
            (folder / file).write_bytes((files[1] / file).read_bytes())
        (folder / "config.json").write_text(json.dumps(config))
        save(folder)
        other = GroundingDino(folder)._model.state_dict()
        ours = expert._model.state_dict()
        assert all(torch.equal(other[key], ours[key]) for key in ours)


def test_scores_do_not_depend_on_batch_mates(expert):
    images = make_pictures(12, 64, 64)
    rows, prompts = ROWS[:12], PROMPTS[:12]
    whole = expert.detect(images, questions_of(rows).names)
    for b in range(12):
        alone = expert.detect(images[b : b + 1], questions_of(rows[b : b + 1]).names)
        P = alone.scores.shape[1]
        torch.testing.assert_close(whole.boxes[b], alone.boxes[0], rtol=0, atol=1e-3)
        torch.testing.assert_close(whole.scores[b, :P], alone.scores[0], rtol=0, atol=1e-4)
        assert not whole.scores[b, P:].any()
    chunked = torch.cat([expert.score(prompts[i::3], images[i::3], rows[i::3]) for i in range(3)])
    order = [i for start in range(3) for i in range(start, 12, 3)]
    torch.testing.assert_close(expert.score(prompts, images, rows)[order], chunked)


def test_captions_are_tokenised_ahead_and_read_once(files, monkeypatch):
    expert = GroundingDino(files[1])
    rows = [{"nouns": ["red cube"]}, {"nouns": ["cat"]}] * 4
    expert.prepare([""] * 8, rows)
    tokenised = expert._encode.cache_info().misses
    seen = []
    bert = expert._model.model.text_backbone.backbone
    forward = bert.forward
    monkeypatch.setattr(
        bert, "forward", lambda ids, *a, **kw: seen.append(len(ids)) or forward(ids, *a, **kw)
    )
    scores = expert.score([""] * 8, make_pictures(8, 64, 64), rows)
    assert expert._encode.cache_info().misses == tokenised == 2
    assert seen == [2] and scores.shape == (8,)


def test_preprocessing_is_the_processors(expert, plain):
    for size in ((64, 64), (60, 100), (40, 120)):
        images = make_pictures(2, *size)
        pictures = [
            Image.fromarray((i * 255).round().byte().permute(1, 2, 0).numpy()) for i in images
        ]
        theirs = plain.processor(pictures, return_tensors="pt")
        assert theirs.pixel_mask.all()
        torch.testing.assert_close(
            expert.preprocess(images), theirs.pixel_values, rtol=0, atol=1e-5
        )


@pytest.mark.parametrize(
    ("dtype", "equal", "overlap", "moved"),
    [(torch.float16, 60, 0.99, 0.002), (torch.bfloat16, 56, 0.95, 0.02)],
)
def test_half_precision_products(files, expert, dtype, equal, overlap, moved):
    """How many of 64 rewards stay, and the median box and confidence of what is found.

    The model is random, so that many proposals are nearly as good as the ones chosen; a few
    are exchanged, which no tolerance on their boxes describes.
    """
    images = make_pictures(64, 64, 64)
    questions = questions_of(ROWS, attributes=False)
    half = GroundingDino(files[1], dtype=dtype)
    ours, full = (e.detect(images, questions.names) for e in (half, expert))
    scores = [detection_scores(questions, suppress(d), image_size=(64, 64)) for d in (ours, full)]
    assert int(((scores[0] - scores[1]).abs() < 1e-3).sum()) >= equal
    assert ours.boxes.dtype == ours.scores.dtype == torch.float32
    best, match = iou(full.boxes[:, :, None], ours.boxes[:, None]).max(-1)  # (B, Q)
    found = full.scores > 0
    assert best[found.any(1)].median() > overlap
    matched = ours.scores.gather(2, match[:, None].expand_as(found))
    assert (matched - full.scores)[found].abs().median() < moved


def test_vocabularies(files, expert, tmp_path, monkeypatch):
    vocabulary = files[1] / "vocab.txt"
    BertTokenizer(vocab=str(vocabulary), do_lower_case=True).save_pretrained(tmp_path)
    texts = ["Café au lait", "l'œuf", "猫 cat", "CATS", "x" * 30, "stop-sign", "...", "\u00a0"]
    for config in (tmp_path, tmp_path / "tokenizer.json", vocabulary):
        other = GroundingDino(files[1], config=config)
        assert [other._encode(t) for t in texts] == [expert._encode(t) for t in texts]
    # A folder of BERT itself says nothing of the detector, whose published shape is known.
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    asked = []

    def load(path, config, source, device):
        asked.append(config)
        return files[0]

    monkeypatch.setattr(gdino, "load_official", load)
    monkeypatch.setattr(gdino, "OncePerCaption", lambda backbone: backbone)
    published = GroundingDino(files[2], config=tmp_path)
    assert asked[0].to_dict() == swin_t_config().to_dict()
    assert published.preprocess(torch.zeros(1, 3, 300, 600)).shape[2:] == (666, 1333)
    assert published.preprocess(torch.zeros(1, 3, 384, 384)).shape[2:] == (800, 800)


def test_a_caption_that_is_too_long_is_refused(expert):
    rows = [{"nouns": ["cat"]}, {"nouns": [f"{'x' * 40} {i}" for i in range(9)]}]
    with pytest.raises(ValueError, match="has .* tokens, gdino takes 256"):
        expert.prepare(["", ""], rows)
    assert len(expert._encode("x" * 40)) == 40


def test_unusable_vocabularies_are_named(files, tmp_path):
    folder, path = files[1:]
    lines = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()

    def written(name, content):
        (tmp_path / name).write_text(content, encoding="utf-8")
        return tmp_path / name

    moved = written("moved.txt", "\n".join([*lines[:5], *lines[6:], "more"]))
    for config, said in (
        (tmp_path, "holds neither tokenizer.json nor vocab.txt"),
        (moved, r"moved.txt: '\[CLS\]' has id 100, bert-base-uncased's 101"),
        (written("large.txt", "\n".join([*lines, "more"])), "1031 tokens, the checkpoint has 1030"),
        (written("short.txt", "cat"), "short.txt: "),
        (written("broken.json", "{"), "broken.json: not a BERT vocabulary"),
        (tmp_path / "absent.txt", "absent.txt: not a BERT vocabulary"),
        (tmp_path / "SwinT_OGC.py", "SwinT_OGC.py: wanted a vocab.txt or tokenizer.json"),
    ):
        with pytest.raises(ValueError, match=said) as raised:
            GroundingDino(folder, config=config)
        assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="batch_size"):
        GroundingDino(path, batch_size=0)


class Evil:
    def __reduce__(self):
        return (eval, ("1/0",))


def broken_files(state):
    """Content of a .pth -> what is said of it."""
    key, joint = (
        "module.feat_map.weight",
        "module.transformer.decoder.layers.1.ca_text.in_proj_bias",
    )
    without = {k: v for k, v in state.items() if k != key}
    tied = "module.transformer.decoder.bbox_embed.1.layers.0.bias"
    return [
        ({"model": without}, r"no key for 'model.text_projection.weight' \(1 missing in all\)"),
        ({"model": {**state, key: state[key][:, 1:]}}, f"'{key}' is .*wanted .32, 32."),
        ({"model": {**state, joint: state[joint][:95]}}, f"'{joint}' is .95,.*wanted .96,"),
        ({"model": {**state, key: state[key].long()}}, f"'{key}' is .*int64"),
        ({"model": {**state, "module.head.weight": state[key]}}, "unexpected key 'module.head.w"),
        ({"model": {**state, key[7:]: state[key]}}, f"key '{key[7:]}' is given twice"),
        ({"model": {**state, tied: state[tied] + 1}}, f"'{tied}' differs from"),
        ({"model": {**state, key: [1.0]}}, f"'{key}' is a list, not a tensor"),
        ({"model": {**state, key: Evil()}}, "not a weights file.*eval"),
        ({"state_dict": state}, "holds no 'model'"),
        ([1], "holds no 'model'"),
    ]


def test_broken_checkpoints_are_named(files, tmp_path):
    folder, path = files[1:]
    state = torch.load(path, weights_only=True)["model"]
    bad = tmp_path / "bad.pth"

    def refused(said):
        with pytest.raises(ValueError, match=f"bad.pth: .*{said}") as raised:
            GroundingDino(bad, config=folder)
        assert "\n" not in str(raised.value)

    refused("no such GroundingDINO checkpoint")
    with pytest.raises(ValueError, match="bad.pth: no such GroundingDINO checkpoint"):
        GroundingDino(bad)  # with no vocabulary beside it either
    for content, said in broken_files(state):
        torch.save(content, bad)
        refused(said)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"not a checkpoint", b""):
        bad.write_bytes(content)
        refused("not a weights file")


def test_broken_folders_are_named(files, tmp_path):
    folder = files[1]

    def refused(said, **contents):
        broken = tmp_path / str(len(list(tmp_path.iterdir())))
        broken.mkdir()
        for file in folder.iterdir():
            (broken / file.name).write_bytes(contents.get(file.stem, file.read_bytes()))
        with pytest.raises(ValueError, match=said) as raised:
            GroundingDino(broken)
        assert "\n" not in str(raised.value)

    weights = (folder / "model.safetensors").read_bytes()
    refused("model.safetensors: not a safetensors file", model=weights[:-100])
    refused("config.json: not JSON", config=b"{")
    refused("model_type is 'bert'", config=b'{"model_type": "bert"}')
    refused("image processor settings: KeyError", preprocessor_config=b'{"size": {}}')
    state = load_file(folder / "model.safetensors")
    key = "model.text_projection.weight"
    without = {k: v for k, v in state.items() if k != key}
    for content, said in (
        (without, f"model.safetensors: no key for '{key}'"),
        ({**state, key: state[key][1:]}, f"model.safetensors: '{key}' is .31, 32."),
        ({**without, key + "s": state[key]}, f"unexpected key '{key}s'"),
    ):
        save_file(content, tmp_path / "model.safetensors")
        data = (tmp_path / "model.safetensors").read_bytes()
        (tmp_path / "model.safetensors").unlink()
        refused(said, model=data)


def test_rows_without_names_and_unknown_localities_are_refused(expert):
    images = make_pictures(1, 64, 64)
    with pytest.raises(ValueError, match="'an egg' has neither"):
        expert.score(["an egg"], images, [{"prompt": "an egg"}])
    info = {"obj1": "cat", "obj2": "dog", "locality": "behind"}
    with pytest.raises(ValueError, match="'behind'"):
        expert.prepare([""], [{"nouns": ["cat"], "spatial_info": info}])
