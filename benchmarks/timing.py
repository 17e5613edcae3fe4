"""How the benchmarks measure time: all calls take turns, and a median comes with its interval."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from time import perf_counter

import torch

# Fast calls are repeated this long per sample, so that the clock and a cold cache don't count.
SAMPLE_SECONDS = 0.02
LEAST_REPEATS = 3


def check_device(device: str) -> None:
    """Raise a ValueError for a device that is not there."""
    if device not in (("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)):
        raise ValueError(
            f"device: got {device!r}, expected cpu, or cuda where there is a GPU (of several, "
            "CUDA_VISIBLE_DEVICES chooses)"
        )


def in_turns(
    calls: Sequence[Callable[[], object]],
    repeats: int,
    device: str,
    before: Callable[[], None],
    sample_seconds: float,
    limit: float = math.inf,
) -> list[list[float]]:
    """Seconds of every call in every repeat, after `before`, called so long that samples last.

    After `limit` seconds no further repeat begins, once there are LEAST_REPEATS.
    """
    numbers, begin = [], perf_counter()
    for call in calls:
        once = seconds(call, 1, device)
        if once < 10 * SAMPLE_SECONDS:  # else it is one call a sample in any case
            once = min(once, seconds(call, 1, device), seconds(call, 1, device))
        numbers.append(max(1, round(sample_seconds / once)))
    samples: list[list[float]] = [[] for _ in calls]
    turns, order = list(zip(calls, numbers, samples, strict=True)), random.Random(0)
    for repeat in range(repeats):
        if repeat >= LEAST_REPEATS and perf_counter() - begin > limit:
            break
        # What ran before leaves its traces in caches and threads.
        order.shuffle(turns)
        for call, number, taken in turns:
            before()
            taken.append(seconds(call, number, device))
    return samples


def seconds(call: Callable[[], object], number: int, device: str) -> float:
    """Seconds per call."""
    if device == "cpu":
        begin = perf_counter()
        for _ in range(number):
            call()
        return (perf_counter() - begin) / number
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    for _ in range(number):
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / number


def median(samples: Sequence[float]) -> dict[str, float]:
    """The median with its 95 % interval by order statistics, whatever the distribution."""
    ordered, n = sorted(samples), len(samples)
    rank = max(1, math.floor((n - 1.96 * math.sqrt(n)) / 2))
    middle = statistics.median(ordered)
    return {"median": middle, "low": ordered[rank - 1], "high": ordered[n - rank]}
