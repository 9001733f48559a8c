"""The GPU check's rollouts: correct, timed beside the peers, and held against the roofline.

Peers are timed over a share of their steps: windows of steps at 1/6, 3/6 and 5/6 of the sequence,
whose mean stands for all of it (exact where a step's time grows linearly with its context). A chunk
of the published loop takes the same time whichever it is. Each row says what was timed.
"""

import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bench.gpu.models import (
    CFG_WEIGHT,
    Item,
    Plan,
    Shape,
    image_decoder,
    peer_loop,
    prompts_of,
    random_policy,
    weight_bytes,
)
from bench.gpu.timing import copy_rate, event_seconds, wall_seconds
from bench.rollout.eager_loop import EagerLoop
from engine.model.policy import Policy
from engine.rollout import sample_images

GROUP = 8  # images that share a prompt in the row with shared prefixes


class ModelCheck:
    """A model's rollouts.

    Args:
        shape: the model.
        plan: how much is run.
        device: where.
    """

    def __init__(self, shape: Shape, plan: Plan, device: torch.device) -> None:
        self.shape, self.plan, self.device = shape, plan, device
        self.seconds: dict[tuple[str, int], float] = {}
        self.correct = False

    def items(self) -> list[Item]:
        """What is run, in the order of what matters most."""
        plan = self.plan
        items: list[Item] = [("weights and copy rate", self.prepare), ("drift", self.drift)]
        items += [(f"ours {n}", lambda n=n: [self.ours(n)]) for n in plan.sizes]
        items.append(("peer's weights", self.prepare_peer))
        items += [(f"eager_loop {n}", lambda n=n: self.chunked(n)) for n in plan.sizes]
        items += [(f"eager_unsplit {n}", lambda n=n: self.unsplit(n)) for n in plan.sizes]
        items += [(f"static_cache {n}", lambda n=n: self.static(n)) for n in plan.sizes]
        largest = max(plan.sizes)
        items.append((f"ours {largest}, cuBLAS head", lambda: [self.cublas_head(largest)]))
        items.append((f"ours {largest} shared", lambda: [self.ours(largest, group=GROUP)]))
        items.append(("eager_loop in full", self.full_loop))
        return items

    def prepare(self) -> list[dict[str, Any]]:
        self.rate = copy_rate(self.device, 2048 if self.device.type == "cuda" else 1)
        self.policy = random_policy(self.shape, self.plan.dtype, self.device)
        self.policy.image_table()
        return []

    def prepare_peer(self) -> list[dict[str, Any]]:
        self.loop = peer_loop(self.policy)
        return []

    def drift(self) -> list[dict[str, Any]]:
        """Sampler's log-probs against the training forward's in fp32, as the same dtype's are."""
        policy, plan = self.policy, self.plan
        prompts = prompts_of(policy, plan.checked, plan.prompt)
        drawn = sample_images(policy, prompts, cfg_weight=CFG_WEIGHT, seed=3)
        eager = self._forward(policy, prompts, drawn.ids)
        exact = self._forward(_widened(policy, self.shape, self.device), prompts, drawn.ids)
        ours = torch.stack((drawn.logprobs, drawn.guided_logprobs))
        error, allowed = (ours - exact).abs(), (eager - exact).abs()
        row = {"check": "log-probs against an fp32 forward, nats", "model": self.shape.name}
        for i, name in enumerate(("conditional", "guided")):
            row |= {f"{name}_mean": error[i].mean().item(), f"{name}_max": error[i].max().item()}
            row |= {f"{name}_eager_mean": allowed[i].mean().item()}
        means = error.mean((1, 2)), allowed.mean((1, 2))
        self.correct = bool((means[0] <= 2 * means[1] + 1e-4).all())
        return [row | {"correct": self.correct}]

    @torch.no_grad()
    def _forward(self, policy: Policy, prompts: list[Tensor], ids: Tensor) -> Tensor:
        """(2, B, N): conditional and guided log-probs by the training forward."""
        pairs = list(zip(prompts, ids, strict=True))
        both = [[policy.image_logprobs(*pair, w) for pair in pairs] for w in (None, CFG_WEIGHT)]
        return torch.stack([torch.stack(rows) for rows in both])

    def ours(self, images: int, *, group: int = 1) -> dict[str, Any]:
        """A whole rollout, and the steps of another between events."""
        policy, plan = self.policy, self.plan
        prompts = prompts_of(policy, images, plan.prompt, group=group)
        row = self._row("ours" if group == 1 else f"ours, {group} images a prompt", images)
        if not self.correct:
            return row | {"correct": False}

        def run() -> None:
            sample_images(policy, prompts, cfg_weight=CFG_WEIGHT, seed=1)

        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        first = wall_seconds(run, self.device)
        seconds = wall_seconds(run, self.device)
        steps = self.step_seconds(prompts[::group], group)
        least = self.roofline(images, group)
        mean = statistics.fmean(steps)
        row |= {
            "correct": True,
            "seconds": seconds,
            "seconds_first_call": first,
            "images_per_s": images / seconds,
            "step_ms": mean * 1e3,
            "step_ms_first_last": [steps[0] * 1e3, steps[-1] * 1e3],
            "roofline_step_ms": least * 1e3,
            "step_over_roofline": mean / least,
        }
        if self.device.type == "cuda":
            row["peak_mb"] = torch.cuda.max_memory_allocated() >> 20
        if group == 1:
            self.seconds["ours", images] = seconds
        return row

    def cublas_head(self, images: int) -> dict[str, Any]:
        """Steps with the head's last layer as a GEMM of its own, for comparison."""
        prompts = prompts_of(self.policy, images, self.plan.prompt)
        steps = self.step_seconds(prompts, 1, fused_head=False)
        return self._row("ours, cuBLAS head", images) | {"step_ms": statistics.fmean(steps) * 1e3}

    def step_seconds(
        self, distinct: Sequence[Tensor], group: int, *, fused_head: bool = True
    ) -> list[float]:
        """Seconds of each decode step but the first."""
        decoder = image_decoder(self.policy, distinct, group, seed=2, fused_head=fused_head)
        advance = decoder.start()
        runs = [advance] * (decoder.steps - 1)
        if self.device.type == "cuda":
            return event_seconds(runs)
        return [wall_seconds(run, self.device) for run in runs]

    def roofline(self, images: int, group: int) -> float:
        """Seconds of a mean step at the copy rate: weights once, each stored prefix once, suffixes."""
        prefixes = -(-images // group) + 1
        suffix = 2 * images * (self.policy.image_tokens + 1) / 2
        tokens = prefixes * (self.plan.prompt - 1) + suffix
        return (
            weight_bytes(self.policy) + tokens * self.policy.shape.kv_bytes(self.policy.dtype)
        ) / self.rate

    def chunked(self, images: int) -> list[dict[str, Any]]:
        """The published loop: chunks of 32 rows, one after the other."""
        size = min(images, self.plan.chunk_rows // 2)
        chunk = self._estimate("eager_loop", size)
        chunks = images / size
        note = f"{chunk['timed']}; {chunks:g} chunks of {2 * size} rows, one timed"
        return [self._peer("eager_loop", images, chunk["seconds"] * chunks, note)]

    def unsplit(self, images: int) -> list[dict[str, Any]]:
        """The same with all rows at once; up to one chunk it is the published loop."""
        name = "eager_loop" if 2 * images <= self.plan.chunk_rows else "eager_unsplit"
        timed = self._estimate(name, images)
        return [self._peer("eager_unsplit", images, timed["seconds"], timed["timed"])]

    def static(self, images: int) -> list[dict[str, Any]]:
        """transformers' static cache, whose step attends all of its length, whatever the context."""
        timed = self._estimate("static_cache", images)
        return [self._peer("static_cache", images, timed["seconds"], timed["timed"])]

    def full_loop(self) -> list[dict[str, Any]]:
        """One chunk of the published loop in full, against its estimate."""
        size = min(max(self.plan.sizes), self.plan.chunk_rows // 2)
        estimate = self._estimate("eager_loop", size)["seconds"]
        prompts = prompts_of(self.policy, size, self.plan.prompt)
        seconds = wall_seconds(lambda: self.loop.sample(prompts, chunk_rows=None), self.device)
        row = self._row("eager_loop in full", size)
        return [row | {"seconds": seconds, "estimated_seconds": estimate}]

    def _estimate(self, name: str, images: int) -> dict[str, Any]:
        """Seconds of a peer's rollout in one chunk, from windows of its steps; timed once."""
        key = f"{name} estimate", images
        plan, steps = self.plan, self.policy.image_tokens
        static = name == "static_cache"
        window = min(plan.window, steps - 2)
        # The static cache's step does not depend on the context.
        middles = [] if static else [steps // 6, steps // 2, steps * 5 // 6]
        starts = [max(0, m - window // 2) for m in middles] or [0]
        note = f"{len(starts)} x {window} of {steps} steps timed"
        if key not in self.seconds:
            self.loop.static_tokens = plan.prompt + steps if static else None
            means, prefill = [], 0.0
            for start in starts:
                prompts = prompts_of(self.policy, images, plan.prompt + start)
                times = loop_seconds(self.loop, prompts, window + 2)
                means.append(statistics.fmean(times[2:]))
                prefill = prefill or times[0]
            self.seconds[key] = prefill + statistics.fmean(means) * (steps - 1)
        return {"seconds": self.seconds[key], "timed": note}

    def _peer(self, name: str, images: int, seconds: float, note: str) -> dict[str, Any]:
        self.seconds[name, images] = seconds
        row = self._row(name, images)
        return row | {"seconds": seconds, "images_per_s": images / seconds, "timed": note}

    def _row(self, provider: str, images: int) -> dict[str, Any]:
        return {
            "provider": provider,
            "model": self.shape.name,
            "images": images,
            "prompt": self.plan.prompt,
            "image_tokens": self.policy.image_tokens,
            "dtype": str(self.plan.dtype).removeprefix("torch."),
        }


def _widened(policy: Policy, shape: Shape, device: torch.device) -> Policy:
    """The policy's own weights in fp32."""
    wide = random_policy(shape, torch.float32, device)
    wide.load_state_dict(policy.state_dict())
    return wide


class _FewTokens:
    """A policy whose pictures have fewer tokens."""

    def __init__(self, policy: Policy, tokens: int) -> None:
        self._policy, self.image_tokens = policy, tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)


def loop_seconds(loop: EagerLoop, prompts: list[Tensor], steps: int) -> list[float]:
    """Seconds of the loop's first steps; the first one holds the prefill."""
    cuda = prompts[0].is_cuda
    marks: list[Any] = []

    def mark(*_: object) -> None:
        if cuda:
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(time.perf_counter())

    hook = loop.llama.register_forward_pre_hook(mark)
    policy, loop.policy = loop.policy, _FewTokens(loop.policy, steps)
    try:
        loop.sample(prompts, chunk_rows=None)
        mark()
    finally:
        hook.remove()
        loop.policy = policy
    if not cuda:
        return [b - a for a, b in pairwise(marks)]
    marks[-1].synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]
