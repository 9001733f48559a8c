"""torch.ops.t2i.*: schemas, fakes and gradients by opcheck; the functions' results; compile."""

import pytest
import torch

import kernels
from bindings import torch_ops
from kernels.sample_step import sample_workspace
from kernels.state import Draw, LayerCache, StepState
from kernels.tiling import prefix_tiles

ops = torch.ops.t2i
B, V, D = 3, 40, 32
HEADS, KV_HEADS, HEAD_DIM, SLOTS = 4, 2, 16, 6


def rand(*shape, seed=0, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=rng).to(dtype)


def draw():
    return {
        "cfg_weight": 3.0,
        "temperature": 0.9,
        "seed": 7,
        "sample_ids": torch.arange(B),
    }


def state(eos=None):
    return draw() | {
        "step": torch.tensor([2], dtype=torch.int32),
        "step_offset": 5,
        "table": rand(V, D),
        "x": torch.zeros(B if eos is not None else 2 * B, D),
        "tokens": torch.zeros((B, SLOTS), dtype=torch.int64),
        "logprobs": torch.zeros((B, SLOTS)),
        "guided_logprobs": torch.zeros((B, SLOTS)),
        "error": torch.zeros(1, dtype=torch.int64),
        "eos": eos,
        "alive": None if eos is None else torch.tensor([True, False, True]),
        "pad": 1,
        "workspace": None,
    }


def index(*values):
    return torch.tensor(values, dtype=torch.int32)


def cached():
    return {
        "keys": rand(B, KV_HEADS, SLOTS, HEAD_DIM),
        "values": rand(B, KV_HEADS, SLOTS, HEAD_DIM),
    }


