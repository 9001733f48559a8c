"""Make the README's measured parts from results: python -m bench.readme --run runs/tiny-0

Reads the run's summary, metrics and evaluation pictures, the other seeds' summaries where they
exist, and bench/results/rollout.json; writes docs/assets/curve.png, docs/assets/before_after.png
and the table between the README's markers. Nothing is typed by hand.
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
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
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


def table(runs: list[Path], rollout: dict[str, Any]) -> str:
    """The README's table, as Markdown."""
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
    names = {
        "vs_eager_loop": "rollout, tiny model, 64 images: speed against T2I-R1's loop (32-row chunks)",
        "vs_eager_unsplit": "the same, against that loop in one chunk",
        "mini_vs_eager_loop": "rollout, 512-wide 8-layer model, 576 tokens, 8 images: against T2I-R1's loop",
    }
    for key, text in names.items():
        lines.append(f"| {text} | {rollout['ratios'][key]:.2f}x |")
    machine = rollout["machine"]
    lines.append("")
    lines.append(
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, commit "
        f"{machine['commit']}; made by `python -m bench.readme` from `python -m engine.train` "
        "(three seeds) and `python -m bench rollout --json`."
    )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, nargs="+", default=[ROOT / "runs" / "tiny-0"])
    parser.add_argument("--rollout", type=Path, default=ROOT / "bench" / "results" / "rollout.json")
    arguments = parser.parse_args()
    ASSETS.mkdir(parents=True, exist_ok=True)
    try:
        draw_curve(arguments.run[0])
        draw_before_after(arguments.run[0])
        text = table(arguments.run, _read(arguments.rollout))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    readme = ROOT / "README.md"
    head, rest = readme.read_text().split(BEGIN)
    tail = rest.split(END)[1]
    readme.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
