"""How far a job is, how fast it goes and how long it will take yet."""

import sys
import time
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """A bar on a terminal; elsewhere a line every ten seconds. The speed is this session's.

    Args:
        total: pictures of the whole job.
        done: pictures that were there already.
    """

    def __init__(self, total: int, done: int = 0, *, stream: TextIO | None = None) -> None:
        self.total, self.done, self.found = total, done, done
        self.stream = stream or sys.stderr
        self.started = self.shown = time.monotonic()
        self.bar = None
        if self.stream.isatty():
            self.bar = tqdm(total=total, initial=done, unit="image", file=self.stream)

    def advance(self, count: int) -> None:
        """`count` more pictures are done."""
        self.done += count
        if self.bar is not None:
            self.bar.update(count)
        elif time.monotonic() - self.shown >= SECONDS_BETWEEN_LINES or self.done == self.total:
            self.shown = time.monotonic()
            print(self.line(), file=self.stream, flush=True)

    def line(self) -> str:
        """`64/2212 images, 3.10 images/s, 11:33 left`."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        speed = (self.done - self.found) / seconds
        left = f"{tqdm.format_interval((self.total - self.done) / speed)} left" if speed else "?"
        return f"{self.done}/{self.total} images, {speed:.2f} images/s, {left}"

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.close()
