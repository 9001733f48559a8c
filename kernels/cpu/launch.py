"""Launching the C ops: their arguments as ops.h lays them out, and recorded sequences of them.

The callers, kernels/*.py, have checked what they pass. A recorded sequence is to a CPU what a
captured graph is to a GPU: the arguments are laid out once, and a decode step is one call.
"""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kernels.cpu.build import BuildError, loaded
from kernels.state import AdamW, Draw, LayerCache, StepState

_thread = threading.local()  # .recording: the Launches that this thread's ops join


class _Launch(ctypes.Structure):
    _fields_ = (("share", ctypes.c_void_p), ("arguments", ctypes.c_void_p))


class Launches:
    """Launches in their order, to be repeated on the same memory."""

    def __init__(self) -> None:
        self._kept: list[tuple[ctypes.Structure, tuple[Tensor, ...]]] = []
        self._launches: list[_Launch] = []
        self._array: ctypes.Array | None = None

    def add(self, share: int, arguments: ctypes.Structure, tensors: tuple[Tensor, ...]) -> None:
        """Take a launch; the tensors that its pointers point into live as long as this object."""
        self._kept.append((arguments, tensors))
        self._launches.append(_Launch(share, ctypes.addressof(arguments)))

    def run(self) -> None:
        """Launch all again."""
        if self._array is None:
            self._array = (_Launch * len(self._launches))(*self._launches)
        loaded().run_launches(self._array, ctypes.c_int64(len(self._launches)))


@contextmanager
def record() -> Iterator[Launches]:
    """Run this thread's C ops as usual, and keep them as well. PyTorch's own ops are not kept.

    What an op of the recording reads of another's results must be the same rows of as many:
    threads keep to their rows and wait for no other (ops.h).
    """
    _thread.recording = launches = Launches()
    try:
        yield launches
    finally:
        _thread.recording = None


@cache
def _op(name: str, fields: tuple[str, ...]) -> tuple[type[ctypes.Structure], Any, int]:
    """The structure of an op's arguments, the op, the address of a thread's share of it.

    Args:
        fields: names with the type in front: "*" pointer, "#" int64, "%" double.
    """
    types = {"*": ctypes.c_void_p, "#": ctypes.c_int64, "%": ctypes.c_double}
    structure = type(
        name, (ctypes.Structure,), {"_fields_": [(f[1:], types[f[0]]) for f in fields]}
    )
    wanted = ctypes.c_int64.in_dll(loaded(), f"{name}_arguments_size").value
    if ctypes.sizeof(structure) != wanted:
        raise BuildError(f"{name}: {ctypes.sizeof(structure)} bytes of arguments, C has {wanted}")
    share = ctypes.cast(getattr(loaded(), f"{name}_share"), ctypes.c_void_p).value
    assert share is not None
    return structure, getattr(loaded(), name), share


def _launch(name: str, **values: Tensor | int | float | None) -> None:
    """Call an op with its structure's fields in their order: tensors and None are pointers."""
    fields: list[str] = []
    plain: list[int | float | None] = []
    for field, value in values.items():
        if value is None or isinstance(value, Tensor):
            fields.append(f"*{field}")
            plain.append(None if value is None else value.data_ptr())
        else:
            fields.append(f"{'%' if isinstance(value, float) else '#'}{field}")
            plain.append(value)
    structure, function, share = _op(name, tuple(fields))
    arguments = structure(*plain)
    function(ctypes.byref(arguments))
    recording = getattr(_thread, "recording", None)
    if recording is not None:
        recording.add(share, arguments, tuple(v for v in values.values() if isinstance(v, Tensor)))


def launch_linear(x: Tensor, panels: Tensor, bias: Tensor | None, out: Tensor, gelu: bool) -> None:
    """See kernels.cpu.linear."""
    _launch(
        "linear",
        x=x,
        panels=panels,
        bias=bias,
        y=out,
        rows=len(x),
        in_features=x.shape[1],
        out_features=out.shape[1],
        x_stride=x.stride(0),
        y_stride=out.stride(0),
        gelu=int(gelu),
        bf16=int(panels.dtype == torch.bfloat16),
    )


def launch_pack(weight: Tensor, panels: Tensor) -> None:
    """See kernels.cpu.linear."""
    _launch(
        "pack",
        weight=weight,
        panels=panels,
        in_features=weight.shape[1],
        out_features=len(weight),
        bf16=int(weight.dtype == torch.bfloat16),
    )


def launch_rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None,
    out: Tensor,
    residual_out: Tensor | None,
) -> None:
    """See kernels.rms_norm."""
    _launch(
        "rms_norm",
        x=x,
        weight=weight,
        residual=residual,
        out=out,
        residual_out=residual_out,
        rows=len(x),
        width=x.shape[1],
        x_stride=x.stride(0),
        residual_stride=0 if residual is None else residual.stride(0),
        out_stride=out.stride(0),
        residual_out_stride=0 if residual_out is None else residual_out.stride(0),
        eps=float(eps),
    )


