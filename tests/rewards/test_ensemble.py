"""The ensemble and pipeline under faults, and the HPS loader."""

import json
import threading
import time

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CLIP, CustomTextCLIP
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from rewards import HPS, Ensemble, RewardError, RewardPipeline


class Fake:
    def __init__(self, name, answer):
        self.name, self.answer = name, answer

    def score(self, prompts, images, metadata):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


BATCH = (["a", "b"], torch.zeros(2, 3, 8, 8), [{}, {}])
GOOD = Fake("good", torch.tensor([1.0, 0.0]))
FAULTS = [
    (RuntimeError("out of cheese"), "out of cheese"),
    (torch.tensor([0.0, float("nan")]), "NaN"),
    (torch.tensor([0.0, float("inf")]), "infinite"),
    (torch.zeros(2, 1), r"\(2, 1\)"),
    (None, "NoneType"),
]


def test_weighted_mean():
    other = Fake("other", torch.tensor([0.0, 0.5], dtype=torch.float64))
    scores = Ensemble([GOOD, other], {"good": 3}).score(*BATCH)
    assert scores.total.tolist() == pytest.approx([0.75, 0.125])
    assert scores.total.dtype == torch.float32 and list(scores.by_expert) == ["good", "other"]


@pytest.mark.parametrize(("answer", "said"), FAULTS)
def test_a_failing_expert_is_named_or_skipped(answer, said):
    bad = Fake("bad", answer)
    with pytest.raises(RewardError, match=f"'bad'.*{said}"):
        Ensemble([GOOD, bad]).score(*BATCH)
    scores = Ensemble([bad, GOOD], {"bad": 9}, on_error="skip").score(*BATCH)
    assert scores.total.tolist() == [1, 0] and scores.skipped == {"bad": 2}
    with pytest.raises(RewardError, match="every expert"):
        Ensemble([bad], on_error="skip").score(*BATCH)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([],), "at least one"),
        (([GOOD, GOOD],), "twice"),
        (([GOOD], {"goood": 1.0}), "'good'"),
        (([GOOD], {"good": -1.0}), "'good'"),
        (([GOOD], None, "ignore"), "'ignore'"),
    ],
)
def test_bad_ensembles_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        Ensemble(*arguments)
    with pytest.raises(ValueError, match="1 prompts"):
        Ensemble([GOOD]).score(["a"], BATCH[1], BATCH[2])


def test_pipeline_runs_beside_and_leaves_no_thread():
    release, scored = threading.Event(), threading.Semaphore(0)

    class Slow(Fake):
        def score(self, prompts, images, metadata):
            assert release.wait(10)
            time.sleep(0.05)
            scored.release()
            return self.answer

    before = threading.active_count()
    with RewardPipeline(Ensemble([Slow("slow", GOOD.answer)]), "cpu") as pipeline:
        first = pipeline.submit(*BATCH)  # returns although the expert waits for us
        second = pipeline.submit(*BATCH)
        release.set()
        total = first.result().total
        assert total.tolist() == [1, 0]
        weight = torch.ones(2, requires_grad=True)
        (weight * total).sum().backward()  # not an inference tensor
        assert weight.grad.tolist() == [1, 0]
        assert first.seconds_exposed > 0.04
        scored.acquire(), scored.acquire()
        time.sleep(0.1)  # the ensemble still has to take its mean
        second.result()
        assert second.seconds_exposed < 0.04
    assert threading.active_count() == before


def test_pipeline_errors_surface_at_result():
    with RewardPipeline(Ensemble([Fake("bad", RuntimeError("boom"))]), "cpu") as pipeline:
        handle = pipeline.submit(*BATCH)
        with pytest.raises(RewardError, match="'bad'.*boom"):
            handle.result()


VISION = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A random tiny CLIP in the layout of HPS_v2.1_compressed.pt; its model and path."""
    folder = tmp_path_factory.mktemp("official")
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": text}
    (folder / "tiny-hps-test.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "tiny-hps-test.json")
    torch.manual_seed(0)
    model = CLIP(**config).eval()
    torch.save({"state_dict": model.state_dict()}, folder / "hps.pt")
    return model, folder / "hps.pt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random tiny CLIP in our folder layout."""
    folder = tmp_path_factory.mktemp("folder")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["a red circle"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    size = tokenizer.get_vocab_size() + 1
    text = {"context_length": 12, "vocab_size": size, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": text}
    torch.manual_seed(1)
    save_file(CustomTextCLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    content = {
        "model_cfg": {**config, "custom_text": True},
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    return folder


def test_official_layout_equals_the_model_itself(official):
    model, path = official
    expert = HPS(path, model_name="tiny-hps-test")
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    prompts = ["a cat", "a dog", "a cat"]
    scores = expert.score(prompts, images, [{}] * 3)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    with torch.no_grad():
        text = model.encode_text(open_clip.get_tokenizer("tiny-hps-test")(prompts), normalize=True)
        image = model.encode_image((images - mean) / std, normalize=True)
    torch.testing.assert_close(scores, (image * text).sum(-1), rtol=0, atol=1e-5)


def test_each_distinct_prompt_is_encoded_once(official, monkeypatch):
    expert = HPS(official[1], model_name="tiny-hps-test")
    seen = []
    encode = expert._model.encode_text
    monkeypatch.setattr(
        expert._model, "encode_text", lambda t, **kw: seen.append(len(t)) or encode(t, **kw)
    )
    expert.score(["a", "b", "a", "a"], torch.rand(4, 3, 32, 32), [{}] * 4)
    assert seen == [2]


def test_folder_layout(folder):
    expert = HPS(folder)
    scores = expert.score(["a red circle", "a long " * 30], torch.rand(2, 3, 64, 64), [{}] * 2)
    assert scores.shape == (2,) and scores.dtype == torch.float32 and scores.abs().max() <= 1


def test_preprocessing_fits_the_longest_side_and_pads_before_normalising(folder):
    expert = HPS(folder)
    images = torch.rand(1, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    pixels = expert.preprocess(images)
    assert pixels.shape == (1, 3, 32, 32)
    assert (pixels[:, :, :8] == -1).all() and (pixels[:, :, 24:] == -1).all()  # black
    small = F.interpolate(images, (16, 32), mode="bicubic", antialias=True)
    torch.testing.assert_close(pixels[:, :, 8:24], (small - 0.5) / 0.5)


def test_unusable_hps_files_are_named(folder, official, tmp_path):
    with pytest.raises(ValueError, match="absent.pt: no such"):
        HPS(tmp_path / "absent.pt")
    with pytest.raises(ValueError, match="open_clip_config.json: missing"):
        HPS(tmp_path)
    bad = tmp_path / "bad.pt"
    bad.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="bad.pt: not a weights file"):
        HPS(bad, model_name="tiny-hps-test")
    torch.save({"state": 1}, bad)
    with pytest.raises(ValueError, match="bad.pt: holds no 'state_dict'"):
        HPS(bad, model_name="tiny-hps-test")
    torch.save({"state_dict": {"logit_scale": torch.zeros(())}}, bad)
    with pytest.raises(ValueError, match="bad.pt: weight '.*absent"):
        HPS(bad, model_name="tiny-hps-test")
    for name in ("open_clip_config.json", "open_clip_model.safetensors", "tokenizer.json"):
        broken = tmp_path / name.split(".")[0]
        broken.mkdir()
        for file in folder.iterdir():
            (broken / file.name).write_bytes(file.read_bytes())
        (broken / name).write_bytes(b"{")
        with pytest.raises(ValueError, match=name):
            HPS(broken)
