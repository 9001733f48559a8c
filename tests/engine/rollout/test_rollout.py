"""Rollouts: independent of their batch, equal to the training forward and to transformers."""

import gc

import pytest
import torch
from transformers import GenerationConfig

import engine.rollout.step
from bench.rollout.transformers_images import generated_tokens
from engine.model.layers import Layer
from engine.model.sequences import Sequences
from engine.rollout import sample_images, sample_text
from engine.rollout.decoder import Decoder
from engine.rollout.prefill import Prepared
from engine.rollout.request import Prompts
from engine.rollout.sample import text_request
from engine.settings.errors import UserError
from kernels.state import Draw

pytestmark = pytest.mark.usefixtures("decoder")

# Prompt lengths of a batch; equal numbers are the same prompt.
BATCHES = {
    "one": (7,),
    "mixed lengths": (7, 12, 5),
    "equal groups": (7, 12, 7, 12, 7, 12),
    "unequal groups": (9, 5, 9, 9, 14, 5),
    "one group": (8, 8, 8),
}


@pytest.fixture(params=BATCHES.values(), ids=BATCHES.keys())
def prompts(request, make_prompts):
    return [make_prompts(n)[0] for n in request.param]


@pytest.fixture(params=[4, 2], ids=["MHA", "GQA"])
def policy(request, pair):
    return pair(request.param)[1]


@torch.no_grad()
def test_images_equal_alone_and_training_forward(policy, prompts):
    rollout = sample_images(policy, prompts, cfg_weight=5.0, seed=3)
    assert rollout.ids.shape == rollout.logprobs.shape == (len(prompts), 16)
    assert rollout.ids.min() >= 0 and rollout.ids.max() < 128
    for i, prompt in enumerate(prompts):
        alone = sample_images(
            policy, [prompt], cfg_weight=5.0, seed=3, sample_ids=torch.tensor([i])
        )
        assert torch.equal(alone.ids[0], rollout.ids[i])
        torch.testing.assert_close(alone.logprobs[0], rollout.logprobs[i], rtol=0, atol=1e-5)
        cond = policy.image_logprobs(prompt, rollout.ids[i])
        guided = policy.image_logprobs(prompt, rollout.ids[i], cfg_weight=5.0)
        torch.testing.assert_close(rollout.logprobs[i], cond, rtol=0, atol=1e-4)
        torch.testing.assert_close(rollout.guided_logprobs[i], guided, rtol=0, atol=1e-4)
    if len(prompts) > 1:
        assert not torch.equal(rollout.ids[0], rollout.ids[-1])  # a sample id each


@torch.no_grad()
def test_text_equals_alone_and_training_forward(policy, prompts):
    rollout = sample_text(policy, prompts, max_new_tokens=9, seed=5)
    for i, prompt in enumerate(prompts):
        n = int(rollout.mask[i].sum())
        alone = sample_text(
            policy, [prompt], max_new_tokens=9, seed=5, sample_ids=torch.tensor([i])
        )
        assert torch.equal(alone.ids[0, :n], rollout.ids[i, :n]) and int(alone.mask.sum()) == n
        torch.testing.assert_close(
            alone.logprobs[0, :n], rollout.logprobs[i, :n], rtol=0, atol=1e-5
        )
        forward = policy.text_logprobs(prompt, rollout.ids[i, :n])
        torch.testing.assert_close(rollout.logprobs[i, :n], forward, rtol=0, atol=1e-4)


