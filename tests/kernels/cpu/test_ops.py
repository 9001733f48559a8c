"""The C ops: products, draws, recorded steps, other instruction sets, machines without a compiler.

Norm, SwiGLU, append, attention and the end of a step are held to fp64 beside the Triton kernels, in
tests/test_gpu_*.py.
"""

import ctypes
import gc
import platform
import re
import warnings

import pytest
import torch
import torch.nn.functional as F

from kernels import decode_attention, prefix_tiles, rms_norm, sample_step, swiglu
from kernels.cpu import build, launch
from kernels.cpu.linear import PanelLinear
from kernels.reference import attention as reference_attention
from kernels.state import AdamW, Draw, LayerCache, StepState

pytestmark = pytest.mark.usefixtures("c_ops")

INSTRUCTION_SETS = {"AVX2": ("-mno-avx512f",), "SSE2": ("-march=x86-64",)}


@pytest.fixture(params=["native", *INSTRUCTION_SETS])
def machine(request, monkeypatch) -> str:
    """The library for this machine, then for narrower registers."""
    if request.param != "native":
        if platform.machine() != "x86_64":
            pytest.skip("x86-64's instruction sets")
        library = build.load(build.build(INSTRUCTION_SETS[request.param]))
        for module in ("launch", "linear"):
            monkeypatch.setattr(f"kernels.cpu.{module}.loaded", lambda: library)
        launch._op.cache_clear()
        request.addfinalizer(launch._op.cache_clear)
    return request.param


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_registers_are_as_wide_as_asked(machine):
    panel = ctypes.c_int64.in_dll(launch.loaded(), "linear_panel").value
    assert panel == {"AVX2": 16, "SSE2": 8}.get(machine, panel)


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 1, 1), (7, 33, 31), (48, 64, 257)])
def test_linear_reads_bf16_weights_as_they_are(machine, rows, inputs, outputs):
    x, weight = numbers(rows, inputs), numbers(outputs, inputs, seed=1).bfloat16()
    found = [torch.full((rows, outputs), torch.nan) for _ in range(2)]
    PanelLinear(weight, None).into(found[0], x)
    PanelLinear(weight.float(), None).into(found[1], x)
    assert found[0].equal(found[1])  # nothing but what is read differs


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(1, 1, 1), (7, 33, 31), (48, 64, 100), (61, 130, 257)]
)
def test_linear_against_fp64(machine, rows, inputs, outputs, gelu):
    x = numbers(rows, inputs + 3)[:, :inputs]
    weight, bias = numbers(outputs, inputs, seed=1), numbers(outputs, seed=2)
    out = torch.full((rows, outputs + 5), torch.nan)
    linear = PanelLinear(weight, bias)
    linear.into(out[:, :outputs], x, gelu=gelu)

    def whole(*tensors: torch.Tensor) -> torch.Tensor:
        y = F.linear(*tensors)
        return F.gelu(y) if gelu else y

    truth = whole(x.double(), weight.double(), bias.double())
    allowed = (whole(x, weight, bias) - truth).abs()
    error = (out[:, :outputs] - truth).abs()
    slack = 1e-6 * truth.abs().max().clamp(min=1)
    assert error.max() <= 2 * allowed.max() + slack
    assert error.mean() <= 2 * allowed.mean() + slack / 10
    assert out[:, outputs:].isnan().all()
    PanelLinear(weight, None).into(out[:, :outputs], x)
    torch.testing.assert_close(out[:, :outputs], x @ weight.T, rtol=1e-5, atol=1e-5)


def test_gelu_everywhere(machine):
    """To fp32's rounding over its whole range, tails and infinities included."""
    extremes = torch.tensor([-0.0, 1e-30, -1e4, 1e4, -torch.inf, torch.inf])
    x = torch.cat((torch.linspace(-30, 30, 100_001), extremes))[:, None]
    out = torch.empty_like(x)
    PanelLinear(torch.ones(1, 1), None).into(out, x, gelu=True)
    truth = F.gelu(x.double())
    finite = truth.isfinite()
    assert torch.equal(out[~finite].isnan(), truth[~finite].isnan())
    error = (out - truth)[finite].abs()
    assert (error <= 2e-7 * truth[finite].abs().clamp(min=1)).all()


