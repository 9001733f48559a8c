"""The paper's ablation on the tiny model: python -m bench.ablation [--json] [--seeds 0 1 2] [--jobs 2]

Trains plans alone, image tokens alone, both, and image tokens straight from the bare prompt, for each
seed, with equal numbers of pictures, and compares the held-out scores, prompt by prompt. --arms takes
others of ARMS, each of which differs from `both` in one setting, and writes an on/off table.

--split validation trains on eleven twelfths of the training prompts and scores on the rest: settings are
chosen by that, never on the held-out prompts. Runs that have a summary.json are not repeated; one that
was interrupted is resumed.
"""

# ruff: noqa: RUF009  `option` makes a dataclasses.field, which ruff cannot know

import json
import math
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bench import machine
from engine.prompts.data import load_prompts
from engine.run.checkpoint import atomic_write_text
from engine.settings.errors import UserError, run_command
from engine.settings.options import check_fields, nearest, option, parse_args

# Every arm draws 64 pictures a step. Image tokens have a tenth of the plans' signal in their gradient.
LEVELS = ["--loss_type", "level", "--level_weights", "semantic=1", "token=0.1"]
IMAGES_OF_A_PLAN = ["--num_generations", "1", "--images_per_plan", "8"]
ARMS: dict[str, list[str]] = {
    "semantic": ["--train_levels", "semantic"],
    "token": ["--train_levels", "token", *IMAGES_OF_A_PLAN, "--learning_rate", "2e-4"],
    "both": LEVELS,
    "bare": ["--plans", "off", "--learning_rate", "2e-4"],
    "one mean": [],
    "equal levels": ["--loss_type", "level"],
    "nested": [
        *LEVELS,
        "--advantages",
        "nested",
        "--num_generations",
        "4",
        "--images_per_plan",
        "2",
    ],
    "guidance": [*LEVELS, "--token_weighting", "guidance"],
    "guidance top": [*LEVELS, "--token_weighting", "guidance", "--token_weighting_top", "0.2"],
    "entropy": [*LEVELS, "--token_weighting", "entropy"],
    "guided": [*LEVELS, "--logprob_policy", "guided"],
    "skip": [*LEVELS, "--dynamic_sampling", "skip"],
    "resample": [*LEVELS, "--dynamic_sampling", "resample"],
    "no scale": [*LEVELS, "--advantage_scale", "none"],
    "by expert": [*LEVELS, "--advantage_scale", "expert"],
}
PAPER = ("semantic", "token", "both", "bare")
RIDDLES = "riddle"  # the task type that needs the plan
VALIDATION = 12  # of so many training prompts one is scored

Results = dict[str, dict[int, dict[str, Any]]]  # arm -> seed -> summary.json, with eval's rows


@dataclass(kw_only=True, slots=True)
class Config:
    """Settings of `python -m bench.ablation`."""

    json: bool = option(False, "print one JSON object as well")
    arms: list[str] = option(PAPER, f"what to compare: {', '.join(ARMS)}")
    seeds: list[int] = option((0, 1, 2), "seeds of each arm", at_least=0)
    split: Literal["heldout", "validation"] = option("heldout", "prompts that are scored")
    flags: str = option("", 'more flags of every run, as --flags="--beta 0"')
    jobs: int = option(1, "runs at a time; of several, each has one thread", at_least=1)
    max_steps: int = option(0, "training steps; 0: the trainer's default", at_least=0)
    output_dir: str = option("runs/ablation", "folder that holds the run folders")
    out: str | None = option(None, "the table's file; none: docs/ablation.md for the paper's arms")

    def __post_init__(self) -> None:
        check_fields(self)
        for arm in self.arms:
            if arm not in ARMS:
                raise UserError(f"--arms: unknown {arm!r} (nearest: {nearest(arm, ARMS)})")
        if self.out is None and tuple(self.arms) == PAPER and self.split == "heldout":
            self.out = "docs/ablation.md"


