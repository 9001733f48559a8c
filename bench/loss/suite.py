"""The fused GRPO loss against its peers, forward and backward: memory, time, error.

Clipped surrogate (0.2), k3 KL (beta 0.04), old log-probs given, mean over N tokens; hidden (N, D)
and head (V, D) get gradients. `ours` is kernels.linear_grpo_loss; `logits` what T2I-R1 does;
`liger*` Liger-Kernel, `trl*` TRL's own kernels, `torch_fused` torch's F.linear_cross_entropy, `cce`
Apple's cut cross entropy. `guided` is ours with an unconditional branch, `guided_two_gemms` the
logits of both branches combined. Each provider runs in a process of its own and all take turns, so
that a slow minute hits all of them. Their loss and gradients are compared with fp64 before speed.

`ratios` are of the size N=4096, V=16384, D=512, lower is better; wanted of fp32 on a CPU:
memory_vs_logits <= 0.125, memory_vs_liger <= 0.7, time_vs_logits <= 0.95,
time_vs_fastest_peer <= 1, guided_time_vs_plain <= 0.4, guided_memory_vs_plain <= 0.111.
A time ratio is the median over rounds of the ratio within the round.
"""

# ruff: noqa: RUF009  `option` makes a dataclasses.field, which ruff cannot know

import math
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib import metadata
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from bench.loss.problem import SEQUENCE, make_problem, solve
from bench.loss.providers import PROVIDERS
from bench.loss.worker import Worker, WorkerFailed
from engine.settings.errors import UserError
from engine.settings.options import check_fields, nearest, option

MIB, GIB = 1 << 20, 1 << 30
# Errors allowed, relative to the largest gradient and to the mean token loss. Peers round logits,
# some log-probs too, to the dtype: in bf16 that moves gradients by up to 5 per cent where log-probs
# are near -11 nats or logits are guided by 5, in fp16 by an eighth of it.
TOLERANCES = {"float32": 1e-5, "bfloat16": 0.1, "float16": 0.0125}
SOLVED = 4096 * 16_384 * 512  # N V D up to which all N rows are compared with fp64
LIGERS = ("liger", "liger_compiled")
PROCESS_BYTES = GIB // 2  # that a process does not share with the others, besides its problem


class Size(NamedTuple):
    """Tokens, vocabulary, width."""

    n: int
    vocab: int
    width: int


RATIO_SIZE = Size(4096, 16_384, 512)
ALL = Size((1024, 4096, 16_384), (16_384, 102_400), (512, 2048, 4096))


@dataclass(kw_only=True, slots=True)
class Config:
    """Settings of `python -m bench loss`."""

    json: bool = option(False, "print one JSON object instead of a table")
    threads: int = option(0, "torch threads of every provider; 0: torch's default", at_least=0)
    n: list[int] = option((), "tokens; none: 4096", at_least=1)
    vocab: list[int] = option((), "vocabulary entries; none: 16384", at_least=2)
    width: list[int] = option((), "width of the hidden states; none: 512", at_least=1)
    all: bool = option(
        False,
        "N 1024 4096 16384, V 16384 102400, D 512 2048 4096 where none given (hours on a CPU)",
    )
    repeats: int = option(5, "timed steps of each provider", at_least=1)
    providers: list[str] = option((), "providers by name; none: all")
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "type of the tensors")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: cuda where there is one")

    def __post_init__(self) -> None:
        check_fields(self)
        for name in self.providers:
            if name not in PROVIDERS:
                raise UserError(
                    f"providers: unknown {name!r} (nearest: {nearest(name, PROVIDERS)})"
                )

    def sizes(self) -> Iterator[Size]:
        """Every combination of the lists."""
        default = ALL if self.all else [(value,) for value in RATIO_SIZE]
        given = (self.n, self.vocab, self.width)
        return map(Size._make, product(*(g or d for g, d in zip(given, default, strict=True))))


@dataclass(kw_only=True, slots=True)
class Finding:
    """What is known of a provider at a size.

    Attributes:
        missing: why it did not run; the other fields are then empty.
        peak_bytes, loss_error, grad_error: see Worker.reading.
        seconds: of each round.
    """

    provider: str
    missing: str | None = None
    peak_bytes: int = 0
    loss_error: float = 0.0
    grad_error: float = 0.0
    seconds: list[float] = field(default_factory=list)


def run(config: Config) -> dict:
    """The suite's {"rows", "ratios", "correct"}."""
    has_cuda = torch.cuda.is_available()
    if config.device == "cuda" and not has_cuda:
        raise UserError("device: wanted cuda, and torch finds none")
    device = torch.device("cuda" if has_cuda and config.device != "cpu" else "cpu")
    names = list(dict.fromkeys(config.providers)) or list(PROVIDERS)
    rows, named = [], {}
    for size in config.sizes():
        findings = measure(size, names, config, device)
        here = rows_of(findings, size, config.dtype)
        if size == RATIO_SIZE:
            named = ratios(findings, here)
        rows += here
    return {"rows": rows, "ratios": named, "correct": all(r.get("correct", True) for r in rows)}


