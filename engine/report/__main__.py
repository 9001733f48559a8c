"""Builds a run's report.html, one self-contained page, from what lies in the run's folder.

python -m engine.report runs/NAME
"""

import argparse
import base64
import math
import sys
from html import escape
from pathlib import Path
from typing import Any

from engine.report.curves import curves
from engine.report.data import Eval, Run, load_run, pair_rows
from engine.report.hacking import (
    RULE,
    change_over_run,
    correlation,
    expert_correlations,
    find_divergence,
)
from engine.report.page import card, number, page, section, signed, span_bar, table
from engine.run.checkpoint import atomic_write_bytes
from engine.run.inside import inside, inside_or_none
from engine.settings.errors import UserError

PAIRS_PER_TASK = 2  # before/after pictures shown of a task type
PAIRS_OF_RIDDLES = 4  # riddles show whether the plan was worked out
SAMPLE_SHEETS = 3
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PIXELATED_BELOW = 129  # picture width in pixels under which enlarging must not blur


def _difference(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


def _before_after(before: float | None, after: float | None) -> str:
    shown = ["–" if v is None else f"{v:.3f}" for v in (before, after)]
    return f'{shown[0]} <span class="arrow">→</span> {shown[1]}'


def _headline(run: Run, found: list[tuple[int, int, str]]) -> str:
    before, after = run.evaluation("before"), run.evaluation("after")

    def mean(held: Eval | None, task: str | None = None) -> float | None:
        if held is None:
            return None
        return held.get("mean") if task is None else (held["by_task"].get(task) or {}).get("mean")

    cards = []
    for label, task in (("Judge, held-out prompts", None), ("Judge, riddles", "riddle")):
        pair = mean(before, task), mean(after, task)
        if pair != (None, None):
            change = _difference(*pair)
            cards.append(card(label, _before_after(*pair), f"change {signed(change)}"))
    narrowed = [(held or {}).get("diversity") or {} for held in (before, after)]
    for label, key in (("Distinct plans", "distinct_plans"), ("Distance", "pixel_distance")):
        if all(key in held for held in narrowed):
            shown = _before_after(narrowed[0][key], narrowed[1][key])
            cards.append(card(label, shown, "of a prompt's samples: diversity"))
    if run.metrics:
        change = change_over_run(run.values("reward"))
        rewards = [v for v in run.values("reward") if math.isfinite(v)]
        if rewards:
            note = f"first to last steps {signed(change)}" if change is not None else ""
            cards.append(card("Reward, last step", f"{rewards[-1]:.3f}", note))
        planned = run.config.get("max_steps")
        note = f"of {planned} planned" if isinstance(planned, int) else ""
        cards.append(card("Steps", f"{len(run.metrics)}", note))
    if _is_judged(run):
        where = "; ".join(f"steps {start}–{end}" for start, end, _ in found)
        value = f"{len(found)} stretch{'es' if len(found) > 1 else ''}" if found else "none seen"
        cards.append(card("Reward up, judge down", value, where))
    seconds, speed = run.summary.get("seconds"), run.summary.get("images_per_s")
    if isinstance(seconds, (int, float)):
        note = f"{speed:.1f} images a second" if isinstance(speed, (int, float)) else ""
        cards.append(card("Time", f"{seconds / 60:.1f} min", note))
    notes = ""
    if run.missing:
        notes = (
            '<p class="warn">This run is not complete, or was interrupted: '
            f"{escape('; '.join(run.missing))}. The report shows what there is.</p>"
        )
    return (
        f"<h1>{escape(run.folder.resolve().name)}</h1>"
        '<p class="muted">Both chains of thought trained by BiCoT-GRPO. The judge scores held-out '
        "prompts and is none of the rewards.</p>"
        f'{notes}<div class="cards">{"".join(cards)}</div>'
    )


def _is_judged(run: Run) -> bool:
    """Whether any training step carries a judge score."""
    return any(math.isfinite(v) for v in run.values("judge"))


def _hacking(run: Run) -> tuple[str, list[tuple[int, int, str]]]:
    """The section on reward hacking, and the stretches found."""
    reward, judge = run.values("reward"), run.values("judge")
    if not _is_judged(run):
        text = "metrics.jsonl holds no judge scores of the training pictures, so reward hacking "
        return f'<p class="warn">{text}could not be looked for step by step.</p>', []
    found = find_divergence(run.steps, reward, judge)
    if found:
        lines = "".join(f"<li>{escape(text)}</li>" for _, _, text in found)
        verdict = f'<div class="warn"><b>Reward and judge part:</b><ul>{lines}</ul></div>'
    else:
        verdict = '<p class="ok"><b>Reward and judge did not part</b> in this run.</p>'
    whole = (
        f"First to last steps: reward {signed(change_over_run(reward))}, judge "
        f"{signed(change_over_run(judge))}."
    )
    agreement = []
    for when in ("before", "after"):
        scored = [(row.get("reward"), row.get("score")) for row in run.rows[when]]
        numbers = (int, float)
        pairs = [(a, b) for a, b in scored if isinstance(a, numbers) and isinstance(b, numbers)]
        r = correlation([p[0] for p in pairs], [p[1] for p in pairs])
        if r is not None:
            agreement.append(f"{r:.2f} {when} training ({len(pairs)} pictures)")
    if agreement:
        whole += " Correlation of reward and judge over held-out pictures: "
        whole += (
            f"{', '.join(agreement)}; a drop means the policy found what only the reward likes."
        )
    experts = expert_correlations(run.experts, judge)
    evals = [(run.evaluation(when) or {}).get("rewards") or {} for when in ("before", "after")]
    body = f'{verdict}<p>{whole}</p><p class="note">{escape(RULE)}</p>'
    if experts:
        rows = [
            [
                escape(name),
                "not defined" if r is None else f"{r:.2f}",
                signed(change_over_run(run.experts[name])),
                signed(_difference(evals[0].get(name), evals[1].get(name))),
            ]
            for name, r in experts
        ]
        header = [
            "Expert",
            "#Correlation with judge",
            "#Training, first to last",
            "#Held-out, before to after",
        ]
        body += table(header, rows)
        if experts[0][1] is not None:
            body += (
                f'<p class="note">Least in step with the judge: <b>{escape(experts[0][0])}</b> '
                f"(correlation {experts[0][1]:.2f} over the steps). Watch it first.</p>"
            )
    return body, found


def _task_table(run: Run) -> str:
    before, after = run.evaluation("before"), run.evaluation("after")
    if before is None and after is None:
        return '<p class="muted">The run was not evaluated.</p>'
    by_task = [(held or {}).get("by_task") or {} for held in (before, after)]
    rows = []
    for task in dict.fromkeys([*by_task[0], *by_task[1]]):
        held = [tasks.get(task) or {} for tasks in by_task]
        count = held[1].get("n", held[0].get("n", "–"))
        rows.append(_task_row(task, count, held[0].get("mean"), held[1].get("mean")))
    counts = [tasks.get("n") for tasks in (by_task[1] or by_task[0]).values()]
    total = sum(counts) if all(isinstance(n, int) for n in counts) else "–"
    rows.append(_task_row("all", total, (before or {}).get("mean"), (after or {}).get("mean")))
    header = [
        "Task type",
        "#Prompts",
        "#Before",
        "#After",
        "#Change",
        "From before to after, 0 to 1",
    ]
    return table(header, rows, kind="totalled")


def _task_row(name: str, count: Any, before: float | None, after: float | None) -> list[str]:
    shown = ["–" if v is None else f"{v:.3f}" for v in (before, after)]
    change = signed(_difference(before, after))
    return [escape(name), escape(str(count)), *shown, change, span_bar(before, after)]


def _picture(run: Run, name: Any) -> str:
    """An <img> with the picture inside it, or a placeholder that says why not."""
    gone = '<div class="gone">no picture</div>'
    if not isinstance(name, str):
        return gone
    for place in (name, f"eval/{name}"):
        path = inside_or_none(run.folder, place)
        if path is not None and path.is_file():
            return _embed(path) or gone
    return gone


def _embed(path: Path) -> str:
    """An <img> that carries the PNG file, or "" where the file is not one."""
    content = path.read_bytes()
    if not content.startswith(PNG_SIGNATURE) or len(content) < 24:
        return ""
    width = int.from_bytes(content[16:20], "big")
    style = ' class="pixels"' if width < PIXELATED_BELOW else ""
    data = base64.b64encode(content).decode()
    return f'<img{style} alt="" src="data:image/png;base64,{data}">'


def _choose(pairs: list[tuple[dict | None, dict | None]]) -> list[tuple[dict | None, dict | None]]:
    """The first pairs with pictures of every task type. The score plays no part in the choice."""
    pairs = [p for p in pairs if any(row and row.get("image") for row in p)] or pairs
    chosen: dict[str, list] = {}
    for pair in pairs:
        task = str((pair[0] or pair[1] or {}).get("task_type", ""))
        held = chosen.setdefault(task, [])
        if len(held) < (PAIRS_OF_RIDDLES if task == "riddle" else PAIRS_PER_TASK):
            held.append(pair)
    return [pair for held in chosen.values() for pair in held]


def _shot(run: Run, row: dict | None) -> str:
    if row is None:
        return '<span class="muted">not evaluated</span>'
    scores = [
        f"{label} {row[key]:.2f}"
        for key, label in (("score", "judge"), ("reward", "reward"))
        if isinstance(row.get(key), (int, float))
    ]
    plan = escape(str(row.get("plan", ""))) or "(empty plan)"
    return (
        f'<div class="shot">{_picture(run, row.get("image"))}<div><p>{plan}</p>'
        f'<p class="muted">{" · ".join(scores)}</p></div></div>'
    )


def _pairs(run: Run) -> str:
    pairs = _choose(pair_rows(run.rows))
    if not pairs:
        return '<p class="muted">No evaluation rows were written.</p>'
    lines = []
    for before, after in pairs:
        row = before or after or {}
        prompt = escape(str(row.get("prompt", "")))
        tag = f'<span class="tag">{escape(str(row.get("task_type", "")))}</span>'
        lines.append([f"<b>{prompt}</b><br>{tag}", _shot(run, before), _shot(run, after)])
    note = "The first prompts of each task type; not chosen by score."
    return f'<p class="note">{note}</p>' + table(["Prompt", "Before", "After"], lines, kind="pairs")


def _samples(run: Run) -> str:
    found = (run.folder / "samples").glob("*.png")
    # A link may lead to a picture that is none of this run, and not meant to be shown.
    sheets = [p for p in sorted(found) if inside_or_none(run.folder, f"samples/{p.name}")]
    if not sheets:
        return '<p class="muted">No sample sheets were written.</p>'
    count = min(SAMPLE_SHEETS, len(sheets))
    picked = [sheets[round(i * (len(sheets) - 1) / max(1, count - 1))] for i in range(count)]
    figures = []
    for path in picked:
        image = _embed(path) or '<p class="muted">not a readable PNG</p>'
        caption = f"<figcaption>{escape(path.name)}</figcaption>"
        figures.append(f'<figure class="sample scroll">{image}{caption}</figure>')
    return "".join(figures)


def _config(run: Run) -> str:
    if not run.config:
        return '<p class="muted">No config.yaml was written.</p>'
    shown = {k: number(v) if isinstance(v, float) else str(v) for k, v in run.config.items()}
    lines = [
        f"<div><span>{escape(str(key))}</span><code>{escape(value)}</code></div>"
        for key, value in shown.items()
    ]
    return f'<div class="panel config">{"".join(lines)}</div>'


def write_report(run_dir: Path) -> Path:
    """Build report.html of a run, finished or not, and write it as a whole.

    Args:
        run_dir: the run's folder. Pictures named in eval/*.json are looked for relative to it,
            then to its eval/ folder.
    Returns: the page's path.
    Raises: UserError when there is no such run or one of its files is damaged.
    """
    run = load_run(Path(run_dir))
    hacking, found = _hacking(run)
    body = "\n".join(
        (
            _headline(run, found),
            section("Held-out judge score by task type", _task_table(run)),
            section("Curves", curves(run, found)),
            section("Reward hacking", hacking),
            section("Before and after", _pairs(run)),
            section("Samples during training", _samples(run)),
            section("Configuration", _config(run)),
        )
    )
    path = inside(run.folder, "report.html")
    atomic_write_bytes(path, page(f"{run.folder.resolve().name} – training report", body).encode())
    return path


def main(arguments: list[str] | None = None) -> int:
    """Rebuild a run's report and print its path."""
    parser = argparse.ArgumentParser(prog="python -m engine.report", description="Rebuild a report")
    parser.add_argument("run_dir", type=Path, help="the run's folder, runs/NAME")
    try:
        print(write_report(parser.parse_args(arguments).run_dir))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
