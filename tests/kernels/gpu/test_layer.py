"""RMS norm and SwiGLU: Triton (in the interpreter without a GPU), C and the PyTorch path."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from triton.runtime import interpreter as triton_interpreter

from engine.model.layers import RMSNorm
from kernels import rms_norm, swiglu
from kernels.gpu import rms_norm as gpu_rms_norm
from kernels.gpu import swiglu as gpu_swiglu
from kernels.gpu.launch import DecodeShape
from kernels.reference import layer as reference_layer

pytestmark = pytest.mark.usefixtures("nearest_rounding")


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-6
# Beyond twice eager's error: what one rounding of a value near 1 may be off.
SLACK = {torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype, device=device)


def strided(x: Tensor) -> Tensor:
    """The same values with a row stride of more than a row."""
    wide = poisoned((len(x), x.shape[1] + 24), x.dtype, x.device)
    view = wide[:, 8 : 8 + x.shape[1]]
    view.copy_(x)
    return view


def norm_inputs(rows: int, width: int, dtype: torch.dtype, device: str, scale: float = 1.0):
    rng = torch.Generator().manual_seed(rows * width)
    x = torch.randn(rows, width, generator=rng) * scale
    residual = torch.randn(rows, width, generator=rng) * 3 * scale
    weight = 1 + 0.3 * torch.randn(width, generator=rng)
    return [t.to(device, dtype) for t in (x, residual, weight)]


def eager_norm(x: Tensor, weight: Tensor) -> Tensor:
    """The way Llama is usually written: every operation in x's dtype but the norm itself."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def assert_rule(got: Tensor, eager: Tensor, truth: Tensor) -> None:
    """|got - fp64| <= 2 |eager - fp64| + slack, in the largest error and in the mean."""
    assert got.dtype == eager.dtype and got.isfinite().all()
    error, allowed = (got.double() - truth).abs(), (eager.double() - truth).abs()
    slack = SLACK[got.dtype] * truth.abs().clamp(min=1).max()
    assert error.max() <= 2 * allowed.max() + slack
    assert error.mean() <= 2 * allowed.mean() + slack


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (3, 100), (5, 1), (4, 256), (2, 2049)])
def test_norm_against_fp64(path, dtype, rows, width):
    x, residual, weight = norm_inputs(rows, width, dtype, path)
    out, total_out = poisoned(x.shape, dtype, path), poisoned(x.shape, dtype, path)
    y, total = rms_norm(x, weight, EPS, residual=residual, out=out, residual_out=total_out)
    assert y is out and total is total_out
    assert torch.equal(total, x + residual)
    truth, _ = reference_layer.rms_norm(total.double(), weight.double(), EPS)
    assert_rule(y, eager_norm(x + residual, weight), truth)
    plain = rms_norm(x, weight, EPS, out=poisoned(x.shape, dtype, path))
    truth, _ = reference_layer.rms_norm(x.double(), weight.double(), EPS)
    assert_rule(plain, eager_norm(x, weight), truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e4, 1e-4])
