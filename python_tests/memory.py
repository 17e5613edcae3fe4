"""What torch allocates on the CPU while something runs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch


def _changes(act: Callable[[], Any]) -> list[int]:
    """Bytes taken, and given back, in their order."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU],
        profile_memory=True,
        acc_events=True,  # without it some versions of torch warn
    ) as profile:
        act()
    events = profile.profiler.kineto_results.events()
    found = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return [size for _, size in sorted(found, key=lambda event: event[0])]


def largest_allocation(act: Callable[[], Any]) -> int:
    """Bytes of the largest single allocation."""
    return max(_changes(act), default=0)


def peak(act: Callable[[], Any]) -> int:
    """The most bytes at once, above those before."""
    return max(accumulate(_changes(act)), default=0)
