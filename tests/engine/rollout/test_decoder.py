"""The one decoder: token by token what full forwards draw, few launches, no host in the loop.

The sequence of launches is run with the C ops and the ops' PyTorch paths over every kind of batch,
and with the Triton kernels (interpreted where there is no GPU) at the smallest shapes. What it is
compared with is plain: a whole forward of one row for every token.
"""

import dataclasses

import pytest
import torch
from transformers import JanusConfig, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig

from bench.rollout.launches import count_loop_step, count_step, launches_per_step
from engine.model.policy import Policy
from engine.rollout import sample_images, sample_text
from engine.rollout.decoder import Decoder, decoder_of
from engine.rollout.request import Prompts
from engine.rollout.sample import IMAGE_STEP, ImageRollout, TextRollout, image_request, text_request
from engine.rollout.step import DecodeStep
from kernels import cfg_sample
from kernels.cpu.launch import Launches
from kernels.state import Draw

# Prompt lengths of a batch; equal numbers are the same prompt.
BATCHES = {
    "one": (7,),
    "mixed lengths": (7, 12, 5),
    "unequal groups": (9, 5, 9, 9, 14, 5),
    "a group beyond a tile": (8,) * 9,
}


@torch.no_grad()
def next_draw(policy, level, prompt, ids, **draw):
    """Token, log-prob and guided log-prob after `ids`, by a whole forward of the row's branches."""
    head = policy.head(level)
    prompts = [prompt] if level == "semantic" else [prompt, policy.unconditional(prompt)]
    embeds = policy.embed_text(torch.stack(prompts))
    if len(ids):
        embeds = torch.cat((embeds, head.embed(ids).expand(len(prompts), -1, -1)), 1)
    features = head.features(policy.hidden(embeds)[:, -1])
    cond, *uncond = (features.float() @ head.weight.float().t()).split(1)
    if head.bias is not None:
        cond, uncond = cond + head.bias, [u + head.bias for u in uncond]
    return cfg_sample(cond, uncond[0] if uncond else None, step=draw.pop("step") + len(ids), **draw)


def plain_rollout(policy, level, prompts, steps, **draw):
    """Rows of (ids, logprobs, guided), each until the end of its sequence."""
    draw = {"cfg_weight": 1.0, "temperature": 1.0, "seed": 0} | draw
    eos, rows = policy.head(level).eos, []
    for row, prompt in enumerate(prompts):
        ids, logprobs = torch.empty(0, dtype=torch.int64), []
        while len(ids) < steps and not (len(ids) and eos is not None and int(ids[-1]) == eos):
            sample = torch.tensor([row])
            drawn = next_draw(policy, level, prompt, ids, sample_ids=sample, **draw)
            ids = torch.cat((ids, drawn[0]))
            logprobs.append(torch.cat(drawn[1:]))
        rows.append((ids, *torch.stack(logprobs).t()))
    return rows


def plain_images(policy, prompts, **draw):
    draw = {"cfg_weight": 5.0, "seed": 3} | draw
    rows = plain_rollout(policy, "token", prompts, policy.image_tokens, step=IMAGE_STEP, **draw)
    return ImageRollout(*(torch.stack(fields) for fields in zip(*rows, strict=True)))


def plain_text(policy, prompts, steps, **draw):
    rows = plain_rollout(policy, "semantic", prompts, steps, step=0, **draw)
    width = max(len(ids) for ids, *_ in rows)
    pad = torch.nn.functional.pad
    return TextRollout(
        torch.stack([pad(ids, (0, width - len(ids)), value=policy.pad) for ids, *_ in rows]),
        torch.stack([torch.arange(width) < len(ids) for ids, *_ in rows]),
        torch.stack([pad(logprobs, (0, width - len(logprobs))) for _, logprobs, _ in rows]),
    )


def decode_images(policy, prompts, **options):
    """ids, logprobs, guided_logprobs in the prompts' order."""
    fused_head = options.pop("fused_head", None)
    draw = Draw(**({"seed": 3, "cfg_weight": 5.0} | options))
    request = image_request(policy, torch.arange(len(prompts)), draw)
    decoder = decoder_of(policy, prompts, request, fused_head=fused_head)
    drawn = decoder.decode().rows(Prompts.of(prompts).order.argsort())
    assert drawn.mask.all()
    return drawn.ids, drawn.logprobs, drawn.guided_logprobs


def assert_same_rollout(got, rollout):
    ids, logprobs, guided = got
    assert torch.equal(ids, rollout.ids)
    torch.testing.assert_close(logprobs, rollout.logprobs, rtol=0, atol=1e-4)
    torch.testing.assert_close(guided, rollout.guided_logprobs, rtol=0, atol=1e-4)


