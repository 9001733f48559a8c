"""What a run's folder holds, as the report reads it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from engine.run.inside import inside
from engine.run.monitor import METRICS_FILE, read_metrics
from engine.settings.errors import UserError

Eval = dict[str, Any]


@dataclass(slots=True)
class Run:
    """What a run's folder holds; None or empty where a file is missing."""

    folder: Path
    metrics: list[dict]
    summary: dict[str, Any]
    config: dict[str, Any]
    rows: dict[str, list[dict]]  # "before", "after" -> rows of eval/*.json
    missing: list[str]  # sentences, for the report

    def values(self, key: str) -> list[float]:
        """One figure over the steps, NaN where a step has none."""
        found = [row.get(key) for row in self.metrics]
        return [float(v) if isinstance(v, (int, float)) else float("nan") for v in found]

    @property
    def steps(self) -> list[int]:
        return [row["step"] for row in self.metrics]

    @property
    def experts(self) -> dict[str, list[float]]:
        """expert -> its reward over the steps."""
        prefix = "rewards/"
        keys = dict.fromkeys(k for row in self.metrics for k in row if k.startswith(prefix))
        return {key.removeprefix(prefix): self.values(key) for key in keys}

    def evaluation(self, when: str) -> Eval | None:
        """The evaluation "before" or "after": from summary.json, else from the rows themselves."""
        held = (self.summary.get("eval") or {}).get(when)
        if held:
            return held
        rows = [row for row in self.rows[when] if isinstance(row.get("score"), (int, float))]
        if not rows:
            return None
        tasks: dict[str, list[float]] = {}
        for row in rows:
            tasks.setdefault(str(row.get("task_type", "")), []).append(row["score"])
        return {
            "mean": sum(row["score"] for row in rows) / len(rows),
            "by_task": {t: {"mean": sum(s) / len(s), "n": len(s)} for t, s in tasks.items()},
        }


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: wanted a JSON object, got {type(content).__name__}")
    return content


def load_run(run_dir: Path) -> Run:
    """Read a run's folder.

    Raises: UserError when there is no such folder, it is no run's, or a file in it is damaged.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run folder")
    run = Run(run_dir, [], {}, {}, {"before": [], "after": []}, [])
    paths = {
        name: inside(run_dir, name)  # a link's file would be shown in a page that is passed on
        for name in (
            "config.yaml",
            METRICS_FILE,
            "summary.json",
            "eval/before.json",
            "eval/after.json",
        )
    }
    if not any(path.exists() for path in paths.values()):
        raise UserError(f"{run_dir}: not a run folder (none of {', '.join(paths)} is in it)")
    run.missing = [f"{name} is missing" for name, path in paths.items() if not path.exists()]
    if paths["config.yaml"].exists():
        try:
            run.config = yaml.safe_load(paths["config.yaml"].read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            line = " ".join(str(error).split())
            raise UserError(f"{paths['config.yaml']}: not valid YAML ({line})") from None
        if not isinstance(run.config, dict):
            raise UserError(f"{paths['config.yaml']}: wanted keys and values")
    if paths[METRICS_FILE].exists():
        run.metrics, cut_short = read_metrics(paths[METRICS_FILE])
        if cut_short:
            run.missing.append(f"the last line of {METRICS_FILE} was cut short and is left out")
    if paths["summary.json"].exists():
        run.summary = _read_json(paths["summary.json"])
    for when in ("before", "after"):
        path = paths[f"eval/{when}.json"]
        if path.exists():
            rows = _read_json(path).get("rows", [])
            run.rows[when] = [row for row in rows if isinstance(row, dict)]
    return run


def pair_rows(rows: dict[str, list[dict]]) -> list[tuple[dict | None, dict | None]]:
    """The rows of both evaluations by prompt; the n-th of a prompt meets the n-th."""
    pairs: dict[tuple[str, int], list[dict | None]] = {}
    for side, when in enumerate(("before", "after")):
        seen: dict[str, int] = {}
        for row in rows[when]:
            prompt = str(row.get("prompt", ""))
            seen[prompt] = seen.get(prompt, 0) + 1
            pairs.setdefault((prompt, seen[prompt]), [None, None])[side] = row
    return [(before, after) for before, after in pairs.values()]
