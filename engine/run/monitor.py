"""What a run tells while it goes: metrics.jsonl, TensorBoard events and a progress bar."""

import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from engine.run.checkpoint import atomic_write_bytes
from engine.run.inside import inside
from engine.settings.errors import UserError

METRICS_FILE = "metrics.jsonl"
LINES_PER_RUN = 20  # progress lines where there is no terminal to redraw a bar on
SECONDS_BETWEEN_LINES = 60.0  # a slow run still says something every minute


def read_metrics(path: Path) -> tuple[list[dict], bool]:
    """The rows of a metrics.jsonl, and whether its last line was cut short by a kill.

    Raises: UserError naming the file and line of any other line that is not a row.
    """
    rows: list[dict] = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        elif number == len(lines):
            return rows, True
        else:
            raise UserError(f'{path}:{number}: not a metrics row (a JSON object with a "step")')
    return rows, False


def _plain(value: object) -> int | float | None:
    """A metric as JSON can hold it: NaN and infinities become null."""
    number = value if isinstance(value, int) else float(value)  # type: ignore[arg-type]
    return number if math.isfinite(number) else None


class RunLogger:
    """Writes the metrics of a run and shows its progress.

    Args:
        run_dir: the run's folder; made where missing.
        total_steps: steps of the whole run, those before a resume included.
        resume: continue the run that lies there. Call `truncate_after` before the first `log`.
        quiet: no progress on stderr.
    Raises: UserError when `resume` is false and the folder already holds metrics.
    """

    def __init__(self, run_dir: Path, total_steps: int, resume: bool, quiet: bool = False) -> None:
        self.run_dir = Path(run_dir)
        self.total_steps = total_steps
        self.path = inside(self.run_dir, METRICS_FILE)
        if not resume and self.path.exists() and self.path.stat().st_size > 0:
            raise UserError(f"{self.path}: a run is there already; --resume it or name another")
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", encoding="utf-8")
        self._purge_step: int | None = None
        self._writer: SummaryWriter | None = None
        self._quiet = quiet
        self._done = 0  # steps of the run so far
        self._first: tuple[int, float] | None = None  # step count and time of this session's first
        self._last_line = 0.0
        # A bar redraws its line with a carriage return, which fills a log file with rubbish.
        self._bar = (
            tqdm(total=total_steps, unit="step", desc="train", dynamic_ncols=True, mininterval=0.2)
            if not quiet and sys.stderr.isatty()
            else None
        )

    def truncate_after(self, step: int) -> int:
        """Drop what an interrupted run logged after `step`, the step of its checkpoint.

        metrics.jsonl is replaced as a whole; TensorBoard is told to hide the later events.

        Returns: rows kept.
        """
        rows, _ = read_metrics(self.path)
        kept = [row for row in rows if row["step"] <= step]
        self._file.close()
        content = "".join(json.dumps(row) + "\n" for row in kept)
        atomic_write_bytes(self.path, content.encode())
        self._file = self.path.open("a", encoding="utf-8")
        self._purge_step = step + 1
        self._done = len(kept)
        if self._bar is not None:
            self._bar.initial = self._bar.n = self._done
            self._bar.refresh()
        return len(kept)

    @property
    def writer(self) -> SummaryWriter:
        """The TensorBoard writer, opened at first use: by then a resumed run knows its step."""
        if self._writer is None:
            folder = inside(self.run_dir, "tensorboard")
            self._writer = SummaryWriter(str(folder), purge_step=self._purge_step)
        return self._writer

    def log(self, metrics: dict) -> None:
        """Append one step's metrics; `metrics["step"]` is required, values are numbers.

        0-dim tensors are read out. A value that is not finite is written as null.
        """
        row = {name: _plain(value) for name, value in metrics.items()}
        step = int(metrics["step"])
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        self._file.flush()
        for name, value in row.items():
            if name != "step" and value is not None:
                self.writer.add_scalar(name, value, step)
        self._done += 1
        self._show(row)

    def text(self, tag: str, step: int, text: str) -> None:
        """A text, such as the plans of a step, for TensorBoard."""
        self.writer.add_text(tag, text, step)

    def image(self, tag: str, step: int, image: Path | str | torch.Tensor) -> None:
        """A picture for TensorBoard: a picture file, or (3, H, W) float in [0, 1]."""
        if isinstance(image, torch.Tensor):
            self.writer.add_image(tag, image.detach().float().cpu().clamp(0, 1), step)
            return
        with Image.open(image) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        self.writer.add_image(tag, pixels, step, dataformats="HWC")

    def say(self, message: str) -> None:
        """A line on stderr that leaves the progress bar whole."""
        if not self._quiet:
            tqdm.write(message, file=sys.stderr)

    def close(self) -> None:
        """Flush and close everything; a second call does nothing."""
        if self._bar is not None:
            self._bar.close()
        self._file.close()
        if self._writer is not None:
            self._writer.close()

    def _show(self, row: dict) -> None:
        if self._quiet:
            return
        figures = [
            f"{label} {row[name]:{form}}"
            for name, label, form in (
                ("reward", "reward", ".3f"),
                ("kl", "KL", ".4f"),
                ("images_per_s", "images/s", ".1f"),
            )
            if row.get(name) is not None
        ]
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(figures), refresh=False)
            self._bar.update(1)
            return
        now = time.monotonic()
        if self._first is None:
            self._first = (self._done, now)
        due = self._done % max(1, self.total_steps // LINES_PER_RUN) == 0
        if due or self._done == self.total_steps or now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            line = ", ".join([f"step {self._done}/{self.total_steps}", *figures, self._left(now)])
            print(line, file=sys.stderr, flush=True)

    def _left(self, now: float) -> str:
        """Time left, from the steps of this session after its first."""
        first_done, first_time = self._first or (self._done, now)
        if self._done == first_done:
            return "time left not known yet"
        seconds = (now - first_time) / (self._done - first_done)
        return f"{tqdm.format_interval(seconds * max(0, self.total_steps - self._done))} left"
