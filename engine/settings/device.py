"""The flags that name a device."""

import ctypes
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from engine.settings.errors import UserError

HELP = "auto, cpu, cuda or cuda:N; auto: a GPU where there is one"
LARGE_BLOCK = 4 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_NAMES = re.compile(r"cpu|cuda(:\d+)?")


def check_device(flag: str, name: str, *, auto: bool = True) -> None:
    """Raise UserError naming the flag unless `name` is cpu, cuda, cuda:N or, where taken, auto."""
    if not _NAMES.fullmatch(name) and not (auto and name == "auto"):
        wanted = "auto, cpu, cuda or cuda:N" if auto else "cpu, cuda or cuda:N"
        raise UserError(f"{flag} must be {wanted}, got {name!r}")


def device_kind(name: str) -> str:
    """What a checked name stands for on this machine: "cpu", "cuda" or "cuda:N"."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def open_device(flag: str, name: str) -> torch.device:
    """The device of a checked name. Raises: UserError naming the flag if the machine lacks it."""
    device = torch.device(device_kind(name))
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--{flag} {name}: this machine has {torch.cuda.device_count()} GPUs")
    return device


def enter_device(device: torch.device) -> None:
    """Make a device the one that this thread's work goes to, before anything is allocated on it.

    CUDA's segments then grow in place: caches of a rollout and activations of an update take turns
    in the same memory, and neither finds it in pieces. PYTORCH_CUDA_ALLOC_CONF says otherwise.
    On a CPU, blocks of LARGE_BLOCK bytes or more go back to the system as they are freed: glibc
    comes to keep those below 32 MB, and an update of a large model ends with gigabytes of nothing
    between what lives. MALLOC_MMAP_THRESHOLD_ says otherwise.
    """
    if device.type == "cpu" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        mallopt = _c_library("mallopt")
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK)
            mallopt(_M_TRIM_THRESHOLD, 8 * LARGE_BLOCK)  # else set to 128 KB by the former
    if device.type == "cuda":
        if "PYTORCH_ALLOC_CONF" not in os.environ:
            os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        torch.cuda.set_device(device.index or 0)


def give_back_memory() -> None:
    """Have the C library return what it holds of freed host memory to the system.

    glibc keeps freed blocks below 32 MB, and with them whatever lies below the last one in use: the
    gigabytes of a rollout's weights would stay resident beside the update's activations.
    """
    trim = _c_library("malloc_trim")
    if trim is not None:
        trim(0)


def _c_library(name: str) -> Callable[..., int] | None:
    """A function of glibc; None where the C library is another."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def free_memory(device: torch.device) -> int:
    """Bytes that a device can still give: what nobody has, and what torch's allocator holds unused.

    Of a host whose system does not tell, a number beyond any machine's.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    with suppress(OSError, ValueError, IndexError):
        text = Path("/proc/meminfo").read_text()
        return int(text.partition("MemAvailable:")[2].split()[0]) << 10
    return 1 << 60
