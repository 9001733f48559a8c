"""The loss benchmark: exact solution, readings of memory and error, rows of failures, ratios."""

import contextlib
import dataclasses
import io
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.__main__ import main
from bench.loss import suite as suite
from bench.loss.problem import BETA, CFG_WEIGHT, CLIP, Problem, load_problem, make_problem, solve
from bench.loss.providers import PROVIDERS, Provider, logits
from bench.loss.suite import Config, Finding, Size
from bench.loss.worker import first_step, peak_bytes
from engine.settings.errors import UserError
from tests.bench.loss import loss_probe

CPU = torch.device("cpu")
BLOCK = 64 << 20  # bytes; far above what else a step of these sizes takes
OWN = ["ours", "logits", "guided", "guided_two_gemms"]


def problem_of(n=40, vocab=64, width=8, *, guided=False, dtype=torch.float32):
    return make_problem(n, vocab, width, guided=guided, dtype=dtype, device=CPU)


def wasteful(problem):
    block = torch.ones(BLOCK // 4)
    loss = logits(problem) + 0 * block[0]
    del block  # a peak counts though it is over at the end
    return loss


@pytest.fixture(scope="module")
def report():
    """Report and exit code of a run with one right, one wrong and two failing providers."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))  # where the probe is
        for name, package in (("spoilt", None), ("absent", "no-such-peer"), ("dying", None)):
            patch.setitem(
                PROVIDERS, name, Provider(getattr(loss_probe, name), lambda *_: 0, package)
            )
        names = ["ours", "logits", "spoilt", "absent", "dying"]
        size = ["--n", "1024", "--vocab", "96", "--width", "16"]
        code = 0
        try:
            main(
                ["loss", "--json", "--repeats", "2", "--threads", "1", *size, "--providers", *names]
            )
        except SystemExit as stop:
            code = stop.code
    return json.loads(out.getvalue()), code


def rows_by_name(report):
    return {row["provider"]: row for row in report["rows"]}


def test_report_has_speed_memory_and_errors_of_right_providers(report):
    report, _ = report
    assert report.keys() == {"suite", "machine", "rows", "ratios", "correct"}
    assert report["suite"] == "loss" and report["ratios"] == {}  # not the size of the ratios
    for name in ("ours", "logits"):
        row = rows_by_name(report)[name]
        assert (row["n"], row["vocab"], row["width"], row["dtype"]) == (1024, 96, 16, "float32")
        assert row["correct"] is True and 0 < row["grad_error"] < 1e-5
        assert (
            row["fastest_seconds"]
            <= row["seconds"]
            == pytest.approx(row["n"] / row["tokens_per_s"])
        )
        assert row["peak_mib"] >= 0 and row["time_vs_logits"] > 0
    assert rows_by_name(report)["logits"]["memory_vs_logits"] == 1


def test_wrong_provider_carries_no_speed_and_fails_the_run(report):
    report, code = report
    row = rows_by_name(report)["spoilt"]
    assert row["correct"] is False and row["grad_error"] == pytest.approx(1e-3, rel=0.05)
    assert not {"seconds", "tokens_per_s", "peak_mib", "time_vs_logits"} & row.keys()
    assert report["correct"] is False and code == 1


def test_missing_peer_is_a_row_that_says_why(report):
    row = rows_by_name(report[0])["absent"]
    assert row["missing"] == "ModuleNotFoundError: No module named 'no_such_peer'"
    assert row["version"] == "no-such-peer is not installed"
    assert "correct" not in row and "seconds" not in row


def test_own_provider_that_dies_is_wrong(report):
    row = rows_by_name(report[0])["dying"]
    assert row["missing"].startswith("its process ended with code 3")
    assert row["correct"] is False and "seconds" not in row


@pytest.mark.parametrize("guided", [False, True])
def test_solution_is_the_closed_form(guided):
    problem = problem_of(1024, guided=guided, dtype=torch.float64)
    hidden, uncond, weight = problem.hidden.detach(), problem.uncond_hidden, problem.weight.detach()
    w = CFG_WEIGHT if guided else 1.0
    mixed = w * hidden + (1 - w) * uncond.detach() if guided else hidden
    probs = (mixed @ weight.T).softmax(-1)
    logps = probs[torch.arange(1024), problem.targets].log()
    ratio, gap = (logps - problem.old_logprobs).exp(), problem.ref_logprobs - logps
    a = problem.advantages
    clipped = ((a > 0) & (ratio > 1 + CLIP)) | ((a < 0) & (ratio < 1 - CLIP))
    slopes = (BETA * (1 - gap.exp()) - torch.where(clipped, 0, ratio * a)) / 1024
    surrogate = torch.where(clipped, ratio.clamp(1 - CLIP, 1 + CLIP), ratio) * a
    losses = BETA * (gap.exp() - gap - 1) - surrogate
    to_logits = slopes[:, None] * (torch.eye(64, dtype=torch.float64)[problem.targets] - probs)
    expected = {"hidden": w * to_logits @ weight, "weight": to_logits.T @ mixed}
    if guided:
        expected["uncond_hidden"] = (1 - w) * to_logits @ weight
    solution = solve(problem, 1024)
    assert solution.loss == pytest.approx(losses.mean().item(), rel=1e-12)
    assert solution.loss_scale == pytest.approx(losses.abs().mean().item(), rel=1e-12)
    assert solution.gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(solution.gradients[name], gradient, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("guided", [False, True])
def test_problem_clips_on_both_sides_and_keeps_off_the_edges(guided):
    problem = problem_of(2048, guided=guided)
    with torch.no_grad():
        scores = problem.hidden @ problem.weight.T
        if guided:
            blank = problem.uncond_hidden @ problem.weight.T
            scores = blank + CFG_WEIGHT * (scores - blank)
    logps = scores.log_softmax(-1).gather(1, problem.targets[:, None])[:, 0]
    logs = logps - problem.old_logprobs
    for edge in (1 - CLIP, 1 + CLIP):
        assert (logs - math.log(edge)).abs().min() > 0.05
    up = problem.advantages > 0
    shares = [(logs > math.log(1 + CLIP)) & up, (logs < math.log(1 - CLIP)) & ~up]
    assert all(0.05 < share.float().mean() < 0.25 for share in shares)
    assert 1 < scores.std() < 3


@pytest.mark.parametrize("name", [*OWN, "ours_logprobs", "liger", "trl", "torch_fused"])
def test_provider_solves_the_problem(name):
    provider = PROVIDERS[name]
    if provider.package:
        pytest.importorskip(provider.package.replace("-", "_"))
    if name == "torch_fused" and not hasattr(torch.nn.functional, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    problem = problem_of(1024, guided=provider.guided)
    reading = first_step(provider.loss, problem, solve(problem, 1024))
    assert reading["grad_error"] < 1e-5 and reading["loss_error"] < 1e-5


def test_memory_of_a_step_is_measured():
    problem = problem_of()
    solution = solve(problem, 40)
    plain, more = (first_step(f, problem, solution)["peak_bytes"] for f in (logits, wasteful))
    assert plain < BLOCK / 8
    assert BLOCK <= more - plain + (2 << 20) and more < BLOCK * 1.125


def test_memory_freed_before_the_step_does_not_hide_it():
    del_me = torch.ones(BLOCK // 4)
    del del_me
    blocks = [torch.ones(1 << 18) for _ in range(64)]  # 1 MiB each: malloc keeps freed ones
    blocks.clear()
    peak = peak_bytes(lambda: [torch.ones(1 << 18) for _ in range(64)], CPU)
    assert BLOCK * 0.95 < peak < BLOCK * 1.125


def test_gradient_of_the_first_rows_alone_is_compared():
    problem = problem_of(1024)
    reading = first_step(logits, problem, solve(problem, 512))
    assert reading["grad_error"] < 1e-5
    problem.ref_logprobs[511] += 1
    other = solve(problem, 512)
    problem.ref_logprobs[511] -= 1
    assert first_step(logits, problem, other)["grad_error"] > 1e-3


class Spoil(torch.autograd.Function):
    """The weight as it is, with a gradient of NaN."""

    @staticmethod
    def forward(ctx, weight):
        return weight.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.full_like(gradient, math.nan)


@pytest.mark.parametrize(
    "change, error", [(Tensor.detach, "inf"), (Spoil.apply, "nan")], ids=["none", "nan"]
)
def test_gradient_that_is_no_number_is_wrong(change, error):
    def bad(problem):
        leaves = {f.name: getattr(problem, f.name) for f in dataclasses.fields(problem)}
        return logits(Problem(**leaves | {"weight": change(problem.weight)}))

    problem = problem_of()
    found = Finding(
        provider="logits", seconds=[1.0], **first_step(bad, problem, solve(problem, 40))
    )
    (row,) = suite.rows_of([found], Size(40, 64, 8), "float32")
    assert row["correct"] is False and row["grad_error"] == error
    assert json.loads(json.dumps(row, allow_nan=False)) == row


def finding(name, mib, *seconds, error=1e-7):
    return Finding(
        provider=name,
        peak_bytes=mib << 20,
        grad_error=error,
        loss_error=1e-9,
        seconds=list(seconds),
    )


FINDINGS = [
    finding("ours", 60, 2.0, 9.0, 2.0),
    finding("logits", 600, 4.0, 9.0, 4.0),
    finding("liger", 120, 8.0, 8.0, 8.0),
    finding("liger_compiled", 240, 5.0, 5.0, 5.0),
    finding("cce", 300, 4.0, 3.0, 2.5),
    finding("guided", 100, 1.0, 1.0, 1.0),
    finding("guided_two_gemms", 1000, 4.0, 2.0, 5.0),
]


def ratios_of(findings):
    rows = suite.rows_of(findings, suite.RATIO_SIZE, "float32")
    return suite.ratios(findings, rows)


def test_ratios_are_within_rounds_and_take_the_best_peer():
    assert ratios_of(FINDINGS) == pytest.approx(
        {
            "memory_vs_logits": 0.1,
            "memory_vs_liger": 0.5,
            "time_vs_logits": 0.5,
            "time_vs_fastest_peer": 0.8,
            "guided_time_vs_plain": 0.25,
            "guided_memory_vs_plain": 0.1,
        }
    )


@pytest.mark.parametrize(
    "name, gone",
    [
        ("logits", {"memory_vs_logits", "time_vs_logits"}),
        ("guided", {"guided_time_vs_plain", "guided_memory_vs_plain"}),
        ("liger", set()),
    ],
)
def test_a_missing_or_wrong_provider_has_no_ratio(name, gone):
    every = ratios_of(FINDINGS)
    for bad in (Finding(provider=name, missing="why"), finding(name, 1, 1, 1, 1, error=math.nan)):
        ratios = ratios_of([bad if f.provider == name else f for f in FINDINGS])
        assert every.keys() - ratios.keys() == gone
        if name == "liger":
            assert ratios["memory_vs_liger"] == pytest.approx(0.25)  # the other Liger's


def test_what_does_not_fit_is_left_out(monkeypatch):
    monkeypatch.setattr(suite, "free_bytes", lambda device: 6 << 30)
    monkeypatch.setattr(suite, "Worker", lambda loss, *_: pytest.fail(f"started {loss}"))
    monkeypatch.setattr(suite, "write_problem", lambda *_: ())
    size = Size(16_384, 102_400, 64)
    findings = suite.measure(size, ["logits"], Config(), CPU)
    rows = suite.rows_of(findings, size, "float32")
    assert rows[0]["missing"].startswith("left out: needs 25")
    assert "correct" not in rows[0] and "seconds" not in rows[0]


def test_sizes_are_every_combination():
    assert list(Config().sizes()) == [Size(4096, 16_384, 512)]
    assert len(set(Config(all=True).sizes())) == 18
    assert list(Config(all=True, n=[8], width=[4]).sizes()) == [(8, 16_384, 4), (8, 102_400, 4)]


def test_unknown_provider_names_the_nearest():
    with pytest.raises(UserError, match=r"providers: unknown 'ligr' \(nearest: liger\)"):
        Config(providers=["ligr"])


def test_liger_refuses_cut_sequences():
    pytest.importorskip("liger_kernel")
    problem = problem_of(600)
    with pytest.raises(NotImplementedError, match="512"):
        PROVIDERS["liger"].loss(problem)


def test_problem_file_keeps_every_tensor(tmp_path):
    problem = problem_of(guided=True, dtype=torch.bfloat16)
    problem.save(tmp_path / "p.pt")
    again = load_problem(tmp_path / "p.pt", CPU)
    for f in dataclasses.fields(problem):
        mine, theirs = getattr(problem, f.name), getattr(again, f.name)
        assert torch.equal(mine, theirs) and mine.requires_grad == theirs.requires_grad