def launch_swiglu(gate_up: Tensor, out: Tensor) -> None:
    """See kernels.swiglu."""
    _launch(
        "swiglu",
        gate_up=gate_up,
        out=out,
        rows=len(out),
        width=out.shape[1],
        gate_up_stride=gate_up.stride(0),
        out_stride=out.stride(0),
    )


def launch_kv_append(
    qkv: Tensor, cos: Tensor, sin: Tensor, cache: LayerCache, heads: int, out: Tensor
) -> None:
    """See kernels.kv_append; keys and values have equal strides."""
    keys = cache.keys
    rows, kv_heads, slots, head_dim = keys.shape
    _launch(
        "kv_append",
        qkv=qkv,
        cos=cos,
        sin=sin,
        first_positions=cache.first_positions,
        step=cache.step,
        keys=keys,
        values=cache.values,
        q=out,
        rows=rows,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        slots=slots,
        positions=len(cos),
        qkv_stride=qkv.stride(0),
        cache_row_stride=keys.stride(0),
        cache_head_stride=keys.stride(1),
        cache_token_stride=keys.stride(2),
        q_row_stride=out.stride(0),
        q_head_stride=out.stride(1),
    )


def launch_decode_attention(q: Tensor, cache: LayerCache, scale: float, out: Tensor) -> None:
    """See kernels.decode_attention."""
    rows, heads, head_dim = q.shape
    keys, prefix_keys = cache.keys, cache.prefix_keys
    _launch(
        "decode_attention",
        q=q,
        keys=keys,
        values=cache.values,
        prefix_keys=prefix_keys,
        prefix_values=cache.prefix_values,
        step=cache.step,
        prefix_lengths=cache.prefix_lengths,
        row_prefix=cache.row_prefix,
        out=out,
        rows=rows,
        heads=heads,
        kv_heads=keys.shape[1],
        head_dim=head_dim,
        slots=keys.shape[2],
        q_row_stride=q.stride(0),
        q_head_stride=q.stride(1),
        row_stride=keys.stride(0),
        head_stride=keys.stride(1),
        token_stride=keys.stride(2),
        prefix_stride=prefix_keys.stride(0),
        prefix_head_stride=prefix_keys.stride(1),
        prefix_token_stride=prefix_keys.stride(2),
        out_stride=out.stride(0),
        scale=float(scale),
    )


def launch_sample_step(
    cond: Tensor, uncond: Tensor | None, kept: Tensor | None, draw: Draw, state: StepState
) -> None:
    """See kernels.sample_step.

    Args:
        kept: (B, V) contiguous, what is drawn from in place of the guided logits; None: those.
    """

    def stride(tensor: Tensor | None) -> int:
        return 0 if tensor is None else tensor.stride(0)

    seed = int(draw.seed)
    _launch(
        "sample_step",
        cond=cond,
        uncond=uncond,
        kept=kept,
        sample_ids=state.sample_ids,
        step=state.step,
        table=state.table,
        x=state.x,
        tokens=state.tokens,
        logprobs=state.logprobs,
        guided_logprobs=state.guided_logprobs,
        error=state.error,
        alive=state.alive,
        rows=len(cond),
        vocab=cond.shape[1],
        columns=state.tokens.shape[1],
        width=state.x.shape[1],
        cond_stride=cond.stride(0),
        uncond_stride=stride(uncond),
        table_stride=state.table.stride(0),
        x_stride=state.x.stride(0),
        tokens_stride=state.tokens.stride(0),
        logprobs_stride=stride(state.logprobs),
        guided_stride=stride(state.guided_logprobs),
        alive_stride=stride(state.alive),
        seed=_signed(seed),
        step_offset=draw.first_step,
        greedy=int(draw.greedy),
        eos=-1 if state.eos is None else state.eos,
        pad=state.pad,
        table_bf16=int(state.table.dtype == torch.bfloat16),
        cfg_weight=float(draw.cfg_weight),
        temperature=float(draw.temperature),
    )


def launch_adamw(
    weight: Tensor,
    grad: Tensor,
    low: Tensor | None,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    settings: AdamW,
    grad_scale: float | Tensor,
    stream: int,
) -> None:
    """See kernels.adamw."""
    names = ("keep", "mean_rate", "square_keep", "square_rate", "root", "size", "eps")
    _launch(
        "adamw",
        weight=weight,
        grad=grad,
        low=low,
        exp_avg=exp_avg,
        exp_avg_sq=exp_avg_sq,
        count=weight.numel(),
        grad_bf16=int(grad.dtype == torch.bfloat16),
        moments_bf16=int(exp_avg.dtype == torch.bfloat16),
        seed=_signed(settings.seed),
        step=settings.step,
        stream=stream,
        **dict(zip(names, settings.constants, strict=True)),
        grad_scale=float(grad_scale),
    )


def _signed(seed: int) -> int:
    """The low 64 bits as C's int64_t takes them."""
    return (seed & (2**64 - 1)) - (2**64 if seed & 2**63 else 0)
