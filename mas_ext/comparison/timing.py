"""Time of calls that are compared: all take turns, and a median comes with its 95 % interval."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter

import torch

from mas_ext._arguments import check_count

# Fast calls are repeated this long per sample, so that the clock and a cold cache don't count.
SAMPLE_SECONDS = 0.02


def in_turns(
    calls: Sequence[Callable[[], object]],
    repeats: int,
    device: str,
    before: Callable[[], object] = lambda: None,
    sample_seconds: float = SAMPLE_SECONDS,
) -> list[list[float]]:
    """Seconds of every call in every repeat, after `before`; called so often that a sample lasts.

    The order is another one in every repeat, as what ran before leaves its traces in caches and threads.
    """
    check_count(repeats, "repeats")
    numbers = []
    for call in calls:
        once = seconds(call, 1, device)
        if once < 10 * SAMPLE_SECONDS:  # else it is one call a sample in any case
            once = min(once, seconds(call, 1, device), seconds(call, 1, device))
        numbers.append(max(1, round(sample_seconds / once)))
    samples: list[list[float]] = [[] for _ in calls]
    turns, order = list(zip(calls, numbers, samples, strict=True)), random.Random(0)
    for _ in range(repeats):
        order.shuffle(turns)
        for call, number, taken in turns:
            before()
            taken.append(seconds(call, number, device))
    return samples


def seconds(call: Callable[[], object], number: int, device: str) -> float:
    """Seconds per call."""
    wait: Callable[[], object] = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    begin = perf_counter()
    for _ in range(number):
        call()
    wait()
    return (perf_counter() - begin) / number


def median(samples: Sequence[float]) -> dict[str, float]:
    """The median with its 95 % interval by order statistics, whatever the distribution."""
    ordered, n = sorted(samples), len(samples)
    rank = max(1, math.floor((n - 1.96 * math.sqrt(n)) / 2))
    middle = statistics.median(ordered)
    return {"median": middle, "low": ordered[rank - 1], "high": ordered[n - rank]}


def paired(samples: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """The median of the ratio of two calls, repeat by repeat."""
    return median([a / b for a, b in zip(samples, others, strict=True)])


def spread(value: Mapping[str, float], digits: int, times: float = 1.0) -> str:
    """A median and its interval in words."""
    low, middle, high = (f"{times * value[key]:.{digits}f}" for key in ("low", "median", "high"))
    return f"{middle} ({low} to {high})"
