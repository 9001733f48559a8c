"""The pass over logits as a kernel (in the interpreter without a GPU) against plain fp64 maths."""

import math

import pytest
import torch
from torch import Tensor

from kernels import linear_grpo_loss, linear_logprobs
from kernels.compiled.audit import MODELS, shapes
from kernels.gpu import grpo_loss as gpu
from kernels.gpu.grpo_loss import launch_grpo_rows, launches, row_config
from kernels.token_loss import Rows, TokenLoss
from tests.kernels.token_pass_problem import RESULTS, ROUNDING, assert_rows, problem

pytestmark = pytest.mark.usefixtures("interpreter", "nearest_rounding", "poisoned")

SMALL = ({"FULL": True, "STREAMED": True, "PARTS": 2, "PART": 64, "HELD": 128}, 1)
VARIANTS = {
    "old and reference": {},
    "on-policy": {"old_logprobs": None, "ref_logprobs": None},
    "no reference": {"ref_logprobs": None},
    "on-policy with a reference": {"old_logprobs": None},
    "dual clip": {"dual_clip": 1.5},
}


@pytest.fixture
def poisoned():
    """torch.empty gives NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def small_steps(monkeypatch):
    """Rows of more than 128 entries are streamed, 128 at a time."""
    monkeypatch.setattr(gpu, "row_config", lambda v: row_config(v) if v <= 128 else SMALL)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (5, 2), (1, 37), (9, 128), (9, 1000)])
def test_losses_against_fp64(variant, rows, vocab, device, small_steps):
    logits, targets, terms = problem(rows, vocab, device, **VARIANTS[variant])
    before = logits.clone()
    got = launch_grpo_rows(logits, targets, temperature=0.7, loss=terms, gradient=torch.float32)
    assert got.gradient is logits and got.factor == 1
    assert_rows(got, before, targets, terms, 0.7)
    if rows == 9 and vocab == 1000:  # the variants are there to be told apart
        assert 0 < got.clipped.sum() + (terms.old_logprobs is None) < rows


@pytest.mark.parametrize("vocab", [3, 64, 129, 1000, 1024])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_gradient_in_the_memory_of_its_row(dtype, vocab, device, small_steps):
    """Every entry: those that are written while logits of the same row are still to be read."""
    logits, targets, terms = problem(6, vocab, device)
    buffer = torch.full((8, vocab), torch.nan, device=device)
    buffer[:6] = logits
    got = launch_grpo_rows(buffer[:6], targets, temperature=1.3, loss=terms, gradient=dtype)
    assert got.gradient.dtype == dtype and got.gradient.stride() == (2 * vocab, 1)
    assert got.gradient.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
    assert_rows(got, logits, targets, terms, 1.3)
    assert buffer[6:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [37, 700])
def test_slopes_given(dtype, vocab, device, small_steps):
    logits, targets, _ = problem(5, vocab, device)
    slopes = torch.tensor([0.3, 0.0, -2.0, 1e-4, 7.0], device=device)
    exact = logits.double().requires_grad_()
    logprobs = (exact / 2).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    logprobs.backward(slopes.double())
    got = launch_grpo_rows(logits, targets, temperature=2.0, slopes=slopes, gradient=dtype)
    assert got.slopes is slopes and got.loss is got.kl is got.clipped is None
    torch.testing.assert_close(got.logprobs.double(), logprobs.detach(), rtol=0, atol=2e-6)
    scale = exact.grad.abs().amax(1, keepdim=True)
    assert ((got.gradient.double() - exact.grad).abs() <= 8 * ROUNDING[dtype] * scale).all()
    assert not got.gradient[1].any()


@pytest.mark.parametrize("vocab", [37, 700])
@pytest.mark.parametrize("with_loss", [False, True])
def test_forward_leaves_the_logits(vocab, with_loss, device, small_steps):
    logits, targets, terms = problem(4, vocab, device)
    before = logits.clone()
    loss = terms if with_loss else None
    got = launch_grpo_rows(logits, targets, temperature=1.0, loss=loss)
    assert torch.equal(logits, before) and got.gradient is None
    if with_loss:
        assert_rows(got, logits, targets, terms, 1.0)
    else:
        assert got.loss is got.kl is got.clipped is got.slopes is None
        exact = logits.double().log_softmax(-1)
        at = exact.gather(1, targets[:, None])[:, 0]
        torch.testing.assert_close(got.logprobs.double(), at, rtol=0, atol=2e-6)
        entropy = -(exact.exp() * exact).sum(-1)
        torch.testing.assert_close(got.entropy.double(), entropy, rtol=0, atol=2e-6)


@pytest.mark.parametrize("vocab", [100, 600])
def test_scale_is_a_factor_of_the_gradient_alone(vocab, device, small_steps):
    """fp16 loses a gradient of 1e-9; 2^30 times as large it keeps it."""
    logits, targets, terms = problem(3, vocab, device)
    terms = terms._replace(token_weights=terms.token_weights * 1e-8)
    arguments = {"temperature": 1.0, "loss": terms, "gradient": torch.float16}
    lost = launch_grpo_rows(logits.clone(), targets, **arguments)
    kept = launch_grpo_rows(logits.clone(), targets, scale=2.0**30, **arguments)
    assert torch.equal(lost.slopes, kept.slopes) and torch.equal(lost.loss, kept.loss)
    assert lost.gradient.count_nonzero() < kept.gradient.count_nonzero()
    full = launch_grpo_rows(
        logits.clone(), targets, temperature=1.0, loss=terms, gradient=torch.float32
    )
    error = (kept.gradient.double() / 2**30 - full.gradient.double()).abs()
    assert (error <= 2**-11 * full.gradient.abs() + 2.0**-55).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [90, 500])
def test_logits_of_ten_thousand(vocab, dtype, device, small_steps):
    logits, targets, terms = problem(6, vocab, device, old_logprobs=None, ref_logprobs=None)
    logits[0] += 1e4
    logits[1] -= 1e4
    logits[2] = torch.where(logits[2] > 0, 1e4, -1e4)
    logits[3, 7], targets[3] = 1e4, 7  # certain
    logits[4, 7], targets[4] = 1e4, 8  # impossible
    logits[5] = -1e4
    got = launch_grpo_rows(logits.clone(), targets, temperature=1.0, loss=terms, gradient=dtype)
    assert_rows(got, logits, targets, terms, 1.0)
    exact = logits.double().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(got.logprobs[:2].double(), exact[:2], rtol=0, atol=1e-5)
    assert got.logprobs[3] == 0 and got.entropy[3] == 0 and not got.gradient[3].any()
    cold = launch_grpo_rows(logits.clone(), targets, temperature=0.01)
    assert cold.logprobs[3] == 0 and cold.logprobs.isfinite().all()


@pytest.mark.parametrize("difference", [80.0, -80.0])
def test_differences_of_80_nats(difference, device):
    """Beyond 20 nats both exponentials go on along their tangents."""
    logits, targets, terms = problem(4, 50, device, dual_clip=None)
    current = launch_grpo_rows(logits, targets, temperature=1.0).logprobs
    terms = terms._replace(
        advantages=terms.advantages.abs().neg(),
        old_logprobs=current - difference,
        ref_logprobs=current + difference,
    )
    got = launch_grpo_rows(
        logits.clone(), targets, temperature=1.0, loss=terms, gradient=torch.float32
    )
    assert_rows(got, logits, targets, terms, 1.0)
    assert (got.slopes != 0).all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_edges_of_the_clip(sign, device):
    """At the edge a token is not clipped and has its full gradient; a rounding beyond it, none."""
    logits, targets, terms = problem(1, 30, device, beta=0.0)
    current = launch_grpo_rows(logits, targets, temperature=1.0).logprobs
    terms = terms._replace(
        advantages=torch.full_like(terms.advantages, sign),
        token_weights=torch.ones_like(terms.token_weights),
        old_logprobs=current - sign * 0.3,
        ref_logprobs=None,
        clip_low=2.0,
        clip_high=9.0,
    )

    def run(edge: float) -> Rows:
        bounds = {"clip_high": edge - 1} if sign > 0 else {"clip_low": 1 - edge}
        return launch_grpo_rows(
            logits.clone(),
            targets,
            temperature=1.0,
            loss=terms._replace(**bounds),
            gradient=torch.float32,
        )

    free = launch_grpo_rows(logits, targets, temperature=1.0, loss=terms)
    ratio = -sign * free.loss  # as the kernel computed it
    at_edge = run(ratio.item())
    assert at_edge.clipped.item() == 0 and torch.equal(at_edge.slopes, -sign * ratio)
    assert at_edge.gradient.any()
    inside = torch.nextafter(ratio, torch.ones_like(ratio)).item()
    beyond = run(inside)
    assert beyond.clipped.item() == 1 and beyond.slopes.item() == 0
    assert beyond.loss.item() == pytest.approx(-sign * inside, rel=1e-7)
    assert not beyond.gradient.any()


def test_clip_of_zero_width_keeps_the_on_policy_gradient(device):
    logits, targets, terms = problem(5, 40, device, clip_low=0.0, clip_high=0.0, beta=0.0)
    for old in (None, launch_grpo_rows(logits, targets, temperature=1.0).logprobs):
        got = launch_grpo_rows(
            logits, targets, temperature=1.0, loss=terms._replace(old_logprobs=old)
        )
        assert not got.clipped.any()
        assert torch.equal(got.slopes, -terms.advantages * terms.token_weights)


def test_dual_clip_bounds_the_loss_of_a_negative_advantage(device):
    logits, targets, terms = problem(3, 40, device, dual_clip=3.0, ref_logprobs=None)
    current = launch_grpo_rows(logits, targets, temperature=1.0).logprobs
    advantages = torch.tensor([-2.0, -2.0, 2.0], device=device)
    old = current - torch.tensor([2.9, 3.1, 3.1], device=device).log()
    terms = terms._replace(advantages=advantages, old_logprobs=old, clip_high=9.0)
    got = launch_grpo_rows(logits, targets, temperature=1.0, loss=terms)
    expected = torch.tensor([5.8, 6.0, -6.2], device=device)
    torch.testing.assert_close(got.loss, expected, rtol=1e-5, atol=0)
    assert got.clipped.tolist() == [0, 1, 0] and got.slopes[1] == 0 and got.slopes[0] != 0


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["advantages", "old_logprobs", "ref_logprobs"])
def test_masked_rows_may_hold_anything(name, poison, device):
    logits, targets, terms = problem(6, 60, device, dual_clip=2.0)
    terms.token_weights[[1, 4]] = 0
    getattr(terms, name)[[1, 4]] = poison
    got = launch_grpo_rows(
        logits.clone(), targets, temperature=1.0, loss=terms, gradient=torch.float32
    )
    assert_rows(got, logits, targets, terms, 1.0)
    for field in (got.loss, got.kl, got.clipped, got.slopes, got.gradient):
        assert not field[[1, 4]].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [80, 700])
def test_impossible_tokens(vocab, dtype, device, small_steps):
    """-inf has probability 0, whole steps of a row included, and no NaN comes of it."""
    logits, targets, terms = problem(4, vocab, device)
    logits[0, ::2] = -torch.inf
    logits[1, : vocab - 3] = -torch.inf
    logits[2, 3:] = -torch.inf
    targets[:3] = torch.tensor([1, vocab - 1, 2])
    got = launch_grpo_rows(logits.clone(), targets, temperature=0.5, loss=terms, gradient=dtype)
    assert_rows(got, logits, targets, terms, 0.5)
    assert not got.gradient[logits == -torch.inf].any()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_is_not_hidden(bad, device, small_steps):
    logits, targets, terms = problem(4, 300, device)
    logits[0, 5], logits[1, 299] = bad, bad
    terms.old_logprobs[2] = math.nan
    got = launch_grpo_rows(logits, targets, temperature=1.0, loss=terms, gradient=torch.float32)
    assert got.logprobs.isnan().tolist() == [True, True, False, False]
    assert got.entropy.isnan().tolist() == [True, True, False, False]
    for field in (got.loss, got.slopes, got.gradient.sum(1)):
        assert field.isnan().tolist() == [True, True, True, False]


def test_rows_do_not_depend_on_each_other_or_on_strides(device, small_steps):
    logits, targets, terms = problem(7, 400, device)
    whole = launch_grpo_rows(
        logits.clone(), targets, temperature=1.0, loss=terms, gradient=torch.bfloat16
    )
    strided = [torch.stack((v, v * 0), 1)[:, 0] for v in terms[:4]]
    part = launch_grpo_rows(
        logits[2:5].clone(),
        torch.stack((targets, targets * 0), 1)[2:5, 0],
        temperature=1,
        loss=TokenLoss(*strided, *terms[4:]).rows(2, 5),
        gradient=torch.bfloat16,
    )
    for name in (*RESULTS, "gradient"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[2:5]), name


def test_no_rows(device):
    logits, targets, terms = problem(0, 50, device)
    got = launch_grpo_rows(logits, targets, temperature=1.0, loss=terms, gradient=torch.float16)
    assert [len(getattr(got, name)) for name in (*RESULTS, "gradient")] == [0] * 7


def test_public_losses_take_the_kernel(device, monkeypatch, small_steps):
    """Chunks of both, three rows at a time, against the PyTorch pass."""
    _, targets, terms = problem(8, 200, device)
    rng = torch.Generator().manual_seed(4)
    hidden, weight = torch.randn(8, 16, generator=rng), torch.randn(200, 16, generator=rng)
    calls = []
    launch = gpu.launch_grpo_rows
    monkeypatch.setattr(gpu, "launch_grpo_rows", lambda *a, **k: calls.append(k) or launch(*a, **k))

    def run() -> list[Tensor]:
        h, w = (x.to(device).requires_grad_() for x in (hidden, weight))
        names = ("advantages", "token_weights", "old_logprobs", "ref_logprobs")
        per_token = {name: getattr(terms, name) for name in names}
        output = linear_grpo_loss(h, w, targets, **per_token, beta=0.1, chunk_rows=3)
        logprobs = linear_logprobs(h, w, targets, temperature=0.5, chunk_rows=3)
        (output.loss + (logprobs * terms.advantages).sum()).backward()
        return [*output, logprobs.detach(), h.grad, w.grad]

    by_kernel = run()
    assert len(calls) == 9 and {k["gradient"] for k in calls} == {None, torch.float32}
    if device == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        for ours, theirs in zip(by_kernel, run(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert len(calls) == 9


def test_rows_that_fit_are_read_once():
    """The audit's count: what is read again is what registers do not hold."""
    for model, dims in MODELS.items():
        (shape,) = shapes([model], ["bf16"], [16], [1])
        for launch in launches(shape):
            vocab = dims["image_vocab" if "image" in launch.name else "text_vocab"]
            held = launch.constexprs["HELD"]
            assert launch.constexprs["STREAMED"] == (vocab > held)
            assert held <= (64 if vocab % 16 == 0 else 32) * 32 * launch.num_warps
            again = launch.bytes_again / launch.grid[0]
            assert again == (vocab > held) * 4 * (vocab - held) * launch.constexprs["HAS_GRADIENT"]
        assert dims["image_vocab"] > 32_768 or not launches(shape)[0].bytes_again


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="real widths take a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [8192, 16_384, 20_001, 32_064, 102_400, 184_622])
def test_real_widths(vocab, dtype, device):
    logits, targets, terms = problem(300, vocab, device)
    got = launch_grpo_rows(logits.clone(), targets, temperature=0.9, loss=terms, gradient=dtype)
    assert_rows(got, logits, targets, terms, 0.9)
