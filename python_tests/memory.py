"""What torch allocates on the CPU while something runs."""

from __future__ import annotations

from collections.abc import Callable

from mas_ext.benchmarks.memory import changes


def largest_allocation(act: Callable[[], object]) -> int:
    """Bytes of the largest single allocation."""
    return max(changes(act), default=0)
