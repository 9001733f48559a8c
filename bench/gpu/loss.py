"""The GPU check's fused loss: right against fp64, then its time and memory beside two others.

`gemms` are the loss's own vocabulary GEMMs alone, all rows at once, fp32 results: the bound.
`logits` is the usual path: logits of all rows in the weights' dtype, fp32 log-softmax, autograd.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.models import CFG_WEIGHT, SHAPES, Item, Shape
from bench.gpu.timing import event_seconds, wall_seconds
from kernels import linear_grpo_loss, linear_logprobs, reference

CLIP, BETA = 0.2, 0.04
# Inside the clip, or far beyond either edge: there the gradient jumps, and rounding would decide.
LOG_RATIOS = (-0.6, -0.02, 0.02, 0.6)
NATS = 1e-3  # allowed error of a log-prob and of the loss: what tensor cores' fp32 sums may lose
# Allowed error of a gradient over its largest value: two roundings, one of the logits' gradient.
SHARE = {torch.bfloat16: 6e-3, torch.float16: 1e-3, torch.float32: 5e-6}
CHECKED_CHUNKS = 3  # of the rows that are held against fp64


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """A head and the tokens of a step.

    Attributes:
        name: "image", "image guided" or "text".
        rows: tokens.
        trainable: the weight gets a gradient too.
        checked: rows that are held against fp64.
    """

    model: str
    name: str
    rows: int
    vocab: int
    width: int
    guided: bool
    trainable: bool
    dtype: torch.dtype
    device: torch.device
    checked: int = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Inputs of the loss; hidden, uncond_hidden and a trainable weight require a gradient."""

    hidden: Tensor
    uncond_hidden: Tensor | None
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    per_token: dict[str, Tensor]

    def leaves(self) -> list[Tensor]:
        inputs = (self.hidden, self.uncond_hidden, self.weight)
        return [x for x in inputs if x is not None and x.requires_grad]

    def part(self, rows: int, dtype: torch.dtype) -> "Problem":
        """The first rows in a dtype, with leaves of its own."""

        def copy(x: Tensor | None, rows: int | None = None) -> Tensor | None:
            if x is None:
                return None
            return x.detach()[:rows].to(dtype, copy=True).requires_grad_(x.requires_grad)

        return Problem(
            hidden=copy(self.hidden, rows),
            uncond_hidden=copy(self.uncond_hidden, rows),
            weight=copy(self.weight),
            bias=copy(self.bias),
            targets=self.targets[:rows],
            per_token={name: x[:rows] for name, x in self.per_token.items()},
        )


def items(
    device: torch.device, shapes: dict[str, Shape] | None = None, **overrides: Any
) -> list[Item]:
    """Both heads of both models: 8 images of 576 tokens, 8 plans of 256."""
    settings = {"dtype": torch.bfloat16, "device": device} | overrides
    heads = []
    for shape in (shapes or SHAPES).values():
        image = {"rows": 8 * shape.grid**2, "vocab": shape.image_vocab, "trainable": False}
        text = {"rows": 8 * 256, "vocab": shape.text_vocab, "trainable": True}
        for name, given in (("image", image), ("image guided", image), ("text", text)):
            given = given | {"model": shape.name, "name": name, "width": shape.width} | settings
            heads.append(Head(guided="guided" in name, **given))
    return [(f"loss {h.model} {h.name}", lambda h=h: [measure(h)]) for h in heads]


def measure(head: Head) -> dict[str, Any]:
    """A row: error, and where it is allowed, time and memory."""
    problem = make_problem(head)
    error = largest_error(problem, head)
    row = {
        "op": "linear_grpo_loss",
        "model": head.model,
        "head": head.name,
        "shape": f"{head.rows} x {head.width} x {head.vocab}",
        "trainable_weight": head.trainable,
        "error_over_allowed": error,
        "correct": error <= 1,
    }
    if not row["correct"]:
        return row
    loss, logits = (lambda: step(problem, fused), lambda: step(problem, by_logits))
    seconds = {name: _seconds(run, head.device) for name, run in (("", loss), ("logits_", logits))}
    seconds["gemms_"] = _seconds(gemms(head), head.device)
    row |= {f"{name}ms": s * 1e3 for name, s in seconds.items()}
    row |= {
        "vocabulary_gemms": gemm_count(head),
        "share_of_gemms": seconds["gemms_"] / seconds[""],
        "logits_over_ours": seconds["logits_"] / seconds[""],
    }
    if head.device.type == "cuda":
        peaks = [_peak_bytes(run, problem) for run in (loss, logits)]
        gradients = sum(x.numel() * x.element_size() for x in problem.leaves())
        row |= {
            "peak_mb": peaks[0] / 2**20,
            "logits_peak_mb": peaks[1] / 2**20,
            "gradients_mb": gradients / 2**20,  # in both
            "logits_over_our_memory": peaks[1] / peaks[0],
        }
    return row


