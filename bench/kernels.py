"""Compile every kernel the engine can launch, without a GPU, and read the machine code.

For each model, dtype, number of rows and group: registers, spills, shared memory, width of global
accesses, tensor-core instructions, and bytes moved over the least possible. The rules are those of
kernels/compiled/audit.py; a broken one is a line on stderr and exit code 1. `rows` has a row a kernel, dtype
and architecture; `configurations` (with --json) one a distinct compilation.
"""

# ruff: noqa: RUF009  `option` makes a dataclasses.field, which ruff cannot know

import multiprocessing
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from bench.rollout.launches import launches_per_step
from engine.policy import load_policy
from engine.settings.errors import UserError
from engine.settings.options import check_fields, nearest, option

if TYPE_CHECKING:
    from kernels.compiled.audit import Finding, Job
    from kernels.gpu.launch import Launch


@dataclass(kw_only=True, slots=True)
class Config:
    """Settings of `python -m bench kernels`."""

    json: bool = option(False, "print one JSON object instead of a table")
    threads: int = option(0, "processes that compile at once; 0: one a core", at_least=0)
    arch: list[Literal["sm_80", "sm_90", "sm_100"]] = option(
        ("sm_80", "sm_90", "sm_100"), "architectures compiled for"
    )
    models: list[str] = option((), "models by name; none: all of kernels/compiled/audit.py")
    dtypes: list[Literal["bf16", "fp16", "fp32"]] = option(("bf16", "fp16", "fp32"), "dtypes")
    rows: list[int] = option((16, 32, 64, 128), "conditional and unconditional rows", at_least=2)
    groups: list[int] = option((1, 8), "rows that share a prompt prefix", at_least=1)
    only: list[str] = option((), "modules of kernels.gpu by name; none: all")
    quick: bool = option(False, "compile one configuration of each kernel, dtype and architecture")
    write: str | None = option(
        None, "also write the tables as a Markdown page, bench/results/kernels.md"
    )

    def __post_init__(self) -> None:
        check_fields(self)


def run(config: Config) -> dict:
    """The suite's {"rows", "ratios", "correct"}. Raises: UserError under TRITON_INTERPRET."""
    if os.environ.get("TRITON_INTERPRET", "0").lower() not in ("", "0", "false", "off"):
        raise UserError("TRITON_INTERPRET is set, and the audit compiles kernels: unset it")
    from kernels.compiled import audit

    known = audit.MODELS
    models = _chosen("models", config.models, known)
    modules = audit.find_modules()
    wanted = _chosen("only", config.only, modules)
    modules = {name: modules[name] for name in wanted}
    shapes = audit.shapes(models, config.dtypes, config.rows, config.groups)
    jobs = audit.plan(modules, shapes, config.arch, quick=config.quick)
    if not jobs:
        raise UserError("nothing to compile: rows must be at least twice a group")
    failures = audit.unlaunched(modules, (job.launch() for job in jobs))
    findings = _examine(jobs, config.threads or len(os.sched_getaffinity(0)))
    failures += [
        f"{f.kernel} ({f.model} {f.dtype} {f.arch}) {failure}"
        for f in findings
        for failure in f.failures
    ]
    launches = launches_per_step(load_policy("tiny", dtype=torch.bfloat16))
    for kind in ("image_step", "text_step"):
        if launches[kind] > launches["allowed"]:
            failures.append(f"{kind}: {launches[kind]} launches, allowed {launches['allowed']}")
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    report = {
        "rows": [_summary(group) for group in _grouped(findings)],
        "configurations": [finding.row() for finding in findings],
        "ratios": {
            "max_spilled_bytes": max(f.code.spilled_bytes for f in findings),
            "narrow_accesses": sum(len(f.narrow) for f in findings),
            "traffic_over_least": max(f.traffic_over_least for f in findings),
        },
        "launches": launches,
        "failures": failures,
        "correct": not failures,
    }
    if config.write:
        example = audit.shapes(
            models[:2], config.dtypes[:1], [max(config.rows)], config.groups[-1:]
        )
        launches = [
            (shape.model, launch)
            for module in modules.values()
            for shape in example
            for launch in audit.launches_of(module, shape)
        ]
        Path(config.write).write_text(page(config, models, report, launches), encoding="utf-8")
    return report


def _chosen(flag: str, names: list[str], known: Iterable[str]) -> list[str]:
    known = list(known)
    for name in names:
        if name not in known:
            raise UserError(f"--{flag}: unknown {name!r} (nearest: {nearest(name, known)})")
    return names or known


def _examine(jobs: list["Job"], processes: int) -> list["Finding"]:
    """Findings in the order of the jobs."""
    from kernels.compiled.audit import examine

    if processes == 1 or len(jobs) < 8:
        return [examine(job) for job in jobs]
    # Spawned, not forked: torch has threads by now.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(examine, jobs, chunksize=4))


def _grouped(findings: list["Finding"]) -> list[list["Finding"]]:
    groups: dict[tuple, list[Finding]] = {}
    for f in findings:
        groups.setdefault((f.kernel, f.dtype, f.arch), []).append(f)
    return list(groups.values())


