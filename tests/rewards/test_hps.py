"""HPS v2 against its official pipeline written out plainly: one PIL picture at a time, fp32."""

import json

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIP
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from rewards import HPS

TOLERANCE = 1e-3
SIZE = 32
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
NOUNS = ("cat", "red car", "teddy bear", "café", "猫", "old man's hat")
TASKS = ("{}", "a {} to the left of a {}", "three {}s", "what a {} drinks!", "{} & {} — №2")
SHAPES = ((32, 32), (64, 64), (24, 24), (40, 64), (64, 40), (17, 61), (61, 17), (32, 20))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A random CLIP whose answers are spread, and its file in the published layout."""
    folder = tmp_path_factory.mktemp("hps")
    vision = {"image_size": SIZE, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2}
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    (folder / "tiny-hps-plain.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "tiny-hps-plain.json")
    torch.manual_seed(0)
    model = CLIP(**config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        # Norms and biases too: a forward could leave out ones and zeros unnoticed.
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
        elif "embedding" in name:
            parameter.normal_()
        elif parameter.ndim > 1:
            parameter.normal_(std=1.5 * parameter[0].numel() ** -0.5)
    # Half precision, as the published file is compressed.
    state = {k: v.half() for k, v in model.state_dict().items()}
    model.load_state_dict({k: v.float() for k, v in state.items()})
    torch.save({"state_dict": state}, folder / "HPS_v2.1_compressed.pt")
    return model, folder / "HPS_v2.1_compressed.pt"


def load(world, **options):
    return HPS(world[1], model_name="tiny-hps-plain", **options)


def picture(image):
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy().astype(np.uint8))


def plain_pixels(image):
    """What hpsv2 does to one PIL picture."""
    pixels = tv.pil_to_tensor(image.convert("RGB")).float() / 255
    height, width = pixels.shape[1:]
    scale = SIZE / max(height, width)
    if scale != 1:
        size = [round(height * scale), round(width * scale)]
        pixels = tv.resize(pixels, size, InterpolationMode.BICUBIC, antialias=True)
    rest_h, rest_w = SIZE - pixels.shape[1], SIZE - pixels.shape[2]
    border = [rest_w // 2, rest_h // 2, rest_w - rest_w // 2, rest_h - rest_h // 2]
    return (tv.pad(pixels, border, fill=0) - MEAN) / STD


@torch.no_grad()
def plain_score(model, prompt, image):
    picture_features = model.encode_image(plain_pixels(picture(image))[None])[0]
    tokens = open_clip.get_tokenizer("tiny-hps-plain")([prompt])
    text_features = model.encode_text(tokens)[0]
    product = picture_features @ text_features
    return float(product / picture_features.norm() / text_features.norm())


def make_batch(count, height, width, seed=0):
    """Pictures of 8 bits, blobs with some noise, with prompts of every kind."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 3, 4, generator=rng)
    images = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    images = images + 0.2 * torch.rand(count, 3, height, width, generator=rng) - 0.1
    names = [NOUNS[(i + seed) % len(NOUNS)] for i in range(count + 1)]
    prompts = [TASKS[i % len(TASKS)].format(names[i], names[i + 1]) for i in range(count)]
    return prompts, images.mul(255).round().clamp(0, 255) / 255, [{}] * count


def test_64_pictures_of_all_shapes_equal_the_plain_pipeline(world):
    expert, every = load(world), []
    for seed, (height, width) in enumerate(SHAPES):
        prompts, images, rows = make_batch(64 // len(SHAPES), height, width, seed)
        scores = expert.score(prompts, images, rows)
        plain = [plain_score(world[0], p, i) for p, i in zip(prompts, images, strict=True)]
        assert scores.dtype == torch.float32
        assert (scores - torch.tensor(plain)).abs().max() < TOLERANCE, (height, width)
        every += plain
    assert len(every) == 64 and torch.tensor(every).std() > 0.05


def test_scores_depend_on_picture_prompt_and_border(world):
    prompts, images, rows = make_batch(8, 40, 64)
    expert = load(world)
    scores = expert.score(prompts, images, rows)
    assert (expert.score(prompts, images.flip(0), rows) - scores).abs().mean() > 0.01
    assert (expert.score(prompts[::-1], images, rows) - scores).abs().mean() > 0.01
    cropped = expert.score(prompts, images[..., 12:52], rows)  # open_clip's own square
    assert (cropped - scores).abs().mean() > 0.01


def test_pictures_do_not_depend_on_their_batch(world):
    prompts, images, rows = make_batch(16, 48, 48)
    whole = load(world).score(prompts, images, rows)
    split = load(world, batch_size=5).score(prompts, images, rows)
    torch.testing.assert_close(split, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_half_precision_holds_to(dtype, tolerance, world):
    prompts, images, rows = make_batch(32, 48, 48)
    exact = load(world).score(prompts, images, rows)
    scores = load(world, dtype=dtype).score(prompts, images, rows)
    assert scores.dtype == torch.float32
    assert 0 < (scores - exact).abs().max() < tolerance


def test_prepared_prompts_are_not_tokenised_again(world, monkeypatch):
    prompts, images, rows = make_batch(4, 32, 32)
    expert = load(world)
    expected = expert.score(prompts, images, rows)
    tokenize = open_clip.get_tokenizer("tiny-hps-plain")
    calls = []
    monkeypatch.setattr(
        open_clip, "get_tokenizer", lambda name: lambda t: calls.append(t) or tokenize(t)
    )
    expert = load(world)
    expert.prepare([*prompts, *prompts], rows * 2)
    assert len(calls) == len(set(prompts))
    assert torch.equal(expert.score(prompts, images, rows), expected)
    assert len(calls) == len(set(prompts))


def test_a_file_that_runs_code_is_refused(world, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"state_dict": {"logit_scale": Evil()}}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil\.pt: not a weights file") as error:
        HPS(tmp_path / "evil.pt", model_name="tiny-hps-plain")
    assert "\n" not in str(error.value) and not (tmp_path / "owned").exists()


def test_bad_arguments_and_states_are_named(world, tmp_path):
    with pytest.raises(ValueError, match="batch_size"):
        load(world, batch_size=0)
    with pytest.raises(ValueError, match="no-such-model"):
        HPS(world[1], model_name="no-such-model")
    for state in ([1], {"logit_scale": "x"}):
        torch.save({"state_dict": state}, tmp_path / "odd.pt")
        with pytest.raises(ValueError, match=r"odd\.pt: "):
            HPS(tmp_path / "odd.pt", model_name="tiny-hps-plain")
    whole = world[1].read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.pt: not a weights file") as error:
        HPS(tmp_path / "cut.pt", model_name="tiny-hps-plain")
    assert "\n" not in str(error.value)
