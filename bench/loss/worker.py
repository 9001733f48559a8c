"""One provider of `python -m bench loss` in a process of its own, and the parent's handle of it.

The process speaks JSON lines: first its reading of the first full step (memory, errors), or why
there is none; then the seconds of a step for each line it is sent.

Memory is the rise of the peak over one forward and backward, gradients included: resident memory
on a CPU, allocated memory on CUDA. The process has by then made steps of at most WARM_UP tokens and
WARM_UP_VOCAB entries, which import and compile what the provider needs and start the thread pools;
buffers that a provider keeps for the full size are in its figure.
"""

import ctypes
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bench.loss.problem import SEQUENCE, Problem, Solution, load_problem, load_solution

ROOT = Path(__file__).parents[2]
WARM_UP = (SEQUENCE, 2 * SEQUENCE)  # two sizes: a compiler then takes the number as a variable
WARM_UP_VOCAB = 2_048
COMPARED_ROWS = 1_024  # gradients at a time

Loss = Callable[[Problem], Tensor]


class WorkerFailed(RuntimeError):
    """A provider's process could not do a step; the message is why, in a line."""


class Worker:
    """A running provider.

    Attributes:
        reading: {"peak_bytes", "loss_error", "grad_error"} of its first full step, errors as
            shares of the mean token loss and of the largest gradient.
    Raises: WorkerFailed from the constructor and `step`.
    """

    def __init__(
        self, loss: Loss, problem: Path, solution: Path, device: torch.device, threads: int
    ) -> None:
        """Start the process and wait for its reading.

        Args:
            loss: a module's function, which the process imports by name.
            problem, solution: files of loss_problem's classes.
            threads: 0: torch's default.
        """
        job = {
            "loss": [loss.__module__, loss.__qualname__],
            "problem": str(problem),
            "solution": str(solution),
            "device": str(device),
            "threads": threads,
        }
        # Compiling in the process itself leaves no pool behind that would share the cores.
        environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.loss.worker", json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        try:
            self.reading = self._answer()
        except BaseException:
            self.close()
            raise

    def step(self) -> float:
        """Seconds of one forward and backward."""
        try:
            print("step", file=self.process.stdin, flush=True)
        except BrokenPipeError:
            pass  # the answer is missing too, and says why
        return self._answer()["seconds"]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self.errors.close()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.errors.seek(0)
            said = [text.strip() for text in self.errors if text.strip()]
            raise WorkerFailed(f"its process ended with code {code}: {(said or ['silent'])[-1]}")
        answer = json.loads(line)
        if "failed" in answer:
            raise WorkerFailed(answer["failed"])
        return answer


def take_step(loss: Loss, problem: Problem) -> float:
    """One forward and backward; the gradients stay on the leaves. Returns: the loss."""
    value = loss(problem)
    value.backward()
    return value.item()


def first_step(loss: Loss, problem: Problem, solution: Solution) -> dict[str, float]:
    """The reading of a provider that has not made a step in this process. See Worker.reading."""
    for rows in WARM_UP:
        take_step(loss, problem.part(rows, WARM_UP_VOCAB))
    values = []
    peak = peak_bytes(lambda: values.append(take_step(loss, problem)), problem.weight.device)
    if solution.rows < len(problem.hidden):
        problem.drop_gradients()
        problem = problem.part(solution.rows)
        values = [take_step(loss, problem)]
    errors = [
        gradient_error(leaf.grad, solution.gradients[name])
        for name, leaf in problem.leaves().items()
    ]
    problem.drop_gradients()
    return {
        "peak_bytes": peak,
        "loss_error": abs(values[0] - solution.loss) / solution.loss_scale,
        "grad_error": torch.tensor(errors, dtype=torch.float64).max().item(),  # keeps NaN
    }


def gradient_error(gradient: Tensor | None, exact: Tensor) -> float:
    """Largest error as a share of the largest exact gradient; infinite where there is none."""
    if gradient is None:
        return float("inf")
    pairs = zip(gradient.split(COMPARED_ROWS), exact.split(COMPARED_ROWS), strict=True)
    errors = torch.stack([(a.cpu().double() - b).abs().max() for a, b in pairs])
    return (errors.max() / exact.abs().max()).item()


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """How far memory rises above its present level at most while `run` does.

    Raises: OSError where Linux' /proc/self/clear_refs cannot be written.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # What malloc has kept of freed memory would hide as much of the rise.
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes the present level
    before = _peak_resident()
    run()
    return _peak_resident() - before


def _peak_resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status: no VmHWM")


def main(job: dict) -> None:
    """The process' side of Worker."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to stdout

    def answer(**values: float | str) -> None:
        print(json.dumps(values), file=answers, flush=True)

    if job["threads"]:
        torch.set_num_threads(job["threads"])
    device = torch.device(job["device"])
    module, name = job["loss"]
    try:
        loss = getattr(importlib.import_module(module), name)
        problem = load_problem(Path(job["problem"]), device)
        answer(**first_step(loss, problem, load_solution(Path(job["solution"]))))
        for _ in sys.stdin:
            problem.drop_gradients()
            answer(seconds=_seconds(lambda: take_step(loss, problem), device))
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        answer(failed=f"{type(error).__name__}: {first}")


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
