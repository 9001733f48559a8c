"""The packed forward of a batch against every row alone: values, gradients, and work done."""

import copy

import pytest
import torch
from torch import Tensor

import engine.model.token_tree
from engine.learner.levels import Experience, Level
from engine.learner.objective import token_weights
from engine.model.policy import Policy
from engine.model.sequences import Sequences
from engine.model.token_tree import Gather, TokenTree, Window, worthwhile_tree
from engine.settings.train import TrainConfig
from tests.engine.learner.conftest import policy_loss

SHAPES = [(4, False), (2, False), (4, True)]  # (key/value heads, tied): MHA, GQA, tied


@pytest.fixture
def always(monkeypatch):
    """Every batch of two rows takes the tree, and attention as many calls as spare anything."""
    monkeypatch.setattr(engine.model.token_tree, "TREE_SPARES", -1.0)
    monkeypatch.setattr(engine.model.token_tree, "CALL_SPARES", 1e-9)


def ids(*values: int) -> Tensor:
    return torch.tensor(values)


def draw(*shape: int, below: int = 300, seed: int = 0) -> Tensor:
    return torch.randint(5, below, shape, generator=torch.Generator().manual_seed(seed))


def groups(make_prompts) -> list[Tensor]:
    """Groups of 3, 1 and 2 rows; the first prompt is a beginning of the third's."""
    a, b = make_prompts(9, 5)
    longer = torch.cat((a, ids(77)))
    return [a, a, a, b, longer, longer]


def unconditional(policy: Policy) -> list[Tensor]:
    return [policy.unconditional(torch.zeros(n, dtype=torch.int64)) for n in (5, 12, 8, 12, 6, 7)]


