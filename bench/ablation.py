"""The paper's ablation on the tiny model: python -m bench.ablation [--seeds 0 1 2] [--jobs 2]

Trains with gradient on the semantic-level chain of thought only, the token-level one only, and
both, for each seed, and writes docs/ablation.md from the runs' summaries. Runs that have a
summary.json are not repeated; one that was interrupted is resumed.
"""

# ruff: noqa: RUF009  `option` makes a dataclasses.field, which ruff cannot know

import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench import machine
from engine.settings.errors import UserError, run_command
from engine.settings.options import check_fields, option, parse_args

LEVELS = {"both": "semantic,token", "semantic": "semantic", "token": "token"}
RIDDLES = "riddle"  # the task type that needs the plan

Summaries = dict[str, dict[int, dict]]  # level -> seed -> summary.json


@dataclass(kw_only=True, slots=True)
class Config:
    """Settings of `python -m bench.ablation`."""

    seeds: list[int] = option((0, 1, 2), "seeds of each variant", at_least=0)
    jobs: int = option(1, "runs at a time; of several, each has one thread", at_least=1)
    max_steps: int = option(0, "training steps; 0: the trainer's default", at_least=0)
    output_dir: str = option("runs/ablation", "folder that holds the run folders")
    out: str = option("docs/ablation.md", "the table's file")

    def __post_init__(self) -> None:
        check_fields(self)


def main(argv: list[str]) -> None:
    """Run what is missing, then write the table."""
    config = parse_args(Config, argv, description=__doc__.splitlines()[0])
    runs = [(level, seed) for level in LEVELS for seed in config.seeds]
    with ThreadPoolExecutor(config.jobs) as pool:
        failed = [run for run in pool.map(lambda run: _train(config, *run), runs) if run]
    if failed:
        raise UserError(f"runs failed: {', '.join(failed)} (see train.log in their folders)")
    root = Path(config.output_dir)
    summaries = {
        level: {seed: _read(root / run_name(level, seed)) for seed in config.seeds}
        for level in LEVELS
    }
    command = "python -m bench.ablation " + shlex.join(argv)
    page = render(summaries, command=command.strip(), on=machine.describe())
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page)
    print(f"wrote {out}")


def run_name(level: str, seed: int) -> str:
    """The run folder's name."""
    return f"{level}-{seed}"


def _train(config: Config, level: str, seed: int) -> str | None:
    """One training run in its own process. Returns its name where it failed."""
    name = run_name(level, seed)
    folder = Path(config.output_dir) / name
    if (folder / "summary.json").exists():
        print(f"{name}: done before")
        return None
    command = [sys.executable, "-m", "engine.train", "--output_dir", config.output_dir]
    command += ["--run_name", name, "--seed", str(seed), "--train_levels", LEVELS[level]]
    if config.max_steps:
        command += ["--max_steps", str(config.max_steps)]
    if config.jobs > 1:
        command += ["--threads", "1"]
    if any(folder.glob("checkpoints/*")):
        command.append("--resume")
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{name}: {shlex.join(command)}", flush=True)
    with (folder / "train.log").open("a") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
    print(f"{name}: {'finished' if code == 0 else f'exit code {code}'}", flush=True)
    return name if code else None


def _read(folder: Path) -> dict:
    path = folder / "summary.json"
    try:
        summary = json.loads(path.read_text())
        for when in ("before", "after"):
            summary["eval"][when]["mean"], summary["eval"][when]["by_task"]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (json.JSONDecodeError, KeyError, TypeError):
        raise UserError(f"{path}: wanted a run's summary with both evaluations") from None
    return summary


def gain(summary: dict, task: str | None = None) -> float:
    """Judge score after minus before: over all task types, or of one."""
    after, before = (_score(summary, when, task) for when in ("after", "before"))
    return after - before


def _score(summary: dict, when: str, task: str | None = None) -> float:
    held = summary["eval"][when]
    return held["mean"] if task is None else held["by_task"][task]["mean"]


def _spread(values: Sequence[float]) -> str:
    """Mean and each value: `+0.210 (+0.200, +0.220)`."""
    each = ", ".join(f"{value:+.3f}" for value in values)
    return f"{statistics.fmean(values):+.3f} ({each})"


def render(summaries: Summaries, *, command: str, on: Mapping[str, str | int]) -> str:
    """docs/ablation.md.

    Args:
        summaries: level -> seed -> summary.json; the same seeds at each level.
        command: what was typed.
        on: bench.machine.describe().
    """
    seeds = list(next(iter(summaries.values())))
    tasks = list(next(iter(summaries.values()))[seeds[0]]["eval"]["after"]["by_task"])
    lines = [
        "# Which chain of thought to train",
        "",
        f"`{command}`, seeds {', '.join(map(str, seeds))}; "
        f"{on['cpu']}, {on['cores']} cores, torch {on['torch']}, commit {on['commit']}.",
        "",
        "Held-out prompts, scored by the judge, before and after training; a gain is after minus "
        "before, in parentheses for each seed.",
        "",
        "| trained | before | after | gain, all task types | gain, riddles | minutes a run |",
        "|---|---|---|---|---|---|",
    ]
    for level, runs in summaries.items():
        before, after = (
            statistics.fmean(_score(s, when) for s in runs.values()) for when in ("before", "after")
        )
        minutes = statistics.fmean(s["seconds"] for s in runs.values()) / 60
        overall = _spread([gain(s) for s in runs.values()])
        riddles = _spread([gain(s, RIDDLES) for s in runs.values()]) if RIDDLES in tasks else "-"
        lines.append(
            f"| {level} | {before:.3f} | {after:.3f} | {overall} | {riddles} | {minutes:.1f} |"
        )
    lines += [
        "",
        "Mean gain by task type:",
        "",
        f"| trained | {' | '.join(tasks)} |",
        "|---" * (len(tasks) + 1) + "|",
    ]
    for level, runs in summaries.items():
        gains = [statistics.fmean(gain(s, task) for s in runs.values()) for task in tasks]
        lines.append(f"| {level} | " + " | ".join(f"{g:+.3f}" for g in gains) + " |")
    lines += ["", _ordering(summaries, None), ""]
    if RIDDLES in tasks:
        lines[-1:] = [_ordering(summaries, RIDDLES), ""]
    return "\n".join(lines)


def _ordering(summaries: Summaries, task: str | None) -> str:
    """The variants in order of mean gain, and on how many seeds the first beats the second."""
    gains = {
        level: {seed: gain(s, task) for seed, s in runs.items()}
        for level, runs in summaries.items()
    }
    order = sorted(gains, key=lambda level: -statistics.fmean(gains[level].values()))
    first, second = order[:2]
    wins = sum(gains[first][seed] > gains[second][seed] for seed in gains[first])
    where = "Over all task types" if task is None else f"On `{task}` prompts"
    return (
        f"{where}, by mean gain: {', '.join(order)}; "
        f"{first} gains more than {second} on {wins} of {len(gains[first])} seeds."
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
