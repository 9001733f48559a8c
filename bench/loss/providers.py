"""Providers of `python -m bench loss`: ours and its peers, each a function from problem to loss.

Peers are imported where they are called, in a process of their own. A peer that only gives
log-probs gets the same loss maths on top (loss_problem.token_loss) and autograd.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.loss.problem import BETA, CFG_WEIGHT, CLIP, SEQUENCE, Problem, token_loss
from kernels import linear_grpo_loss, linear_logprobs

# Vocabulary entries a tile: what TRL's trainer passes; one below V = 16384; the fastest on a CPU
# at the size of the ratios, where narrower ones take less memory and longer.
TRL_DEFAULT_TILE, TRL_TILE, TRL_CPU_TILE = 32_768, 4_096, 512
# Rows a chunk. At that size torch chooses 128, which takes less memory and a third longer.
TORCH_ROWS = 512


class Provider(NamedTuple):
    """One way to the loss.

    Attributes:
        loss: scalar loss of a problem, differentiable in its leaves.
        floats: (N, V, D) -> a generous estimate of its peak memory in fp32 numbers, gradients
            included; only used to leave out what would not fit.
        package: the peer's distribution; None: ours and plain PyTorch.
        guided: it takes the guided problem.
    """

    loss: Callable[[Problem], Tensor]
    floats: Callable[[int, int, int], float]
    package: str | None = None
    guided: bool = False


def ours(problem: Problem) -> Tensor:
    """kernels.linear_grpo_loss, guided where the problem is."""
    return linear_grpo_loss(
        problem.hidden,
        problem.weight,
        problem.targets,
        problem.advantages,
        uncond_hidden=problem.uncond_hidden,
        cfg_weight=None if problem.uncond_hidden is None else CFG_WEIGHT,
        old_logprobs=problem.old_logprobs,
        ref_logprobs=problem.ref_logprobs,
        clip_low=CLIP,
        clip_high=CLIP,
        beta=BETA,
    ).loss


def ours_logprobs(problem: Problem) -> Tensor:
    """kernels.linear_logprobs, for a loss of the caller's own."""
    logprobs = linear_logprobs(problem.hidden, problem.weight, problem.targets)
    return token_loss(logprobs, problem).mean()


def logits(problem: Problem) -> Tensor:
    """What T2I-R1 does: all logits, log_softmax, gather, autograd."""
    return _loss_of_logits(F.linear(problem.hidden, problem.weight), problem)


def guided_two_gemms(problem: Problem) -> Tensor:
    """Guidance as the samplers of image generators write it: on the logits of both branches."""
    cond = F.linear(problem.hidden, problem.weight)
    uncond = F.linear(problem.uncond_hidden, problem.weight)
    return _loss_of_logits(uncond + CFG_WEIGHT * (cond - uncond), problem)


def liger(problem: Problem, *, compiled: bool = False) -> Tensor:
    """Liger-Kernel's chunked loss, a sequence at a time as by default."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    n = len(problem.targets)
    if n > SEQUENCE and n % SEQUENCE:
        raise NotImplementedError(f"takes one advantage a sequence: wanted N of n x {SEQUENCE}")
    sequences = max(n // SEQUENCE, 1)

    def by_sequence(x: Tensor) -> Tensor:
        return x.view(sequences, -1, *x.shape[1:])

    targets = by_sequence(problem.targets)
    loss_of = LigerFusedLinearGRPOLoss(
        beta=BETA,
        compiled=compiled,
        epsilon_low=CLIP,
        epsilon_high=CLIP,
        loss_type="bnpo",  # the mean over tokens
    )
    loss, _ = loss_of(
        by_sequence(problem.hidden),
        problem.weight,
        targets,
        torch.ones_like(targets, dtype=torch.float32),
        by_sequence(problem.advantages)[:, 0],
        ref_per_token_logps=by_sequence(problem.ref_logprobs),
        old_per_token_logps=by_sequence(problem.old_logprobs),
    )
    return loss


def liger_compiled(problem: Problem) -> Tensor:
    """The same with its loss maths under torch.compile, its default."""
    return liger(problem, compiled=True)


def trl(problem: Problem) -> Tensor:
    """TRL's chunked log-probs, with no other output, and a tile that suits the machine."""
    return _trl(problem, TRL_TILE if problem.hidden.is_cuda else TRL_CPU_TILE)


