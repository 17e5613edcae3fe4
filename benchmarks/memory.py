"""How the benchmarks measure memory: what torch's allocator gives out while something runs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch


def peak(act: Callable[[], object], device: str = "cpu") -> int:
    """The most bytes at once, above those before; a library's own buffers are not among them."""
    if device == "cpu":
        return max(accumulate(changes(act)), default=0)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    act()
    return torch.cuda.max_memory_allocated(device) - before


def changes(act: Callable[[], object]) -> list[int]:
    """Bytes taken on the CPU, and given back (negative), in their order."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU],
        profile_memory=True,
        acc_events=True,  # without it some versions of torch warn
    ) as profile:
        act()
    events = profile.profiler.kineto_results.events()
    found = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return [size for _, size in sorted(found, key=lambda event: event[0])]
