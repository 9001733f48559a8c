"""The run folder's beginning, and a polite end: opening a run, and stopping it by signal."""

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import yaml

from engine.run.checkpoint import atomic_write_text
from engine.run.inside import inside
from engine.settings.errors import UserError
from engine.settings.train import TrainConfig

# Settings that may differ when a run goes on: they change no number of its remaining steps.
FREE = {
    "resume", "output_dir", "run_name", "threads", "logging_steps", "sample_steps", "save_steps",
    "save_total_limit", "eval_prompts", "eval_generations", "eval_dataset_name", "max_steps",
    "on_reward_error", "reward_timeout", "reward_device", "reward_offload",
    "gradient_checkpointing", "ref_offload", "max_zero_std_steps", "lora_merge",
}  # fmt: skip

# All that a run writes. A link among them is found when the run begins, not when it is over.
WRITTEN = (
    "config.yaml", "metrics.jsonl", "summary.json", "reward_error.txt", "report.html",
    "eval/before.json", "eval/before", "eval/after.json", "eval/after",
    "checkpoints", "samples", "tensorboard", "policy", "adapter",
)  # fmt: skip


def name_run(config: TrainConfig) -> None:
    """Where no --run_name is given and the run of that name is finished, take the next number.

    So that a command can be given again as it is. With --resume, the newest run is meant.
    """
    if config.run_name:
        return
    base, finished, number = config.run_dir.name, "", 1
    while (config.run_dir / "summary.json").is_file():
        finished, number = config.run_dir.name, number + 1
        config.run_name = f"{base}-{number}"
    if finished and config.resume and not config.run_dir.exists():
        config.run_name = finished
    elif finished:
        print(f"{finished} is finished; this run is {config.run_dir}", file=sys.stderr)


def open_run(config: TrainConfig, settings: str, checkpoint: Path | None) -> float:
    """Make the run folder, or check that the one to resume belongs to these settings.

    Args:
        settings: the configuration as YAML, written to config.yaml.
        checkpoint: the one that a resumed run starts from.
    Returns: seconds that the run has taken so far, from its metrics.
    Raises: UserError naming the folder or key.
    """
    run_dir = config.run_dir
    for name in WRITTEN:
        inside(run_dir, name)
    if config.resume:
        if checkpoint is None:
            raise UserError(f"--resume: {run_dir} holds no checkpoint")
        _check_same(run_dir / "config.yaml", yaml.safe_load(settings), config)
    elif (run_dir / "metrics.jsonl").exists() and (run_dir / "metrics.jsonl").stat().st_size:
        raise UserError(f"{run_dir}: a run is there already; --resume it or give --run_name")
    try:
        (run_dir / "eval").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{run_dir}: cannot make the run folder: {error.strerror}") from error
    if not config.resume:
        for stale in ("eval/before.json", "eval/after.json", "summary.json"):
            inside(run_dir, stale).unlink(missing_ok=True)
    atomic_write_text(inside(run_dir, "config.yaml"), settings)
    return _seconds_so_far(run_dir) if config.resume else 0.0


def _check_same(path: Path, now: dict, config: TrainConfig) -> None:
    try:
        then = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    free = set(FREE)
    if config.lr_scheduler_type != "constant":
        free.remove("max_steps")  # the schedule's shape follows from it
    for key, value in now.items():
        if key not in free and isinstance(then, dict) and key in then and then[key] != value:
            raise UserError(f"--resume: {key} was {then[key]!r} in {path}, now {value!r}")


def _seconds_so_far(run_dir: Path) -> float:
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return 0.0
    total = 0.0
    for line in path.read_text().splitlines():
        try:
            total += json.loads(line).get("seconds/step") or 0.0
        except json.JSONDecodeError:
            break  # a line cut short by a kill: RunLogger drops it
    return total


@contextmanager
def stop_on_signal() -> Iterator[list[str]]:
    """Collects the first SIGINT or SIGTERM instead of dying of it; the second one kills.

    Yields: a list, empty until a signal came, then holding its description.
    """
    received: list[str] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append("stopped" if number == signal.SIGTERM else "interrupted")

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
