"""The ops as torch.ops.t2i.*, for torch.compile and for programs that call ops by name.

Importing this module registers them: schemas, fake kernels for tracing, and the gradient of
linear_logprobs. Eager code calls the functions of `kernels` directly, which costs less per call.
Arguments are those of the functions of the same name; results are always new tensors, and tensors
that an op writes are marked in its schema. A seed must fit in a signed 64-bit integer.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import kernels
from kernels.chunked_head import HeadInputs, Needs, check_inputs, run_head
from kernels.decode_attention import decode_attention
from kernels.head_sample import head_sample
from kernels.kv_append import kv_append
from kernels.sample_step import sample_step
from kernels.state import Draw, LayerCache, StepState
from kernels.tiling import prefix_of_rows

_STATE = (
    "Tensor(a!) step, int step_offset, Tensor table, Tensor(b!) x, Tensor(c!) tokens, "
    "Tensor(d!)? logprobs, Tensor(e!)? guided_logprobs, Tensor(f!) error, int? eos=None, "
    "Tensor(g!)? alive=None, int pad=0, Tensor(h!)? workspace=None"
)
_HEAD = (
    "Tensor hidden, Tensor weight, Tensor targets, Tensor? bias=None, Tensor? uncond_hidden=None"
)
_DRAW = "float cfg_weight, float temperature, int seed, Tensor sample_ids"

SCHEMAS = {
    "cfg_sample": (
        f"(Tensor cond, Tensor? uncond, *, {_DRAW}, int step, int top_k=0, float top_p=1.0, "
        "bool greedy=False) -> (Tensor, Tensor, Tensor)"
    ),
    "rms_norm": "(Tensor x, Tensor weight, float eps) -> Tensor",
    "add_rms_norm": "(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    "swiglu": "(Tensor gate_up) -> Tensor",
    "kv_append": (
        "(Tensor qkv, Tensor cos, Tensor sin, Tensor first_positions, Tensor step, "
        "Tensor(a!) keys, Tensor(b!) values, *, int heads) -> Tensor"
    ),
    "decode_attention": (
        "(Tensor q, Tensor keys, Tensor values, Tensor step, Tensor prefix_keys, "
        "Tensor prefix_values, Tensor prefix_lengths, Tensor tiles, *, float scale) -> Tensor"
    ),
    "sample_step": (
        f"(Tensor cond, Tensor? uncond, *, {_DRAW}, {_STATE}, int top_k=0, float top_p=1.0, "
        "bool greedy=False) -> ()"
    ),
    "head_sample": (
        f"(Tensor cond, Tensor? uncond, Tensor weight, Tensor? bias, *, {_DRAW}, {_STATE}, "
        "bool greedy=False) -> ()"
    ),
    "linear_logprobs": (f"({_HEAD}, *, float temperature=1.0, float? cfg_weight=None) -> Tensor"),
    "linear_logprobs_backward": (
        f"(Tensor slopes, {_HEAD}, *, float temperature, float? cfg_weight, bool[] needs) "
        "-> Tensor[]"
    ),
}

_library = torch.library.Library("t2i", "DEF")


def _cfg_sample(
    cond: Tensor, uncond: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    ids, logprobs, guided = kernels.cfg_sample(cond, uncond, **options)
    # Unguided, the op returns one tensor twice, which an operator must not.
    return ids, logprobs.clone() if logprobs is guided else logprobs, guided


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    normed = kernels.rms_norm(x, weight, eps, residual=residual)
    assert isinstance(normed, tuple)
    return normed


def _head_inputs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    uncond_hidden: Tensor | None = None,
    *,
    temperature: float = 1.0,
    cfg_weight: float | None = None,
) -> HeadInputs:
    head = HeadInputs(hidden, weight, targets, bias, uncond_hidden, cfg_weight, temperature, None)
    check_inputs(head)
    return head


def _linear_logprobs(*tensors: Any, **options: Any) -> Tensor:
    return run_head(_head_inputs(*tensors, **options))[0].logprobs


def _linear_logprobs_backward(
    slopes: Tensor, *tensors: Any, needs: list[bool], **options: Any
) -> list[Tensor]:
    """Gradients of the inputs that need one, in the order of `Needs`."""
    head = _head_inputs(*tensors, **options)
    gradients = run_head(head, slopes=slopes.contiguous(), needs=Needs(*needs))[1]
    return [g for g in gradients if g is not None]


def _kv_append(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    first_positions: Tensor,
    step: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    heads: int,
) -> Tensor:
    cache = _cache(step, keys, values, first_positions=first_positions)
    return kv_append(qkv, cos, sin, cache, heads=heads).contiguous()  # a slice on CPU


def _decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    step: Tensor,
    prefix_keys: Tensor,
    prefix_values: Tensor,
    prefix_lengths: Tensor,
    tiles: Tensor,
    *,
    scale: float,
) -> Tensor:
    cache = _cache(
        step,
        keys,
        values,
        prefix_keys=prefix_keys,
        prefix_values=prefix_values,
        prefix_lengths=prefix_lengths,
        tiles=tiles,
    )
    # Tiles name each row's prefix; only what runs on a CPU goes by row.
    if q.device.type == "cpu":
        cache.row_prefix = prefix_of_rows(tiles, len(q))
    return decode_attention(q, cache, scale=scale)


def _cache(step: Tensor, keys: Tensor, values: Tensor, **given: Tensor) -> LayerCache:
    """A cache of which an op reads the given parts alone."""
    parts = ("first_positions", "prefix_keys", "prefix_values", "prefix_lengths", "tiles")
    unread = {name: step for name in (*parts, "row_prefix")}
    if "prefix_lengths" in given:
        unread["row_prefix"] = torch.zeros_like(given["prefix_lengths"])
    return LayerCache(step=step, keys=keys, values=values, **(unread | given))


def _sample_step(cond: Tensor, uncond: Tensor | None, **options: Any) -> None:
    sample_step(cond, uncond, *_draw_and_state(options))


def _head_sample(
    cond: Tensor, uncond: Tensor | None, weight: Tensor, bias: Tensor | None, **options: Any
) -> None:
    head_sample(cond, uncond, weight, bias, *_draw_and_state(options))


def _draw_and_state(options: dict[str, Any]) -> tuple[Draw, StepState]:
    """The two objects from the schemas' keywords."""
    draw = {name: options.pop(name) for name in _DRAWN if name in options}
    return Draw(first_step=options.pop("step_offset"), **draw), StepState(**options)