def test_norm_of_extremes(path, dtype, scale):
    x, _, weight = norm_inputs(4, 96, dtype, path)
    x = (x.clamp(-3, 3) * scale).to(dtype)
    x[2] = 0
    y = rms_norm(x, weight, EPS)
    truth, _ = reference_layer.rms_norm(x.double(), weight.double(), EPS)
    assert_rule(y, eager_norm(x, weight), truth)
    assert (y[2] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_is_that_of_the_policy(path, dtype):
    x, residual, weight = norm_inputs(6, 128, dtype, path)
    module = RMSNorm(128, EPS)
    module.weight.data = weight
    y, total = rms_norm(x, weight, EPS, residual=residual)
    expected = module(total)
    if dtype == torch.float32:
        torch.testing.assert_close(y, expected, rtol=2e-6, atol=0)
    else:
        # Bit by bit, but for a value at the edge of two roundings.
        assert (y != expected).float().mean() < 0.01
        torch.testing.assert_close(y, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norm_of_strided_rows_in_place_and_row_by_row(path, dtype):
    x, residual, weight = norm_inputs(5, 72, dtype, path)
    y, total = rms_norm(x, weight, EPS, residual=residual)
    views = strided(x), strided(residual)
    outs = strided(torch.zeros_like(x)), strided(torch.zeros_like(x))
    got = rms_norm(views[0], weight, EPS, residual=views[1], out=outs[0], residual_out=outs[1])
    assert torch.equal(got[0], y) and torch.equal(got[1], total)
    borders = outs[0].as_strided((5, 96), (96, 1), 0)
    assert borders[:, :8].isnan().all() and borders[:, 80:].isnan().all()
    # In place: the norm over x, the sum over the residual.
    rms_norm(views[0], weight, EPS, residual=views[1], out=views[0], residual_out=views[1])
    assert torch.equal(views[0], y) and torch.equal(views[1], total)
    for i in range(5):
        alone = rms_norm(x[i : i + 1], weight, EPS, residual=residual[i : i + 1])
        assert torch.equal(alone[0][0], y[i])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (3, 99), (2, 1), (2, 1376)])
def test_swiglu_against_fp64(path, dtype, rows, width):
    rng = torch.Generator().manual_seed(rows * width)
    gate_up = (torch.randn(rows, 2 * width, generator=rng) * 4).to(path, dtype)
    out = poisoned((rows, width), dtype, path)
    assert swiglu(gate_up, out=out) is out
    gate, up = gate_up.chunk(2, -1)
    assert_rule(out, F.silu(gate) * up, reference_layer.swiglu(gate_up.double()))
    assert torch.equal(swiglu(strided(gate_up), out=strided(out * 0)), out)
    assert torch.equal(swiglu(gate_up), out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_of_extremes(path, dtype):
    gate = torch.tensor([-1e4, -90.0, -0.0, 0.0, 90.0, 1e4], dtype=dtype, device=path)
    got = swiglu(torch.cat((gate, torch.ones_like(gate)))[None])[0]
    assert got.tolist() == F.silu(gate).tolist()
    assert got.tolist()[4:] == gate.tolist()[4:]
    nan = swiglu(torch.tensor([[torch.nan, 1.0]], dtype=dtype, device=path))
    assert nan.isnan().all()


def test_empty_batch(path):
    x = torch.zeros(0, 16, device=path)
    assert rms_norm(x, x.new_ones(16), EPS).shape == (0, 16)
    assert [t.shape for t in rms_norm(x, x.new_ones(16), EPS, residual=x)] == [(0, 16)] * 2
    assert swiglu(x).shape == (0, 8)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", {"x": torch.zeros(4)}),
        ("x", {"x": torch.zeros(2, 4, dtype=torch.float64)}),
        ("x", {"x": torch.zeros(4, 2).T}),
        ("x", {"x": torch.zeros(1, 20_000)}),
        ("weight", {"weight": torch.zeros(5)}),
        ("weight", {"weight": torch.zeros(4).bfloat16()}),
        ("weight", {"weight": torch.zeros(8)[::2]}),
        ("residual", {"residual": torch.zeros(2, 5)}),
        ("out", {"out": torch.zeros(2, 4).half()}),
        ("out", {"out": torch.zeros(4, 2).T}),
        ("residual_out", {"residual_out": torch.zeros(2, 4)}),
    ],
)
def test_bad_norm_arguments_are_named(name, change):
    arguments = {"x": torch.zeros(2, 4), "weight": torch.zeros(4), "eps": EPS}
    with pytest.raises(ValueError, match=f"^{name}: wanted"):
        rms_norm(**(arguments | change))


