"""Kernel launches of one decode step, counted on a trace: ours against the published loop's.

Counted alike for both: every torch op that computes or copies (views and allocations launch
nothing) is one launch, and so is every Triton kernel. An op that is several kernels on a GPU
(`multinomial`) counts once, which favours the loop.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.rollout.eager_loop import EagerLoop
from engine.model.policy import Policy
from engine.rollout.decoder import decoder_of
from engine.rollout.sample import image_request, text_request
from kernels.state import Draw

# Ops that return new memory without touching it.
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
VIEWS = ("_unsafe_view",)  # a view that its schema does not call one


class LaunchCount(TorchDispatchMode):
    """Counts launches by name while it is active.

    Args:
        run_triton: execute Triton kernels too; False only counts them, which needs no device.

    Attributes:
        names: launches of each torch op and Triton kernel.
        allocated: tensors that torch ops have taken memory for.
    """

    def __init__(self, *, run_triton: bool) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.allocated = 0
        self.run_triton = run_triton
        self.paused = False

    @property
    def total(self) -> int:
        return self.names.total()

    def __torch_dispatch__(
        self, func: Any, _types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.paused:
            # In inference mode composite ops arrive whole: what they are made of is launched.
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
            name = func.overloadpacket.__name__
            if name in ALLOCATIONS:
                # A meta tensor only computes a size.
                self.allocated += str(kwargs.get("device")) != "meta"
            elif name not in VIEWS and not _is_view(func):
                self.names[name] += 1
        return func(*args, **kwargs)

    def triton(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """`run` of a Triton function, counted."""

        def counted(function: Any, *args: Any, **kwargs: Any) -> Any:
            self.names[function.fn.__name__] += 1
            if not self.run_triton:
                return None
            # The interpreter works on torch tensors; its own copies are no launches of the step.
            self.paused = True
            try:
                return run(function, *args, **kwargs)
            finally:
                self.paused = False

        return counted


@contextmanager
def counted_launches(*, run_triton: bool = True) -> Iterator[LaunchCount]:
    """Count every launch inside. See LaunchCount."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    counted = LaunchCount(run_triton=run_triton)
    originals = [(cls, cls.run) for cls in (JITFunction, InterpretedFunction)]
    for cls, run in originals:
        cls.run = counted.triton(run)
    try:
        with counted:
            yield counted
    finally:
        for cls, run in originals:
            cls.run = run


def _is_view(func: Any) -> bool:
    """Whether an overload returns an alias of an input that it does not write to."""
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


@contextmanager
def triton_on_cpu() -> Iterator[None]:
    """Public ops take the Triton path for CPU tensors; to count launches that are not executed."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


def launches_per_step(policy: Policy) -> dict[str, Any]:
    """Launches of one decode step of ours, for images and for text, and of the published loop's.

    Returns: totals a step; `eager_loop_layer` is the loop's share in one layer; `allowed` is the
        most that ours may take.
    """
    loop_step, loop_layer = count_loop_step(policy)
    layers = policy.config.text_config.num_hidden_layers
    return {
        "layers": layers,
        "image_step": count_step(policy, image=True).total,
        "text_step": count_step(policy, image=False).total,
        "allowed": 10 * layers + 6,
        "eager_loop_step": loop_step,
        "eager_loop_layer": loop_layer,
    }


def count_step(policy: Policy, *, image: bool, run_triton: bool = False) -> LaunchCount:
    """The engine's launches in one step of two rows (text) or four (images)."""
    rows = torch.arange(2, device=policy.device)
    request = image_request(policy, rows, Draw()) if image else text_request(rows, 2, Draw())
    with triton_on_cpu():
        decoder = decoder_of(policy, _prompts(policy), request)
        with counted_launches(run_triton=run_triton) as counted:
            decoder.step.launch()
    return counted


def count_loop_step(policy: Policy) -> tuple[int, int]:
    """The published loop's launches in its second step, and in one layer of that step."""
    loop = EagerLoop(policy)
    steps, layer = [], []
    first = loop.llama.layers[0]
    hooks = [
        loop.llama.register_forward_pre_hook(lambda *_: steps.append(counted.total)),
        first.register_forward_pre_hook(lambda *_: layer.append(counted.total)),
        first.register_forward_hook(lambda *_: layer.append(counted.total)),
    ]
    with counted_launches() as counted:
        loop.sample(_prompts(policy))
    for hook in hooks:
        hook.remove()
    return steps[2] - steps[1], layer[3] - layer[2]


def _prompts(policy: Policy) -> list[torch.Tensor]:
    """Two different prompts of one length."""
    return list(torch.arange(5, 19, device=policy.device).view(2, 7))
