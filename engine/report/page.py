"""The look of report.html: style sheet, page shell, cards, tables and SVG curves."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from engine.report.hacking import WINDOW, rolling_mean

COLORS = ("#2a78d6", "#e07b39", "#1b9e77", "#8a4fbf", "#c9a400", "#d6456b")
MAX_POINTS = 400  # of a curve; longer ones are thinned after smoothing

STYLE = """
:root{--ink:#181b20;--muted:#626872;--line:#e3e6ea;--paper:#fff;--wash:#f5f6f8;--up:#0b7a45;
--down:#b3261e;--accent:#2a78d6}
*{box-sizing:border-box}
body{margin:0;background:var(--wash);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1160px;margin:0 auto;padding:28px 24px 64px}
h1{font-size:26px;line-height:1.2;margin:0 0 4px}h2{font-size:18px;margin:36px 0 10px}
p{margin:6px 0 12px}.muted,figcaption,.note{color:var(--muted);font-size:13px}
.warn{border-left:4px solid #d98b00;background:#fff8e8;padding:10px 14px;border-radius:4px}
.ok{border-left:4px solid var(--up);background:#eef8f2;padding:10px 14px;border-radius:4px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(180px,1fr));gap:14px;margin:18px 0}
.card,.panel,figure{background:var(--paper);border:1px solid var(--line);border-radius:10px;
padding:14px 16px;margin:0}
.card .label{color:var(--muted);font-size:13px}.card .value{font-size:25px;font-weight:600;
line-height:1.35;white-space:nowrap}
.card .arrow{color:var(--muted);font-weight:400}
.up{color:var(--up)}.down{color:var(--down)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(340px,1fr));gap:14px}
figure{min-width:0}figure.wide{margin-bottom:14px}figure h3{font-size:14px;margin:0 0 2px}
figure svg{display:block;width:100%;height:auto}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:12.5px;color:var(--muted)}
.legend i{display:inline-block;width:12px;height:3px;border-radius:2px;margin-right:6px;
vertical-align:middle}.legend b{color:var(--ink);font-weight:600}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th{font-size:13px;font-weight:600;color:var(--muted);text-align:left}
th,td{padding:7px 12px 7px 0;border-bottom:1px solid var(--line);vertical-align:top}
tr:last-child td{border-bottom:0}td.num,th.num{text-align:right}tr.total td{font-weight:600}
.pairs td{padding:12px 14px 12px 0}.shot{display:flex;gap:12px;min-width:270px}
.shot img,.shot .gone{width:112px;height:112px;flex:none;border:1px solid var(--line);
border-radius:6px;object-fit:contain}
.shot .gone{display:grid;place-items:center;color:var(--muted);font-size:12px;text-align:center}
img.pixels{image-rendering:pixelated}
.shot p{margin:0 0 4px;font-size:13.5px;overflow-wrap:anywhere}
.tag{display:inline-block;font-size:12px;color:var(--muted);border:1px solid var(--line);
border-radius:99px;padding:0 8px}
.sample{margin-bottom:14px}.sample img{max-width:100%;height:auto}
.config{columns:2 380px;column-gap:32px;font-size:13.5px}
.config div{display:flex;justify-content:space-between;gap:16px;padding:3px 0;
border-bottom:1px solid var(--line);break-inside:avoid}
.config code{overflow-wrap:anywhere;text-align:right}
"""


def page(title: str, body: str) -> str:
    """A whole HTML document that loads nothing from anywhere."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


def section(title: str, body: str) -> str:
    """A titled section."""
    return f"<section><h2>{escape(title)}</h2>\n{body}\n</section>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, kind: str = "") -> str:
    """A table in a panel. `rows` are HTML; a header that starts with '#' marks figures.

    The last row stands out where `kind` is "totalled".
    """
    numeric = [name.startswith("#") for name in header]
    styles = [' class="num"' if is_number else "" for is_number in numeric]
    head = "".join(
        f"<th{style}>{escape(name.lstrip('#'))}</th>"
        for style, name in zip(styles, header, strict=True)
    )
    lines = []
    for index, row in enumerate(rows, 1):
        cells = "".join(f"<td{s}>{cell}</td>" for s, cell in zip(styles, row, strict=True))
        emphasis = ' class="total"' if kind == "totalled" and index == len(rows) else ""
        lines.append(f"<tr{emphasis}>{cells}</tr>")
    return (
        f'<div class="panel scroll"><table class="{kind}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def card(label: str, value: str, note: str = "") -> str:
    """One headline figure. `value` and `note` are HTML."""
    return (
        f'<div class="card"><div class="label">{escape(label)}</div>'
        f'<div class="value">{value}</div><div class="note">{note}</div></div>'
    )


def signed(change: float | None, digits: int = 3) -> str:
    """A change as HTML: its sign always, its colour by its sign, a dash when unknown."""
    if change is None:
        return "–"
    text = f"{change:+.{digits}f}"
    if float(text) == 0:
        return text
    return f'<span class="{"up" if change > 0 else "down"}">{text.replace("-", "−")}</span>'


def span_bar(before: float | None, after: float | None) -> str:
    """A small SVG on the scale 0 to 1: a grey dot before, a blue one after."""
    dots = ((before, "#9aa1ab"), (after, COLORS[0]))
    x = [(5 + 150 * min(1.0, max(0.0, v)), color) for v, color in dots if v is not None]
    line = (
        f'<path d="M{x[0][0]:.1f} 8H{x[1][0]:.1f}" stroke="{COLORS[0]}" stroke-width="2"/>'
        if len(x) == 2
        else ""
    )
    circles = "".join(f'<circle cx="{cx:.1f}" cy="8" r="4" fill="{color}"/>' for cx, color in x)
    return (
        '<svg width="160" height="16" role="img" aria-label="before and after, 0 to 1">'
        f'<path d="M5 8H155" stroke="#e3e6ea" stroke-width="2"/>{line}{circles}</svg>'
    )


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a chart: a value a step, NaN where there is none."""

    name: str
    values: Sequence[float]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers within [low, high]."""
    raw = (high - low) / count
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= raw * 0.75)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def number(value: float, digits: int = 4) -> str:
    """A figure in few characters: `digits` of them count."""
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e5):
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.{digits}g}"


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """SVG path data; NaN lifts the pen."""
    stride = max(1, -(-len(x) // MAX_POINTS))
    points, pen_down = [], False
    for px, py in zip(x[::stride], y[::stride], strict=True):
        if np.isfinite(py):
            points.append(f"{'L' if pen_down else 'M'}{px:.1f} {py:.1f}")
        pen_down = bool(np.isfinite(py))
    return "".join(points)


def chart(
    title: str,
    steps: Sequence[int],
    curves: Sequence[Curve],
    *,
    note: str = "",
    bands: Sequence[tuple[int, int]] = (),
    wide: bool = False,
) -> str:
    """Curves over the steps on one common axis, raw and faint behind their rolling mean.

    Args:
        title, note: plain text.
        steps: (N,) increasing.
        curves: those without any finite value are left out; of none left, a sentence remains.
        bands: (first step, last step) stretches to shade.
        wide: for a chart that has a row to itself.
    Returns: a <figure> with its legend, whose figures are means over the last steps.
    """
    box = f"<figure{' class=wide' if wide else ''}><h3>{escape(title)}</h3>"
    caption = f"<figcaption>{escape(note)}</figcaption>" if note else ""
    held = [(c.name, np.asarray(c.values, np.float64)) for c in curves]
    held = [(name, values) for name, values in held if np.isfinite(values).any()]
    if not held:
        return f'{box}<p class="muted">No such figures in metrics.jsonl.</p>{caption}</figure>'
    width, height = (1080, 300) if wide else (360, 190)
    left, right, top, bottom = 46, 10, 12, 24
    joined = np.concatenate([v[np.isfinite(v)] for _, v in held])
    low, high = float(joined.min()), float(joined.max())
    pad = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    # Quantities that never go below zero get no empty axis below it.
    low, high = (low - pad if low < 0 else max(0.0, low - pad)), high + pad
    first, last = float(steps[0]), float(max(steps[-1], steps[0] + 1))

    def px(step: np.ndarray | float) -> np.ndarray:
        return left + (np.asarray(step, float) - first) / (last - first) * (width - left - right)

    def py(value: np.ndarray | float) -> np.ndarray:
        return top + (high - np.asarray(value)) / (high - low) * (height - top - bottom)

    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}" '
        'font-size="11" fill="#626872" font-family="inherit">'
    ]
    for start, end in bands:
        x0, x1 = float(px(start)), float(px(end))
        parts.append(
            f'<rect x="{x0:.1f}" y="{top}" width="{max(2.0, x1 - x0):.1f}" '
            f'height="{height - top - bottom}" fill="#d98b00" opacity=".16"/>'
        )
    for tick in ticks(low, high):
        y = float(py(tick))
        parts.append(f'<path d="M{left} {y:.1f}H{width - right}" stroke="#e9ebee"/>')
        parts.append(
            f'<text x="{left - 7}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>'
        )
    for tick in {round(t) for t in ticks(first, last, 6)}:
        parts.append(
            f'<text x="{float(px(tick)):.1f}" y="{height - 7}" text-anchor="middle">{tick}</text>'
        )
    x = px(np.asarray(steps))
    legend = []
    for index, (name, values) in enumerate(held):
        color = COLORS[index % len(COLORS)]
        smooth = rolling_mean(values)
        if len(values) > WINDOW:
            parts.append(
                f'<path d="{_path(x, py(values))}" fill="none" stroke="{color}" opacity=".25"/>'
            )
        else:  # too short to smooth
            smooth = values
        parts.append(
            f'<path d="{_path(x, py(smooth))}" fill="none" stroke="{color}" stroke-width="2" '
            'stroke-linejoin="round" stroke-linecap="round"/>'
        )
        final = number(values[np.isfinite(values)][-WINDOW:].mean(), 3)
        legend.append(
            f'<span><i style="background:{color}"></i>{escape(name)} <b>{final}</b></span>'
        )
    parts.append("</svg>")
    return f'{box}<div class="legend">{"".join(legend)}</div>{"".join(parts)}{caption}</figure>'
