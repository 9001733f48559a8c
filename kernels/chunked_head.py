"""A linear head and a loss on it, chunk by chunk of rows: three vocabulary GEMMs, never N x V.

For each chunk: logits by one GEMM into a buffer that every chunk reuses; one pass that leaves the
gradient in their place (`logits_pass`); two GEMMs that turn it into shares of the gradients of
hidden states and weight. The weight's share is summed in fp32 over the chunks.

Guidance: the head is linear and the guidance weights sum to one, so the branches are mixed before
the GEMM, z = W (u + w (c - u)) + b, and dz W is w times the conditional branch's gradient and 1 - w
times the unconditional one's. A mix of 16-bit activations is kept as a sum of two 16-bit matrices.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.logits_pass import logits_pass, pass_scratch
from kernels.tiling import CHUNK_BYTES, VOCAB_TILE
from kernels.token_loss import Rows, TokenLoss


class HeadInputs(NamedTuple):
    """A head and what goes into it.

    Attributes:
        hidden: (N, D); conditional branch.
        weight: (V, D); targets: (N,) int64; bias: (V,) or None.
        uncond_hidden, cfg_weight: (N, D) and the guidance weight; None: no guidance.
        temperature: > 0.
        chunk_rows: rows of a chunk; None: by CHUNK_BYTES.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None
    uncond_hidden: Tensor | None
    cfg_weight: float | None
    temperature: float
    chunk_rows: int | None


class Needs(NamedTuple):
    """Which inputs get a gradient."""

    hidden: bool = False
    uncond_hidden: bool = False
    weight: bool = False
    bias: bool = False


class Gradients(NamedTuple):
    """In the dtypes of the inputs; None where there is no need."""

    hidden: Tensor | None = None
    uncond_hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None