def main(argv: list[str]) -> None:
    """Run what is missing, then write the table and print the figures."""
    config = parse_args(Config, argv, description=__doc__.splitlines()[0])
    root = Path(config.output_dir)
    if config.split != "heldout":
        root /= config.split  # its finished runs are none of the other split's
    root.mkdir(parents=True, exist_ok=True)
    more = [*shlex.split(config.flags), *(_validation(root) if config.split != "heldout" else [])]
    runs = [(arm, seed) for arm in config.arms for seed in config.seeds]
    with ThreadPoolExecutor(config.jobs) as pool:
        failed = [
            run for run in pool.map(lambda run: _train(config, root, more, *run), runs) if run
        ]
    if failed:
        raise UserError(f"runs failed: {', '.join(failed)} (see train.log in their folders)")
    results = {
        arm: {seed: _read(root / run_name(arm, seed)) for seed in config.seeds}
        for arm in config.arms
    }
    figures = compare(results)
    command = f"python -m bench.ablation {shlex.join(argv)}".strip()
    page = render(results, figures, command=command, on=machine.describe())
    if config.out:
        out = Path(config.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(out, page)
        print(f"wrote {out}", file=sys.stderr)
    else:
        print(page, file=sys.stderr)
    if config.json:
        print(json.dumps(figures))


def run_name(arm: str, seed: int) -> str:
    """The run folder's name."""
    return f"{arm.replace(' ', '-')}-{seed}"


def _validation(root: Path) -> list[str]:
    """Flags of a run on the training prompts alone, a twelfth of which it is scored on."""
    rows = load_prompts("tiny")
    parts = {
        "fit": [row for i, row in enumerate(rows) if i % VALIDATION],
        "validation": rows[::VALIDATION],
    }
    for name, part in parts.items():
        text = "".join(json.dumps(row) + "\n" for row in part)
        atomic_write_text(root / f"{name}.jsonl", text)
    files = {name: str(root / f"{name}.jsonl") for name in parts}
    return ["--dataset_name", files["fit"], "--eval_dataset_name", files["validation"]]


def _train(config: Config, root: Path, more: list[str], arm: str, seed: int) -> str | None:
    """One training run in its own process. Returns its name where it failed."""
    name = run_name(arm, seed)
    folder = root / name
    if (folder / "summary.json").exists():
        print(f"{name}: done before", file=sys.stderr)
        return None
    command = [sys.executable, "-m", "engine.train", "--output_dir", str(root)]
    command += ["--run_name", name, "--seed", str(seed), *ARMS[arm], *more]
    if config.max_steps:
        command += ["--max_steps", str(config.max_steps)]
    if config.jobs > 1:
        command += ["--threads", "1"]
    if any(folder.glob("checkpoints/*")):
        command.append("--resume")
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{name}: {shlex.join(command)}", file=sys.stderr, flush=True)
    with (folder / "train.log").open("a") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
    ended = "finished" if code == 0 else f"exit code {code}"
    print(f"{name}: {ended}", file=sys.stderr, flush=True)
    return name if code else None


def _read(folder: Path) -> dict[str, Any]:
    """A run's summary, with `rows`: when -> prompt -> its mean score."""
    path = folder / "summary.json"
    try:
        summary = json.loads(path.read_text())
        rows = {}
        for when in ("before", "after"):
            summary["eval"][when]["mean"], summary["eval"][when]["by_task"]
            path = folder / "eval" / f"{when}.json"
            by_prompt: dict[str, list[float]] = {}
            for row in json.loads(path.read_text())["rows"]:
                by_prompt.setdefault(row["prompt"], []).append(row["score"])
            rows[when] = {prompt: statistics.fmean(found) for prompt, found in by_prompt.items()}
        return {**summary, "rows": rows}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (json.JSONDecodeError, KeyError, TypeError):
        raise UserError(f"{path}: wanted a run's evaluations, before and after") from None


def gain(result: dict[str, Any], task: str | None = None) -> float:
    """Judge score after minus before: over all task types, or of one."""
    before, after = (result["eval"][when] for when in ("before", "after"))
    if task is not None:
        before, after = before["by_task"][task], after["by_task"][task]
    return after["mean"] - before["mean"]


def compare(results: Results) -> dict[str, Any]:
    """Gains and their differences, means over the seeds, with standard errors over prompts.

    Returns: `ARM_gain` of each arm; `both_minus_ARM` where both is among them; of each also
        `..._se`, the paired standard error over prompts (a prompt's value is its mean over seeds and
        pictures), and `..._by_seed`.
    """
    found: dict[str, Any] = {}

    def put(name: str, by_seed: list[float], by_prompt: list[float]) -> None:
        found[name], found[f"{name}_by_seed"] = statistics.fmean(by_seed), by_seed
        found[f"{name}_se"] = statistics.stdev(by_prompt) / math.sqrt(len(by_prompt))

    def by_prompt(one: dict[str, float], other: dict[str, float]) -> list[float]:
        return [one[prompt] - other[prompt] for prompt in one]

    def over_seeds(each: list[list[float]]) -> list[float]:
        return [statistics.fmean(values) for values in zip(*each, strict=True)]

    for arm, runs in results.items():
        name, scored = arm.replace(" ", "_"), [run["rows"] for run in runs.values()]
        changes = [by_prompt(rows["after"], rows["before"]) for rows in scored]
        put(f"{name}_gain", [gain(run) for run in runs.values()], over_seeds(changes))
        if arm != "both" and "both" in results:
            # After training: before it, arms that plan are the same, and one that does not has
            # another start.
            pairs = [(results["both"][seed], run) for seed, run in runs.items()]
            put(
                f"both_minus_{name}",
                [a["eval"]["after"]["mean"] - b["eval"]["after"]["mean"] for a, b in pairs],
                over_seeds([by_prompt(a["rows"]["after"], b["rows"]["after"]) for a, b in pairs]),
            )
    return found


def render(
    results: Results, figures: Mapping[str, Any], *, command: str, on: Mapping[str, str | int]
) -> str:
    """docs/ablation.md: a row an arm, and the differences from `both`."""
    seeds = list(next(iter(results.values())))
    tasks = list(next(iter(results.values()))[seeds[0]]["eval"]["after"]["by_task"])
    riddles = RIDDLES in tasks
    lines = [
        "# Which chain of thought to train",
        "",
        f"`{command}`, seeds {', '.join(map(str, seeds))}; "
        f"{on['cpu']}, {on['cores']} cores, torch {on['torch']}, commit {on['commit']}.",
        "",
        "Scored by the judge, before and after training; a gain is after minus before, in "
        "parentheses for each seed, ± its standard error over prompts. `bare`: without plans, from "
        "the prompt straight to the picture, in training and in its evaluations.",
        "",
        "| trained | before | after | gain, all task types | gain, riddles | minutes a run |",
        "|---|---|---|---|---|---|",
    ]
    for arm, runs in results.items():
        before, after = (
            statistics.fmean(r["eval"][when]["mean"] for r in runs.values())
            for when in ("before", "after")
        )
        minutes = statistics.fmean(r["seconds"] for r in runs.values()) / 60
        overall = _with_error(figures, f"{arm.replace(' ', '_')}_gain")
        each = [gain(r, RIDDLES) for r in runs.values()] if riddles else []
        of_riddles = f"{statistics.fmean(each):+.3f}" if riddles else "-"
        lines.append(
            f"| {arm} | {before:.3f} | {after:.3f} | {overall} | {of_riddles} | {minutes:.1f} |"
        )
    lines += ["", "Mean gain by task type:", "", f"| trained | {' | '.join(tasks)} |"]
    lines.append("|---" * (len(tasks) + 1) + "|")
    for arm, runs in results.items():
        gains = [statistics.fmean(gain(r, task) for r in runs.values()) for task in tasks]
        lines.append(f"| {arm} | " + " | ".join(f"{g:+.3f}" for g in gains) + " |")
    differences = [n for n in figures if "_minus_" in n and not n.endswith(("_se", "_by_seed"))]
    if differences:
        lines += ["", "Paired differences of the scores after training:", ""]
        lines += [
            f"* {name.replace('_', ' ')}: {_with_error(figures, name)}" for name in differences
        ]
    lines += ["", "Settings beside the trainer's defaults:", ""]
    lines += [f"* {arm}: `{shlex.join(ARMS[arm]) or '(none)'}`" for arm in results]
    return "\n".join([*lines, ""])


def _with_error(figures: Mapping[str, Any], name: str) -> str:
    """`+0.210 ± 0.012 (+0.200, +0.220)`."""
    each = ", ".join(f"{value:+.3f}" for value in figures[f"{name}_by_seed"])
    return f"{figures[name]:+.3f} ± {figures[f'{name}_se']:.3f} ({each})"


if __name__ == "__main__":
    sys.exit(run_command(main))