def decode_text(policy, prompts, steps, seed):
    request = text_request(torch.arange(len(prompts)), steps, Draw(seed=seed))
    drawn = decoder_of(policy, prompts, request).decode()
    drawn = drawn.rows(Prompts.of(prompts).order.argsort())
    return drawn.ids, drawn.mask, drawn.logprobs


def assert_same_text(got, rollout):
    ids, mask, logprobs = got
    assert torch.equal(ids, rollout.ids) and torch.equal(mask, rollout.mask)
    torch.testing.assert_close(logprobs, rollout.logprobs, rtol=0, atol=1e-4)


# The launches on a CPU


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES.keys())
def test_images_equal_full_forwards(pair, make_prompts, lengths, kv_heads):
    _, policy = pair(kv_heads)
    prompts = [make_prompts(n)[0] for n in lengths]
    got = decode_images(policy, prompts)
    assert_same_rollout(got, plain_images(policy, prompts))


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize(
    "options",
    [
        {"fused_head": True},
        {"greedy": True},
        {"temperature": 1.7, "cfg_weight": 1.0},
        {"top_k": 5},
        {"top_p": 0.8},
    ],
    ids=str,
)
def test_sampling_options_equal_full_forwards(pair, make_prompts, options):
    _, policy = pair()
    prompts = make_prompts(7, 12)
    got = decode_images(policy, prompts, **options)
    options = {k: v for k, v in options.items() if k != "fused_head"}
    assert_same_rollout(got, plain_images(policy, prompts, **options))


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_text_equals_full_forwards_and_ends_row_by_row(
    new_policy, make_prompts, monkeypatch, kv_heads
):
    monkeypatch.setattr("engine.rollout.decoder.ALIVE_EVERY", 4)
    policy = new_policy(kv_heads)
    prompts = make_prompts(6, 10, 8, 8)
    policy.eos = -1  # nothing ends
    free = plain_text(policy, prompts, 12, seed=2)
    assert_same_text(decode_text(policy, prompts, 12, 2), free)
    lengths = set()
    for row, step in ((0, 3), (1, 5)):
        policy.eos = int(free.ids[row, step])
        rollout = plain_text(policy, prompts, 12, seed=2)
        lengths |= set(rollout.mask.sum(1).tolist())
        assert_same_text(decode_text(policy, prompts, 12, 2), rollout)
    assert len(lengths) > 2


def test_text_stops_soon_after_its_last_row(new_policy, make_prompts, monkeypatch, decoder):
    monkeypatch.setattr("engine.rollout.decoder.ALIVE_EVERY", 4)
    policy = new_policy()
    prompts = make_prompts(6)
    policy.eos = -1
    policy.eos = int(plain_text(policy, prompts, 4, seed=2).ids[0, 2])
    rollout = plain_text(policy, prompts, 50, seed=2)
    steps, launch, replay = [], DecodeStep.launch, Launches.run
    monkeypatch.setattr(DecodeStep, "launch", lambda self: (steps.append("launch"), launch(self)))
    monkeypatch.setattr(Launches, "run", lambda self: (steps.append("replay"), replay(self)))
    assert_same_text(decode_text(policy, prompts, 50, 2), rollout)
    used = rollout.ids.shape[1]
    assert used <= 3
    assert steps == (["launch"] + ["replay"] * (used - 1) if decoder == "C" else ["launch"] * 4)


@pytest.mark.usefixtures("decoder")
def test_pad_that_is_end_of_sequence(new_policy, make_prompts):
    policy = new_policy()
    prompts = make_prompts(6, 10)
    policy.eos = -1
    policy.eos = policy.pad = int(plain_text(policy, prompts, 9).ids[0, 3])
    rollout = plain_text(policy, prompts, 9)
    assert_same_text(decode_text(policy, prompts, 9, 0), rollout)


@pytest.mark.usefixtures("decoder")
def test_bad_logits_name_row_and_step(new_policy, make_prompts):
    policy = new_policy()
    prompts = make_prompts(7, 9, 7)
    reached = plain_text(policy, prompts, 8, seed=1)
    # A token that row 1 alone draws, at step 2 first: its embedding spoils step 3.
    token = int(reached.ids[1, 2])
    policy.model.language_model.embed_tokens.weight.data[token] = torch.nan
    with pytest.raises(FloatingPointError, match="row 1 at step 3 "):
        decode_text(policy, prompts, 8, 1)
    with pytest.raises(FloatingPointError, match="row 0 at step 0 "):
        policy = new_policy()
        policy.model.language_model.embed_tokens.weight.data[policy.pad] = torch.nan
        decode_images(policy, prompts)


