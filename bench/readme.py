"""Make the README's measured parts from results: python -m bench.readme [--run runs/tiny-0 ...]

Reads the suites' JSON in bench/results, and of runs, where they are given, the summaries, and the
first one's metrics and evaluation pictures; writes the tables between the README's markers,
docs/assets/curve.png and docs/assets/before_after.png. Nothing is typed by hand.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from engine.run.grids import save_grid
from engine.settings.errors import UserError

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "docs" / "assets"
WINDOW = 9  # steps of the curves' rolling mean


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None


def draw_curve(run: Path) -> None:
    """Reward and judge score over the run's steps, with their rolling means."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = np.array([row["step"] for row in rows])
    figure, axis = plt.subplots(figsize=(8, 3.2), dpi=120)
    for name, label, color in (
        ("reward", "reward (mean of the four experts)", "#3566c8"),
        ("judge", "judge score (not a reward)", "#d0582a"),
    ):
        values = np.array([row[name] for row in rows])
        axis.plot(steps, values, color=color, alpha=0.25, linewidth=1)
        smooth = np.convolve(values, np.ones(WINDOW) / WINDOW, mode="valid")
        axis.plot(steps[WINDOW // 2 : WINDOW // 2 + len(smooth)], smooth, color=color, label=label)
    axis.set_xlabel("step")
    axis.set_ylabel("score on training prompts")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(ASSETS / "curve.png")


def draw_before_after(run: Path, columns: int = 6) -> None:
    """The first held-out pictures of several task types, before above after; never picked by score."""
    found = {when: _read(run / "eval" / f"{when}.json")["rows"] for when in ("before", "after")}
    order = ("riddle", "spatial", "numeracy", "color", "texture", "complex")
    pictures, captions = [], []
    for when in ("before", "after"):
        for task in order[:columns]:
            row = next(r for r in found[when] if r["task_type"] == task and "image" in r)
            pixels = np.asarray(Image.open(run / "eval" / row["image"]).convert("RGB"))
            pictures.append(torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255)
            captions.append(f"{row['prompt']}\n{when}: {row['plan']}")
    path = ASSETS / "before_after.png"
    save_grid(path, torch.stack(pictures), captions, columns=columns, scale=3)


def gains(runs: list[Path]) -> str:
    """What the runs gained, as rows of the README's table."""
    lines = []
    for run in runs:
        summary = _read(run / "summary.json")
        before, after = summary["eval"]["before"], summary["eval"]["after"]
        riddles = [e["by_task"]["riddle"]["mean"] for e in (before, after)]
        lines.append(
            f"| default run, seed {summary['seed']}: held-out judge score, all task types / riddles "
            f"| {before['mean']:.3f} → {after['mean']:.3f} ({after['mean'] - before['mean']:+.3f}) / "
            f"{riddles[0]:.3f} → {riddles[1]:.3f} ({riddles[1] - riddles[0]:+.3f}), "
            f"{summary['seconds'] / 60:.1f} min, {summary['peak_memory_mib'] / 1024:.1f} GiB |"
        )
    return "\n".join(lines)


SUITES = ("rollout", "generate", "loss", "rewards", "overlap")
# (suite, figure as a format of the suite's ratios, what it is)
FIGURES = (
    ("rollout", "{vs_eager_loop:.2f}x", "rollout, tiny model, 64 images: speed against T2I-R1's loop (32-row chunks)"),
    ("rollout", "{vs_eager_unsplit:.2f}x", "the same, against that loop in one chunk"),
    ("rollout", "{mini_vs_eager_loop:.2f}x", "rollout, 512-wide 8-layer model, 576 tokens, 8 images: against T2I-R1's loop"),
    ("generate", "{vs_transformers:.2f}x", "pictures from prompts, that model, 8 images of 2 prompts: speed against transformers' own `generate`"),
    ("loss", "{time_vs_logits:.2f} of its time, {memory_vs_logits:.2f} of its memory", "loss with gradients, 4096 tokens, 16,384 codes, width 512: against all logits at once"),
    ("loss", "{memory_vs_liger:.2f} of its memory", "the same, against Liger-Kernel's fused loss"),
    ("loss", "{time_vs_fastest_peer:.2f} of its time", "the same, against the fastest of the peers that ran"),
    ("loss", "{guided_time_vs_plain:.2f} of its time, {guided_memory_vs_plain:.2f} of its memory", "guided loss: against the logits of both branches"),
    ("rewards", "{worst_batched_vs_single:.2f}x, {second_best_batched_vs_single:.2f}x", "reward experts, 16 images in a batch against one at a time: the least gain of any, the second best"),
    ("overlap", "{hidden_share_of_possible:.0%}", "reward time that the pipeline hides, of what could be hidden"),
)  # fmt: skip


def speeds(reports: dict[str, dict[str, Any]]) -> str:
    """The benchmarks' ratios, as rows of the README's table. Args: reports: of each of SUITES."""
    return "\n".join(
        f"| {what} | {figure.format(**reports[suite]['ratios'])} |"
        for suite, figure, what in FIGURES
    )


def _source(report: dict[str, Any]) -> str:
    machine = report["machine"]
    return (
        f"`python -m bench {report['suite']} --json`: {machine['cpu']}, {machine['threads']} "
        f"threads, torch {machine['torch']}, commit {machine['commit']}."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, nargs="+", default=[])
    arguments = parser.parse_args()
    ASSETS.mkdir(parents=True, exist_ok=True)
    try:
        results = ROOT / "bench" / "results"
        reports = {suite: _read(results / f"{suite}.json") for suite in SUITES}
        sources = "\n".join(_source(report) for report in reports.values())
        tables = {"speeds": speeds(reports), "sources": sources}
        if arguments.run:
            draw_curve(arguments.run[0])
            draw_before_after(arguments.run[0])
            tables["gains"] = gains(arguments.run)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    readme = ROOT / "README.md"
    text = readme.read_text()
    for name, made in tables.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        head, rest = text.split(begin)
        text = f"{head}{begin}\n{made}\n{end}{rest.split(end)[1]}"
    readme.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
