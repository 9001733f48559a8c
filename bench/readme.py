"""Make the README's measured parts from results: python -m bench.readme [--run runs/tiny-0 ...]

Reads bench/results/rollout.json and bench/results/loss.json, and of runs, where they are given, the
summaries, and the first one's metrics and evaluation pictures; writes the tables between the
README's markers, docs/assets/curve.png and docs/assets/before_after.png. Nothing is typed by hand.
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

from engine.errors import UserError
from engine.pictures import save_grid

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
    """What the runs gained, as a Markdown table."""
    lines = ["| measured | figure |", "|---|---|"]
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


def speeds(rollout: dict[str, Any], loss: dict[str, Any]) -> str:
    """The benchmarks' ratios, as a Markdown table, and where they were measured."""
    lines = ["| measured | figure |", "|---|---|"]
    names = {
        "vs_eager_loop": "rollout, tiny model, 64 images: speed against T2I-R1's loop (32-row chunks)",
        "vs_eager_unsplit": "the same, against that loop in one chunk",
        "mini_vs_eager_loop": "rollout, 512-wide 8-layer model, 576 tokens, 8 images: against T2I-R1's loop",
    }
    for key, text in names.items():
        lines.append(f"| {text} | {rollout['ratios'][key]:.2f}x |")
    ratios = loss["ratios"]
    names = {
        "logits": "loss with gradients, 4096 tokens, 16,384 codes, width 512: against all logits at once",
        "liger": "the same, against Liger-Kernel's fused loss",
        "fastest_peer": "the same, against the fastest of the peers that ran",
        "plain": "guided loss: against the logits of both branches",
    }
    for key, text in names.items():
        guided = "guided_" if key == "plain" else ""
        parts = [
            f"{ratios[name]:.2f} of its {what}"
            for what in ("time", "memory")
            if (name := f"{guided}{what}_vs_{key}") in ratios
        ]
        lines.append(f"| {text} | {', '.join(parts)} |")
    return "\n".join([*lines, "", *(_source(report) for report in (rollout, loss))])


def _source(report: dict[str, Any]) -> str:
    machine = report["machine"]
    return (
        f"`python -m bench {report['suite']} --json`: {machine['cpu']}, {machine['threads']} "
        f"threads, torch {machine['torch']}, commit {machine['commit']}."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, nargs="+", default=[])
    results = ROOT / "bench" / "results"
    parser.add_argument("--rollout", type=Path, default=results / "rollout.json")
    parser.add_argument("--loss", type=Path, default=results / "loss.json")
    arguments = parser.parse_args()
    ASSETS.mkdir(parents=True, exist_ok=True)
    try:
        tables = {"speeds": speeds(_read(arguments.rollout), _read(arguments.loss))}
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
