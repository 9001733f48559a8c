"""Decoding by one step's launches, captured once and replayed for all other steps.

On CUDA the capture is a graph, and nothing returns to the host between the first and the last
token, but that text looks every few steps at whether any row still runs. On a CPU it is a list of
C ops with their arguments, and as many rows decode together as its cache holds. Under Triton's
interpreter the launches run one by one: tests only.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from engine.model.generator import Generator
from engine.rollout.prefill import Prepared
from engine.rollout.request import Drawn, Prompts, Request, joined
from engine.rollout.step import DecodeStep
from engine.settings.device import free_memory, give_back_memory
from engine.settings.out_of_memory import halved, is_out_of_memory
from kernels.cpu.launch import record
from kernels.dispatch import use_triton
from kernels.sample_step import error_place

ALIVE_EVERY = 32  # text steps between two looks at whether any row still runs, on CUDA
FREE_SHARE = (
    0.8  # of a device's free memory that caches may take; the rest: logits, workspaces, waste
)
FEWEST_TOGETHER = 8  # samples: fewer read the weights too often for what they save of the cache


def decode(generator: Generator, prompts: Sequence[Tensor], request: Request) -> Drawn:
    """Draw up to `request.steps` tokens for each of B prompts (L_i,).

    Raises: FloatingPointError naming row and step of the first bad logits.
    """
    rows, parts, first = Prompts.of(prompts), [], 0
    give_back_memory()
    try:
        prepared = Prepared(generator, rows, request)
        together = _together(prepared, rows, request)
        while first < len(prompts):
            some = rows.rows(slice(first, first + together))
            part = _decoded(prepared, some, request)
            if part is None:
                together = halved(len(some.owner), "samples of a rollout")
            else:
                parts.append(part)
                first += len(some.owner)
    finally:
        getattr(generator.weights, "release", _nothing)()
    return joined(parts, generator.pad).rows(rows.order.argsort())


def _nothing() -> None:
    """For weights that nothing was done to."""


def _decoded(prepared: Prepared, prompts: Prompts, request: Request) -> Drawn | None:
    """What some rows drew; None: out of memory, and there are rows to spare."""
    request = replace(request, sample_ids=request.sample_ids[prompts.order])
    try:
        return Decoder(prepared, prompts, request).decode()
    except RuntimeError as error:
        if len(prompts.owner) == 1 or not is_out_of_memory(error):
            raise
    return None


def decoder_of(
    generator: Generator,
    prompts: Sequence[Tensor],
    request: Request,
    *,
    fused_head: bool | None = None,
) -> "Decoder":
    """A decoder of all the prompts at once; its rows are `Prompts.of(prompts)`'s."""
    rows = Prompts.of(prompts)
    prepared = Prepared(generator, rows, request)
    request = replace(request, sample_ids=request.sample_ids[rows.order])
    return Decoder(prepared, rows, request, fused_head=fused_head)


def _together(prepared: Prepared, prompts: Prompts, request: Request) -> int:
    """Samples to decode at a time.

    As many as the device's free memory holds. A CPU reads its last level of cache several times as
    fast as memory: where the weights and some samples' keys and values fit half of it, so many.
    """
    generator, count, cache = prepared.generator, len(prompts.owner), _cache_bytes()
    # What a row's keys and values take, at most.
    tokens = request.branches * request.steps + len(prompts.longest)
    each = tokens * generator.shape.kv_bytes(prepared.weights.dtype)
    fitting = max(1, int(FREE_SHARE * free_memory(generator.device)) // each)
    if generator.device.type == "cpu" and cache is not None:
        cached = (cache // 2 - prepared.weights.trunk_bytes) // each
        if cached >= FEWEST_TOGETHER:
            fitting = min(fitting, cached)
    parts = -(-count // fitting)
    return -(-count // parts)


@cache
def _cache_bytes() -> int | None:
    """Bytes of this CPU's last level of cache; None where the system does not tell."""
    size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    try:
        return int(size.read_text().strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        return None


class Decoder:
    """Decodes some rows; their cache, buffers and graph are released with it.

    Args:
        prepared: for these prompts.
        prompts: the rows'.
        request: what to draw; sample_ids are those of the rows.
        fused_head: see DecodeStep; None: on CUDA.
    Raises: ValueError where the weights have changed since they were prepared.
    """

    @torch.no_grad()
    def __init__(
        self,
        prepared: Prepared,
        prompts: Prompts,
        request: Request,
        *,
        fused_head: bool | None = None,
    ) -> None:
        if prepared.weights.version != prepared.generator.weights.version:
            raise ValueError("prepared: the weights have changed since; prepare them anew")
        self.names, self.steps = prompts.order, request.steps
        fused = use_triton(prompts.owner) if fused_head is None else fused_head
        self.step = DecodeStep(prepared, prompts, request, fused_head=fused)

    def decode(self, *, capture: bool = True) -> Drawn:
        """Draw the tokens.

        Args:
            capture: replay step 0's launches; False launches every step's one by one, for
                comparison.
        Raises: FloatingPointError naming row and step of the first bad logits.
        """
        advance, alive = self.start(capture=capture), self.step.state.alive
        every = 1 if self.step.in_c else ALIVE_EVERY
        for step in range(1, self.steps):
            if alive is not None and step % every == 0 and not alive.any():
                break
            advance()
        # A GPU's one host sync, but for text's looks at alive.
        place = error_place(self.step.state.error, len(self.names))
        if place is not None:
            row, at = int(self.names[place[0]]), place[1]
            raise FloatingPointError(f"logits of row {row} at step {at} are not finite")
        return self._result()

    def start(self, *, capture: bool = True) -> Callable[[], None]:
        """Run step 0. Returns what runs the next one: the capture's replay, or the launches.

        Step 0 is launched eagerly: it compiles and loads what is not loaded yet, which must not
        happen during a capture.
        """
        launch, device = self.step.launch, self.names.device
        if capture and self.step.in_c:
            with record() as launches:
                launch()
            return launches.run
        if device.type != "cuda" or not capture:
            launch()
            return launch
        stream, caller = _capture_stream(device), torch.cuda.current_stream(device)
        stream.wait_stream(caller)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            launch()
            # Not torch.cuda.graph: that empties the allocator's cache, which training refills at
            # every step. thread_local: reward experts may allocate on other threads meanwhile.
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                launch()
            finally:
                graph.capture_end()
        caller.wait_stream(stream)
        return graph.replay

    def _result(self) -> Drawn:
        state = self.step.state
        assert state.logprobs is not None and state.guided_logprobs is not None
        mask, used = torch.ones_like(state.tokens, dtype=torch.bool), self.steps
        if state.eos is not None:
            ends = state.tokens.eq(state.eos)
            mask = ends.cumsum(1) - ends.long() == 0  # no end before
            used = int(mask.sum(1).max())
        drawn = Drawn(state.tokens, state.logprobs, state.guided_logprobs, mask)
        return drawn.columns(used)


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream a device for all captures: cuBLAS keeps a workspace for every stream it sees."""
    return torch.cuda.Stream(device)
