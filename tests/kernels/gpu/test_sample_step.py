"""sample_step and head_sample: Triton (interpreted without a GPU) and C against PyTorch and fp64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import error_place, head_sample, head_workspace, sample_step, sample_workspace
from kernels.reference import guide, linear_logits, log_softmax_at
from kernels.state import Draw, StepState

WIDTH, STEPS, OFFSET = 20, 4, 1 << 20


@pytest.fixture
def on_pytorch(monkeypatch):
    """Run a call on the PyTorch path: CPU tensors, no interpreter, no C."""

    def run(op, *arguments, **options) -> None:
        with monkeypatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "0")
            patch.setattr("kernels.cpu.build.library", lambda: None)
            op(*arguments, **options)

    return run


def state(rows: int, vocab: int, *, paired: bool, eos: int | None, device: str) -> dict[str, Any]:
    """What a step reads and writes; outputs are views of wider buffers, filled with poison."""
    rng = torch.Generator().manual_seed(vocab)
    inputs = 2 * rows if paired else rows
    table = torch.randn(vocab + 2, WIDTH + 4, generator=rng)[:, :WIDTH]
    made = {
        "step": torch.zeros(1, dtype=torch.int32),
        "table": table,
        "x": torch.full((inputs, WIDTH + 3), math.nan)[:, :WIDTH],
        "tokens": torch.full((rows, STEPS + 2), -7)[:, :STEPS],
        "logprobs": torch.full((rows, STEPS + 1), math.nan)[:, :STEPS],
        "guided_logprobs": torch.full((rows, STEPS), math.nan),
        "error": torch.zeros(1, dtype=torch.int64),
        "alive": None if eos is None else torch.ones(rows, dtype=torch.bool),
        "eos": eos,
        "pad": 3,
    }
    # Copies to a GPU keep the strides.
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in made.items()}


def assert_same_state(got: dict[str, Any], expected: dict[str, Any], atol: float = 1e-5) -> None:
    for name, theirs in expected.items():
        if isinstance(theirs, Tensor):
            ours = got[name].cpu()
            torch.testing.assert_close(
                ours, theirs, rtol=0, atol=atol if ours.is_floating_point() else 0, equal_nan=True
            )


def draw_arguments(rows: int, device: str) -> dict[str, Any]:
    return {
        "cfg_weight": 3.0,
        "temperature": 0.9,
        "seed": 11,
        "sample_ids": torch.arange(rows, device=device) + 2**33,
        "step_offset": OFFSET,
    }


def objects(options: dict[str, Any]) -> tuple[Draw, StepState]:
    """A step's two objects from its settings by name; tensors are shared."""
    drawn = ("cfg_weight", "temperature", "seed", "top_k", "top_p", "greedy")
    draw = {name: options[name] for name in drawn if name in options}
    written = {k: v for k, v in options.items() if k not in (*drawn, "step_offset")}
    return Draw(first_step=options["step_offset"], **draw), StepState(**written)


def sample(cond: Tensor, uncond: Tensor | None, **options) -> None:
    sample_step(cond, uncond, *objects(options))


def head(
    cond: Tensor, uncond: Tensor | None, weight: Tensor, bias: Tensor | None, **options
) -> None:
    head_sample(cond, uncond, weight, bias, *objects(options))


def logits_of(step: int, rows: int, vocab: int) -> Tensor:
    return torch.randn(2, rows, vocab, generator=torch.Generator().manual_seed(step)) * 2


@pytest.mark.parametrize(
    ("rows", "vocab", "paired", "options"),
    [
        (1, 37, True, {}),
        (5, 2100, True, {}),  # two tiles
        (40, 64, True, {"greedy": True}),  # two groups of rows
        (6, 50, True, {"top_k": 9, "top_p": 0.8}),
        (7, 50, False, {}),
    ],
)
def test_a_rollout_matches_pytorch(rows, vocab, paired, options, kernel, on_pytorch):
    """And a step too many writes no column: it would be the neighbour's."""
    ours = state(rows, vocab, paired=paired, eos=None, device=kernel)
    theirs = state(rows, vocab, paired=paired, eos=None, device="cpu")
    workspace = sample_workspace(rows, vocab, kernel)
    for step in range(STEPS + 1):
        cond, uncond = logits_of(step, rows, vocab)
        on_pytorch(
            sample,
            cond,
            uncond if paired else None,
            **draw_arguments(rows, "cpu"),
            **options,
            **theirs,
        )
        cond, uncond = cond.to(kernel), uncond.to(kernel)
        sample(
            cond,
            uncond if paired else None,
            workspace=workspace,
            **draw_arguments(rows, kernel),
            **options,
            **ours,
        )
    assert_same_state(ours, theirs)
    assert ours["step"].item() == STEPS + 1
    assert ours["tokens"].min() >= 0 and ours["logprobs"].isfinite().all()
    assert torch.equal(ours["x"][:rows], ours["x"][-rows:])
    # What lies behind the views is untouched.
    assert (ours["tokens"].as_strided((rows, 2), (STEPS + 2, 1), STEPS) == -7).all()
    assert ours["x"].as_strided((len(ours["x"]), 3), (WIDTH + 3, 1), WIDTH).isnan().all()


