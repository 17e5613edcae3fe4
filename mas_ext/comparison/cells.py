"""Cells: what a comparison measures one by one, where it is kept, and how lam is chosen from it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, Protocol, cast

# One thing to measure, such as a method with a seed: names and JSON values that alone decide the result.
Cell = dict[str, Any]
# What was measured, as JSON: of a training that diverged {"diverged": why}.
Found = dict[str, Any]
# The score of every lam tried so far, in that order -> the lam to try next; none ends the search.
Candidates = Callable[[Mapping[float, float]], Sequence[float]]


class CellStore(Protocol):
    """Keeps what was found, by cell."""

    def __contains__(self, cell: Cell) -> bool:
        """Whether the cell was measured."""

    def __getitem__(self, cell: Cell) -> Found:
        """What was found, as it was read from JSON."""

    def add(self, cell: Cell, found: Found, seconds: float) -> None:
        """Keep what was found now, in `seconds`."""


def fill(store: CellStore, plan: Iterable[Cell], measure: Callable[[Cell], Found]) -> None:
    """Measure every cell of a plan that is not in the store.

    A plan may depend on results: the store has each cell by the time the next one is asked for.
    """
    for cell in plan:
        if cell not in store:
            start = time.perf_counter()
            found = measure(cell)
            store.add(cell, found, time.perf_counter() - start)


def listed(lams: Sequence[float]) -> Candidates:
    """Try each of these."""
    return lambda scores: () if scores else lams


def decades(grid: Sequence[float]) -> Candidates:
    """Try every second value of a grid, then the decades beside the best one as long as it gets better.

    The search may leave the grid.
    """

    def candidates(scores: Mapping[float, float]) -> Sequence[float]:
        if not scores:
            return grid[1::2]
        best = max(scores, key=scores.__getitem__)
        beside = (float(f"{factor * best:.0e}") for factor in (0.1, 10))
        return [lam for lam in beside if lam not in scores]

    return candidates


def choose(
    store: CellStore,
    cells: Sequence[Cell],
    candidates: Candidates,
    key: str = "validation_accuracy",
) -> Generator[Cell, None, float | None]:
    """Ask for the trainings that a lam is chosen by; return the lam, None where all diverged.

    The lam with the largest mean of `key` over the cells is taken, of equal ones the one tried first; never one
    with which a training diverged.

    Args:
        store: has each cell by the time the next one is asked for.
        cells: the trainings with one lam, one per seed, without that lam.
        candidates: which lam are tried.
        key: of what was found.
    """
    scores: dict[float, float] = {}
    while near := candidates(scores):
        for cell in cells:
            for lam in near:
                yield {**cell, "lam": lam}
        for lam in near:
            found = [store[{**cell, "lam": lam}] for cell in cells]
            lost = any("diverged" in each for each in found)
            scores[lam] = -math.inf if lost else sum(each[key] for each in found) / len(found)
    best = max(scores, key=scores.__getitem__)
    return best if scores[best] > -math.inf else None


def chosen(store: CellStore, asking: Generator[Cell, None, float | None]) -> float | None:
    """The lam that `choose` returns; None also where a training that it asks for is missing."""
    while True:
        try:
            needed = next(asking)
        except StopIteration as stop:
            return cast("float | None", stop.value)
        if needed not in store:
            return None