@pytest.mark.usefixtures("decoder")
def test_uninitialised_memory_is_never_read(pair, make_prompts, monkeypatch):
    _, policy = pair(2)
    prompts = make_prompts(7, 11, 5)
    clean = decode_images(policy, prompts)
    empty = torch.empty

    def filled(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", filled)
    for a, b in zip(clean, decode_images(policy, prompts), strict=True):
        assert torch.equal(a, b)


# The Triton kernels


def tiny_policy(kv_heads: int = 2, device: str = "cpu") -> Policy:
    """One layer, two heads, four image tokens: what the interpreter can do in seconds."""
    text = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=kv_heads,
        max_position_embeddings=64,
    )
    vq = JanusVQVAEConfig(
        embed_dim=8,
        num_embeddings=32,
        latent_channels=32,
        base_channels=32,
        channel_multiplier=[1, 1],
        num_res_blocks=1,
        projection_dim=32,
        image_token_embed_dim=32,
        num_patches=2,
    )
    vision = JanusVisionConfig(image_size=2, patch_size=1, num_hidden_layers=1)
    torch.manual_seed(0)
    policy = Policy(JanusConfig(text_config=text, vision_config=vision, vq_config=vq)).eval()
    for name, parameter in policy.named_parameters():
        if parameter.ndim == 2 and "vqmodel" not in name:
            parameter.data.normal_(0, 2 * parameter.shape[1] ** -0.5)
    policy.freeze_generation()
    return policy.to(device)


def tiny_prompts(device, *lengths):
    rng = torch.Generator().manual_seed(1)
    words = {n: torch.randint(4, 48, (n,), generator=rng).to(device) for n in lengths}
    return [words[n] for n in lengths]


@pytest.mark.parametrize(("kv_heads", "lengths"), [(2, (5, 3, 5)), (1, (4, 6))])
def test_kernels_draw_plain_images(request, device, kv_heads, lengths):
    policy = tiny_policy(kv_heads)
    expected = plain_images(policy, tiny_prompts("cpu", *lengths))
    assert len(set(map(tuple, expected.ids.tolist()))) == len(lengths)
    request.getfixturevalue("interpreter")
    policy = policy.to(device)
    got = sample_images(policy, tiny_prompts(device, *lengths), seed=3)
    fields = [getattr(got, f.name).cpu() for f in dataclasses.fields(got)]
    assert_same_rollout(fields, expected)


def test_kernels_draw_plain_text(request, device):
    policy = tiny_policy()
    prompts = tiny_prompts("cpu", 4, 6, 3)
    policy.eos = -1
    free = plain_text(policy, prompts, 4, seed=2)
    policy.eos = int(free.ids[0, 1])
    expected = plain_text(policy, prompts, 4, seed=2)
    assert len(set(expected.mask.sum(1).tolist())) > 1
    request.getfixturevalue("interpreter")
    policy = policy.to(device)
    got = sample_text(policy, tiny_prompts(device, 4, 6, 3), max_new_tokens=4, seed=2)
    assert_same_text([t.cpu() for t in (got.ids, got.mask, got.logprobs)], expected)


# Launches


@pytest.fixture(scope="module")
def bf16_policy():
    return tiny_policy().to(torch.bfloat16)


def test_launches_a_step(pair):
    """At most 10 a layer and 6 more; the published loop takes four times as many in a layer."""
    _, policy = pair()
    counted = launches_per_step(Policy(policy.config).to(torch.bfloat16))
    assert counted["layers"] == 2
    assert counted["text_step"] <= counted["image_step"] <= counted["allowed"] == 26
    assert counted["eager_loop_layer"] >= 40
    assert counted["eager_loop_step"] > 2 * counted["eager_loop_layer"]


def test_every_launch_is_counted_and_none_waits(bf16_policy):
    """Ten kernels of a layer and the last norm and head; no value read back, no memory taken."""
    counted = count_step(bf16_policy, image=True)
    assert counted.total == 15 and counted.names["mm"] == 4 and counted.names["addmm"] == 1
    assert counted.allocated == 0 and "_local_scalar_dense" not in counted.names
    assert count_step(bf16_policy, image=False).total == 13


def test_counting_without_running_counts_what_runs(device, interpreter):
    policy = tiny_policy(device=device)
    ran = count_step(policy, image=True, run_triton=True)
    assert ran.names == count_step(policy, image=True).names


def test_loop_counts_do_not_depend_on_the_step(bf16_policy):
    assert count_loop_step(bf16_policy) == count_loop_step(bf16_policy)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph")
def test_replay_waits_for_nothing_and_takes_no_memory():
    policy = tiny_policy(device="cuda")
    request = image_request(policy, torch.arange(2, device="cuda"), Draw(seed=3, cfg_weight=5.0))
    decoder: Decoder = decoder_of(policy, tiny_prompts("cuda", 5, 3), request)
    advance = decoder.start()
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            advance()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_allocated() == allocated and int(decoder.step.state.step) == 4
