"""Run an ensemble beside the main work: a side stream on CUDA, a worker thread on the CPU."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import nvtx
import torch
from torch import Tensor

from rewards.ensemble import Ensemble, RewardError, Scores, expert_range
from rewards.offload import Offload


class Span(NamedTuple):
    """One expert's work on one batch, in seconds of `time.perf_counter`."""

    expert: str
    start: float
    end: float


class _GivenUp(BaseException):
    """Ends the batch of a thread that was left behind; no expert's failure."""


class _Job:
    """One thing for the worker thread to do, and what became of it."""

    def __init__(self, work: "Callable[[_Job], Any]", *, is_batch: bool) -> None:
        self.work = work
        self.is_batch = is_batch
        self.started = 0.0  # time.monotonic when the worker took it
        self.expert = ""  # the one it is in
        self.spans: list[Span] = []
        self.done = False
        self.value: Any = None
        self.error: BaseException | None = None

    def finish(self, value: Any = None, error: BaseException | None = None) -> None:
        self.value, self.error, self.done = value, error, True


class RewardHandle:
    """Scores on their way. `seconds_exposed` is how long `result` kept its caller waiting."""

    def __init__(self, pipeline: "RewardPipeline", job: _Job, device: torch.device) -> None:
        self._pipeline, self._job, self._device = pipeline, job, device
        self.seconds_exposed = 0.0

    @property
    def spans(self) -> list[Span]:
        """When each expert was at it, as far as they have come. On CUDA the stream's work counts."""
        return list(self._job.spans)

    def result(self) -> Scores:
        """The scores, on the images' device; what the ensemble raised in the worker is raised here.

        Raises: RewardError naming the expert, also for one that let the timeout pass.
        """
        start = time.perf_counter()
        try:
            with nvtx.annotate("rewards/wait"):
                scores, finished = self._pipeline._wait_for(self._job)
                if finished is not None:
                    finished.synchronize()  # the host reads the scores next anyway
        finally:
            self.seconds_exposed += time.perf_counter() - start
        if finished is not None:
            main = torch.cuda.current_stream(scores.total.device)
            for tensor in (scores.total, *scores.by_expert.values()):
                tensor.record_stream(main)
        # The worker's tensors are inference tensors, which autograd refuses to save.
        by_expert = {name: s.to(self._device, copy=True) for name, s in scores.by_expert.items()}
        return Scores(scores.total.to(self._device, copy=True), by_expert, scores.skipped)


