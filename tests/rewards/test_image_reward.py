"""ImageReward against plain BLIP maths on the published layout, one picture at a time through PIL."""

import math

import pytest
import torch
from transformers import BertTokenizer, BlipConfig

from engine.experts import build_ensemble
from engine.settings.errors import UserError
from rewards.image_reward import UNUSED, ImageReward, ImageRewardModel, official_name
from tests.rewards.gdino_problem import write_vocabulary
from tests.rewards.image_reward_problem import Plain, official_shapes, official_state
from tests.rewards.vqa_problem import make_batch

SIZE, PATCH = 32, 8
TOLERANCE = 1e-3
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The plain procedure, and a checkpoint in the published layout beside its vocabulary."""
    folder = tmp_path_factory.mktemp("imagereward")
    words = write_vocabulary(folder / "vocab.txt")
    tokenizer = BertTokenizer(vocab=str(folder / "vocab.txt"), do_lower_case=True)
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_tokens(["[ENC]"], special_tokens=True)
    state = official_state(
        official_shapes(
            128,
            192,
            grid=SIZE // PATCH,
            patch=PATCH,
            depths=(3, 2),
            inner=(256, 320),
            vocabulary=words + 2,
            positions=40,
        )
    )
    torch.save(state, folder / "ImageReward.pt")
    return Plain(state, tokenizer, SIZE), folder / "ImageReward.pt"


@pytest.fixture(scope="module")
def expert(world):
    return ImageReward(world[1])


@pytest.fixture(scope="module")
def batch():
    # 40 x 59 becomes 32 x 47, whose margin of 7.5 pixels torchvision rounds up.
    return make_batch(64, 40, 59)


@pytest.fixture(scope="module")
def plain(world, batch):
    return world[0].scores(*batch)


def test_published_layout_equals_plain_blip(expert, batch, plain):
    scores = expert.score(*batch)
    assert scores.shape == (64,) and scores.dtype == torch.float32
    assert plain.std() > 0.3
    assert (scores - plain).abs().max() < TOLERANCE


@pytest.mark.parametrize("size", [(SIZE, SIZE), (20, 20), (59, 40), (24, 70), (70, 50)])
def test_pictures_of_every_shape(world, expert, size):
    batch = make_batch(8, *size)
    wanted = world[0].scores(*batch)
    # The resize is Pillow's to the bit at these sizes, so only the arithmetic is left.
    torch.testing.assert_close(expert.score(*batch), wanted, rtol=0, atol=1e-4)


def test_score_depends_on_the_prompt_and_on_the_picture(expert, batch):
    prompts, images, rows = batch
    one_prompt = expert.score(prompts[:1] * 16, images[:16], rows[:16])
    one_picture = expert.score(prompts[:16], images[:1].expand(16, -1, -1, -1), rows[:16])
    assert one_prompt.std() > 0.05 and one_picture.std() > 0.05


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_errs_no_more_than_plain_blip(world, batch, plain, dtype):
    part, exact = [p[:24] for p in batch], plain[:24]
    expert = ImageReward(world[1], dtype=dtype)
    assert {p.dtype for p in expert._model.parameters()} == {torch.float32}
    theirs = (world[0].scores(*part, dtype) - exact).abs()
    ours = (expert.score(*part) - exact).abs()
    assert ours.max() < 2 * theirs.max() + TOLERANCE
    assert ours.mean() < 1.5 * theirs.mean() + TOLERANCE
    assert ours.mean() > theirs.mean() / 10  # the products are taken in that precision


def test_batches_change_nothing(world, expert, batch):
    part = [p[:11] for p in batch]
    assert len({len(expert._encode(prompt)) for prompt in part[0]}) > 3
    whole = expert.score(*part)
    apart = ImageReward(world[1], batch_size=4).score(*part)
    torch.testing.assert_close(apart, whole, rtol=0, atol=1e-5)
    alone = torch.cat([expert.score(*(p[i : i + 1] for p in part)) for i in range(11)])
    torch.testing.assert_close(alone, whole, rtol=0, atol=1e-5)
    assert expert.score([], part[1][:0], []).shape == (0,)


def test_prompts_are_cut_at_35_tokens_and_tokenised_ahead(world):
    expert = ImageReward(world[1])
    start = " ".join(["cat", "red", "dog"] * 11)  # 33 tokens
    prompts = [start, f"{start} stop sign", "[ENC] a cat [PAD] dog [SEP][DEC]", ""]
    assert [len(expert._encode(p)) for p in prompts] == [35, 35, 9, 2]
    _, images, rows = make_batch(4, SIZE, SIZE)
    images = images[:1].expand(4, -1, -1, -1)
    expert.prepare(prompts, rows)
    tokenised = expert._encode.cache_info().misses
    scores = expert.score(prompts, images, rows)
    assert expert._encode.cache_info().misses == tokenised
    assert scores[0] == pytest.approx(float(scores[1]), abs=1e-5)
    wanted = world[0].scores(prompts, images, rows)
    torch.testing.assert_close(scores, wanted, rtol=0, atol=1e-4)


def test_every_weight_of_the_published_file_has_a_place():
    vision = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision |= {"intermediate_size": 4096, "image_size": 224, "patch_size": 16}
    with torch.device("meta"):
        config = BlipConfig(text_config={"num_attention_heads": 12}, vision_config=vision)
        state = ImageRewardModel(config).state_dict()
    ours = {official_name(key): tuple(tensor.shape) for key, tensor in state.items()}
    file = official_shapes(
        1024,
        768,
        grid=14,
        patch=16,
        depths=(24, 12),
        inner=(4096, 3072),
        vocabulary=30524,
        positions=512,
    )
    used = {k: v for k, v in file.items() if not UNUSED.fullmatch(k) and "position_ids" not in k}
    assert len(file) - len(used) == 5
    assert ours == used
    # fp32, so near the published file's 1.79 GB.
    assert 4 * sum(map(math.prod, file.values())) == pytest.approx(1.79e9, rel=0.01)


def test_sizes_are_read_off_the_shapes(world, expert):
    vision, text = expert._model.vision.config, expert._model.text.config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == (128, 3, 2)
    assert (vision.image_size, vision.patch_size, vision.layer_norm_eps) == (32, 8, 1e-6)
    assert (text.hidden_size, text.num_hidden_layers, text.num_attention_heads) == (192, 2, 3)
    assert text.layer_norm_eps == 1e-12 and text.encoder_hidden_size == 128
    weights = {official_name(k): v for k, v in expert._model.state_dict().items()}
    assert all(torch.equal(tensor, world[0].state[key]) for key, tensor in weights.items())


def test_vocabularies(world, expert, batch, tmp_path):
    folder = world[1].parent
    world[0].tokenizer.save_pretrained(tmp_path)  # a tokenizer.json with [DEC] and [ENC]
    part = [p[:4] for p in batch]
    for config in (folder, folder / "vocab.txt", tmp_path, tmp_path / "tokenizer.json"):
        other = ImageReward(world[1], config=config)
        assert torch.equal(other.score(*part), expert.score(*part))
    lines = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "med_config.json").write_text('{"architectures": ["BertModel"]}')
    for name, content in (("long.txt", [*lines, "more"]), ("short.txt", lines[:-1])):
        (tmp_path / name).write_text("\n".join(content), encoding="utf-8")
    larger = tmp_path / "larger.pt"
    torch.save({**world[0].state, WORDS: torch.zeros(1040, 192)}, larger)
    with pytest.raises(ValueError, match="vocab.txt: 1032 tokens with .*, the checkpoint has 1040"):
        ImageReward(larger, config=folder / "vocab.txt")
    for config, said in (
        (empty, "empty: holds neither tokenizer.json nor vocab.txt.*ImageReward"),
        (tmp_path / "long.txt", "long.txt: 1033 tokens with .*, the checkpoint has 1032"),
        (tmp_path / "short.txt", r"short.txt: '\?' has id None.*ImageReward"),
        (tmp_path / "med_config.json", "med_config.json: not a BERT vocabulary"),
        (tmp_path / "vocab.bin", "vocab.bin: wanted a vocab.txt or tokenizer.json"),
    ):
        with pytest.raises(ValueError, match=said) as caught:
            ImageReward(world[1], config=config)
        assert "\n" not in str(caught.value)


class Evil:
    def __reduce__(self):
        return (eval, ("1/0",))


V, T = "blip.visual_encoder.", "blip.text_encoder."
QKV = V + "blocks.1.attn.qkv.weight"
WORDS = T + "embeddings.word_embeddings.weight"


def broken_states(state):
    """Contents of a .pt file -> what is said of it."""
    without = lambda key: {k: v for k, v in state.items() if k != key}  # noqa: E731
    wide = {k: torch.zeros(*v.shape[:-1], 96) for k, v in state.items() if k in (WORDS,)}
    return [
        (without(QKV), rf"key '{QKV}' is missing \(1 in all\)"),
        (without(WORDS), f"key '{WORDS}' is missing"),
        (without(V + "pos_embed"), f"key '{V}pos_embed' is missing"),
        (without("mlp.layers.7.bias"), "key 'mlp.layers.7.bias' is missing"),
        (
            {**state, "mlp.layers.8.bias": state["mlp.layers.7.bias"]},
            "unexpected key 'mlp.layers.8",
        ),
        ({**state, "head.0.bias": state["mlp.layers.0.bias"]}, "unexpected key 'head.0.bias'"),
        ({**state, QKV: state[QKV][:100]}, rf"'{QKV}' is \(100, 128\), wanted \(384, 128\)"),
        ({**state, QKV: state[QKV].long()}, f"'{QKV}' is torch.strided torch.int64, no weight"),
        ({**state, **wide}, rf"'{WORDS}' is \(1032, 96\), wanted a width of whole .* heads"),
        ({**state, WORDS: state[WORDS][0]}, rf"'{WORDS}' is \(192,\), wanted 2 dimensions"),
        ({**state, V + "pos_embed": torch.zeros(1, 12, 128)}, "pos_embed' is .1, 12, 128., wanted"),
        (
            {**state, T + "embeddings.position_embeddings.weight": torch.zeros(20, 192)},
            "has 20 rows, a prompt needs 35",
        ),
        ({**state, QKV: [1.0]}, f"'{QKV}' is a list, not a tensor"),
        ({"model": state}, "'model' is a dict, not a tensor"),
        ([state], "wanted a dict of tensors, got list"),
        ({}, "is missing"),
        ({**state, QKV: Evil()}, "not a weights file.*eval"),
    ]


def test_broken_checkpoints_are_named(world, tmp_path):
    vocabulary, bad = world[1].parent, tmp_path / "bad.pt"

    def refused(said):
        with pytest.raises(ValueError, match=f"bad.pt: .*{said}") as caught:
            ImageReward(bad, config=vocabulary)
        assert "\n" not in str(caught.value)

    refused("no such ImageReward checkpoint")
    for content, said in broken_states(world[0].state):
        torch.save(content, bad)
        refused(said)
    whole = world[1].read_bytes()
    for content in (whole[: len(whole) // 2], b"not a checkpoint", b""):
        bad.write_bytes(content)
        refused("not a weights file")
    with pytest.raises(ValueError, match="batch_size"):
        ImageReward(world[1], batch_size=0)


def test_flags_lead_to_the_expert(world, expert, batch, tmp_path):
    alone = tmp_path / "ImageReward.pt"
    alone.write_bytes(world[1].read_bytes())
    paths = {"imagereward_ckpt_path": str(alone)}
    with pytest.raises(UserError, match="^--imagereward_ckpt_path: .*holds neither"):
        build_ensemble(["imagereward"], model="tiny", device="cpu", paths=paths)
    paths["imagereward_config_path"] = str(world[1].parent)
    (built,) = build_ensemble(["imagereward"], model="tiny", device="cpu", paths=paths).experts
    part = [p[:4] for p in batch]
    assert torch.equal(built.score(*part), expert.score(*part))
    with pytest.raises(UserError, match="--imagereward_ckpt_path: .*the tiny world has no"):
        build_ensemble(["imagereward"], model="tiny", device="cpu")
    paths["imagereward_ckpt_path"] = str(tmp_path / "absent.pt")
    said = "^--imagereward_ckpt_path: .*absent.pt: no such ImageReward checkpoint$"
    with pytest.raises(UserError, match=said):
        build_ensemble(["imagereward"], model="tiny", device="cpu", paths=paths)
