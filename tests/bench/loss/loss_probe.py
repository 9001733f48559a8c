"""Providers that go wrong, for test_bench_loss.py: processes of the benchmark import them by name."""

import os

from bench.loss.providers import logits


def spoilt(problem):
    """Off by a thousandth."""
    return 1.001 * logits(problem)


def absent(problem):
    """A peer that is not installed."""
    import no_such_peer  # noqa: F401


def dying(problem):
    """A peer that takes its process with it."""
    os._exit(3)