class RewardPipeline:
    """Scores batches in the order submitted, one at a time, beside the caller's own work.

    A worker thread issues the experts' work, so that their Python time is hidden too; on CUDA
    it issues it to a stream of its own, which waits for the pictures by an event.

    A thread cannot be stopped from outside. One that is stuck in an expert is left behind as a
    daemon, which keeps no process from ending, and another takes its place. Until it comes back,
    its expert counts as failing: a model cannot be in two threads at a time.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        device: torch.device | str,
        *,
        depth: int = 2,
        timeout: float | None = None,
        offload: bool = False,
    ) -> None:
        """
        Args:
            device: the experts'. Pictures from another one are copied to it.
            depth: batches that may wait behind the one being scored before `submit` blocks.
            timeout: seconds that a batch may take, counted from its start; None: any time.
            offload: keep the experts' weights in host memory but while each is scoring.
        Raises: ValueError naming the argument.
        """
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout must be positive or None, got {timeout}")
        self._ensemble = ensemble
        self._device = torch.device(device)
        self._depth = depth
        self._timeout = timeout
        self._offloads: dict[str, Offload] = {}
        if offload:
            if self._device.type == "cpu":
                raise ValueError("offload: the experts are on the CPU already")
            self._offloads = {e.name: Offload(e, self._device) for e in ensemble.experts}
        self._changed = threading.Condition()  # guards all that follows
        self._waiting: deque[_Job] = deque()
        self._running: _Job | None = None
        self._thread: threading.Thread | None = None
        self._stuck: dict[str, threading.Thread] = {}
        self._closed = False

    def prepare(self, prompts: list[str], metadata: list[dict[str, Any]]) -> None:
        """Let the experts tokenise while the pictures of these prompts are still being drawn.

        Their weights stay where they are: device work would disturb the capture of CUDA graphs.
        """

        def work(job: _Job) -> None:
            self._ensemble.prepare(
                prompts, metadata, around=lambda name: self._inside(job, name, weights=False)
            )

        self._put(_Job(work, is_batch=False))

    def submit(
        self, prompts: list[str], images: Tensor, metadata: list[dict[str, Any]]
    ) -> RewardHandle:
        """Start scoring. The images must not be written to before `result` returns.

        Blocks while `depth` batches wait.

        Args:
            prompts, metadata: B each.
            images: (B, 3, H, W) float in [0, 1].
        Raises: RewardError when the pipeline is closed.
        """
        here = images.device
        staged, ready = self._stage(images)

        def work(job: _Job) -> tuple[Scores, torch.cuda.Event | None]:
            return self._score(job, prompts, staged, metadata, ready)

        job = _Job(work, is_batch=True)
        self._put(job)
        return RewardHandle(self, job, here)

    def score(self, prompts: list[str], images: Tensor, metadata: list[dict[str, Any]]) -> Scores:
        """`submit` and wait: for callers that have nothing else to do."""
        return self.submit(prompts, images, metadata).result()

    def _stage(self, images: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        """The images on the experts' device, and the event after which they may be read."""
        if self._device.type == "cpu":
            if images.device.type == "cpu":
                return images, None
            # Pinned, or the copy would stop the main stream's host thread.
            staged = torch.empty(images.shape, dtype=images.dtype, pin_memory=True)
            staged.copy_(images, non_blocking=True)
            return staged, torch.cuda.current_stream(images.device).record_event()
        staged = images.to(self._device, non_blocking=True)
        return staged, torch.cuda.current_stream(self._device).record_event()

    def _score(
        self,
        job: _Job,
        prompts: list[str],
        images: Tensor,
        metadata: list[dict[str, Any]],
        ready: torch.cuda.Event | None,
    ) -> tuple[Scores, torch.cuda.Event | None]:
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        if stream is not None and ready is not None:
            images.record_stream(stream)
            stream.wait_event(ready)
        elif ready is not None:
            ready.synchronize()
        with nvtx.annotate("rewards/score"), torch.inference_mode():
            scores = self._ensemble.score(
                prompts, images, metadata, around=lambda name: self._inside(job, name)
            )
        return scores, stream.record_event() if stream is not None else None

    @contextmanager
    def _inside(self, job: _Job, name: str, *, weights: bool = True) -> Iterator[None]:
        """What the worker thread keeps about itself while it is in an expert."""
        me = threading.current_thread()
        with self._changed:
            if self._thread is not me:
                raise _GivenUp
            if name in self._stuck:
                raise RewardError(f"expert {name!r} has not come back from an earlier batch")
            job.expert = name
        offload = self._offloads.get(name) if weights else None
        start = time.perf_counter()
        try:
            with expert_range(name), offload.on_device() if offload else nullcontext():
                yield
        finally:
            with self._changed:
                if self._stuck.get(name) is me:
                    del self._stuck[name]
                else:
                    job.spans.append(Span(name, start, time.perf_counter()))

    def _work(self, stream: torch.cuda.Stream | None) -> None:
        """The worker thread."""
        me = threading.current_thread()
        with torch.cuda.stream(stream):
            while True:
                with self._changed:
                    while self._thread is me and not self._waiting and not self._closed:
                        self._changed.wait()
                    if self._thread is not me or not self._waiting:
                        return
                    job = self._running = self._waiting.popleft()
                    job.started, job.expert = time.monotonic(), ""
                    self._changed.notify_all()
                value = error = None
                try:
                    value = job.work(job)
                # Everything is for whoever asks for the result, even a SystemExit.
                except BaseException as raised:
                    error = raised
                with self._changed:
                    if self._thread is not me:
                        return
                    self._running = None
                    job.finish(value, error)
                    self._changed.notify_all()
                del job, value, error  # they hold the pictures while the next batch is awaited

    def _put(self, job: _Job) -> None:
        with self._changed:
            if job.is_batch:
                self._wait_until(
                    lambda: self._closed or sum(j.is_batch for j in self._waiting) < self._depth
                )
            if self._closed:
                raise RewardError("the reward pipeline is closed")
            self._waiting.append(job)
            self._start_worker()
            self._changed.notify_all()

    def _start_worker(self) -> None:
        if self._thread is None:
            # A stream for each thread: what one is stuck in would block its successor's work.
            stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
            self._thread = threading.Thread(
                target=self._work, args=(stream,), name="rewards", daemon=True
            )
            self._thread.start()

    def _wait_for(self, job: _Job) -> Any:
        with self._changed:
            self._wait_until(lambda: job.done)
        if job.error is not None:
            raise job.error
        return job.value

    def _wait_until(self, ready: Callable[[], bool]) -> None:
        """Wait, holding `_changed`, and give up a batch whose time is over meanwhile."""
        while not ready():
            left = None
            if self._timeout is not None and self._running is not None:
                left = self._running.started + self._timeout - time.monotonic()
                if left <= 0:
                    self._give_up(self._running)
                    continue
            self._changed.wait(left)

    def _give_up(self, job: _Job) -> None:
        """Leave the worker thread behind with its job.

        With on_error="skip" the job is done again without the expert that the thread is stuck in.
        """
        if job.expert and self._thread is not None:
            self._stuck[job.expert] = self._thread
        self._thread = self._running = None
        if job.expert and self._ensemble.on_error == "skip" and not self._closed:
            job.spans.clear()
            self._waiting.appendleft(job)
        else:
            who = f"expert {job.expert!r}" if job.expert else "the reward worker"
            job.finish(error=RewardError(f"{who} did not answer within {self._timeout:g} s"))
        if self._waiting:
            self._start_worker()
        self._changed.notify_all()

    def close(self, *, finish: bool = True) -> None:
        """End the worker thread. Waits for the batch being scored, at most to its timeout.

        Args: finish: score what was submitted first; else `result` of what waits raises.
        """
        with self._changed:
            if not finish:
                for job in self._waiting:
                    job.finish(error=RewardError("the reward pipeline was closed"))
                self._waiting.clear()
            self._wait_until(lambda: not self._waiting and self._running is None)
            self._closed = True
            self._changed.notify_all()
            thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()

    def __enter__(self) -> "RewardPipeline":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        self.close(finish=kind is None)
