"""Compiling and loading the C sources.

As Triton does for its launchers, the library is made when it is first needed, for this machine's
own instruction set, and kept in the user's cache under a name that holds a digest of all that went
into it. Threads are OpenMP's, of the runtime that torch has loaded, so that `torch.set_num_threads`
holds here as well.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch  # noqa: F401  loads the OpenMP runtime that the library's symbols are resolved in

SOURCES = Path(__file__).parent
FLAGS = (
    "-std=gnu11",
    "-O3",
    "-march=native",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
)
# An optimizer's step is the same bits on every device: no product is fused with a sum.
SOURCE_FLAGS = {"adamw": ("-ffp-contract=off",)}
SWITCH = "T2I_CPU_KERNELS"  # 0: PyTorch's ops instead
MORE_FLAGS = "T2I_CPU_CFLAGS"  # for the compiler and the linker: warnings, sanitizers


class BuildError(RuntimeError):
    """The library cannot be made or loaded here; the message is one line."""


@cache
def library() -> ctypes.CDLL | None:
    """The ops, compiled; None, with one warning, where that cannot be done.

    Switched off by T2I_CPU_KERNELS=0, without a warning.
    """
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        return load(build())
    except BuildError as error:
        warnings.warn(
            f"CPU kernels: {error}; decoding takes PyTorch's ops, at less than half of the speed "
            f"({SWITCH}=0 says so beforehand)",
            stacklevel=2,
        )
        return None


def loaded() -> ctypes.CDLL:
    """The ops, where there are any: for callers that have asked `library`."""
    found = library()
    assert found is not None
    return found


def describe() -> str:
    """What the ops run on, for a report: the compiler, or "PyTorch"."""
    return "PyTorch" if library() is None else compiler()[1]


@cache
def compiler() -> tuple[str, str]:
    """Path and version line of the C compiler: $CC, or the first of gcc, cc.

    Raises: BuildError.
    """
    names = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "cc"]
    for name in names:
        path = shutil.which(name)
        if path is not None:
            return path, _run([path, "--version"]).partition("\n")[0]
    raise BuildError(f"no C compiler (looked for {', '.join(names)})")


def build(extra_flags: tuple[str, ...] = ()) -> Path:
    """Compile the library unless it is in the cache. Returns its path.

    Args:
        extra_flags: after FLAGS, before those of T2I_CPU_CFLAGS; for tests of other instruction
            sets.
    Raises: BuildError.
    """
    if sys.platform != "linux":
        raise BuildError(f"made for Linux only, this is {sys.platform}")
    path, version = compiler()
    more = os.environ.get(MORE_FLAGS, "").split()
    flags = (*FLAGS, *extra_flags, *more)
    digest = hashlib.sha256(repr((version, flags, SOURCE_FLAGS, _processor())).encode())
    for source in sorted(SOURCES.glob("*.[ch]")):
        digest.update(source.read_bytes())
    folder = _cache_folder()
    target = folder / f"ops-{digest.hexdigest()[:20]}.so"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        objects = []
        for source in sorted(SOURCES.glob("*.c")):
            objects.append(f"{scratch}/{source.stem}.o")
            own = SOURCE_FLAGS.get(source.stem, ())
            _run([path, *flags, *own, "-c", str(source), "-o", objects[-1]])
        # No -fopenmp: that would load a second runtime, whose threads would fight torch's.
        _run([path, "-shared", *more, *objects, "-lm", "-o", f"{scratch}/ops.so"])
        os.replace(f"{scratch}/ops.so", target)  # whole or not at all, whoever else compiles
    return target


def load(path: Path) -> ctypes.CDLL:
    """Load what `build` made. Raises: BuildError."""
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(str(error)) from None


def _cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home) / "t2i-engine"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return _private_folder()


@cache
def _private_folder() -> Path:
    """This process's own, where there is no cache to write to."""
    return Path(tempfile.mkdtemp(prefix="t2i-engine-"))


def _processor() -> str:
    """What -march=native depends on: a home folder may be shared by unlike machines."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return f"{platform.machine()} {line}"
    return platform.machine()


def _run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        said = (result.stderr or result.stdout).splitlines() or ["it said nothing"]
        error = next((line for line in said if "error" in line), said[0])
        raise BuildError(f"{command[0]} failed: {error}")
    return result.stdout