def test_text_rows_end_at_eos(kernel, on_pytorch):
    rows, vocab, eos = 24, 40, 5
    ours = state(rows, vocab, paired=False, eos=eos, device=kernel)
    theirs = state(rows, vocab, paired=False, eos=eos, device="cpu")
    for step in range(STEPS):
        cond = logits_of(step, rows, vocab)[0]
        cond[:, eos] += 3
        cond[~theirs["alive"]] = math.nan  # not read, and no fault
        on_pytorch(sample, cond, None, **draw_arguments(rows, "cpu"), **theirs)
        sample(cond.to(kernel), None, **draw_arguments(rows, kernel), **ours)
    assert_same_state(ours, theirs)
    tokens, alive = ours["tokens"], ours["alive"]
    ended = (tokens == eos).any(1)
    assert torch.equal(alive, ~ended) and 0 < ended.sum() < rows
    assert error_place(ours["error"], rows) is None
    for row in ended.nonzero()[:, 0].tolist():
        first = tokens[row].tolist().index(eos)
        assert (tokens[row, first + 1 :] == 3).all()
        assert (ours["logprobs"][row, first + 1 :] == 0).all()


def test_first_unusable_logits_are_reported(kernel):
    rows, vocab = 70, 33  # more than a group of rows
    ours = state(rows, vocab, paired=True, eos=None, device=kernel)
    for step in range(STEPS):
        cond, uncond = logits_of(step, rows, vocab).to(kernel)
        if step == 1:
            cond[69, 3] = math.nan
            uncond[66] = -math.inf
            cond[66] = -math.inf
        if step == 2:
            cond[0, 0] = math.nan
        sample(cond, uncond, **draw_arguments(rows, kernel), **ours)
    assert error_place(ours["error"], rows) == (66, 1)
    assert ours["error"].item() == 1 + 1 * rows + 66
    assert ((ours["tokens"] >= 0) & (ours["tokens"] < vocab)).all()
    bad = ~ours["logprobs"].isfinite()
    assert sorted(map(tuple, bad.nonzero().tolist())) == [(0, 2), (66, 1), (69, 1)]


def test_seed_on_the_device_and_outputs_left_out(kernel):
    rows, vocab = 6, 50
    plain = state(rows, vocab, paired=True, eos=None, device=kernel)
    other = state(rows, vocab, paired=True, eos=None, device=kernel)
    cond, uncond = logits_of(0, rows, vocab).to(kernel)
    arguments = draw_arguments(rows, kernel)
    seed = torch.tensor([arguments["seed"]], device=kernel)
    sample(cond, uncond, **arguments, **plain)
    other |= {"logprobs": None, "guided_logprobs": None}
    sample(cond, uncond, **(arguments | {"seed": seed}), **other)
    assert torch.equal(plain["tokens"], other["tokens"])
    assert torch.equal(plain["x"], other["x"])


def head_inputs(rows: int, vocab: int, width: int, dtype: torch.dtype, device: str):
    """cond, uncond (rows, width), weight, bias: strided views, NaN around them."""
    rng = torch.Generator().manual_seed(rows + vocab + width)
    shapes = ((rows, width), (rows, width), (vocab, width))
    tensors = []
    for shape, scale in zip(shapes, (1.0, 1.0, 2.0 * width**-0.5), strict=True):
        wide = torch.full((shape[0], width + 8), math.nan)
        wide[:, :width] = torch.randn(shape, generator=rng) * scale
        tensors.append(wide.to(device, dtype)[:, :width])
    return *tensors, torch.randn(vocab, generator=rng).to(device, dtype)


@pytest.mark.parametrize("kind", ["both", "guided only", "unguided"])
@pytest.mark.parametrize(
    ("rows", "vocab", "width", "dtype"),
    [
        (1, 130, 64, torch.float32),
        (5, 100, 70, torch.float32),  # a width that no block of K divides
        (18, 257, 96, torch.float16),
        (70, 128, 64, torch.bfloat16),  # two groups of rows
    ],
)
def test_head_matches_pytorch(kind, rows, vocab, width, dtype, device, on_pytorch, interpreter):
    cond, uncond, weight, bias = head_inputs(rows, vocab, width, dtype, device)
    uncond = None if kind == "unguided" else uncond
    bias = None if rows == 18 else bias
    ours = state(rows, vocab, paired=uncond is not None, eos=None, device=device)
    theirs = state(rows, vocab, paired=uncond is not None, eos=None, device="cpu")
    if kind == "guided only":
        ours["logprobs"] = theirs["logprobs"] = None
    workspace = head_workspace(cond, weight)
    for _ in range(1 if rows == 70 else 2):
        plain = [None if t is None else t.cpu() for t in (cond, uncond, weight, bias)]
        on_pytorch(head, *plain, **draw_arguments(rows, "cpu"), **theirs)
        head(
            cond,
            uncond,
            weight,
            bias,
            workspace=workspace,
            **draw_arguments(rows, device),
            **ours,
        )
    # Two parts of bf16 leave 2**-14 of an input in the interpreter, which cuts instead of rounding.
    cut = kind == "guided only" and dtype == torch.bfloat16
    assert_same_state(ours, theirs, atol=2e-3 if cut else 2e-5)
    # The same draw as from logits in memory.
    logits = [None if t is None else linear_logits(t, weight, bias, 1.0) for t in (cond, uncond)]
    again = state(rows, vocab, paired=uncond is not None, eos=None, device=device)
    sample(*logits, **draw_arguments(rows, device), **again)
    assert torch.equal(again["tokens"][:, 0], ours["tokens"][:, 0])