def test_a_row_is_the_same_bits_in_any_batch(machine):
    x, weight = numbers(100, 70), numbers(90, 70, seed=1)
    linear = PanelLinear(weight, None)
    together, alone = torch.empty(100, 90), torch.empty(1, 90)
    linear.into(together, x)
    for row in range(0, 100, 7):
        linear.into(alone, x[row : row + 1])
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("head_dim", [16, 32, 80, 128])
def test_attention_on_every_instruction_set(machine, head_dim):
    q, scale = numbers(3, 4, head_dim), head_dim**-0.5
    keys, values = numbers(2, 3, 2, 150, head_dim, seed=1)
    prefix_keys, prefix_values = numbers(2, 1, 2, 20, head_dim, seed=2)
    lengths = torch.tensor([20, 0, 7], dtype=torch.int32)
    tiles = prefix_tiles(torch.zeros(3, dtype=torch.int64), 3)
    for length in (1, 17, 141):
        step = torch.tensor([length - 1], dtype=torch.int32)
        cache = LayerCache(
            step=step,
            first_positions=lengths,
            keys=keys,
            values=values,
            prefix_keys=prefix_keys,
            prefix_values=prefix_values,
            prefix_lengths=lengths,
            tiles=tiles,
            row_prefix=torch.zeros(3, dtype=torch.int32),
        )
        got = decode_attention(q, cache, scale=scale)
        truth = reference_attention.decode_attention(
            q.double(),
            keys.double(),
            values.double(),
            length,
            prefix_keys.double(),
            prefix_values.double(),
            lengths,
            torch.zeros(3, dtype=torch.int64),
            scale,
        )
        torch.testing.assert_close(got.double(), truth, rtol=0, atol=2e-6)


def draw(cond: torch.Tensor, uncond: torch.Tensor, **options) -> dict[str, torch.Tensor]:
    """One step over the logits. Returns all that it writes."""
    rows = len(cond)
    written = {
        "step": torch.zeros(1, dtype=torch.int32),
        "x": torch.empty(2 * rows, 1),
        "tokens": torch.empty(rows, 1, dtype=torch.int64),
        "logprobs": torch.empty(rows, 1),
        "guided_logprobs": torch.empty(rows, 1),
        "error": torch.zeros(1, dtype=torch.int64),
    }
    how = Draw(**({"cfg_weight": 5.0, "seed": 2**63 + 5, "first_step": 1 << 20} | options))
    ids = torch.arange(rows) * (2**33 + 1)
    table = torch.arange(cond.shape[1], dtype=torch.float32)[:, None]
    sample_step(cond, uncond, how, StepState(sample_ids=ids, table=table, **written))
    return written


@pytest.mark.parametrize(
    ("rows", "vocab", "options"),
    [
        (10_000, 29, {}),
        (10_000, 29, {"temperature": 0.7}),
        (300, 16_384, {}),
        (300, 1000, {"greedy": True}),
        (500, 300, {"top_k": 20, "top_p": 0.9}),
    ],
)
def test_draws_are_those_of_pytorch(machine, monkeypatch, rows, vocab, options):
    cond, uncond = numbers(2, rows, vocab, seed=vocab) * 2
    ours = draw(cond, uncond, **options)
    with monkeypatch.context() as patch:
        patch.setattr("kernels.cpu.build.library", lambda: None)
        theirs = draw(cond, uncond, **options)
    # A tie within the rounding of two logarithms may fall either way: once in 1e6 draws.
    assert (ours["tokens"] != theirs["tokens"]).sum() == 0
    for name in ("logprobs", "guided_logprobs"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=2e-6, atol=1e-5)
    assert torch.equal(ours["x"][:, 0].long(), ours["tokens"][:, 0].repeat(2))


def test_masked_and_unusable_logits():
    cond, uncond = numbers(2, 5, 200)
    cond[0, :130] = uncond[0, :130] = -torch.inf  # whole blocks of it
    cond[1, 199] = torch.nan
    cond[2] = uncond[2] = -torch.inf
    uncond[3, 64:128] = torch.nan
    written = draw(cond, cond.clone(), cfg_weight=1.0)
    assert written["tokens"][0] >= 130 and written["logprobs"][0].isfinite()
    written = draw(cond, uncond)
    fine = written["guided_logprobs"].isfinite()[:, 0].tolist()
    assert fine == [False, False, False, False, True]  # guidance makes NaN of two infinities
    assert int(written["error"]) == 1


