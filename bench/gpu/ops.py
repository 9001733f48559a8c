"""The GPU check's ops, each at the shapes of a decode step: the layer's ops and the list of all."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu import sampling
from bench.gpu.case import Call, Case, Step, Tensors, largest, measure
from bench.gpu.models import SHAPES, Item
from bench.gpu.timing import copy_rate
from kernels import rms_norm, swiglu
from kernels.decode_attention import decode_attention
from kernels.kv_append import kv_append
from kernels.reference import attention as reference_attention
from kernels.reference import layer as reference_layer
from kernels.state import LayerCache
from kernels.tiling import prefix_tiles


def items(
    device: torch.device,
    steps: tuple[Step, ...] | None = None,
    *,
    copy_megabytes: int = 2048,
) -> list[Item]:
    """Every op at every step: by default the largest and the smallest batch of both models."""
    if steps is None:
        steps = tuple(
            Step(shape=shape, images=images, dtype=torch.bfloat16, device=device)
            for images in (64, 8)
            for shape in SHAPES.values()
        )
    rate = cache(lambda: copy_rate(device, copy_megabytes))
    found: list[Item] = [("copy", lambda: [{"op": "copy", "gb_per_s": rate() / 1e9}])]
    for step in steps:
        for case in CASES:
            label = f"{case.__name__} {step.shape.name} {step.images}"
            found.append((label, lambda c=case, s=step: [measure(c(s), s, rate())]))
    return found


def norm(s: Step) -> Case:
    rows, width = 2 * s.images, s.shape.width
    size = s.dtype.itemsize

    def prepare() -> Call:
        x, residual = s.normal(rows, width), s.normal(rows, width)
        weight = s.normal(width)
        outs = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)

        def run() -> Tensors:
            return rms_norm(x, weight, 1e-6, residual=residual, out=outs[0], residual_out=outs[1])

        def errors() -> tuple[float, float]:
            eager = reference_layer.rms_norm(x, weight, 1e-6, residual)
            wide = (t.double() for t in (x, weight))
            exact = reference_layer.rms_norm(*wide, 1e-6, residual.double())
            return largest(run(), eager, exact, s.dtype)

        return Call(run, errors)

    least = (4 * rows + 1) * width * size
    return Case(op="rms_norm", shape=f"{rows} x {width}", least=least, prepare=prepare)


def gate(s: Step) -> Case:
    rows, hidden = 2 * s.images, s.shape.intermediate

    def prepare() -> Call:
        gate_up = s.normal(rows, 2 * hidden)
        out = torch.full((rows, hidden), torch.nan, dtype=s.dtype, device=s.device)

        def run() -> Tensor:
            return swiglu(gate_up, out=out)

        def errors() -> tuple[float, float]:
            eager, exact = reference_layer.swiglu(gate_up), reference_layer.swiglu(gate_up.double())
            return largest((run(),), (eager,), (exact,), s.dtype)

        return Call(run, errors)

    least = 3 * rows * hidden * s.dtype.itemsize
    return Case(op="swiglu", shape=f"{rows} x {2 * hidden}", least=least, prepare=prepare)


def append(s: Step) -> Case:
    rows, heads, kv_heads = 2 * s.images, s.shape.heads, s.shape.kv_heads
    head_dim = s.shape.width // heads
    packed = heads + 2 * kv_heads
    # One for all sets of inputs: it is large, and written only.
    cache = torch.full(
        (2, rows, kv_heads, s.suffix, head_dim), torch.nan, dtype=s.dtype, device=s.device
    )

    def prepare() -> Call:
        qkv = s.normal(rows, packed * head_dim)
        angles = torch.rand(s.prefix + s.suffix, head_dim // 2, device=s.device) * 6.28
        cos, sin = angles.cos(), angles.sin()
        first, at = s.index([s.prefix] * rows), s.index([s.step])
        none = cache[0, :0, :, :0]
        layer = LayerCache(
            step=at,
            first_positions=first,
            keys=cache[0],
            values=cache[1],
            prefix_keys=none,
            prefix_values=none,
            prefix_lengths=torch.zeros_like(first),
            tiles=s.index([]).view(0, 3),
            row_prefix=torch.zeros_like(first),
        )
        out = torch.full((rows, heads, head_dim), torch.nan, dtype=s.dtype, device=s.device)

        def run() -> Tensor:
            return kv_append(qkv, cos, sin, layer, heads=heads, out=out)

        def errors() -> tuple[float, float]:
            got = run(), cache[0, :, :, s.step], cache[1, :, :, s.step]
            here = [t[first + s.step] for t in (cos, sin)]
            eager = reference_attention.rotated(qkv, *here, heads, kv_heads)
            wide = [t.double() for t in (qkv, *here)]
            return largest(got, eager, reference_attention.rotated(*wide, heads, kv_heads), s.dtype)

        return Call(run, errors)

    least = 2 * rows * packed * head_dim * s.dtype.itemsize + rows * head_dim * 4
    return Case(
        op="kv_append", shape=f"{rows} x {packed} x {head_dim}", least=least, prepare=prepare
    )


def attend(s: Step) -> Case:
    rows, heads, kv_heads = 2 * s.images, s.shape.heads, s.shape.kv_heads
    head_dim = s.shape.width // heads
    # A prompt an image, one unconditional prefix for all.
    row_prefix = torch.cat((torch.arange(s.images), torch.full((s.images,), s.images)))

    def prepare() -> Call:
        q = s.normal(rows, heads, head_dim)
        suffix = s.normal(2, rows, kv_heads, s.suffix, head_dim)
        suffix[:, :, :, s.step + 1 :] = torch.nan
        prefix = s.normal(2, s.images + 1, kv_heads, s.prefix, head_dim)
        at, lengths = s.index([s.step]), s.index([s.prefix] * rows)
        tiles = prefix_tiles(row_prefix, 16).to(s.device)
        out = torch.full((rows, heads * head_dim), torch.nan, dtype=s.dtype, device=s.device)
        scale = head_dim**-0.5
        cache = LayerCache(
            step=at,
            first_positions=lengths,
            keys=suffix[0],
            values=suffix[1],
            prefix_keys=prefix[0],
            prefix_values=prefix[1],
            prefix_lengths=lengths,
            tiles=tiles,
            row_prefix=row_prefix.to(s.device, torch.int32),
        )

        def run() -> Tensor:
            return decode_attention(q, cache, scale=scale, out=out)

        def errors() -> tuple[float, float]:
            used = suffix[:, :, :, : s.step + 1]
            k, v = torch.cat((prefix[:, row_prefix.to(s.device)], used), 3)
            k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
            eager = F.scaled_dot_product_attention(q[:, :, None], k, v, scale=scale)
            scores = (q[:, :, None].double() @ k.double().mT) * scale
            exact = scores.softmax(-1) @ v.double()
            flat = [t.flatten(1) for t in (eager, exact)]
            return largest((run(),), (flat[0],), (flat[1],), s.dtype)

        return Call(run, errors)

    tokens = (s.images + 1) * s.prefix + rows * (s.step + 1)
    least = (2 * tokens * kv_heads + 2 * rows * heads) * head_dim * s.dtype.itemsize
    shape = f"{rows} rows, {s.prefix} + {s.step + 1} tokens, {heads} heads of {head_dim}"
    return Case(op="decode_attention", shape=shape, least=least, prepare=prepare)


CASES = (norm, gate, append, attend, *sampling.CASES)
