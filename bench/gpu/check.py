"""Everything that needs a GPU, in one command: python -m bench gpu_check (bench/gpu_check.sh)

Parts: `tests` runs the test files that reach a GPU; `ops` holds every op against fp64 at real
shapes and times it against a copy; `loss` does the same for the fused loss, against its GEMMs alone
and the path through the logits; `parity` compares graph, launches and transformers' loop token
by token; `rewards` holds the experts against the CPU and runs them beside the main stream; `1b` and
`7b` time rollouts of Janus-Pro's shapes, with random weights, beside the peers
and the roofline.

Each part is a process of its own, so that one that fails, hangs or spoils its CUDA context costs
only itself; it is ended when its share of the time is over. Every row is written to the results
file as it comes, and what was not reached is listed there.
"""

# ruff: noqa: RUF009  `option` makes a dataclasses.field, which ruff cannot know

import gc
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from bench import machine
from bench.gpu.models import Item
from engine.settings.errors import UserError
from engine.settings.options import check_fields, option

RESULTS = Path(__file__).parents[1] / "results"
# Shares of the time; what a part leaves over goes to those after it.
SHARES = {"tests": 120, "ops": 70, "loss": 40, "parity": 40, "rewards": 40, "1b": 90, "7b": 120}
TEST_FILES = ("tests/kernels", "tests/engine/rollout", "tests/engine/test_policy.py")
GRACE = 10  # seconds between a part's last start of an item and its end by force

# "tests/test_x.py::test_y PASSED [ 1%]", or pytest-xdist's "[gw0] [ 1%] PASSED tests/test_x.py::test_y".
SAID = "PASSED|FAILED|ERROR|SKIPPED|XFAIL"
VERDICT = re.compile(
    rf"^(?P<name>tests/\S+::.+?) (?P<said>{SAID})\b|^\[gw\d+\].*? (?P<first>{SAID}) (?P<xdist>tests/.+)"
)

PartName = Literal["tests", "ops", "loss", "parity", "rewards", "1b", "7b"]


@dataclass(kw_only=True, slots=True)
class Config:
    """Settings of `python -m bench gpu_check`."""

    json: bool = option(False, "print one JSON object instead of a table")
    threads: int = option(0, "torch threads; 0: torch's default", at_least=0)
    parts: list[PartName] = option(tuple(SHARES), "what to run")
    seconds: int = option(520, "seconds in all", at_least=1)
    out: str = option("", "results file; empty: bench/results/gpu_check-<device>.json")
    commit: str = option("", "commit to record where the checkout has no git")

    def __post_init__(self) -> None:
        check_fields(self)


class Results:
    """The results file, whole after every row.

    Args:
        path: where; replaced atomically.
        about: what it says of the machine.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        self.report: dict[str, Any] = {
            "suite": "gpu_check",
            "machine": about,
            "rows": [],
            "ratios": {},
            "correct": False,
            "complete": False,
            "left_out": [],
        }

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.report["rows"]

    def add(self, row: dict[str, Any]) -> None:
        """A row, or {"left_out": label} of a part."""
        if "left_out" in row:
            self.report["left_out"].append(f"{row['part']}: {row['left_out']}")
        else:
            self.rows.append(row)
        self.save()

    def save(self) -> None:
        self.report["ratios"] = ratios(self.rows)
        checked = [row["correct"] for row in self.rows if "correct" in row]
        self.report["correct"] = bool(checked) and all(checked)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".tmp")
        draft.write_text(json.dumps(self.report, indent=1) + "\n")
        os.replace(draft, self.path)


def run(config: Config) -> dict:
    """Run the parts. Raises: UserError without a CUDA device."""
    if not torch.cuda.is_available():
        raise UserError("gpu_check needs a CUDA device, and torch sees none")
    name = re.sub(r"\W+", "-", torch.cuda.get_device_name()).strip("-").lower()
    path = Path(config.out) if config.out else RESULTS / f"gpu_check-{name}.json"
    results = Results(path, about(config.commit))
    results.save()
    ends = time.monotonic() + config.seconds
    left = [part for part in SHARES if part in config.parts]
    while left:
        part = left[0]
        share = SHARES[part] / sum(SHARES[p] for p in left)
        seconds = max(0.0, (ends - time.monotonic()) * share)
        run_part(part, command(part, seconds), seconds, results)
        left.pop(0)
    results.report["complete"] = not results.report["left_out"]
    results.save()
    print(f"results: {path}", file=sys.stderr)
    return {k: v for k, v in results.report.items() if k not in ("suite", "machine")}


def about(commit: str) -> dict[str, Any]:
    """The machine with its GPU and what drives it."""
    import triton

    found = machine.describe()
    properties = torch.cuda.get_device_properties(0)
    if found["commit"] == "unknown" and commit:
        found["commit"] = commit
    return found | {
        "gpu": properties.name,
        "gpu_mb": properties.total_memory >> 20,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "when": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }


def command(part: str, seconds: float) -> list[str]:
    """The process of a part."""
    if part == "tests":
        several = ["-n", "4"] if importlib.util.find_spec("xdist") else []  # they compile a lot
        words = ["-m", "pytest", "-vv", "--tb=line", "-p", "no:cacheprovider", *several, *tests()]
    else:
        words = ["-m", "bench.gpu.check", part, f"{seconds:.0f}"]
    return [sys.executable, *words]


def tests() -> list[str]:
    """The tests about what runs on a GPU."""
    return [str(machine.ROOT / place) for place in TEST_FILES]


def run_part(part: str, words: list[str], seconds: float, results: Results) -> None:
    """Run a part's process, collect its rows, end it when its time is over."""
    print(f"{part}: at most {seconds:.0f} s", file=sys.stderr)
    started = time.monotonic()
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=machine.ROOT
    )
    timer = threading.Timer(seconds + GRACE, process.kill)
    timer.start()
    said = Said()
    try:
        for line in process.stdout:
            for row in said.read(line):
                results.add(row)
        code = process.wait()
    finally:
        timer.cancel()
        process.kill()  # where this process itself is interrupted
    if part == "tests":
        results.add(tests_row(said.verdicts, code))
    elif code not in (0, -signal.SIGKILL):
        results.add({"part": part, "correct": False, "error": f"exit code {code}: {said.last}"})
    for label in said.items:
        results.add({"part": part, "left_out": f"{label} (ended by force)"})
    results.add({"part": part, "wall_seconds": round(time.monotonic() - started, 1)})


