"""How the GPU check looks at an op: inputs, errors against fp64, time against a copy.

Allowed error: twice the same-dtype eager op's, plus a little. Timed calls take turns over several
sets of inputs, so that none is found in cache; the rate counts the least bytes an op must move.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.gpu.models import Shape
from bench.gpu.timing import input_sets, median_seconds

EPS = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-6}
Tensors = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """An op at a shape.

    Attributes:
        least: bytes that it must move.
        prepare: makes a set of inputs.
    """

    op: str
    shape: str
    least: int
    prepare: Callable[[], "Call"]


@dataclass(frozen=True, slots=True)
class Call:
    """One set of inputs.

    Attributes:
        run: the op on them.
        errors: (largest error, allowed error) of the op's results.
    """

    run: Callable[[], Any]
    errors: Callable[[], tuple[float, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Where in a rollout the ops are looked at.

    Attributes:
        images: rows are two an image.
        prefix, suffix, step: tokens of the prompt, slots of the suffix, the current slot.
    """

    shape: Shape
    images: int
    dtype: torch.dtype
    device: torch.device
    prefix: int = 149
    suffix: int = 576
    step: int = 287

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, device=self.device).mul_(scale).to(self.dtype)

    def index(self, values: Tensor | list[int]) -> Tensor:
        return torch.as_tensor(values, dtype=torch.int32, device=self.device)


def measure(case: Case, step: Step, rate: float) -> dict[str, Any]:
    """A row: errors, and a speed where they are allowed ones."""
    torch.manual_seed(0)
    calls = [case.prepare()]
    error, allowed = calls[0].errors()
    row = {
        "op": case.op,
        "model": step.shape.name,
        "shape": case.shape,
        "max_error": error,
        "allowed_error": allowed,
        "correct": error <= allowed,
    }
    if not row["correct"]:
        return row
    calls += [case.prepare() for _ in range(input_sets(case.least, step.device) - 1)]
    seconds = median_seconds([call.run for call in calls], step.device)
    return row | {
        "us": seconds * 1e6,
        "gb_per_s": case.least / seconds / 1e9,
        "share_of_copy": case.least / seconds / rate,
    }


def largest(
    got: Tensors, eager: Tensors, exact: Tensors, dtype: torch.dtype
) -> tuple[float, float]:
    """Largest error of `got`, and the largest allowed: both against fp64, over the same scale."""
    errors, allowed = [], []
    for mine, theirs, truth in zip(got, eager, exact, strict=True):
        scale = truth.abs().max().item() or 1.0
        errors.append((mine.double() - truth).abs().max() / scale)
        allowed.append((theirs.double() - truth).abs().max() / scale)
    # Tensor.max keeps a NaN, which is then not within what is allowed.
    return torch.stack(errors).max().item(), 2 * torch.stack(allowed).max().item() + EPS[dtype] / 4