_DRAWN = ("cfg_weight", "temperature", "seed", "top_k", "top_p", "greedy")


_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "cfg_sample": _cfg_sample,
    "rms_norm": kernels.rms_norm,
    "add_rms_norm": _add_rms_norm,
    "swiglu": kernels.swiglu,
    "kv_append": _kv_append,
    "decode_attention": _decode_attention,
    "sample_step": _sample_step,
    "head_sample": _head_sample,
    "linear_logprobs": _linear_logprobs,
    "linear_logprobs_backward": _linear_logprobs_backward,
}


def _fake_cfg_sample(cond: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor, Tensor]:
    rows = cond.shape[:1]
    first, second = (cond.new_empty(rows, dtype=torch.float32) for _ in range(2))
    return cond.new_empty(rows, dtype=torch.int64), first, second


def _fake_norm(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


def _fake_add_norm(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _fake_swiglu(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


def _fake_kv_append(qkv: Tensor, *tensors: Tensor, heads: int) -> Tensor:
    keys = tensors[4]
    return qkv.new_empty(qkv.shape[0], heads, keys.shape[3])


def _fake_attention(q: Tensor, *_: Tensor, scale: float) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1] * q.shape[2])


def _fake_state(*_: object, **__: object) -> None:
    return None


def _fake_logprobs(hidden: Tensor, *_: object, **__: object) -> Tensor:
    dtype = hidden.dtype if hidden.dtype == torch.float64 else torch.float32
    return hidden.new_empty(hidden.shape[:1], dtype=dtype)


def _fake_logprobs_backward(
    slopes: Tensor, *tensors: Any, needs: list[bool], **_: object
) -> list[Tensor]:
    head = HeadInputs(*tensors, *[None] * (8 - len(tensors)))
    return [
        torch.empty_like(getattr(head, n))
        for n, need in zip(Needs._fields, needs, strict=True)
        if need
    ]


_FAKES: dict[str, Callable[..., Any]] = {
    "cfg_sample": _fake_cfg_sample,
    "rms_norm": _fake_norm,
    "add_rms_norm": _fake_add_norm,
    "swiglu": _fake_swiglu,
    "kv_append": _fake_kv_append,
    "decode_attention": _fake_attention,
    "sample_step": _fake_state,
    "head_sample": _fake_state,
    "linear_logprobs": _fake_logprobs,
    "linear_logprobs_backward": _fake_logprobs_backward,
}


_PLACES = ("hidden", "weight", "targets", "bias", "uncond_hidden")  # of the op's tensors


def _save_logprobs(ctx: Any, inputs: tuple, keyword_only_inputs: dict, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.options = keyword_only_inputs


def _logprobs_backward(ctx: Any, slopes: Tensor) -> tuple[Tensor | None, ...]:
    asked = dict(zip(_PLACES, ctx.needs_input_grad, strict=False))  # arguments left out: no entry
    needs = [asked.get(name, False) for name in Needs._fields]
    found = torch.ops.t2i.linear_logprobs_backward(
        slopes, *ctx.saved_tensors, needs=needs, **ctx.options
    )
    names = [name for name, need in zip(Needs._fields, needs, strict=True) if need]
    gradients = dict(zip(names, found, strict=True))
    return tuple(gradients.get(name) for name in asked)


for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, _IMPLEMENTATIONS[_name], "CompositeExplicitAutograd")
    torch.library.register_fake(f"t2i::{_name}", _FAKES[_name], lib=_library)
torch.library.register_autograd(
    "t2i::linear_logprobs", _logprobs_backward, setup_context=_save_logprobs, lib=_library
)
