"""The chunked head: memory, precision, skipped rows and the behaviour of its autograd functions."""

import subprocess
import sys
import textwrap

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import chunked_head, linear_grpo_loss, linear_logprobs
from kernels.chunked_head import HeadInputs

N, D, V = 37, 8, 50


def problem(dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    leaves = {
        name: torch.randn(shape).to(dtype).requires_grad_()
        for name, shape in {"hidden": (N, D), "weight": (V, D), "bias": (V,)}.items()
    }
    return leaves, torch.randint(V, (N,)), torch.randn(N)


def gradients(leaves, loss):
    return torch.autograd.grad(loss, list(leaves.values()))


class Sizes(TorchDispatchMode):
    """Records the number of elements of every tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple) else (result,):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return result


@pytest.mark.parametrize("op", ["loss", "guided loss", "logprobs"])
def test_no_tensor_holds_the_logits_of_all_rows(op):
    torch.manual_seed(0)
    rows, vocab, width = 2048, 1024, 16
    hidden, uncond = torch.randn(2, rows, width).requires_grad_().unbind()
    weight = torch.randn(vocab, width, requires_grad=True)
    targets, advantages = torch.randint(vocab, (rows,)), torch.randn(rows)
    guided = {"uncond_hidden": uncond, "cfg_weight": 5.0} if op == "guided loss" else {}
    with Sizes() as sizes:
        if op == "logprobs":
            out = linear_logprobs(hidden, weight, targets, chunk_rows=64).sum()
        else:
            out = linear_grpo_loss(hidden, weight, targets, advantages, chunk_rows=64, **guided)[0]
        out.backward()
    assert sizes.largest <= 64 * vocab
    with Sizes() as plain:
        (hidden @ weight.T).log_softmax(-1)
    assert plain.largest == rows * vocab  # the recorder sees what it should


def test_runs_where_the_logits_do_not_fit():
    """1 GiB of logits with 256 MiB of address space left."""
    code = """
        import resource
        import torch
        from kernels import linear_grpo_loss

        torch.set_num_threads(2)
        rows = vocab = 1 << 14
        hidden, weight = torch.randn(rows, 4).requires_grad_(), torch.randn(vocab, 4).requires_grad_()
        targets, advantages = torch.randint(vocab, (rows,)), torch.randn(rows)
        linear_grpo_loss(hidden[:16], weight, targets[:16], advantages[:16])  # threads start here
        pages = int(open("/proc/self/statm").read().split()[0])
        limit = pages * resource.getpagesize() + (1 << 28)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        try:
            torch.empty(rows, vocab)
            raise SystemExit("the limit does not hold")
        except RuntimeError:
            pass
        linear_grpo_loss(hidden, weight, targets, advantages).loss.backward()
        assert hidden.grad.isfinite().all() and weight.grad.any()
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize("chunk_rows", [1, 7, 16, 37, 1000])
def test_chunks_change_nothing(chunk_rows):
    leaves, targets, advantages = problem(torch.float64)
    whole = linear_grpo_loss(**leaves, targets=targets, advantages=advantages)
    split = linear_grpo_loss(
        **leaves, targets=targets, advantages=advantages, chunk_rows=chunk_rows
    )
    for a, b in zip(whole, split, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(gradients(leaves, whole.loss), gradients(leaves, split.loss), strict=True):
        torch.testing.assert_close(a, b)


def test_rows_without_slope_reach_no_product(monkeypatch):
    """Masked and zero-advantage rows, and rows that the clip stops, are left out of both GEMMs."""
    leaves, targets, advantages = problem()
    advantages[5:9] = 0
    advantages[20:30] = 1
    current = linear_logprobs(**leaves, targets=targets).detach()
    old = current.clone()
    old[20:30] -= 1  # ratio e, beyond the clip
    weights = torch.full((N,), 1 / N)
    weights[[0, 36]] = 0
    seen = []
    product = chunked_head._product

    def spy(gradient, weight, *, out):
        seen.append(len(gradient))
        return product(gradient, weight, out=out)

    monkeypatch.setattr(chunked_head, "_product", spy)
    linear_grpo_loss(
        **leaves,
        targets=targets,
        advantages=advantages,
        old_logprobs=old,
        token_weights=weights,
        chunk_rows=10,
    )
    # Chunks of 10, 10, 10 and 7 rows lose 5 (0, 5..8), none, all and one.
    assert seen == [5, 10, 6]


@pytest.mark.parametrize("guided", [False, True])
def test_only_what_is_needed_is_computed(guided):
    leaves, targets, advantages = problem()
    hidden = leaves["hidden"].detach()
    extra = {"uncond_hidden": leaves["hidden"] * 0.9, "cfg_weight": 2.0} if guided else {}
    frozen = {"weight": leaves["weight"].detach(), "bias": leaves["bias"].detach()}
    loss = linear_grpo_loss(hidden, targets=targets, advantages=advantages, **frozen, **extra).loss
    assert loss.requires_grad == guided
    if guided:
        loss.backward()
        assert leaves["hidden"].grad.any()
    with torch.no_grad():
        output = linear_grpo_loss(**leaves, targets=targets, advantages=advantages)
    assert not output.loss.requires_grad


def test_no_grad_computes_no_gradients(monkeypatch):
    leaves, targets, advantages = problem()
    monkeypatch.setattr(chunked_head, "_product", lambda *_, **__: pytest.fail("a gradient's GEMM"))
    with torch.no_grad():
        linear_grpo_loss(**leaves, targets=targets, advantages=advantages)
    linear_logprobs(**leaves, targets=targets)  # its backward pass computes them


@pytest.mark.parametrize("op", [linear_grpo_loss, linear_logprobs])
def test_a_retained_graph_gives_the_same_gradient_again(op):
    leaves, targets, advantages = problem()
    kwargs = {"advantages": advantages} if op is linear_grpo_loss else {}
    output = op(**leaves, targets=targets, **kwargs)
    loss = output.loss if op is linear_grpo_loss else output.mean()
    (3 * loss).backward(retain_graph=True)
    first = {name: leaf.grad.clone() for name, leaf in leaves.items()}
    loss.backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, first[name] * 4 / 3)


def test_gradients_are_scaled_by_what_follows():
    leaves, targets, advantages = problem(torch.float64)
    output = linear_grpo_loss(**leaves, targets=targets, advantages=advantages)
    plain = gradients(leaves, output.loss)
    again = linear_grpo_loss(**leaves, targets=targets, advantages=advantages)
    scaled = gradients(leaves, -0.25 * again.loss + leaves["bias"].sum() * 0)
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(-0.25 * a, b)


def test_a_second_derivative_is_refused():
    leaves, targets, advantages = problem()
    loss = linear_grpo_loss(**leaves, targets=targets, advantages=advantages).loss
    doubled = loss * leaves["bias"].sum()  # so that the upstream gradient has a graph
    (slope,) = torch.autograd.grad(doubled, leaves["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


# Precision


def guided_bf16(rows: int = 24, vocab: int = 512, width: int = 4096):
    """Branches in bf16 that agree as a conditional and an unconditional one do (0.9)."""
    torch.manual_seed(1)
    cond = torch.randn(rows, width)
    uncond = 0.9 * cond + (1 - 0.9**2) ** 0.5 * torch.randn(rows, width)
    weight = torch.randn(vocab, width) / width**0.5
    return cond.bfloat16(), uncond.bfloat16(), weight.bfloat16(), torch.randint(vocab, (rows,))


def exact_guided(cond, uncond, weight, targets):
    cond, uncond, weight = (t.double() for t in (cond, uncond, weight))
    logits = uncond @ weight.T + 5 * (cond @ weight.T - uncond @ weight.T)
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def test_guided_log_probs_of_bf16_branches():
    cond, uncond, weight, targets = guided_bf16()
    exact = exact_guided(cond, uncond, weight, targets)
    got = linear_logprobs(cond, weight, targets, uncond_hidden=uncond, cfg_weight=5.0)
    assert (got - exact).abs().max() < 1e-4
    rounded = torch.lerp(uncond.float(), cond.float(), 5.0).bfloat16()
    assert (linear_logprobs(rounded, weight, targets) - exact).abs().max() > 1e-3  # what is avoided


def test_a_mix_for_16_bit_products_is_kept_in_two_parts():
    """What CUDA's GEMMs get; their products and sums are exact to fp32, as fp32 is here."""
    cond, uncond, weight, targets = guided_bf16()
    head = HeadInputs(cond, weight, targets, None, uncond, 5.0, 1.0, None)
    parts = chunked_head._mixed(head, 0, len(cond))
    assert [p.dtype for p in parts] == [torch.bfloat16] * 2
    logits = sum(p.float() @ weight.float().T for p in parts)
    got = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert (got - exact_guided(cond, uncond, weight, targets)).abs().max() < 1e-4


def test_weight_gradient_in_bf16_is_as_good_as_one_gemm():
    torch.manual_seed(2)
    rows, vocab, width = 512, 64, 32
    hidden, weight = torch.randn(rows, width).bfloat16(), torch.randn(vocab, width).bfloat16()
    targets, advantages = torch.randint(vocab, (rows,)), torch.randn(rows)

    def plain(hidden, weight, logits_dtype):
        logits = (hidden @ weight.T).to(logits_dtype)
        logp = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        return -((logp - logp.detach()).exp() * advantages).mean()

    exact = weight.double().requires_grad_()
    plain(hidden.double(), exact, torch.float64).backward()
    eager = weight.clone().requires_grad_()
    plain(hidden, eager, torch.float32).backward()
    ours = weight.clone().requires_grad_()
    linear_grpo_loss(hidden, ours, targets, advantages, chunk_rows=32).loss.backward()
    assert ours.grad.dtype == torch.bfloat16
    errors = [(g.double() - exact.grad).norm() for g in (ours.grad, eager.grad)]
    assert errors[0] <= errors[1]


@pytest.mark.parametrize(
    ("hidden_dtype", "weight_dtype"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16,) * 2],
)
def test_gradients_come_in_the_dtypes_of_the_inputs(hidden_dtype, weight_dtype):
    leaves, targets, advantages = problem()
    exact = gradients(
        leaves, linear_grpo_loss(**leaves, targets=targets, advantages=advantages).loss
    )
    dtypes = {"hidden": hidden_dtype, "weight": weight_dtype, "bias": weight_dtype}
    low = {name: leaf.detach().to(dtypes[name]).requires_grad_() for name, leaf in leaves.items()}
    got = gradients(low, linear_grpo_loss(**low, targets=targets, advantages=advantages).loss)
    for name, a, b in zip(leaves, got, exact, strict=True):
        assert a.dtype == dtypes[name]
        assert (a - b).norm() < 0.02 * b.norm()


def test_fp16_gradients_are_brought_into_range():
    terms = chunked_head.TokenLoss(
        torch.ones(2), torch.tensor([3e-6, 0]), *[None] * 2, 0, 0, None, 0
    )
    scale = chunked_head._scale(terms, None, torch.float16)
    assert 0.5 < scale * 3e-6 < 2 and torch.tensor(scale).log2() % 1 == 0
    assert chunked_head._scale(terms, None, torch.bfloat16) == 1
    assert chunked_head._scale(None, torch.zeros(3), torch.float16) == 1


def test_guided_logprobs_gradcheck():
    leaves, targets, _ = problem(torch.float64)
    uncond = torch.randn(N, D, dtype=torch.float64, requires_grad=True)

    def logprobs(hidden, weight, bias, uncond):
        head = {"bias": bias, "uncond_hidden": uncond, "cfg_weight": 3.0, "chunk_rows": 10}
        return linear_logprobs(hidden, weight, targets, temperature=1.3, **head)

    assert torch.autograd.gradcheck(logprobs, (*leaves.values(), uncond))


def test_a_token_excluded_by_the_bias_counts_as_nothing():
    leaves, targets, advantages = problem()
    with torch.no_grad():
        leaves["bias"][3] = -torch.inf
    targets = targets.masked_fill(targets == 3, 4)
    output = linear_grpo_loss(**leaves, targets=targets, advantages=advantages)
    kept = [i for i in range(V) if i != 3]
    fewer = {"weight": leaves["weight"][kept], "bias": leaves["bias"][kept]}
    moved = targets - (targets > 3).long()
    expected = linear_grpo_loss(leaves["hidden"], **fewer, targets=moved, advantages=advantages)
    for a, b in zip(output, expected, strict=True):
        torch.testing.assert_close(a, b)


# Through Triton's pass


@pytest.mark.parametrize("sequences", [None, torch.arange(N) // 9])
def test_triton_pass_gives_the_same_loss_and_gradients(monkeypatch, device, sequences):
    leaves, targets, advantages = problem()
    leaves["uncond_hidden"] = (0.8 * leaves["hidden"]).detach().requires_grad_()
    advantages[5:9] = 0
    options = {
        "old_logprobs": linear_logprobs(
            *[leaves[n] for n in ("hidden", "weight")],
            targets,
            bias=leaves["bias"],
            uncond_hidden=leaves["uncond_hidden"],
            cfg_weight=3.0,
        ).detach()
        + torch.linspace(-0.9, 0.9, N),
        "token_weights": torch.linspace(0, 1, N),
        "sequence_ids": sequences,
    }
    options["ref_logprobs"] = options["old_logprobs"].where(advantages != 0, torch.nan)
    options["token_weights"] = options["token_weights"].where(advantages != 0, 0)
    rest = {"clip_high": 0.3, "dual_clip": 1.5, "beta": 0.1, "temperature": 1.3, "cfg_weight": 3.0}

    def run(device):
        here = {n: x.detach().to(device).requires_grad_() for n, x in leaves.items()}
        moved = {n: x if x is None else x.to(device) for n, x in options.items()}
        output = linear_grpo_loss(
            **here,
            targets=targets.to(device),
            advantages=advantages.to(device),
            chunk_rows=10,
            **moved,
            **rest,
        )
        output.loss.backward()
        return [x.cpu() for x in (*output, *(leaf.grad for leaf in here.values()))]

    expected = run("cpu")
    if device == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    for a, b in zip(run(device), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
