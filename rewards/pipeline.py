"""Run an ensemble beside the main work: a side stream on CUDA, a worker thread on the CPU."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import nvtx
import torch
from torch import Tensor

from rewards.ensemble import Ensemble, Scores


class RewardHandle:
    """Scores on their way. `seconds_exposed` is how long `result` kept its caller waiting."""

    def __init__(self, future: "Future[tuple[Scores, torch.cuda.Event | None]]") -> None:
        self._future = future
        self.seconds_exposed = 0.0

    def result(self) -> Scores:
        """The scores; whatever the ensemble raised in the worker is raised here."""
        start = time.perf_counter()
        try:
            with nvtx.annotate("rewards/wait"):
                scores, done = self._future.result()
                if done is not None:
                    done.synchronize()  # the host reads the scores next anyway
        finally:
            self.seconds_exposed += time.perf_counter() - start
        if done is not None:
            main = torch.cuda.current_stream(scores.total.device)
            for tensor in (scores.total, *scores.by_expert.values()):
                tensor.record_stream(main)
        # The worker's tensors are inference tensors, which autograd refuses to save.
        by_expert = {name: s.clone() for name, s in scores.by_expert.items()}
        return Scores(scores.total.clone(), by_expert, scores.skipped)


class RewardPipeline:
    """Scores batches in the order submitted, one at a time, beside the caller's own work.

    A worker thread issues the experts' work, so that their Python time is hidden too; on CUDA
    it issues it to a stream of its own, which waits for the pictures by an event.
    """

    def __init__(self, ensemble: Ensemble, device: torch.device | str) -> None:
        self._ensemble = ensemble
        self._device = torch.device(device)
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rewards")

    def submit(
        self, prompts: list[str], images: Tensor, metadata: list[dict[str, Any]]
    ) -> RewardHandle:
        """Start scoring. The images must not be written to before `result` returns.

        Args:
            prompts, metadata: B each.
            images: (B, 3, H, W) float in [0, 1] on the pipeline's device.
        """
        ready = None
        if self._stream is not None:
            images.record_stream(self._stream)
            ready = torch.cuda.current_stream(self._device).record_event()
        future = self._pool.submit(self._run, prompts, images, metadata, ready)
        return RewardHandle(future)

    def _run(
        self,
        prompts: list[str],
        images: Tensor,
        metadata: list[dict[str, Any]],
        ready: "torch.cuda.Event | None",
    ) -> tuple[Scores, "torch.cuda.Event | None"]:
        with nvtx.annotate("rewards/score"), torch.inference_mode():
            if self._stream is None:
                return self._ensemble.score(prompts, images, metadata), None
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(ready)
                scores = self._ensemble.score(prompts, images, metadata)
                return scores, self._stream.record_event()

    def close(self) -> None:
        """Finish what was submitted and end the worker thread."""
        self._pool.shutdown(wait=True)

    def __enter__(self) -> "RewardPipeline":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
