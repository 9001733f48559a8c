"""Clocks of the GPU check: CUDA events around graph replays; a plain clock on a CPU (tests)."""

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

L2_BYTES = 128 << 20  # more than the last-level cache of any GPU of today


def median_seconds(
    calls: Sequence[Callable[[], object]], device: torch.device, *, repeats: int = 21
) -> float:
    """Median seconds of one call.

    Args:
        calls: one op on several sets of inputs, run in turn so that none finds its inputs in
            cache; captured as one graph, since a launch from Python takes longer than many ops.
    """
    for call in calls:
        call()
    if device.type != "cuda":
        run = _all(calls)
        return min(_wall(run) for _ in range(2)) / len(calls)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return statistics.median(event_seconds([graph.replay] * repeats)) / len(calls)


def event_seconds(runs: Sequence[Callable[[], object]]) -> list[float]:
    """Seconds of each run on the current CUDA stream, between events; one sync at the end."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(runs) + 1)]
    marks[0].record()
    for run, mark in zip(runs, marks[1:], strict=True):
        run()
        mark.record()
    marks[-1].synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]


def wall_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Seconds until the run's work is done, the host's part included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return _wall(lambda: (run(), device.type == "cuda" and torch.cuda.synchronize(device)))


def copy_rate(device: torch.device, megabytes: int = 2048) -> float:
    """Bytes read and written a second by a large device-to-device copy."""
    source = torch.randint(-9, 9, (megabytes << 20,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / median_seconds([lambda: target.copy_(source)], device)


def input_sets(bytes_of_one: int, device: torch.device) -> int:
    """Sets of inputs that together exceed the GPU's cache, for `median_seconds`."""
    if device.type != "cuda":
        return 1
    return min(max(2, -(-2 * L2_BYTES // max(bytes_of_one, 1))), 32)


def _all(calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
    def run() -> None:
        for call in calls:
            call()

    return run


def _wall(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