@pytest.mark.parametrize("guided_only", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_head_against_fp64(guided_only, scale, device, interpreter):
    """At most twice the error of logits that are rounded to the weights' dtype: far below it."""
    rows, vocab, dtype = 12, 140, torch.float16
    cond, uncond, weight, bias = head_inputs(rows, vocab, 64, dtype, device)
    cond, uncond = cond * scale, uncond * scale
    ours = state(rows, vocab, paired=True, eos=None, device=device)
    ours["logprobs"] = None if guided_only else ours["logprobs"]
    arguments = draw_arguments(rows, device) | {"temperature": 0.9 * scale}
    head(cond, uncond, weight, bias, **arguments, **ours)
    ids = ours["tokens"][:, 0]

    def guided_logprob(inputs: tuple[Tensor, ...]) -> Tensor:
        pair = [torch.nn.functional.linear(t, *inputs[2:]) for t in inputs[:2]]
        wide = [t if t.dtype == torch.float64 else t.float() for t in pair]
        return log_softmax_at(guide(*wide, 3.0) / (0.9 * scale), ids)

    inputs = cond, uncond, weight, bias
    truth = guided_logprob(tuple(t.double() for t in inputs))
    error = (ours["guided_logprobs"][:, 0] - truth).abs()
    allowed = (guided_logprob(inputs) - truth).abs()
    assert error.max() <= 2 * allowed.max() + 1e-5
    assert error.mean() < 0.05 * allowed.mean()


def test_head_reports_unusable_rows_and_ends_text(device, interpreter):
    rows, vocab, eos = 20, 90, 4
    cond, _, weight, _ = head_inputs(rows, vocab, 64, torch.float32, device)
    cond[17, 3] = math.nan
    ours = state(rows, vocab, paired=False, eos=eos, device=device)
    ours["alive"][3] = False
    weight[eos] = cond[5]  # a sure end
    head(cond, None, weight, None, **draw_arguments(rows, device), **ours)
    assert error_place(ours["error"], rows) == (17, 0)
    assert ours["tokens"][3, 0] == 3 and ours["logprobs"][3, 0] == 0
    assert ours["tokens"][5, 0] == eos
    alive = ours["tokens"][:, 0] != eos
    alive[3] = False
    assert torch.equal(ours["alive"], alive) and alive.sum() > 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": torch.zeros(1, dtype=torch.int64)}, "step: wanted"),
        ({"x": torch.zeros(3, WIDTH)}, "x: wanted"),
        ({"tokens": torch.zeros(3, 4)}, "tokens: wanted"),
        ({"table": torch.zeros(7, WIDTH)}, "table: wanted"),
        ({"eos": 2}, "alive: wanted"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, "seed: wanted"),
        ({"logprobs": torch.zeros(STEPS, 3).T}, "logprobs: wanted a last stride"),
    ],
)
def test_wrong_arguments_are_named(change, message, interpreter):
    cond, uncond = logits_of(0, 3, 9)
    arguments = draw_arguments(3, "cpu") | state(3, 9, paired=True, eos=None, device="cpu")
    with pytest.raises(ValueError, match=message):
        sample(cond, uncond, **(arguments | change))
    cond, uncond, weight, bias = head_inputs(3, 9, 16, torch.float32, "cpu")
    with pytest.raises(ValueError, match=message):
        head(cond, uncond, weight, bias, **(arguments | change))
    with pytest.raises(ValueError, match="weight: wanted"):
        head(cond, uncond, weight.half(), bias, **arguments)


def test_a_fused_head_refuses_top_k(interpreter):
    cond, uncond, weight, bias = head_inputs(3, 9, 16, torch.float32, "cpu")
    options = draw_arguments(3, "cpu") | state(3, 9, paired=True, eos=None, device="cpu")
    for change in ({"top_k": 3}, {"top_p": 0.5}):
        with pytest.raises(ValueError, match="^top_k, top_p: wanted 0 and 1"):
            head(cond, uncond, weight, bias, **(options | change))