def check_inputs(head: HeadInputs) -> None:
    """Raise ValueError naming the argument whose shape or value cannot be."""
    hidden, weight, targets, bias = head[:4]
    if hidden.ndim != 2:
        raise ValueError(f"hidden: wanted (N, D), got {tuple(hidden.shape)}")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight: wanted (V, {hidden.shape[1]}), got {tuple(weight.shape)}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets: wanted ({len(hidden)},), got {tuple(targets.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: wanted ({len(weight)},), got {tuple(bias.shape)}")
    if (head.uncond_hidden is None) != (head.cfg_weight is None):
        raise ValueError("uncond_hidden and cfg_weight: wanted both or neither")
    if head.uncond_hidden is not None and head.uncond_hidden.shape != hidden.shape:
        got = tuple(head.uncond_hidden.shape)
        raise ValueError(f"uncond_hidden: wanted {tuple(hidden.shape)}, got {got}")
    if not head.temperature > 0:
        raise ValueError(f"temperature: wanted > 0, got {head.temperature}")
    if head.chunk_rows is not None and head.chunk_rows < 1:
        raise ValueError(f"chunk_rows: wanted >= 1, got {head.chunk_rows}")


def run_head(
    head: HeadInputs,
    *,
    terms: TokenLoss | None = None,
    slopes: Tensor | None = None,
    entropy: bool = False,
    needs: Needs | None = None,
) -> tuple[Rows, Gradients]:
    """All rows of a head through `logits_pass`, and the gradients.

    Args:
        terms, slopes, entropy: see `logits_pass`; (N,) here.
        needs: None: forward only.
    Returns: the pass's (N,) results, and gradients of the summed loss.
    """
    needs = needs or Needs()
    chunk_rows = head.chunk_rows or _chunk_rows(head, needs)
    share = _Gradients(head, needs, chunk_rows)
    head = head._replace(
        weight=_computed(head.weight),
        bias=None if head.bias is None else _computed(head.bias),
    )
    count, vocab = len(head.hidden), len(head.weight)
    shape = (min(chunk_rows, count), vocab)
    logits = head.weight.new_empty(shape, dtype=_wide(head.weight.dtype))
    scratch = pass_scratch(logits)
    gradient = head.weight.dtype if any(needs) else None
    scale = _scale(terms, slopes, gradient)
    parts: list[Rows] = []
    for start in range(0, count, chunk_rows):
        stop = min(start + chunk_rows, count)
        inputs = _mixed(head, start, stop)
        _project(inputs, head.weight, head.bias, out=logits[: stop - start])
        rows = logits_pass(
            logits[: stop - start],
            head.targets[start:stop],
            temperature=head.temperature,
            terms=None if terms is None else terms.rows(start, stop),
            slopes=None if slopes is None else slopes[start:stop],
            entropy=entropy,
            gradient=gradient,
            scale=scale,
            scratch=scratch,
        )
        if gradient is not None:
            share.add(start, inputs, head.weight, rows)
        parts.append(rows._replace(gradient=None, factor=1.0))
    return _joined(parts, logits), share.finish()


class _Gradients:
    """Sums the chunks' shares of the gradients: rows in their own dtype, weights in fp32."""

    def __init__(self, head: HeadInputs, needs: Needs, chunk_rows: int) -> None:
        self.guidance = 1.0 if head.cfg_weight is None else head.cfg_weight
        inputs = {name: getattr(head, name) for name, needed in needs._asdict().items() if needed}
        self.dtypes = {name: x.dtype for name, x in inputs.items()}
        self.rows = {n: _zeros(x, x.dtype) for n, x in inputs.items() if "hidden" in n}
        self.sums = {n: _zeros(x, _wide(x.dtype)) for n, x in inputs.items() if "hidden" not in n}
        # Kept over the chunks: blocks of this size, taken and given back, leave the heap in holes.
        shape = (min(chunk_rows, len(head.hidden)) if inputs else 0, head.hidden.shape[1])
        self.work = head.hidden.new_empty(shape, dtype=_wide(head.weight.dtype))

    def add(self, start: int, inputs: list[Tensor], weight: Tensor, rows: Rows) -> None:
        """One chunk's share; rows of slope 0 (masked, clipped, no advantage) have none."""
        assert rows.slopes is not None and rows.gradient is not None
        live = rows.slopes.nonzero()[:, 0]
        if len(live) == 0:
            return
        gradient, factor = rows.gradient, rows.factor
        places: slice | Tensor = slice(start, start + len(live))
        if len(live) < len(gradient):
            gradient, inputs = _gathered(gradient, live), [x[live] for x in inputs]
            factor = factor[live] if isinstance(factor, Tensor) else factor
            places = live + start
        if self.rows:
            mixed = _product(gradient, weight, out=self.work[: len(gradient)])
            mixed *= factor[:, None] if isinstance(factor, Tensor) else factor
            shares = {"hidden": self.guidance, "uncond_hidden": 1 - self.guidance}
            for name, target in self.rows.items():
                share = mixed if shares[name] == 1 else mixed * shares[name]
                target[places] = share.to(target.dtype)  # an index, unlike a slice, casts nothing
        for name, total in self.sums.items():
            for x in inputs if name == "weight" else [gradient.new_ones(len(gradient), 1)]:
                if isinstance(factor, Tensor):
                    work = self.work[: len(x), : x.shape[1]]
                    total.view(len(total), -1).addmm_(
                        gradient.T, torch.mul(x, factor[:, None], out=work)
                    )
                else:
                    _add_product(total.view(len(total), -1), gradient.T, x, factor)

    def finish(self) -> Gradients:
        """The sums, in the dtypes of the inputs."""
        found = self.rows | self.sums
        return Gradients(**{name: x.to(self.dtypes[name]) for name, x in found.items()})


def _zeros(like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(like.shape, dtype=dtype, device=like.device)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What sums of that dtype are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _chunk_rows(head: HeadInputs, needs: Needs) -> int:
    vocab, width = head.weight.shape
    budget = CHUNK_BYTES["cuda" if head.weight.is_cuda else "cpu"]
    if needs.weight:
        budget = max(budget, vocab * width)  # fp32 bytes over 4
    return max(16, budget // (4 * vocab) // 16 * 16)


def _computed(x: Tensor) -> Tensor:
    """As the GEMMs take it: 16-bit stays on CUDA, where they accumulate and return fp32."""
    return x if x.is_cuda or x.dtype == torch.float64 else x.float()


def _scale(terms: TokenLoss | None, slopes: Tensor | None, gradient: torch.dtype | None) -> float:
    """Power of two that brings a gradient in fp16 to around 1; 1 for dtypes with fp32's range."""
    if gradient != torch.float16:
        return 1.0
    sizes = slopes if terms is None else terms.token_weights
    assert sizes is not None
    sizes = sizes.abs()
    largest = sizes.max().item() if len(sizes) else 0.0
    return 2.0 ** -math.floor(math.log2(largest)) if largest > 0 else 1.0


def _mixed(head: HeadInputs, start: int, stop: int) -> list[Tensor]:
    """The input of the GEMM as matrices that sum to it, in the weight's dtype."""
    x, dtype = head.hidden[start:stop], head.weight.dtype
    if head.uncond_hidden is not None:
        assert head.cfg_weight is not None
        uncond = head.uncond_hidden[start:stop].to(_wide(x.dtype))
        x = torch.lerp(uncond, x.to(_wide(x.dtype)), head.cfg_weight)
    if dtype in (x.dtype, _wide(dtype)):
        return [x.to(dtype)]
    high = x.to(dtype)
    return [high, (x - high).to(dtype)]


def _project(inputs: list[Tensor], weight: Tensor, bias: Tensor | None, *, out: Tensor) -> None:
    """sum(inputs) @ weight.T + bias into out (C, V)."""
    if weight.is_cuda:
        first, *rest = inputs
        if weight.dtype == out.dtype:
            torch.mm(first, weight.T, out=out)
        else:
            torch.mm(first, weight.T, out.dtype, out=out)
        for x in rest:
            torch.addmm(out, x, weight.T, out.dtype, out=out)
        if bias is not None:
            out.add_(bias)
        return
    (x,) = inputs
    for start in range(0, len(weight), VOCAB_TILE):
        columns = slice(start, start + VOCAB_TILE)
        if bias is None:
            torch.mm(x, weight[columns].T, out=out[:, columns])
        else:
            torch.addmm(bias[columns], x, weight[columns].T, out=out[:, columns])


def _product(gradient: Tensor, weight: Tensor, *, out: Tensor) -> Tensor:
    """gradient (C, V) @ weight (V, D) into out, fp32 (fp64)."""
    if weight.dtype == out.dtype:
        return torch.mm(gradient, weight, out=out)
    return torch.mm(gradient, weight, out.dtype, out=out)


def _add_product(total: Tensor, left: Tensor, right: Tensor, factor: float) -> None:
    """total += factor * left @ right, the sum in fp32 (fp64)."""
    if total.dtype == left.dtype:
        total.addmm_(left, right, alpha=factor)
    else:
        torch.addmm(total, left, right, total.dtype, alpha=factor, out=total)


def _gathered(gradient: Tensor, live: Tensor, step: int = 64) -> Tensor:
    """The live rows (ascending) moved to the front, in place."""
    for start in range(0, len(live), step):
        block = live[start : start + step]
        gradient[start : start + len(block)] = gradient[block]
    return gradient[: len(live)]


def _joined(parts: list[Rows], logits: Tensor) -> Rows:
    """The chunks' results end to end."""
    if not parts:
        none = logits.new_empty(0)
        return Rows(none, none, none, none, none, none)
    if len(parts) == 1:
        return parts[0]
    return Rows(
        *(
            torch.cat(column) if isinstance(column[0], Tensor) else column[0]
            for column in zip(*parts, strict=True)
        )
    )