def cases():
    """Arguments of each op: name, positional, keyword."""
    cond, uncond = rand(B, V), rand(B, V, seed=1)
    angles = rand(9, HEAD_DIM // 2)
    qkv = rand(B, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    first = index(3, 1, 2)
    tiles = prefix_tiles(torch.tensor([0, 0, 1]), 4)
    prefix = [rand(2, KV_HEADS, 3, HEAD_DIM, seed=s) for s in (2, 3)]
    q = rand(B, HEADS, HEAD_DIM)
    weight, bias = rand(V, D), rand(V)
    yield "cfg_sample", (cond, uncond), draw() | {"step": 4, "top_k": 9, "top_p": 0.9}
    yield "cfg_sample", (cond, None), draw() | {"step": 4, "greedy": True}
    yield "rms_norm", (rand(B, D), rand(D), 1e-6), {}
    yield "add_rms_norm", (rand(B, D), rand(B, D, seed=1), rand(D), 1e-6), {}
    yield "swiglu", (rand(B, 2 * D, dtype=torch.bfloat16),), {}
    tables = (qkv, angles.cos(), angles.sin(), first, index(2))
    yield "kv_append", (*tables, *cached().values()), {"heads": HEADS}
    attended = (q, *cached().values(), index(2), *prefix, first, tiles)
    yield "decode_attention", attended, {"scale": 0.25}
    yield "sample_step", (cond, uncond), state() | {"top_k": 9}
    yield "sample_step", (cond, None), state(eos=4)
    yield "head_sample", (rand(B, D), rand(B, D, seed=1), weight, bias), state()
    yield "head_sample", (rand(B, D), None, weight, None), state(eos=4)
    targets = torch.tensor([0, 7, V - 1])
    leaf = [t.clone().requires_grad_() for t in (rand(B, D), weight, bias)]
    yield "linear_logprobs", (leaf[0], leaf[1], targets, leaf[2]), {"temperature": 0.7}
    yield "linear_logprobs", (rand(B, D), weight, targets), {}
    head = (leaf[0], weight, targets, None, rand(B, D, seed=1).requires_grad_())
    yield "linear_logprobs", head, {"cfg_weight": 4.0}
    options = {"temperature": 1.0, "cfg_weight": 4.0, "needs": [True, False, True, False]}
    head = [t if t is None else t.detach() for t in head]
    yield "linear_logprobs_backward", (rand(B), *head), options


CASES = [pytest.param(*case, id=f"{case[0]}-{i}") for i, case in enumerate(cases())]


def cloned(value):
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().clone().requires_grad_(value.requires_grad)


def arguments(args, kwargs):
    return [cloned(a) for a in args], {k: cloned(v) for k, v in kwargs.items()}


def test_every_schema_has_a_case():
    assert {case[0] for case in cases()} == torch_ops.SCHEMAS.keys()


@pytest.mark.parametrize(("name", "args", "kwargs"), CASES)
def test_opcheck(name, args, kwargs):
    args, kwargs = arguments(args, kwargs)
    torch.library.opcheck(getattr(ops, name).default, tuple(args), kwargs)


def direct(name, args, kwargs):
    """The function that the op stands for."""
    if name == "add_rms_norm":
        x, residual, weight, eps = args
        return kernels.rms_norm(x, weight, eps, residual=residual)
    if name.startswith("linear_logprobs"):
        slopes, args = (args[0], args[1:]) if name.endswith("backward") else (None, args)
        options = dict(zip(("bias", "uncond_hidden"), args[3:], strict=False)) | kwargs
        needs = options.pop("needs", None)
        if slopes is None:
            return kernels.linear_logprobs(*args[:3], **options)
        leaves = (args[0], args[4], args[1], args[3])
        leaves = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
        for leaf in leaves:
            leaf.requires_grad_()
        logprobs = kernels.linear_logprobs(*args[:3], **options)
        return torch.autograd.grad(logprobs, leaves, slopes)
    if name in ("kv_append", "decode_attention"):
        return cache_op(name, args, kwargs)
    if name in ("sample_step", "head_sample"):
        drawn = ("cfg_weight", "temperature", "seed", "top_k", "top_p")
        how = {k: kwargs[k] for k in drawn if k in kwargs} | {"first_step": kwargs["step_offset"]}
        written = {k: v for k, v in kwargs.items() if k not in (*drawn, "step_offset")}
        return getattr(kernels, name)(*args, Draw(**how), StepState(**written))
    return getattr(kernels, name)(*args, **kwargs)


def cache_op(name, args, kwargs):
    """The op on a cache whose rows 0 and 1 share prefix 0; row 2 has prefix 1."""
    *head, first, step, keys, values = (
        args if name == "kv_append" else (*args[:1], None, None, *args[1:3])
    )
    prefix = [keys, keys, index(0, 0, 0), index().view(0, 3)] if name == "kv_append" else args[4:]
    cache = LayerCache(
        step=args[3] if step is None else step,
        first_positions=prefix[2] if first is None else first,
        keys=keys,
        values=values,
        prefix_keys=prefix[0],
        prefix_values=prefix[1],
        prefix_lengths=prefix[2],
        tiles=prefix[3],
        row_prefix=index(0, 0, 1),
    )
    return getattr(kernels, name)(*head, cache, **kwargs)


def flat(result, args, kwargs):
    """Results and every argument, which the op may have written."""
    results = () if result is None else [result] if isinstance(result, torch.Tensor) else result
    return [t for t in (*results, *args, *kwargs.values()) if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize(("name", "args", "kwargs"), CASES)
def test_results_are_the_functions(name, args, kwargs):
    """Called directly, and inside a graph compiled without a break."""
    expected_args, expected_kwargs = arguments(args, kwargs)
    expected = direct(name, expected_args, expected_kwargs)
    op = getattr(ops, name)

    def call(args, kwargs):
        return op(*args, **kwargs)

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for run in (call, compiled):
        got_args, got_kwargs = arguments(args, kwargs)
        got = run(got_args, got_kwargs)
        everything = flat(got, got_args, got_kwargs)
        for a, b in zip(everything, flat(expected, expected_args, expected_kwargs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_gradient_of_linear_logprobs():
    hidden, weight, bias = (rand(*s).double().requires_grad_() for s in ((4, 5), (7, 5), (7,)))
    targets = torch.tensor([0, 6, 3, 3])

    def logprobs(hidden, weight, bias):
        return ops.linear_logprobs(hidden, weight, targets, bias, temperature=0.7)

    assert torch.autograd.gradcheck(logprobs, (hidden, weight, bias))

    def guided(hidden, weight, uncond):
        return ops.linear_logprobs(hidden, weight, targets, None, uncond, cfg_weight=3.0)

    uncond = rand(4, 5, seed=1).double().requires_grad_()
    assert torch.autograd.gradcheck(guided, (hidden, weight, uncond))
    torch.autograd.grad(ops.linear_logprobs(hidden, weight, targets).sum(), hidden)


def test_decode_layer_compiles_as_one_graph():
    """Norm, append and attention in a row, their cache written in place."""
    _, args, kwargs = next(c for c in cases() if c[0] == "kv_append")
    _, attended, scale = next(c for c in cases() if c[0] == "decode_attention")

    def layer(qkv, weight, keys, values):
        qkv = ops.rms_norm(qkv, weight, 1e-6)
        q = ops.kv_append(qkv, *args[1:5], keys, values, **kwargs)
        return ops.decode_attention(q, keys, values, *attended[3:], **scale)

    weight = rand(args[0].shape[1])
    outs = []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        cache = [t.clone() for t in args[5:]]
        outs.append((run(args[0], weight, *cache), *cache))
    for a, b in zip(*outs, strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.equal(outs[0][1], args[5])  # the cache was written


def test_kept_workspace_is_an_argument():
    given = state() | {"workspace": sample_workspace(B, V, "cpu")}
    ops.sample_step(rand(B, V), rand(B, V, seed=1), **given)
    assert int(given["step"]) == 3 and given["tokens"][:, 2].any()