def test_bad_swiglu_arguments_are_named():
    for bad in (torch.zeros(3), torch.zeros(2, 5), torch.zeros(2, 4).long(), torch.zeros(4, 2).T):
        with pytest.raises(ValueError, match=r"^gate_up: wanted"):
            swiglu(bad)
    for bad in (torch.zeros(2, 4), torch.zeros(2, 2).half(), torch.zeros(2, 2).T):
        with pytest.raises(ValueError, match=r"^out: wanted"):
            swiglu(torch.zeros(2, 4), out=bad)


def decode_shape(**changes) -> DecodeShape:
    sizes = {"rows": 4, "group": 1, "hidden": 48, "intermediate": 40, "heads": 2, "kv_heads": 2}
    sizes |= {"head_dim": 24, "layers": 1, "image_vocab": 64, "text_vocab": 64, "head_width": 48}
    sizes |= {"prefix": 3, "suffix": 5, "model": "test", "dtype": "fp32"}
    return DecodeShape(**(sizes | changes))


def test_launches_say_what_the_launchers_do(monkeypatch):
    """The audit compiles what `launches` lists: it must be what a call really launches."""
    seen = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *args, **named: seen.append((self.kernel, grid, args, named))

    for module, name in (
        (gpu_rms_norm, "_rms_norm_fwd_kernel"),
        (gpu_swiglu, "_swiglu_fwd_kernel"),
    ):
        monkeypatch.setattr(module, name, Recorder(getattr(module, name)))
    shape = decode_shape()
    x, residual, weight = norm_inputs(4, 48, torch.float32, "cpu")
    gpu_rms_norm.launch_rms_norm(x, weight, EPS, None, x, None)
    gpu_rms_norm.launch_rms_norm(x, weight, EPS, residual, x, residual)
    gpu_swiglu.launch_swiglu(torch.zeros(4, 80), torch.zeros(4, 40))
    monkeypatch.undo()
    claimed = [*gpu_rms_norm.launches(shape), *gpu_swiglu.launches(shape)]
    triton_type = {torch.Tensor: "*fp32", int: "i32", float: "fp32"}
    for launch, (kernel, grid, args, named) in zip(claimed, seen, strict=True):
        assert (launch.kernel, launch.grid) == (kernel, grid)
        assert launch.constexprs | {"num_warps": launch.num_warps} == named
        types = dict(zip(kernel.arg_names, map(lambda a: triton_type[type(a)], args), strict=False))
        assert launch.signature == types
        assert launch.bytes_moved >= launch.bytes_least > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts in the interpreter")
def test_traffic_claimed_is_the_memory_touched(interpreter, monkeypatch):
    touched = set()
    builder = triton_interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def spy(kind, pointers, mask):
        size = pointers.dtype.element_ty.primitive_bitwidth // 8
        touched.update((kind, a, size) for a in pointers.data[mask.data].ravel().tolist())

    def counted_load(self, pointers, mask, *rest):
        spy("load", pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self, pointers, values, mask, *rest):
        spy("store", pointers, mask)
        return store(self, pointers, values, mask, *rest)

    monkeypatch.setattr(builder, "create_masked_load", counted_load)
    monkeypatch.setattr(builder, "create_masked_store", counted_store)
    shape = decode_shape(dtype="bf16")
    x, residual, weight = norm_inputs(4, 48, torch.bfloat16, "cpu")
    outs = torch.empty_like(x), torch.empty_like(x)
    gate_up, out = torch.zeros(4, 80).bfloat16(), torch.zeros(4, 40).bfloat16()
    calls = [
        lambda: gpu_rms_norm.launch_rms_norm(x, weight, EPS, None, outs[0], None),
        lambda: gpu_rms_norm.launch_rms_norm(x, weight, EPS, residual, *outs),
        lambda: gpu_swiglu.launch_swiglu(gate_up, out),
    ]
    claimed = [*gpu_rms_norm.launches(shape), *gpu_swiglu.launches(shape)]
    for launch, call in zip(claimed, calls, strict=True):
        touched.clear()
        call()
        assert launch.bytes_moved == launch.bytes_least == sum(size for *_, size in touched)
