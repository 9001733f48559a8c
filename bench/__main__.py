"""Measure, with the peers in the same run: python -m bench SUITE [--json] [--threads N]

Prints one JSON object {"suite", "machine", "rows", "ratios", "correct"}, or the same as a table.
Exit code 1 when an output was wrong: such a row carries no speed.
"""

import json
import sys
from types import ModuleType

import torch

from bench import adamw, credit, kernels, machine, memory
from bench.gpu import check as gpu_check
from bench.loss import suite as loss
from bench.rewards import overlap
from bench.rewards import suite as rewards
from bench.rollout import generate
from bench.rollout import suite as rollout
from engine.settings.errors import UserError, run_command
from engine.settings.options import nearest, parse_args

# A suite is a module with a settings class `Config` (which has json and threads) and
# run(config) -> {"rows": [...], "ratios": {...}, "correct": bool}.
SUITES: dict[str, ModuleType] = {
    "rollout": rollout,
    "loss": loss,
    "kernels": kernels,
    "rewards": rewards,
    "overlap": overlap,
    "generate": generate,
    "memory": memory,
    "adamw": adamw,
    "credit": credit,
    "gpu_check": gpu_check,
}


def main(argv: list[str]) -> None:
    """Run the suite that argv names. Raises: UserError naming the suite or flag."""
    if not argv or argv[0] in ("-h", "--help"):
        print(
            f"{__doc__}\nsuites: {', '.join(SUITES)} (flags of one: python -m bench SUITE --help)"
        )
        return
    name = argv[0]
    if name not in SUITES:
        raise UserError(f"unknown suite {name!r} (nearest: {nearest(name, SUITES)})")
    suite = SUITES[name]
    config = parse_args(suite.Config, argv[1:], description=suite.__doc__.splitlines()[0])
    if config.threads:
        torch.set_num_threads(config.threads)
    report = {"suite": name, "machine": machine.describe(), **suite.run(config)}
    print(json.dumps(report) if config.json else table(report))
    if not report["correct"]:
        raise SystemExit(1)


def table(report: dict) -> str:
    """The report for a person."""
    on = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    lines = [f"{report['suite']}: {on}", ""]
    columns = list(dict.fromkeys(key for row in report["rows"] for key in row))
    cells = [columns]
    cells += [[_cell(row.get(column)) for column in columns] for row in report["rows"]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines += ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in cells]
    lines += ["", *(f"{name}: {ratio:.2f}x" for name, ratio in report["ratios"].items())]
    lines.append(f"correct: {report['correct']}")
    return "\n".join(lines)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(run_command(main))