def test_temperature_is_that_of_the_returned_logprobs(pair, make_prompts):
    _, policy = pair()
    (prompt,) = make_prompts(7)
    rollout = sample_images(policy, [prompt], cfg_weight=1.0, temperature=2.0, seed=1)
    with torch.no_grad():
        hidden = policy.completion_hidden(Sequences("token", [prompt], rollout.ids))[0]
        logits = policy.model.generation_head(hidden) / 2.0
    expected = logits.log_softmax(-1).gather(1, rollout.ids[0, :, None])[:, 0]
    torch.testing.assert_close(rollout.logprobs[0], expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(rollout.guided_logprobs[0], expected, rtol=0, atol=1e-4)


def test_text_stops_at_end_of_sequence(new_policy, make_prompts):
    policy = new_policy()
    prompts = make_prompts(6, 10, 8, 8)
    policy.eos = -1  # nothing ends
    free = sample_text(policy, prompts, max_new_tokens=12, seed=2)
    assert free.ids.shape == (4, 12)
    # Call end-of-sequence what row 0 says at step 3, and row 1 at step 5.
    for row, step in ((0, 3), (1, 5)):
        policy.eos = int(free.ids[row, step])
        rollout = sample_text(policy, prompts, max_new_tokens=12, seed=2)
        for i in range(4):
            ends = (free.ids[i] == policy.eos).nonzero()
            n = int(ends[0]) + 1 if len(ends) else 12
            n = min(n, rollout.ids.shape[1])
            assert rollout.mask[i].tolist() == [True] * n + [False] * (rollout.ids.shape[1] - n)
            assert torch.equal(rollout.ids[i, :n], free.ids[i, :n])
            assert (rollout.ids[i, n:] == policy.pad).all()
            assert (rollout.logprobs[i, n:] == 0).all()
            torch.testing.assert_close(
                rollout.logprobs[i, :n], free.logprobs[i, :n], rtol=0, atol=1e-5
            )
    alone = sample_text(
        policy, prompts[1:2], max_new_tokens=12, seed=2, sample_ids=torch.tensor([1])
    )
    assert alone.ids.shape[1] == int(rollout.mask[1].sum()) <= 6  # no step after the last row ended


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_greedy_images_equal_transformers_generate(pair, make_prompts, kv_heads):
    theirs, ours = pair(kv_heads)
    prompts = make_prompts(9, 9, 9)
    theirs.generation_config = GenerationConfig(
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        guidance_scale=3.0,
        generation_kwargs={"boi_token_id": 3},
    )
    expected = generated_tokens(theirs, torch.stack(prompts), do_sample=False)
    rollout = sample_images(ours, prompts, cfg_weight=3.0, greedy=True)
    assert len(set(map(tuple, expected.tolist()))) == 3
    assert torch.equal(rollout.ids, expected)


def test_greedy_text_equals_the_argmax_of_the_forward(pair, make_prompts):
    _, policy = pair()
    (prompt,) = make_prompts(6)
    rollout = sample_text(policy, [prompt], max_new_tokens=8, greedy=True)
    with torch.no_grad():
        hidden = policy.completion_hidden(Sequences("semantic", [prompt], rollout.ids))[0]
    assert torch.equal(policy.lm_head(hidden).argmax(-1), rollout.ids[0])


def test_seed_and_sample_ids_decide(pair, make_prompts):
    _, policy = pair()
    prompts = make_prompts(7, 7)
    one = sample_images(policy, prompts, seed=1)
    assert torch.equal(one.ids, sample_images(policy, prompts, seed=1).ids)
    assert not torch.equal(one.ids, sample_images(policy, prompts, seed=2).ids)
    moved = sample_images(policy, prompts, seed=1, sample_ids=torch.tensor([0, 2**34]))
    assert torch.equal(one.ids[0], moved.ids[0]) and not torch.equal(one.ids[1], moved.ids[1])
    assert (
        sample_images(policy, prompts, seed=1, top_k=1).ids
        == sample_images(policy, prompts, greedy=True).ids
    ).all()


@pytest.mark.parametrize("sampler", ["images", "text"])
def test_prefix_is_computed_once_and_memory_does_not_grow(pair, make_prompts, monkeypatch, sampler):
    """Layer forwards are the prefill's only, and tensors alive at a step do not grow with it."""
    _, policy = pair()
    prompts = [p for p in make_prompts(10, 13) for _ in range(3)]
    forwards, alive = [], []
    forward = Layer.forward

    def counted_forward(self, x, cos, sin):
        forwards.append(tuple(x.shape[:2]))
        return forward(self, x, cos, sin)

    def counted_draw(*args):
        if int(args[-1].step) % 16 in (2, 13):
            storages = {
                t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in gc.get_objects()
                if type(t) in (torch.Tensor, torch.nn.Parameter) and t.layout == torch.strided
            }
            alive.append(sum(storages.values()))
        return draw(*args)

    monkeypatch.setattr(Layer, "forward", counted_forward)
    # Steps are launched one by one, to be looked at.
    draw, start = engine.rollout.step.sample_step, Decoder.start
    monkeypatch.setattr(engine.rollout.step, "sample_step", counted_draw)
    monkeypatch.setattr(Decoder, "start", lambda self, **_: start(self, capture=False))
    if sampler == "images":
        sample_images(policy, prompts)
        distinct = 3  # two prompts and the unconditional one
    else:
        monkeypatch.setattr(policy, "eos", -1)  # nothing ends
        sample_text(policy, prompts, max_new_tokens=16)
        distinct = 2
    assert len(alive) == 2 and alive[1] - alive[0] <= 4096
    # One call a layer but the last, of which only keys and values are made; a row a distinct prompt.
    assert forwards == [(distinct, 12)]


@pytest.mark.parametrize("sampler", ["images", "text"])
def test_portions_that_fit_the_cache_change_nothing(
    new_policy, make_prompts, monkeypatch, sampler, decoder
):
    """20 samples 9 at most at a time are 7, 7 and 6; a cache that holds 7 takes all at once."""
    policy, prompts = new_policy(), make_prompts(*[6, 9, 12, 7, 10] * 4)
    policy.eos = -1
    policy.eos = int(sample_text(policy, prompts, max_new_tokens=16, seed=1).ids[0, 2])

    def run():
        if sampler == "images":
            return sample_images(policy, prompts, seed=1)
        return sample_text(policy, prompts, max_new_tokens=16, seed=1)

    weights = sum(layer.nbytes for layer in policy.weights.layers())
    tokens = 12 + 16 + (16 if sampler == "images" else 0)
    sample = tokens * policy.shape.kv_bytes(policy.dtype)
    rows, make = [], Decoder.__init__

    def counted(self, prepared, prompts, request):
        rows.append(len(prompts.owner))
        make(self, prepared, prompts, request)

    monkeypatch.setattr(Decoder, "__init__", counted)
    found = []
    for fitting in (9, 7):
        size = 2 * (weights + fitting * sample) + 2
        monkeypatch.setattr("engine.rollout.decoder._cache_bytes", lambda size=size: size)
        found.append(run())
    assert rows == [7, 7, 6, 20]
    assert torch.equal(found[0].ids, found[1].ids)
    # The C ops' rows do not depend on their number; a BLAS's rounding may.
    atol = 0 if decoder == "C" else 1e-5
    torch.testing.assert_close(found[0].logprobs, found[1].logprobs, rtol=0, atol=atol)
    if sampler == "text":
        assert torch.equal(found[0].mask, found[1].mask)
        assert len(set(found[0].mask.sum(1).tolist())) > 1


def test_uninitialised_memory_is_never_read(pair, make_prompts, monkeypatch):
    _, policy = pair(2)
    prompts = make_prompts(7, 11, 5)
    clean = sample_images(policy, prompts, seed=4), sample_text(policy, prompts, max_new_tokens=6)
    empty = torch.empty

    def filled(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.fill_(1 << 40)

    monkeypatch.setattr(torch, "empty", filled)
    dirty = sample_images(policy, prompts, seed=4), sample_text(policy, prompts, max_new_tokens=6)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a.ids, b.ids) and torch.equal(a.logprobs, b.logprobs)


# Errors


def test_impossible_requests_are_refused(pair, make_prompts):
    _, policy = pair()
    good, long = make_prompts(7, 50)
    with pytest.raises(UserError, match=r"^prompts: wanted at least one"):
        sample_images(policy, [])
    with pytest.raises(UserError, match=r"^prompt 1: 50 tokens and 16 to generate"):
        sample_images(policy, [good, long])
    with pytest.raises(UserError, match=r"^prompt 0: 7 tokens and 58 to generate"):
        sample_text(policy, [good], max_new_tokens=58)
    sample_text(policy, [good], max_new_tokens=57)  # fills the context exactly
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(UserError, match=r"^temperature: wanted > 0"):
            sample_images(policy, [good], temperature=temperature)
    with pytest.raises(UserError, match=r"^prompt 1: wanted at least 2 tokens"):
        sample_text(policy, [good, good[:1]], max_new_tokens=4)
    with pytest.raises(ValueError, match=r"^sample_ids: wanted"):
        sample_images(policy, [good], sample_ids=torch.arange(2))


def test_non_finite_weights_name_row_and_step(new_policy, make_prompts):
    policy = new_policy()
    prompts = make_prompts(7, 9, 7)
    reached = sample_text(policy, prompts, max_new_tokens=8, seed=1)
    # A token that row 1 alone draws, at step 2 first: its embedding spoils step 3.
    token = int(reached.ids[1, 2])
    assert (reached.ids == token).sum() == (reached.ids[1] == token).sum()
    assert not any((p == token).any() for p in prompts) and token not in reached.ids[1, :2]
    policy.model.language_model.embed_tokens.weight.data[token] = torch.nan
    with pytest.raises(FloatingPointError, match="row 1 at step 3 "):
        sample_text(policy, prompts, max_new_tokens=8, seed=1)
    policy = new_policy()
    policy.model.language_model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="row 0 at step 0 "):
        sample_images(policy, prompts)


def test_non_finite_unconditional_branch_is_found(new_policy, make_prompts):
    """The pad embedding enters the unconditional rows only, and so only the guided logits."""
    policy = new_policy()
    policy.model.language_model.embed_tokens.weight.data[policy.pad] = torch.nan
    with pytest.raises(FloatingPointError, match="row 0 at step 0 "):
        sample_images(policy, make_prompts(7, 9))


def test_weights_that_changed_since_they_were_prepared_are_refused(new_policy, make_prompts):
    policy = new_policy()
    request = text_request(torch.arange(1), 4, Draw())
    rows = Prompts.of(make_prompts(6))
    prepared = Prepared(policy, rows, request)
    Decoder(prepared, rows, request)
    with torch.no_grad():
        policy.model.language_model.layers[1].mlp.down_proj.weight.add_(1)
    with pytest.raises(ValueError, match=r"^prepared: the weights have changed"):
        Decoder(prepared, rows, request)
