"""The static decode step: token by token the CPU path's, few launches, no host in the loop.

The sequence of launches is run with the ops' PyTorch paths over every kind of batch, and with the
Triton kernels (interpreted where there is no GPU) at the smallest shapes.
"""

import dataclasses

import pytest
import torch
from transformers import JanusConfig, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig

from bench.rollout.launches import count_loop_step, count_step, launches_per_step
from engine.model.policy import Policy
from engine.rollout import sample_images, sample_text
from engine.rollout.decoder import StaticDecoder
from engine.rollout.sample import IMAGE_STEP
from engine.rollout.sampling import Sampling, distinct_prompts
from engine.rollout.step import StaticStep
from kernels.cpu.build import library
from kernels.cpu.launch import Launches

# Prompt lengths of a batch; equal numbers are the same prompt.
BATCHES = {
    "one": (7,),
    "mixed lengths": (7, 12, 5),
    "unequal groups": (9, 5, 9, 9, 14, 5),
    "a group beyond a tile": (8,) * 9,
}


def image_sampling(ids, **options):
    settings = {"seed": 3, "temperature": 1.0, "greedy": False, "cfg_weight": 5.0} | options
    return Sampling(image=True, first_step=IMAGE_STEP, sample_ids=ids, **settings)


def decode_images(policy, prompts, **options):
    """ids, logprobs, guided_logprobs in the prompts' order."""
    fused_head = options.pop("fused_head", None)
    distinct, owner, order = distinct_prompts(prompts)
    decoder = StaticDecoder(
        policy,
        distinct,
        owner,
        order,
        steps=policy.image_tokens,
        sampling=image_sampling(order, **options),
        fused_head=fused_head,
    )
    drawn, back = decoder.decode(), order.argsort()
    assert drawn.mask.all()
    return drawn.ids[back], drawn.logprobs[back], drawn.guided_logprobs[back]


def assert_same_rollout(got, rollout):
    ids, logprobs, guided = got
    assert torch.equal(ids, rollout.ids)
    torch.testing.assert_close(logprobs, rollout.logprobs, rtol=0, atol=1e-4)
    torch.testing.assert_close(guided, rollout.guided_logprobs, rtol=0, atol=1e-4)


def decode_text(policy, prompts, steps, seed):
    distinct, owner, order = distinct_prompts(prompts)
    sampling = Sampling(
        image=False, first_step=0, sample_ids=order, temperature=1.0, seed=seed, greedy=False
    )
    decoder = StaticDecoder(policy, distinct, owner, order, steps=steps, sampling=sampling)
    drawn, back = decoder.decode(), order.argsort()
    return drawn.ids[back], drawn.mask[back], drawn.logprobs[back]


def assert_same_text(got, rollout):
    ids, mask, logprobs = got
    assert torch.equal(ids, rollout.ids) and torch.equal(mask, rollout.mask)
    torch.testing.assert_close(logprobs, rollout.logprobs, rtol=0, atol=1e-4)


# The launches on a CPU


@pytest.fixture(params=["C", "PyTorch"])
def ops(request, monkeypatch) -> str:
    """The ops take C, recorded and replayed, then PyTorch."""
    if request.param == "PyTorch":
        monkeypatch.setattr("kernels.cpu.build.library", lambda: None)
    elif library() is None:
        pytest.skip("the C ops cannot be compiled here")
    return request.param


@pytest.fixture(autouse=True)
def eager_rollouts(monkeypatch) -> None:
    """What is compared with comes from engine/rollout/eager.py."""
    monkeypatch.setattr("engine.rollout.sample.has_c_ops", lambda policy: False)


@pytest.mark.usefixtures("ops")
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES.keys())
def test_images_equal_the_cpu_path(pair, make_prompts, lengths, kv_heads):
    _, policy = pair(kv_heads)
    prompts = [make_prompts(n)[0] for n in lengths]
    got = decode_images(policy, prompts)
    assert_same_rollout(got, sample_images(policy, prompts, cfg_weight=5.0, seed=3))


@pytest.mark.usefixtures("ops")
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
def test_sampling_options_equal_the_cpu_path(pair, make_prompts, options):
    _, policy = pair()
    prompts = make_prompts(7, 12)
    got = decode_images(policy, prompts, **options)
    options = {"cfg_weight": 5.0, "seed": 3} | options
    options.pop("fused_head", None)
    assert_same_rollout(got, sample_images(policy, prompts, **options))


