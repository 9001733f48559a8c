"""Decoding on a GPU: one step captured as a CUDA graph and replayed for all others.

Nothing returns to the host between the first and the last token, but that text looks every few
steps at whether any row still runs. On a CPU under Triton's interpreter the same launches run one
by one: tests only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from engine.kv_cache import prefill
from engine.policy import Policy
from engine.static_step import Sampling, StaticStep
from kernels.sample_step import error_place

ALIVE_EVERY = 32  # text steps between two looks at whether any row still runs


@dataclass(slots=True)
class Decoded:
    """What a rollout drew, in the order of its rows.

    Attributes:
        ids: (B, T) int64; pad after a text row's end-of-sequence.
        logprobs, guided_logprobs: (B, T) fp32 nats, 0 after a text row's end-of-sequence.
        mask: (B, T) bool, True up to and including end-of-sequence.
    """

    ids: Tensor
    logprobs: Tensor
    guided_logprobs: Tensor
    mask: Tensor


class StaticDecoder:
    """Decodes one rollout; its cache, buffers and graph are released with it.

    Args:
        policy: the policy.
        distinct: U tensors (L_i,) int64: the prompts, each once.
        owner: (B,) int64, ascending: the prompt of each row.
        names: (B,) what an error calls each row.
        steps: tokens to draw, at most.
        sampling: how.
        fused_head: see StaticStep.
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
        fused_head: bool = True,
    ) -> None:
        self.eos, self.names, self.steps = policy.eos, names, steps
        last = torch.stack([p[-1] for p in distinct])[owner]
        lengths = torch.tensor([len(p) - 1 for p in distinct], device=owner.device)[owner]
        prefixes = [p[:-1] for p in distinct]
        if sampling.image:
            # Every unconditional prefix is a head of the longest one.
            prefixes.append(policy.unconditional(max(distinct, key=len))[:-1])
            owner = torch.cat((owner, torch.full_like(owner, len(distinct))))
            lengths = lengths.repeat(2)
        self.step = StaticStep(
            policy,
            owner,
            lengths,
            *prefill(policy, prefixes),
            last,
            steps=steps,
            sampling=sampling,
            fused_head=fused_head,
        )

    def decode(self, *, capture: bool = True) -> Decoded:
        """Draw the tokens.

        Args:
            capture: replay a graph on CUDA; False launches every step's kernels one by one, for
                comparison.
        Raises: FloatingPointError naming row and step of the first bad logits.
        """
        advance, alive = self.start(capture=capture), self.step.alive
        for step in range(1, self.steps):
            if alive is not None and step % ALIVE_EVERY == 0 and not alive.any():
                break
            advance()
        # The rollout's one host sync, but for text's looks at alive.
        place = error_place(self.step.error, len(self.names))
        if place is not None:
            row, at = int(self.names[place[0]]), place[1]
            raise FloatingPointError(f"logits of row {row} at step {at} are not finite")
        return self._result()

    def start(self, *, capture: bool = True) -> Callable[[], None]:
        """Run step 0. Returns what runs the next one: the graph's replay, or the launches.

        Step 0 is launched eagerly: it compiles and loads what is not loaded yet, which must not
        happen during a capture.
        """
        launch, device = self.step.launch, self.names.device
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
        return Decoded(
            *(t[:, :used] for t in (step.tokens, step.logprobs, step.guided_logprobs, mask))
        )


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream a device for all captures: cuBLAS keeps a workspace for every stream it sees."""
    return torch.cuda.Stream(device)