def test_arguments_are_laid_out_as_the_header_says(monkeypatch):
    """Fields of one size in another order would not show in the structure's size."""
    header = re.sub(r"/\*.*?\*/", "", (build.SOURCES / "ops.h").read_text(), flags=re.DOTALL)
    declared = {
        name: re.findall(r"(\w+)\s*[,;]", body)
        for name, body in re.findall(r"struct (\w+)_arguments \{(.*?)\n\};", header, re.DOTALL)
    }
    passed = {}

    def seen(name, **values):
        passed[name] = list(values)

    monkeypatch.setattr(launch, "_launch", seen)
    x, index = torch.zeros(2, 32), torch.zeros(2, dtype=torch.int32)
    cache = torch.zeros(2, 1, 4, 16)
    launch.launch_linear(x, x, None, x, False)
    launch.launch_rms_norm(x, x, 1e-6, None, x, None)
    launch.launch_swiglu(x, x)
    layer = LayerCache(
        step=index,
        first_positions=index,
        keys=cache,
        values=cache,
        prefix_keys=cache,
        prefix_values=cache,
        prefix_lengths=index,
        tiles=index,
        row_prefix=index,
    )
    launch.launch_kv_append(x, x, x, layer, 1, cache[0])
    launch.launch_decode_attention(cache[0], layer, 1.0, x)
    state = StepState(
        step=index,
        sample_ids=index,
        table=x,
        x=x,
        tokens=x,
        logprobs=None,
        guided_logprobs=None,
        error=index,
    )
    launch.launch_sample_step(x, None, None, Draw(), state)
    launch.launch_pack(x, x)
    launch.launch_adamw(x, x, None, x, x, AdamW(step=1, lr=1.0), 1.0, 0)
    assert passed == declared and len(declared) == 8


# Recorded steps


def test_a_recording_is_launched_again_on_what_memory_holds_then():
    x, weight = numbers(4, 8), numbers(8, seed=1)
    normed, activated = torch.empty(4, 8), torch.empty(4, 4)
    with launch.record() as launches:
        rms_norm(x, weight, 1e-6, out=normed)
        swiglu(normed, out=activated)
    x.mul_(-3).add_(1)
    launches.run()
    torch.testing.assert_close(normed, F.rms_norm(x, (8,), weight, 1e-6))
    torch.testing.assert_close(activated, F.silu(normed[:, :4]) * normed[:, 4:])
    with launch.record() as nothing:
        pass
    rms_norm(x, weight, 1e-6)  # joins none
    nothing.run()


def test_a_recording_keeps_its_tensors():
    with launch.record() as launches:
        out = rms_norm(numbers(2, 64), torch.ones(64), 1e-6)
    expected = out.clone()
    gc.collect()
    others = [torch.full((2, 64), torch.nan) for _ in range(64)]  # would take freed memory
    out.zero_()
    launches.run()
    assert torch.equal(out, expected) and len(others) == 64


def test_gradients_take_pytorch():
    x = numbers(2, 8).requires_grad_()
    with torch.enable_grad():
        rms_norm(x, torch.ones(8), 1e-6).sum().backward()
    assert x.grad is not None


# Building


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache folder; nothing loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    for cached in (build.library, build.compiler):
        cached.cache_clear()
    yield tmp_path / "t2i-engine"
    monkeypatch.undo()
    for cached in (build.library, build.compiler):
        cached.cache_clear()


@pytest.mark.slow
def test_compiled_once_and_kept(fresh, monkeypatch):
    path = build.build()
    assert path.parent == fresh and [p.name for p in fresh.iterdir()] == [path.name]
    monkeypatch.setattr(build.subprocess, "run", lambda *_, **__: pytest.fail("compiled again"))
    assert build.build() == path


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("no-such-compiler", "no C compiler (looked for no-such-compiler)"), ("false", "failed")],
)
def test_without_a_compiler_one_warning_then_pytorch(fresh, monkeypatch, compiler, reason):
    monkeypatch.setenv("CC", compiler)
    with pytest.warns(UserWarning) as caught:
        assert build.library() is None
    (warning,) = caught
    message = str(warning.message)
    assert message.startswith("CPU kernels: ") and reason in message and "\n" not in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build.describe() == "PyTorch"
        torch.testing.assert_close(
            rms_norm(numbers(2, 8), torch.ones(8), 1e-6),
            F.rms_norm(numbers(2, 8), (8,), None, 1e-6),
        )
    assert not list(fresh.glob("*.so"))


def test_switched_off(fresh, monkeypatch):
    monkeypatch.setenv(build.SWITCH, "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build.library() is None
    assert not fresh.exists()


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_no_obstacle(fresh, monkeypatch):
    fresh.write_text("a file in its place")
    path = build.build()
    assert path.exists() and path.parent != fresh
    assert build.load(path).run_launches


def test_a_library_that_does_not_load_is_one_line(tmp_path):
    broken = tmp_path / "ops.so"
    broken.write_bytes(b"not a library")
    with pytest.raises(build.BuildError) as caught:
        build.load(broken)
    assert "ops.so" in str(caught.value) and "\n" not in str(caught.value)