def make_problem(head: Head) -> Problem:
    """Logits with a standard deviation of 3; ratios in and beyond the clip."""
    torch.manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, device=head.device).mul_(scale).to(head.dtype)

    hidden = normal(head.rows, head.width)
    # Alike, as the branches are; guidance enlarges what differs.
    other = normal(head.rows, head.width, scale=0.2)
    weight = normal(head.vocab, head.width, scale=3 * head.width**-0.5)
    problem = Problem(
        hidden=hidden.requires_grad_(),
        uncond_hidden=(hidden.detach() + other).requires_grad_() if head.guided else None,
        weight=weight.requires_grad_(head.trainable),
        bias=normal(head.vocab) if "image" in head.name else None,
        targets=torch.randint(head.vocab, (head.rows,), device=head.device),
        per_token={},
    )
    with torch.no_grad():
        logprobs = linear_logprobs(
            problem.hidden,
            problem.weight,
            problem.targets,
            bias=problem.bias,
            uncond_hidden=problem.uncond_hidden,
            cfg_weight=CFG_WEIGHT if head.guided else None,
        )
    rows = torch.arange(head.rows, device=head.device)
    log_ratios = torch.tensor(LOG_RATIOS, device=head.device)
    problem.per_token.update(
        advantages=torch.where(rows // 4 % 2 == 0, 1.0, -0.7),
        old_logprobs=logprobs - log_ratios[rows % 4],
        ref_logprobs=logprobs + 0.3 * torch.randn_like(logprobs),
        token_weights=torch.full_like(logprobs, 1 / head.rows),
    )
    return problem


def fused(problem: Problem, chunk_rows: int | None = None) -> tuple[Tensor, Tensor]:
    """Loss and log-probs by the op."""
    output = linear_grpo_loss(
        problem.hidden,
        problem.weight,
        problem.targets,
        bias=problem.bias,
        uncond_hidden=problem.uncond_hidden,
        cfg_weight=None if problem.uncond_hidden is None else CFG_WEIGHT,
        clip_low=CLIP,
        clip_high=CLIP,
        beta=BETA,
        chunk_rows=chunk_rows,
        **problem.per_token,
    )
    return output.loss, output.logprobs


def by_logits(problem: Problem) -> tuple[Tensor, Tensor]:
    """The same by the logits of all rows."""
    logits = F.linear(problem.hidden, problem.weight, problem.bias)
    if problem.uncond_hidden is not None:
        uncond = F.linear(problem.uncond_hidden, problem.weight, problem.bias)
        logits = reference.guide(reference.as_float(logits), reference.as_float(uncond), CFG_WEIGHT)
    full = reference.as_float(logits).log_softmax(-1)
    logprobs = full.gather(1, problem.targets[:, None])[:, 0]
    given = problem.per_token
    losses, _, _ = reference.grpo_token_loss(
        logprobs,
        given["old_logprobs"],
        given["ref_logprobs"],
        given["advantages"],
        clip_low=CLIP,
        clip_high=CLIP,
        beta=BETA,
    )
    return (given["token_weights"] * losses).sum(), logprobs.detach()


def step(
    problem: Problem, loss_of: Callable[[Problem], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Loss, log-probs, gradients: one forward and backward."""
    for leaf in problem.leaves():
        leaf.grad = None
    loss, logprobs = loss_of(problem)
    loss.backward()
    return loss.detach(), logprobs, [leaf.grad for leaf in problem.leaves()]


def largest_error(problem: Problem, head: Head) -> float:
    """Largest error against fp64 over what is allowed.

    The first rows as a problem of their own, in several chunks; and the same rows of the whole
    problem, whose log-probs and gradients are those rows' alone.
    """
    rows = min(head.checked, head.rows)
    loss, logprobs, gradients = step(problem.part(rows, torch.float64), by_logits)
    part = problem.part(rows, head.dtype)
    mine = step(part, lambda p: fused(p, -(-rows // CHECKED_CHUNKS)))
    whole = step(problem, fused)
    errors = [
        (mine[0] - loss).abs() / NATS / problem.per_token["token_weights"][:rows].sum(),
        (mine[1] - logprobs).abs().max() / NATS,
        (whole[1][:rows] - logprobs).abs().max() / NATS,
    ]
    pairs = list(zip(mine[2], gradients, strict=True))
    by_row = 2 if head.guided else 1  # the gradients that come first
    pairs += [(g[:rows], x) for g, x in zip(whole[2][:by_row], gradients, strict=False)]
    for got, truth in pairs:
        errors.append((got - truth).abs().max() / truth.abs().max() / SHARE[head.dtype])
    # Tensor.max keeps a NaN, which is then not within what is allowed.
    return torch.stack(errors).max().item()


def gemm_count(head: Head) -> int:
    """Guided activations go through the head as a high and a low part, and into its gradient."""
    parts = 2 if head.guided and head.dtype != torch.float32 else 1
    return parts * (1 + head.trainable) + 1


def gemms(head: Head) -> Callable[[], None]:
    """The loss's vocabulary GEMMs over all rows at once, fp32 results, operands in head.dtype."""

    def operand(rows: int, columns: int) -> Tensor:
        return torch.randn((rows, columns), device=head.device).to(head.dtype)

    def product(left: Tensor, right: Tensor) -> Tensor:
        if head.dtype == torch.float32:
            return left @ right
        return torch.mm(left, right, torch.float32)

    hidden, weight = operand(head.rows, head.width), operand(head.vocab, head.width)
    gradient = operand(head.rows, head.vocab)
    parts = (gemm_count(head) - 1) // (1 + head.trainable)

    def run() -> None:
        for _ in range(parts):
            product(hidden, weight.T)
        product(gradient, weight)
        for _ in range(parts * head.trainable):
            product(gradient.T, hidden)

    return run


def _seconds(run: Callable[[], object], device: torch.device, repeats: int = 11) -> float:
    """Median seconds of one call, launches included: the loss asks the host between its chunks."""
    for _ in range(2):
        run()
    if device.type != "cuda":
        return min(wall_seconds(run, device) for _ in range(2))
    return statistics.median(event_seconds([run] * repeats))


def _peak_bytes(run: Callable[[], object], problem: Problem) -> int:
    """Memory that one forward and backward takes at most beyond its inputs, gradients included."""
    for leaf in problem.leaves():
        leaf.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before