def measure(size: Size, names: list[str], config: Config, device: torch.device) -> list[Finding]:
    """First step of each provider alone, then rounds in which each makes one step."""
    findings, workers = {}, {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        files = {
            guided: write_problem(Path(folder), size, guided, config.dtype, device)
            for guided in {PROVIDERS[name].guided for name in names}
        }
        free = free_bytes(device) - resident_bytes(size, names, config.dtype)
        for name in names:
            provider = PROVIDERS[name]
            need = 4 * provider.floats(*size)
            if need > free:
                why = f"left out: needs {need / GIB:.3g} GiB of {max(free, 0) / GIB:.3g} free"
                findings[name] = Finding(provider=name, missing=why)
                continue
            try:
                worker = Worker(provider.loss, *files[provider.guided], device, config.threads)
            except WorkerFailed as error:
                findings[name] = Finding(provider=name, missing=str(error))
                continue
            stack.callback(worker.close)
            workers[name] = worker
            findings[name] = Finding(provider=name, **worker.reading)
            print(f"{name}: {worker.reading['peak_bytes'] / MIB:.0f} MiB", file=sys.stderr)
            if device.type == "cuda":
                free -= need  # between steps too: torch's allocator keeps what it had
        for round_ in range(config.repeats):
            print(f"round {round_ + 1} of {config.repeats}", file=sys.stderr)
            for name, worker in list(workers.items()):
                try:
                    findings[name].seconds.append(worker.step())
                except WorkerFailed as error:
                    findings[name] = Finding(provider=name, missing=str(error))
                    del workers[name]
    return list(findings.values())


def write_problem(
    folder: Path, size: Size, guided: bool, dtype: str, device: torch.device
) -> tuple[Path, Path]:
    """Files of a problem and of its solution in fp64."""
    problem = make_problem(*size, guided=guided, dtype=getattr(torch, dtype), device=device)
    rows = size.n
    if size.n * size.vocab * size.width > SOLVED:
        rows = max(SOLVED // (size.vocab * size.width) // SEQUENCE, 1) * SEQUENCE
    paths = folder / f"problem-{guided}.pt", folder / f"solution-{guided}.pt"
    problem.save(paths[0])
    solve(problem, min(rows, size.n)).save(paths[1])
    del problem
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the providers' processes need it
    return paths


def resident_bytes(size: Size, names: list[str], dtype: str) -> int:
    """Of all the providers' processes between steps: they stay alive side by side."""
    rows = [size.vocab + size.n * (1 + PROVIDERS[name].guided) for name in names]
    return getattr(torch, dtype).itemsize * size.width * sum(rows) + PROCESS_BYTES * len(names)


def free_bytes(device: torch.device) -> int:
    """Memory that processes started now may take. Raises: OSError without /proc/meminfo."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo: no MemAvailable")


def rows_of(findings: list[Finding], size: Size, dtype: str) -> list[dict]:
    """A row a provider. `time_vs_logits` and `memory_vs_logits` are relative to `logits`, for the
    guided ones to `guided_two_gemms`."""
    tolerance = TOLERANCES[dtype]
    by_name = {f.provider: f for f in findings}
    rows = []
    for finding in findings:
        provider = PROVIDERS[finding.provider]
        row: dict = {"provider": finding.provider, **size._asdict(), "dtype": dtype}
        if provider.package:
            row["version"] = _version(provider.package)
        rows.append(row)
        if finding.missing:
            row["missing"] = finding.missing
            # Ours and plain PyTorch run everywhere: failing is an error of theirs.
            if not provider.package and not finding.missing.startswith("left out"):
                row["correct"] = False
            continue
        row["correct"] = correct(finding, tolerance)
        for name in ("grad_error", "loss_error"):
            error = getattr(finding, name)
            row[name] = error if math.isfinite(error) else str(error)  # JSON has no such numbers
        if not row["correct"]:
            continue
        median = statistics.median(finding.seconds)
        row |= {
            "seconds": median,
            "fastest_seconds": min(finding.seconds),
            "tokens_per_s": size.n / median,
            "peak_mib": finding.peak_bytes / MIB,
        }
        plain = by_name.get("guided_two_gemms" if provider.guided else "logits")
        if plain and not plain.missing and correct(plain, tolerance):
            row["time_vs_logits"] = time_ratio(finding, plain)
            row["memory_vs_logits"] = memory_ratio(finding, plain)
    return rows


def correct(finding: Finding, tolerance: float) -> bool:
    """Whether loss and gradients are within the tolerance. NaN never is."""
    return finding.grad_error <= tolerance and finding.loss_error <= tolerance


def memory_ratio(finding: Finding, other: Finding) -> float:
    return finding.peak_bytes / other.peak_bytes


def time_ratio(finding: Finding, other: Finding) -> float:
    """Median over rounds of the ratio within the round."""
    return statistics.median(a / b for a, b in zip(finding.seconds, other.seconds, strict=True))


def ratios(findings: list[Finding], rows: list[dict]) -> dict[str, float]:
    """The ratios of the module's docstring; one of a missing or wrong provider is absent."""
    right = {row["provider"] for row in rows if "seconds" in row}
    by_name = {f.provider: f for f in findings if f.provider in right}
    peers = [f for name, f in by_name.items() if PROVIDERS[name].package]
    fastest = min(peers, key=lambda f: statistics.median(f.seconds), default=None)
    ligers = [f for f in peers if f.provider in LIGERS]
    liger = min(ligers, key=lambda f: f.peak_bytes, default=None)
    ours, plain = by_name.get("ours"), by_name.get("logits")
    guided, guided_plain = by_name.get("guided"), by_name.get("guided_two_gemms")
    wanted = {
        "memory_vs_logits": (memory_ratio, ours, plain),
        "memory_vs_liger": (memory_ratio, ours, liger),
        "time_vs_logits": (time_ratio, ours, plain),
        "time_vs_fastest_peer": (time_ratio, ours, fastest),
        "guided_time_vs_plain": (time_ratio, guided, guided_plain),
        "guided_memory_vs_plain": (memory_ratio, guided, guided_plain),
    }
    return {name: ratio(a, b) for name, (ratio, a, b) in wanted.items() if a and b}


def _version(package: str) -> str:
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return f"{package} is not installed"
