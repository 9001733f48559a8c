"""The exact 16-bit AdamW against torch's fused one: time and bytes a weight.

One tensor of as many weights as a large layer has. Providers take turns, medians. `correct`: after 20
steps the split weights are fp32's, bit for bit. Beside them torch's loop over its ops (what a CPU takes
by default) and fused AdamW on bf16 weights, which loses most of an update at T2I-R1's learning rate:
`share_of_update` is how much of the wanted change of the weights is there after those steps.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.settings.options import check_fields, option
from kernels import AdamW, adamw
from kernels.adamw import master

FP32, BF16 = torch.float32, torch.bfloat16
RATE, STEPS = 1e-6, 20


@dataclass(kw_only=True, slots=True)
class Config:
    """Settings of `python -m bench adamw`."""

    json: bool = option(False, "print one JSON object instead of a table")
    threads: int = option(0, "torch threads; 0: torch's choice", at_least=0)
    weights: int = option(16_000_000, "weights of the tensor", at_least=1000)
    repeats: int = option(15, "timed steps of each", at_least=1)

    def __post_init__(self) -> None:
        check_fields(self)


class Ours:
    """kernels.adamw on weights of a dtype with moments of a dtype."""

    def __init__(self, start: Tensor, dtype: torch.dtype, moments: torch.dtype) -> None:
        self.weight, self.low = start.to(dtype).clone(), None
        if dtype == BF16:
            self.low = torch.zeros(start.shape, dtype=torch.int16)
        self.moments = [torch.zeros_like(start, dtype=moments) for _ in "mv"]
        self.done = 0

    def step(self, grad: Tensor) -> None:
        self.done += 1
        settings = AdamW(step=self.done, lr=RATE)
        adamw(self.weight, grad.to(self.weight.dtype), self.low, *self.moments, settings)

    def value(self) -> Tensor:
        return self.weight.float() if self.low is None else master(self.weight, self.low)

    @property
    def bytes(self) -> float:
        kept = [self.weight, *self.moments, *([] if self.low is None else [self.low])]
        return sum(t.element_size() for t in kept)


class Theirs:
    """torch.optim.AdamW on weights of a dtype."""

    def __init__(self, start: Tensor, dtype: torch.dtype, *, fused: bool) -> None:
        self.weight = torch.nn.Parameter(start.to(dtype).clone())
        self.optimizer = torch.optim.AdamW([self.weight], lr=RATE, weight_decay=0, fused=fused)
        self.bytes = 3 * dtype.itemsize

    def step(self, grad: Tensor) -> None:
        self.weight.grad = grad.to(self.weight.dtype)
        self.optimizer.step()

    def value(self) -> Tensor:
        return self.weight.detach().float()


def run(config: Config) -> dict[str, Any]:
    """Check, then time."""
    rng = torch.Generator().manual_seed(0)
    start = (torch.randn(config.weights, generator=rng) * 0.02).bfloat16().float()
    providers: dict[str, Ours | Theirs] = {
        "ours, bf16 + 16 bits, fp32 moments": Ours(start, BF16, FP32),
        "ours, bf16 + 16 bits, bf16 moments": Ours(start, BF16, BF16),
        "ours, fp32": Ours(start, FP32, FP32),
        "torch fused, fp32": Theirs(start, FP32, fused=True),
        "torch fused, bf16": Theirs(start, BF16, fused=True),
        "torch loop, fp32": Theirs(start, FP32, fused=False),
    }
    for _ in range(STEPS):
        grad = (torch.randn(config.weights, generator=rng) * 1e-2).bfloat16()
        for provider in providers.values():
            provider.step(grad)
    exact = providers["ours, bf16 + 16 bits, fp32 moments"].value()
    correct = exact.equal(providers["ours, fp32"].value())
    wanted = providers["torch fused, fp32"].value() - start
    kept = {
        name: float((p.value() - start) @ wanted / (wanted @ wanted))
        for name, p in providers.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    grads = {dtype: grad.to(dtype) for dtype in (FP32, BF16)}
    for _ in range(config.repeats):
        for name, provider in providers.items():
            own = grads[provider.weight.dtype]
            seconds[name].append(_timed(lambda p=provider, g=own: p.step(g)))
    median = {name: statistics.median(times) for name, times in seconds.items()}
    rows = [
        {
            "provider": name,
            "bytes_per_weight": providers[name].bytes,
            "ns_per_weight": median[name] / config.weights * 1e9,
            "share_of_update": kept[name],
        }
        for name in providers
    ]
    first = "ours, bf16 + 16 bits, fp32 moments"
    ratios = {
        "time_vs_torch_fused": median[first] / median["torch fused, fp32"],
        "time_vs_torch_loop": median[first] / median["torch loop, fp32"],
        "bytes_vs_torch_fp32": providers[first].bytes / 12,
    }
    return {"rows": rows, "ratios": ratios, "correct": correct}


def _timed(step: Callable[[], None]) -> float:
    begun = time.perf_counter()
    step()
    return time.perf_counter() - begun
