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

from engine.model.policy import Policy
from engine.rollout.prefill import kv_bytes, prefill_prompts
from engine.rollout.sampling import Decoded, Sampling, distinct_prompts, joined
from engine.rollout.step import StaticStep
from engine.rollout.step_weights import StepWeights
from kernels.cpu.launch import record
from kernels.dispatch import use_triton
from kernels.sample_step import error_place

ALIVE_EVERY = 32  # text steps between two looks at whether any row still runs, on CUDA
FEWEST_TOGETHER = 8  # samples: fewer read the weights too often for what they save of the cache


def decode_static(
    policy: Policy, prompts: Sequence[Tensor], *, steps: int, sampling: Sampling
) -> Decoded:
    """Draw up to `steps` tokens for each of B prompts (L_i,).

    Raises: FloatingPointError naming row and step of the first bad logits.
    """
    distinct, owner, order = distinct_prompts(prompts)
    prepared = Prepared(policy, distinct, image=sampling.image)
    together, parts = _together(policy, prompts, steps, sampling), []
    for first in range(0, len(prompts), together):
        places = slice(first, first + together)
        rows = order[places]
        decoder = StaticDecoder(
            policy,
            distinct,
            owner[places],
            rows,
            steps=steps,
            sampling=replace(sampling, sample_ids=sampling.sample_ids[rows]),
            prepared=prepared,
        )
        parts.append(decoder.decode())
    return joined(parts, policy.pad).rows(order.argsort())


def _together(policy: Policy, prompts: Sequence[Tensor], steps: int, sampling: Sampling) -> int:
    """Samples to decode at a time.

    A GPU takes all of them. A CPU reads its last level of cache several times as fast as memory:
    where the weights and some samples' keys and values fit half of it, so many.
    """
    cache, weights = _cache_bytes(), policy.model.language_model.parameters()
    if policy.device.type != "cpu" or cache is None:
        return len(prompts)
    own = steps + max(map(len, prompts))  # what a row's keys and values take, at most
    tokens = own + steps if sampling.image else own
    room = cache // 2 - sum(w.nbytes for w in weights)
    fitting = room // (tokens * kv_bytes(policy.config, policy.dtype))
    if fitting < FEWEST_TOGETHER:
        return len(prompts)
    parts = -(-len(prompts) // fitting)
    return -(-len(prompts) // parts)


@cache
def _cache_bytes() -> int | None:
    """Bytes of this CPU's last level of cache; None where the system does not tell."""
    size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    try:
        return int(size.read_text().strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        return None


class Prepared:
    """What decoders of the same prompts share: the weights, and the prompts' keys and values.

    Args:
        policy: the policy.
        distinct: U tensors (L_i,) int64: the prompts, each once.
        image: image tokens are drawn, else text.

    Attributes:
        weights: for a step.
        prefixes: keys and values (layers, U or U + 1, Hkv, P, head_dim): see `prefill_prompts`.
    """

    @torch.no_grad()
    def __init__(self, policy: Policy, distinct: Sequence[Tensor], *, image: bool) -> None:
        self.weights = StepWeights(policy, image=image)
        self.prefixes = prefill_prompts(policy, distinct, image=image)


class StaticDecoder:
    """Decodes some rows; their cache, buffers and graph are released with it.

    Args:
        policy: the policy.
        distinct: U tensors (L_i,) int64: the prompts, each once.
        owner: (B,) int64, ascending: the prompt of each row.
        names: (B,) what an error calls each row.
        steps: tokens to draw, at most.
        sampling: how.
        fused_head: see StaticStep; None: on CUDA.
        prepared: for these prompts; None: to be made.
    """

    @torch.no_grad()
    def __init__(
        self,
        policy: Policy,
        distinct: Sequence[Tensor],
        owner: Tensor,
        names: Tensor,
        *,
        steps: int,
        sampling: Sampling,
        fused_head: bool | None = None,
        prepared: Prepared | None = None,
    ) -> None:
        self.eos, self.names, self.steps = policy.eos, names, steps
        last = torch.stack([p[-1] for p in distinct])[owner]
        lengths = torch.tensor([len(p) - 1 for p in distinct], device=owner.device)[owner]
        if prepared is None:
            prepared = Prepared(policy, distinct, image=sampling.image)
        if sampling.image:
            owner = torch.cat((owner, torch.full_like(owner, len(distinct))))
            lengths = lengths.repeat(2)
        self.step = StaticStep(
            policy,
            prepared.weights,
            owner,
            lengths,
            *prepared.prefixes,
            last,
            steps=steps,
            sampling=sampling,
            fused_head=use_triton(owner) if fused_head is None else fused_head,
        )

    def decode(self, *, capture: bool = True) -> Decoded:
        """Draw the tokens.

        Args:
            capture: replay step 0's launches; False launches every step's one by one, for
                comparison.
        Raises: FloatingPointError naming row and step of the first bad logits.
        """
        advance, alive = self.start(capture=capture), self.step.alive
        every = 1 if self.step.in_c else ALIVE_EVERY
        for step in range(1, self.steps):
            if alive is not None and step % every == 0 and not alive.any():
                break
            advance()
        # A GPU's one host sync, but for text's looks at alive.
        place = error_place(self.step.error, len(self.names))
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

    def _result(self) -> Decoded:
        step = self.step
        mask, used = torch.ones_like(step.tokens, dtype=torch.bool), self.steps
        if step.alive is not None:
            ends = step.tokens == self.eos
            mask = ends.cumsum(1) - ends.long() == 0  # no end before
            used = int(mask.sum(1).max())
        drawn = Decoded(step.tokens, step.logprobs, step.guided_logprobs, mask)
        return drawn.columns(used)


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream a device for all captures: cuBLAS keeps a workspace for every stream it sees."""
    return torch.cuda.Stream(device)
