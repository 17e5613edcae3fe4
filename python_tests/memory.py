"""What torch allocates on the CPU while something runs, and that nothing waits for a GPU meanwhile."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from benchmarks.memory import changes


def largest_allocation(act: Callable[[], object]) -> int:
    """Bytes of the largest single allocation."""
    return max(changes(act), default=0)


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Waiting for a GPU raises a RuntimeError."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode", UserWarning)
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