def outcome(policy: Policy, hidden: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Rows of hidden states, and gradients of a random projection of them."""
    flat = torch.cat(hidden)
    policy.zero_grad()
    weights = torch.randn(flat.shape, generator=torch.Generator().manual_seed(3))
    (flat * weights.to(flat)).sum().backward()
    grads = {k: p.grad.clone() for k, p in policy.trainable().items() if p.grad is not None}
    return flat.detach(), grads


def asked(prompts, completions, lengths=None, *, image, share=True) -> Sequences:
    return Sequences("token" if image else "semantic", prompts, completions, lengths, share)


def alone(policy: Policy, prompts, completions, lengths, *, image):
    """Each row as a batch of its own, without what is past its end."""
    return [
        policy.completion_hidden(asked([p], c[None, :n], image=image, share=False))[0]
        for p, c, n in zip(prompts, completions, lengths, strict=True)
        if n
    ]


def together(policy: Policy, prompts, completions, lengths, *, image):
    lengths = torch.tensor(lengths)
    hidden = policy.completion_hidden(asked(prompts, completions, lengths, image=image))
    return [row[:n] for row, n in zip(hidden, lengths, strict=True)]


def assert_same(got, expected, tolerance: float) -> None:
    """Largest difference relative to the largest value, of states and of every gradient."""
    (hidden, grads), (wanted_hidden, wanted) = got, expected
    assert grads.keys() == wanted.keys() and "model.language_model.embed_tokens.weight" in grads
    for name, a, b in [
        ("hidden", hidden, wanted_hidden),
        *((k, grads[k], wanted[k]) for k in wanted),
    ]:
        assert a.shape == b.shape and (a - b).abs().max() <= tolerance * b.abs().max(), name


def spread(prompts: list[Tensor], lengths: list[int], completions: Tensor, image: bool) -> int:
    """Distinct beginnings of the sequences that are fed."""
    kind = "image" if image else "text"
    rows = [
        [*(("text", int(i)) for i in p), *((kind, int(i)) for i in c[: max(n - 1, 0)])]
        for p, c, n in zip(prompts, completions, lengths, strict=True)
    ]
    return len({tuple(row[: j + 1]) for row in rows for j in range(len(row))})


# Values and gradients


@pytest.mark.parametrize(("kv_heads", "tied"), SHAPES)
@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_groups_equal_every_row_alone(
    new_policy, make_prompts, kv_heads, tied, image, dtype, tolerance
):
    policy = new_policy(kv_heads, tied).to(dtype)
    prompts, completions = groups(make_prompts), draw(6, 8, below=128)
    completions[1] = completions[0]  # two samples may be the same
    lengths = [8, 8, 3, 8, 1, 5]
    seen = count_tokens(policy)
    got = outcome(policy, together(policy, prompts, completions, lengths, image=image))
    assert seen == [spread(prompts, lengths, completions, image)] * 2  # it was packed
    expected = outcome(policy, alone(policy, prompts, completions, lengths, image=image))
    assert_same(got, expected, tolerance)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_unconditional_prompts_share_their_pads(new_policy, kv_heads):
    policy = new_policy(kv_heads).double()
    prompts, completions, lengths = unconditional(policy), draw(6, 16, below=128), [16] * 6
    seen = count_tokens(policy)
    got = outcome(policy, together(policy, prompts, completions, lengths, image=True))
    # BOS and 10 pads once; image-start once for each of 5 lengths; 15 image tokens of each row.
    assert seen == [11 + 5 + 6 * 15] * 2
    assert_same(
        got, outcome(policy, alone(policy, prompts, completions, lengths, image=True)), 1e-10
    )


@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
@pytest.mark.parametrize("seed", range(4))
def test_any_tree_equals_every_row_alone(new_policy, always, seed, image):
    """Three ids only, so that rows branch anywhere, end inside each other and repeat."""
    policy = new_policy(2).double()
    rng = torch.Generator().manual_seed(seed)
    prompts = [
        torch.cat((ids(0), torch.randint(5, 8, (int(n),), generator=rng)))
        for n in torch.randint(0, 6, (9,), generator=rng)
    ]
    completions = torch.randint(5, 8, (9, 6), generator=rng)
    lengths = torch.randint(0, 7, (9,), generator=rng).tolist()
    tree = TokenTree(prompts, completions, torch.tensor(lengths), own_ids=image)
    assert len(tree.positions) == spread(prompts, lengths, completions, image)
    got = outcome(policy, together(policy, prompts, completions, lengths, image=image))
    assert_same(
        got, outcome(policy, alone(policy, prompts, completions, lengths, image=image)), 1e-10
    )


def test_one_completion_token_needs_the_prompts_only(new_policy, make_prompts):
    policy = new_policy().double()
    prompts, completions = groups(make_prompts), draw(6, 1)
    seen = count_tokens(policy)
    got = outcome(policy, together(policy, prompts, completions, [1] * 6, image=False))
    assert seen == [10 + 5 - 1] * 2  # BOS is shared by all
    assert_same(
        got, outcome(policy, alone(policy, prompts, completions, [1] * 6, image=False)), 1e-10
    )


def test_an_image_token_is_no_text_token_of_the_same_id(new_policy, always):
    policy = new_policy().double()
    prompts, completions = [ids(0, 9, 3), ids(0, 9, 3, 11)], torch.tensor([[11, 12, 13]] * 2)
    got = outcome(policy, together(policy, prompts, completions, [3, 3], image=True))
    assert_same(
        got, outcome(policy, alone(policy, prompts, completions, [3, 3], image=True)), 1e-10
    )


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_rounded_weights_lose_no_more_than_every_row_alone(
    new_policy, make_prompts, device, kv_heads
):
    prompts = [p.to(device) for p in make_prompts(24) * 12]
    completions, lengths = draw(12, 6).to(device), [6] * 12
    policy = new_policy(kv_heads).to(device, torch.bfloat16)
    exact = copy.deepcopy(policy).double()
    expected = outcome(exact, alone(exact, prompts, completions, lengths, image=False))[1]
    ours, plain = (
        {k: (g - expected[k]).norm() / expected[k].norm() for k, g in grads.items()}
        for _, grads in (
            outcome(policy, forward(policy, prompts, completions, lengths, image=False))
            for forward in (together, alone)
        )
    )
    assert all(ours[k] <= 2 * plain[k] for k in plain) and max(plain.values()) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_shared_gradient_is_rounded_once(dtype):
    index, used = torch.tensor([[1] * 600, [2, 0] * 300]), torch.ones(2, 600, dtype=torch.bool)
    used[1, ::2] = False  # row 2's
    x = torch.randn(4, 8, dtype=dtype, requires_grad=True)
    rows = Gather(index, used, 4, x.device)(x)
    assert torch.equal(rows, x[index])
    weights = torch.rand(rows.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    (rows * weights).sum().backward()
    expected = torch.zeros(4, 8, dtype=torch.float64)
    expected[1], expected[0] = weights[0].double().sum(0), weights[1, 1::2].double().sum(0)
    assert not x.grad[2:].any()
    bound = torch.finfo(dtype).eps + 600 * 2**-24  # of the result, of the fp32 sum of 600
    assert ((x.grad - expected).abs() <= bound * expected).all()


def test_micro_batches_that_cut_groups_sum_to_the_whole(new_policy, make_prompts):
    policy = new_policy().double()
    prompts = [p for p in make_prompts(12, 7, 12) for _ in range(4)]
    completions, lengths = draw(12, 6), [6, 2, 5, 6] * 3
    whole = outcome(policy, together(policy, prompts, completions, lengths, image=False))
    parts = []
    for start, stop in ((0, 3), (3, 6), (6, 7), (7, 12)):
        cut = slice(start, stop)
        parts += together(policy, prompts[cut], completions[cut], lengths[cut], image=False)
    assert_same(outcome(policy, parts), whole, 1e-10)


def test_past_its_length_a_row_is_zero_and_holds_anything(new_policy, make_prompts):
    policy = new_policy()
    prompts, completions = groups(make_prompts), draw(6, 8)
    lengths = torch.tensor([8, 0, 3, 6, 1, 5])
    past = torch.arange(8) >= lengths[:, None]
    for share in (True, False):
        first, second = (
            policy.completion_hidden(asked(prompts, c, lengths, image=False, share=share))
            for c in (completions, completions.masked_fill(past, 9))
        )
        assert torch.equal(first, second) and not first[past].any()
        assert first[~past].norm(dim=-1).min() > 0.1


# Work


def count_tokens(policy: Policy) -> list[int]:
    """Tokens that pass through each MLP, filled in as forwards run."""
    seen: list[int] = []
    for layer in policy.model.language_model.layers:
        layer.mlp.register_forward_hook(lambda _m, args, _out: seen.append(args[0][..., 0].numel()))
    return seen


@torch.no_grad()
def test_a_groups_prompt_is_computed_once(new_policy, make_prompts):
    policy = new_policy()
    prompts, completions = make_prompts(20) * 8, draw(8, 11)
    seen = count_tokens(policy)
    policy.completion_hidden(asked(prompts, completions, image=False))
    assert seen == [20 + 8 * 10] * 2
    seen.clear()
    policy.completion_hidden(asked(prompts, completions, image=False, share=False))
    assert seen == [8 * 30] * 2
    seen.clear()
    lengths = torch.tensor([11, 1, 4, 4, 11, 2, 3, 8])
    policy.completion_hidden(asked(prompts, completions, lengths, image=False))
    assert seen == [20 + int(lengths.sum()) - 8] * 2


@torch.no_grad()
def test_second_stage_prompts_share_what_precedes_the_plans(new_policy, make_prompts):
    policy = new_policy()
    (request,) = make_prompts(15)
    plans = [draw(n, seed=n) for n in (6, 9, 6, 4)]  # two samples wrote the same plan
    prompts = [torch.cat((request, plan)) for plan in plans]
    seen = count_tokens(policy)
    policy.completion_hidden(asked(prompts, draw(4, 16, below=128), image=True))
    assert seen == [15 + 6 + 9 + 4 + 4 * 15] * 2


@torch.no_grad()
def test_attention_asks_for_a_prompt_once(new_policy, make_prompts, monkeypatch):
    policy, attend, queries = new_policy(), Window.attend, []

    def counting(window, *tensors):
        out = attend(window, *tensors)
        queries.append(len(out))
        return out

    monkeypatch.setattr(Window, "attend", counting)
    policy.completion_hidden(asked(make_prompts(40) * 8, draw(8, 11), image=False))
    # The first row asks for the prompt and its own completion; two layers.
    assert queries == [50, 7 * 10] * 2


def test_a_batch_that_shares_nothing_is_not_packed(make_prompts):
    lengths = torch.full((4,), 16)
    images = draw(4, 16, below=128)
    assert worthwhile_tree(make_prompts(9, 9, 9, 9), images, lengths, own_ids=True) is None
    assert worthwhile_tree(make_prompts(9, 9, 9, 9), images, None, own_ids=True) is None
    assert worthwhile_tree(make_prompts(9), images[:1], lengths[:1], own_ids=True) is None
    assert worthwhile_tree(make_prompts(9) * 4, images, None, own_ids=True) is not None
    assert worthwhile_tree(make_prompts(9, 30, 9, 9), images, None, own_ids=True) is not None
    assert (
        worthwhile_tree(make_prompts(9, 9), images[:2], lengths[:2] // 4, own_ids=True) is not None
    )


@pytest.mark.parametrize("logprob_policy", ["conditional", "guided", "guided_detached"])
def test_the_option_changes_the_work_and_nothing_else(
    new_policy, make_prompts, monkeypatch, logprob_policy
):
    policy = new_policy()
    stage1 = [p for p in make_prompts(14, 9) for _ in range(3)]
    plans = [draw(n, seed=n) for n in (3, 5, 3, 4, 6, 4)]
    stage2 = [torch.cat((p[:-1], plan, ids(3))) for p, plan in zip(stage1, plans, strict=True)]
    mask = torch.arange(6) < torch.tensor([[6], [2], [4], [6], [5], [1]])
    torch.manual_seed(1)
    text_old, image_old = -torch.rand(6, 6) * 6, -torch.rand(6, 16) * 6
    advantages, whole = torch.randn(6), torch.ones(6, 16, dtype=torch.bool)
    text_ids, image_ids = draw(6, 6), draw(6, 16, below=128)

    def experience(share):
        levels = [
            Level("semantic", stage1, text_ids, mask, 6, text_old, text_old, text_old + 0.1),
            Level("token", stage2, image_ids, whole, 16, image_old, image_old, image_old - 0.1),
        ]
        levels[1].cfg_weight = None if logprob_policy == "conditional" else 3.0
        levels[1].detached = logprob_policy == "guided_detached"
        for level, weights in zip(levels, token_weights(levels, "token"), strict=True):
            level.weights, level.share = weights, share
        made = Experience(levels)
        made.credit(dict.fromkeys(("semantic", "token"), advantages))
        return made

    totals, grads, tokens = {}, {}, {}
    for share in (True, False):
        config = TrainConfig(
            cfg_weight=3.0, beta=0.1, logprob_policy=logprob_policy, share_prompts=share
        )
        policy.zero_grad()
        seen = count_tokens(policy)
        totals[share] = policy_loss(policy, experience(share).parts[0], config)
        totals[share]["loss"].backward()
        grads[share] = {k: p.grad.clone() for k, p in policy.trainable().items()}
        tokens[share] = sum(seen)
    images = [16] * 6
    blank = [policy.unconditional(p) for p in stage2]
    expected = spread(stage1, mask.sum(1).tolist(), text_ids, False)
    expected += spread(stage2, images, image_ids, True)
    if logprob_policy != "conditional":
        expected += spread(blank, images, image_ids, True)
    assert tokens == {True: 2 * expected, False: tokens[False]} and expected < 0.4 * tokens[False]
    for name, value in totals[False].items():
        torch.testing.assert_close(totals[True][name], value, rtol=1e-5, atol=1e-7)
    for name, grad in grads[False].items():
        assert (grads[True][name] - grad).abs().max() <= 1e-5 * grad.abs().max(), name
    pads = grads[True]["model.language_model.embed_tokens.weight"][policy.pad]
    assert bool(pads.any()) == (logprob_policy == "guided")
    monkeypatch.setattr(TokenTree, "__init__", lambda *_, **__: pytest.fail("a tree was built"))
    policy_loss(policy, experience(share).parts[0], config)
