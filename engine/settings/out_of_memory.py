"""Running out of a device's memory, whatever the allocator calls it."""

import sys

import torch

_CPU = ("can't allocate memory", "not enough memory")  # what torch's CPU allocator says


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is a failed allocation, on a GPU or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error) for said in _CPU)


def halved(count: int, what: str) -> int:
    """Half of `count` > 1, rounded up, after a line on stderr and with the cache given back.

    To be called when the failed attempt's tensors are gone: outside its `except`.
    """
    fewer = -(-count // 2)
    print(f"out of memory with {count} {what} at a time; going on with {fewer}", file=sys.stderr)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return fewer