@pytest.mark.usefixtures("ops")
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_text_equals_the_cpu_path_and_ends_row_by_row(
    new_policy, make_prompts, monkeypatch, kv_heads
):
    monkeypatch.setattr("engine.rollout.decoder.ALIVE_EVERY", 4)
    policy = new_policy(kv_heads)
    prompts = make_prompts(6, 10, 8, 8)
    policy.eos = -1  # nothing ends
    free = sample_text(policy, prompts, max_new_tokens=12, seed=2)
    assert_same_text(decode_text(policy, prompts, 12, 2), free)
    lengths = set()
    for row, step in ((0, 3), (1, 5)):
        policy.eos = int(free.ids[row, step])
        rollout = sample_text(policy, prompts, max_new_tokens=12, seed=2)
        lengths |= set(rollout.mask.sum(1).tolist())
        assert_same_text(decode_text(policy, prompts, 12, 2), rollout)
    assert len(lengths) > 2


def test_text_stops_soon_after_its_last_row(new_policy, make_prompts, monkeypatch, ops):
    monkeypatch.setattr("engine.rollout.decoder.ALIVE_EVERY", 4)
    policy = new_policy()
    prompts = make_prompts(6)
    policy.eos = -1
    policy.eos = int(sample_text(policy, prompts, max_new_tokens=4, seed=2).ids[0, 2])
    rollout = sample_text(policy, prompts, max_new_tokens=50, seed=2)
    steps, launch, replay = [], StaticStep.launch, Launches.run
    monkeypatch.setattr(StaticStep, "launch", lambda self: (steps.append("launch"), launch(self)))
    monkeypatch.setattr(Launches, "run", lambda self: (steps.append("replay"), replay(self)))
    assert_same_text(decode_text(policy, prompts, 50, 2), rollout)
    used = rollout.ids.shape[1]
    assert used <= 3
    assert steps == (["launch"] + ["replay"] * (used - 1) if ops == "C" else ["launch"] * 4)


@pytest.mark.usefixtures("ops")
def test_pad_that_is_end_of_sequence(new_policy, make_prompts):
    policy = new_policy()
    prompts = make_prompts(6, 10)
    policy.eos = -1
    policy.eos = policy.pad = int(sample_text(policy, prompts, max_new_tokens=9).ids[0, 3])
    rollout = sample_text(policy, prompts, max_new_tokens=9)
    assert_same_text(decode_text(policy, prompts, 9, 0), rollout)


@pytest.mark.usefixtures("ops")
def test_bad_logits_name_row_and_step(new_policy, make_prompts):
    policy = new_policy()
    prompts = make_prompts(7, 9, 7)
    reached = sample_text(policy, prompts, max_new_tokens=8, seed=1)
    # A token that row 1 alone draws, at step 2 first: its embedding spoils step 3.
    token = int(reached.ids[1, 2])
    policy.model.language_model.embed_tokens.weight.data[token] = torch.nan
    with pytest.raises(FloatingPointError, match="row 1 at step 3 "):
        decode_text(policy, prompts, 8, 1)
    with pytest.raises(FloatingPointError, match="row 0 at step 0 "):
        policy = new_policy()
        policy.model.language_model.embed_tokens.weight.data[policy.pad] = torch.nan
        decode_images(policy, prompts)


@pytest.mark.usefixtures("ops")
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
def test_kernels_draw_the_cpu_path_s_images(request, device, kv_heads, lengths):
    policy = tiny_policy(kv_heads)
    expected = sample_images(policy, tiny_prompts("cpu", *lengths), seed=3)
    assert len(set(map(tuple, expected.ids.tolist()))) == len(lengths)
    request.getfixturevalue("interpreter")
    policy = policy.to(device)
    got = sample_images(policy, tiny_prompts(device, *lengths), seed=3)
    fields = [getattr(got, f.name).cpu() for f in dataclasses.fields(got)]
    assert_same_rollout(fields, expected)


def test_kernels_draw_the_cpu_path_s_text(request, device):
    policy = tiny_policy()
    prompts = tiny_prompts("cpu", 4, 6, 3)
    policy.eos = -1
    free = sample_text(policy, prompts, max_new_tokens=4, seed=2)
    policy.eos = int(free.ids[0, 1])
    expected = sample_text(policy, prompts, max_new_tokens=4, seed=2)
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph")
def test_replay_waits_for_nothing_and_takes_no_memory():
    policy = tiny_policy(device="cuda")
    distinct, owner, order = distinct_prompts(tiny_prompts("cuda", 5, 3))
    decoder = StaticDecoder(policy, distinct, owner, order, steps=4, sampling=image_sampling(order))
    advance = decoder.start()
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            advance()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_allocated() == allocated and int(decoder.step.step) == 4