class Said:
    """What a part's process has printed.

    Attributes:
        items: labels of what it has still to do.
        verdicts: of tests, by name.
        last: the last line that is none of ours.
    """

    def __init__(self) -> None:
        self.items: list[str] = []
        self.verdicts: dict[str, str] = {}
        self.last = ""

    def read(self, line: str) -> list[dict[str, Any]]:
        """Rows of a line."""
        if line.startswith('{"part"'):
            row = json.loads(line)
            if "items" in row:
                self.items = row["items"]
            elif "done" in row:
                self.items.remove(row["done"])
            else:
                return [row]
        elif match := VERDICT.search(line):
            name, verdict = match["name"] or match["xdist"], match["said"] or match["first"]
            self.verdicts[name.strip()] = verdict
        elif line.strip():
            self.last = line.strip()
        return []


def tests_row(verdicts: dict[str, str], code: int) -> dict[str, Any]:
    """What the test run said; correct when it ended by itself and nothing failed."""
    by_name = {
        name: [t for t, v in verdicts.items() if v == name] for name in set(verdicts.values())
    }
    failed = by_name.get("FAILED", []) + by_name.get("ERROR", [])
    counts = {name.lower(): len(found) for name, found in sorted(by_name.items())}
    # A run cut by its time says nothing against what it had not reached.
    correct = not failed and bool(verdicts) and code in (0, -signal.SIGKILL)
    return {"part": "tests", **counts, "failures": failed, "exit_code": code, "correct": correct}


def work(part: str, seconds: float, items: Sequence[Item]) -> None:
    """Run a part's items in this process and print their rows."""
    deadline = time.monotonic() + seconds
    emit(part, {"items": [label for label, _ in items]})
    for label, make in items:
        late = time.monotonic() > deadline
        for row in [{"left_out": f"{label} (no time)"}] if late else attempt(label, make):
            emit(part, row)
        emit(part, {"done": label})
        if torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()  # the next one's shapes are others


def attempt(label: str, make: Callable[[], Iterable[dict[str, Any]]]) -> list[dict[str, Any]]:
    """An item's rows. One that raises is a row too: the others still have something to tell."""
    try:
        return list(make())
    except torch.OutOfMemoryError:
        return [{"left_out": f"{label}: out of memory"}]
    except Exception as error:
        line = (str(error).strip().splitlines() or [""])[0]
        return [{"item": label, "correct": False, "error": f"{type(error).__name__}: {line}"}]


def emit(part: str, row: dict[str, Any]) -> None:
    """Print a row for the parent, which knows it by its first key."""
    print(json.dumps({"part": part, **row}), flush=True)


def items_of(part: str, device: torch.device) -> list[Item]:
    """A part's items: (label, what makes its rows)."""
    from bench.gpu import loss, models, ops, parity, rewards, rollout

    if part == "ops":
        return ops.items(device)
    if part == "loss":
        return loss.items(device)
    if part == "parity":
        return parity.items(device)
    if part == "rewards":
        return rewards.items(device)
    shape = models.SHAPES[part]
    return rollout.ModelCheck(shape, rollout.Plan(), device).items()


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Peer time / our time of each size, our step over the roofline, and what the loss reaches."""
    found: dict[str, float] = {}
    ours = {(r["model"], r["images"]): r for r in rows if r.get("provider") == "ours"}
    for (model, images), row in ours.items():
        if "step_over_roofline" in row:
            found[f"{model}_{images}_step_over_roofline"] = row["step_over_roofline"]
    for row in rows:
        mine = ours.get((row.get("model"), row.get("images")))
        peer = row.get("provider")
        if mine and "seconds" in mine and peer in ("eager_loop", "eager_unsplit", "static_cache"):
            found[f"{row['model']}_{row['images']}_vs_{peer}"] = row["seconds"] / mine["seconds"]
        if "hidden_share_of_possible" in row:
            found["rewards_hidden_share"] = row["hidden_share_of_possible"]
        if row.get("op") == "linear_grpo_loss":
            head = f"{row['model']}_{row['head'].replace(' ', '_')}_loss"
            for key in ("share_of_gemms", "logits_over_ours", "logits_over_our_memory"):
                if key in row:
                    found[f"{head}_{key}"] = row[key]
    return found


if __name__ == "__main__":
    work(sys.argv[1], float(sys.argv[2]), items_of(sys.argv[1], torch.device("cuda")))
