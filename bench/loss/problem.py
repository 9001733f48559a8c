"""The problem that every provider of `python -m bench loss` solves, and its exact solution.

Sequences of SEQUENCE tokens with one advantage each, of both signs, as GRPO has them. Old
log-probs put a quarter of the ratios below the clip and a quarter above, all of them well away from
its edges: there the gradient jumps, and providers that differ by rounding would differ by a token.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SEQUENCE = 512  # tokens; one advantage each, and the unit in which Liger's loss takes them
CLIP, BETA, CFG_WEIGHT = 0.2, 0.04, 5.0
ALIKE = 0.9  # correlation of the conditional and the unconditional hidden states
ORACLE_ROWS = 256  # at a time, so that fp64 logits take no more memory than a provider's
# log(0.8) = -0.22 and log(1.2) = 0.18 are the clip's edges. Twice inside, once on either side.
LOG_RATIOS = ((-0.6, -0.35), (-0.1, 0.1), (-0.1, 0.1), (0.3, 0.6))


@dataclass(kw_only=True, slots=True)
class Problem:
    """Inputs of one loss.

    Attributes:
        hidden: (N, D), requires a gradient; the conditional branch of a guided problem.
        uncond_hidden: (N, D), requires a gradient; None: not guided.
        weight: (V, D), requires a gradient.
        targets: (N,) int64.
        advantages: (N,) fp32, constant within a sequence of SEQUENCE tokens.
        old_logprobs, ref_logprobs: (N,) fp32 nats.
    """

    hidden: Tensor
    uncond_hidden: Tensor | None
    weight: Tensor
    targets: Tensor
    advantages: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor

    def leaves(self) -> dict[str, Tensor]:
        """The tensors that get a gradient, by name."""
        names = ("hidden", "uncond_hidden", "weight")
        return {name: t for name in names if (t := getattr(self, name)) is not None}

    def part(self, rows: int, vocab: int | None = None) -> "Problem":
        """The first rows as a problem with leaves of its own, on the first vocab entries."""
        vocab = len(self.weight) if vocab is None else min(vocab, len(self.weight))
        cut = {
            f.name: None if (t := getattr(self, f.name)) is None else t.detach()[:rows].clone()
            for f in dataclasses.fields(self)
        }
        cut |= {"weight": self.weight.detach()[:vocab].clone(), "targets": cut["targets"] % vocab}
        return Problem(**cut).ask_gradients()

    def ask_gradients(self) -> "Problem":
        """Make the leaves require a gradient. Returns: itself."""
        for leaf in self.leaves().values():
            leaf.requires_grad_()
        return self

    def drop_gradients(self) -> None:
        for leaf in self.leaves().values():
            leaf.grad = None

    def save(self, path: Path) -> None:
        tensors = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        torch.save({k: None if t is None else t.detach().cpu() for k, t in tensors.items()}, path)


@dataclass(kw_only=True, slots=True)
class Solution:
    """The exact loss and gradients of a problem's first rows.

    Attributes:
        rows: the problem's first rows that it is about.
        loss: their loss.
        loss_scale: mean absolute token loss, by which an error of the loss is judged: the
            surrogates of both signs nearly cancel in the loss itself.
        gradients: fp64, of the leaves by name.
    """

    rows: int
    loss: float
    loss_scale: float
    gradients: dict[str, Tensor]

    def save(self, path: Path) -> None:
        torch.save(dataclasses.asdict(self), path)


def load_problem(path: Path, device: torch.device) -> Problem:
    tensors = torch.load(path, weights_only=True)
    on = {k: None if t is None else t.to(device) for k, t in tensors.items()}
    return Problem(**on).ask_gradients()


def load_solution(path: Path) -> Solution:
    """With gradients that are mapped from the file, not in memory."""
    return Solution(**torch.load(path, mmap=True, weights_only=True))


def make_problem(
    n: int, vocab: int, width: int, *, guided: bool, dtype: torch.dtype, device: torch.device
) -> Problem:
    """Logits of standard deviation near 2, the same for the same arguments."""
    random = torch.Generator(device).manual_seed(n + vocab + width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device)

    hidden = normal(n, width)
    uncond = ALIKE * hidden + (1 - ALIKE**2) ** 0.5 * normal(n, width) if guided else None
    weight = normal(vocab, width) * ((1.0 if guided else 2.0) / width**0.5)
    sequence = torch.arange(n, device=device) // SEQUENCE
    advantages = (1 - 2 * (sequence % 2)) * (0.5 + sequence % 5 * 0.25)
    problem = Problem(
        hidden=hidden.to(dtype),
        uncond_hidden=None if uncond is None else uncond.to(dtype),
        weight=weight.to(dtype),
        targets=torch.randint(vocab, (n,), generator=random, device=device),
        advantages=advantages,
        old_logprobs=advantages,  # the log-probs depend on the rest of the problem
        ref_logprobs=advantages,
    )
    logprobs = _logprobs(problem)
    low, high = torch.tensor(LOG_RATIOS, device=device)[
        torch.randint(len(LOG_RATIOS), (n,), generator=random, device=device)
    ].T
    share = torch.rand(n, generator=random, device=device)
    problem.old_logprobs = logprobs - (low + share * (high - low))
    problem.ref_logprobs = logprobs + 0.3 * normal(n)
    return problem.ask_gradients()


def token_loss(logprobs: Tensor, problem: Problem, rows: slice = slice(None)) -> Tensor:
    """Clipped surrogate plus beta times k3, by token: -min(r A, clip(r) A) + beta (e^d - d - 1).

    Source: GRPO, arXiv:2402.03300. Its exponentials have no cap, which the problem never reaches.
    """
    ratio = (logprobs - problem.old_logprobs[rows]).exp()
    advantages = problem.advantages[rows]
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    gap = problem.ref_logprobs[rows] - logprobs
    return BETA * (gap.exp() - gap - 1) - surrogate


def solve(problem: Problem, rows: int) -> Solution:
    """Autograd through fp64 logits, ORACLE_ROWS rows at a time."""
    leaves = {k: t.detach()[: rows if k != "weight" else None] for k, t in problem.leaves().items()}
    leaves = {k: t.double().requires_grad_() for k, t in leaves.items()}
    loss = scale = 0.0
    for chunk in _chunks(rows):
        branches = [leaves[name][chunk] for name in leaves if name != "weight"]
        logits = _guide([branch @ leaves["weight"].T for branch in branches])
        logprobs = logits.log_softmax(-1).gather(1, problem.targets[chunk, None])[:, 0]
        losses = token_loss(logprobs, problem, chunk) / rows
        losses.sum().backward()
        loss += losses.sum().item()
        scale += losses.abs().sum().item()
    gradients = {name: leaf.grad.cpu() for name, leaf in leaves.items()}
    return Solution(rows=rows, loss=loss, loss_scale=scale, gradients=gradients)


@torch.no_grad()
def _logprobs(problem: Problem) -> Tensor:
    """(N,) fp32."""
    weight = problem.weight.float()
    parts = []
    for chunk in _chunks(len(problem.hidden)):
        branches = [problem.hidden, problem.uncond_hidden]
        logits = _guide([b[chunk].float() @ weight.T for b in branches if b is not None])
        parts.append(logits.log_softmax(-1).gather(1, problem.targets[chunk, None])[:, 0])
    return torch.cat(parts)


def _guide(logits: list[Tensor]) -> Tensor:
    """Guided logits of a conditional and an unconditional branch; of one branch, its own."""
    if len(logits) == 1:
        return logits[0]
    cond, uncond = logits
    return uncond + CFG_WEIGHT * (cond - uncond)


def _chunks(rows: int) -> list[slice]:
    return [slice(i, min(i + ORACLE_ROWS, rows)) for i in range(0, rows, ORACLE_ROWS)]