def trl_default(problem: Problem) -> Tensor:
    """The same with the tile of its trainer."""
    return _trl(problem, TRL_DEFAULT_TILE)


def torch_fused(problem: Problem) -> Tensor:
    """torch's own chunked linear cross entropy, by token since each has a slope of its own."""
    return _torch_fused(problem, TORCH_ROWS)


def torch_fused_default(problem: Problem) -> Tensor:
    """The same with chunks of torch's choice."""
    return _torch_fused(problem, None)


def cce(problem: Problem) -> Tensor:
    """Apple's cut cross entropy: its Triton kernels on CUDA, its compiled logits on a CPU."""
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if problem.hidden.is_cuda else "torch_compile"
    losses = linear_cross_entropy(
        problem.hidden, problem.weight, problem.targets, reduction="none", impl=impl
    )
    return token_loss(-losses.float(), problem).mean()


def _trl(problem: Problem, tile: int) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    logprobs, *_ = ChunkedLogProbFunction.apply(
        problem.hidden, problem.weight, None, problem.targets, 1.0, tile, None, 1.0, ()
    )
    return token_loss(logprobs, problem).mean()


def _torch_fused(problem: Problem, rows: int | None) -> Tensor:
    if not hasattr(F, "linear_cross_entropy"):
        raise NotImplementedError(f"torch {torch.__version__} has no F.linear_cross_entropy")
    losses = F.linear_cross_entropy(
        problem.hidden,
        problem.weight,
        problem.targets,
        reduction="none",
        options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows),
    )
    return token_loss(-losses, problem).mean()


def _loss_of_logits(logits: Tensor, problem: Problem) -> Tensor:
    logprobs = logits.float().log_softmax(-1).gather(1, problem.targets[:, None])[:, 0]
    return token_loss(logprobs, problem).mean()


def _chunked(rows: int, columns: int) -> Callable[[int, int, int], float]:
    """Memory of a provider that keeps several copies of one tile of logits and of the gradients."""
    return lambda n, v, d: 9 * min(n, rows) * min(v, columns) + 2 * n * d + 3 * v * d


PROVIDERS: dict[str, Provider] = {
    "ours": Provider(ours, _chunked(512, 16_384)),
    "ours_logprobs": Provider(ours_logprobs, _chunked(512, 16_384)),
    "logits": Provider(logits, lambda n, v, d: 4 * n * v + n * d + v * d),
    "liger": Provider(liger, _chunked(2048, 4096), "liger-kernel"),
    "liger_compiled": Provider(liger_compiled, _chunked(2048, 4096), "liger-kernel"),
    "trl": Provider(trl, _chunked(4096, TRL_TILE), "trl"),
    "trl_default": Provider(trl_default, _chunked(4096, TRL_DEFAULT_TILE), "trl"),
    "torch_fused": Provider(torch_fused, _chunked(TORCH_ROWS, 1 << 30), "torch"),
    # Its chunks have about as many logits as there are hidden values.
    "torch_fused_default": Provider(
        torch_fused_default, lambda n, v, d: 9 * n * d + 3 * v * d, "torch"
    ),
    "cce": Provider(cce, lambda n, v, d: 1.5 * n * v + n * d + v * d, "cut-cross-entropy"),
    "guided": Provider(ours, _chunked(512, 16_384), guided=True),
    "guided_two_gemms": Provider(
        guided_two_gemms, lambda n, v, d: 5 * n * v + 2 * n * d + v * d, guided=True
    ),
}
