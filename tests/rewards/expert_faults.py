"""An expert's fault, and the waiting for what a worker thread does."""

import time

import torch


def out_of_memory(count):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore follows.")


def wait_until(ready):
    deadline = time.monotonic() + 10
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.005)