def _summary(findings: list["Finding"]) -> dict:
    """One kernel, dtype and architecture over all models and shapes; the worst of each figure."""
    first = findings[0]
    codes = [f.code for f in findings]
    cores = sorted({name for code in codes for name in code.tensor_cores})
    return {
        "provider": first.kernel,
        "dtype": first.dtype,
        "arch": first.arch,
        "configurations": len(findings),
        "registers": max(code.registers for code in codes),
        "spilled_bytes": max(code.spilled_bytes for code in codes),
        "shared_bytes": max(f.shared_bytes for f in findings),
        "wide_loads": _span(_wide(code, "load", "copy") for code in codes),
        "wide_stores": _span(_wide(code, "store") for code in codes),
        "narrow": sum(len(f.narrow) for f in findings),
        "narrow_by_design": " ".join(sorted({name for f in findings for name in f.exempt})),
        "tensor_core": " ".join(cores),
        "traffic_over_least": max(f.traffic_over_least for f in findings),
        "correct": not any(f.failures for f in findings),
    }


def _wide(code: object, *kinds: str) -> int:
    return sum(n for (kind, bits), n in code.global_widths.items() if kind in kinds and bits >= 128)


def _span(counts: Iterable[int]) -> str:
    """ "3", or "3-12"."""
    ordered = sorted(counts)
    ends = dict.fromkeys((ordered[0], ordered[-1]))
    return "-".join(map(str, ends))


def page(
    config: Config, models: list[str], report: dict, launches: list[tuple[str, "Launch"]]
) -> str:
    """The tables: a row a kernel, dtype and architecture, and the traffic; docs/kernels.md reads them."""
    import triton

    from kernels.compiled import audit

    columns = {
        "provider": "kernel",
        "dtype": "dtype",
        "arch": "arch",
        "configurations": "configurations",
        "registers": "registers",
        "spilled_bytes": "spilled bytes",
        "shared_bytes": "shared bytes",
        "wide_loads": "128-bit loads",
        "wide_stores": "128-bit stores",
        "narrow": "narrow",
        "narrow_by_design": "narrow by design",
        "tensor_core": "tensor cores",
        "traffic_over_least": "bytes / least",
    }
    lines = [
        "# Kernels, as compiled: the tables",
        "",
        "Written by `python -m bench kernels --write bench/results/kernels.md`; do not edit.",
        "docs/kernels.md says how to read them. "
        f"Compiled with Triton {triton.__version__} for {', '.join(config.arch)}; "
        f"{', '.join(models)}; rows {', '.join(map(str, config.rows))}; "
        f"groups {', '.join(map(str, config.groups))}"
        f"{'; one configuration of each kernel and dtype' if config.quick else ''}.",
        "",
        "| " + " | ".join(columns.values()) + " |",
        "|" + " --- |" * len(columns),
    ]
    for row in report["rows"]:
        cells = [f"{v:.3f}" if isinstance(v := row[key], float) else str(v) for key in columns]
        lines.append("| " + " | ".join(cells) + " |")
    ratios = ", ".join(f"`{name}` {value:g}" for name, value in report["ratios"].items())
    lines += ["", f"Over all of them: {ratios}.", "", "## Traffic of one launch", ""]
    lines += [
        f"{config.dtypes[0]}, {max(config.rows)} rows in groups of {config.groups[-1]}, "
        f"{audit.PREFIX} prefix and {audit.SUFFIX} suffix tokens:",
        "what the launch says it moves, the least possible, what it reads a second time from L2, and",
        "the operations of its matrix products. The loss takes a chunk of rows of its own.",
        "",
        "| kernel | model | grid | warps | MB moved | MB least | MB again | GFLOP |",
        "|" + " --- |" * 8,
    ]
    for model, launch in launches:
        grid = " × ".join(map(str, launch.grid))
        moved, least = launch.bytes_moved / 1e6, launch.bytes_least / 1e6
        again = f"{launch.bytes_again / 1e6:.3f}" if launch.bytes_again else ""
        flops = f"{launch.flops / 1e9:.2f}" if launch.flops else ""
        lines.append(
            f"| {launch.name} | {model} | {grid} | {launch.num_warps} | {moved:.3f} | {least:.3f} "
            f"| {again} | {flops} |"
        )
    counts = report["launches"]
    lines += [
        "",
        "## Launches of one decode step",
        "",
        f"Counted on a trace of the tiny model ({counts['layers']} layers, bf16), for both engines in",
        "the same way (bench/rollout/launches.py): every op that computes or copies, every Triton kernel.",
        "",
        "| engine | launches a step |",
        "| --- | --- |",
        f"| ours, images | {counts['image_step']} |",
        f"| ours, text | {counts['text_step']} |",
        f"| allowed: 10 a layer and 6 | {counts['allowed']} |",
        f"| the published loop, {counts['eager_loop_layer']} of them in each layer "
        f"| {counts['eager_loop_step']} |",
    ]
    return "\n".join(lines) + "\n"
