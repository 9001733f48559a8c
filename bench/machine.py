"""What a measurement ran on."""

import os
import platform
import subprocess
from pathlib import Path

import torch
import transformers

from kernels.cpu import build

ROOT = Path(__file__).parents[1]


def describe() -> dict[str, str | int]:
    """Processor, cores this process may use, threads, versions, what compiled the C ops, commit."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu_kernels": build.describe(),
        "commit": commit(),
    }


def commit() -> str:
    """The checkout's short commit, with -dirty where tracked files differ; "unknown" without git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return answer.stdout.strip() or "unknown"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
