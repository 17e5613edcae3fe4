"""Cells: what a comparison measures one by one, where it is kept, and how lam is chosen from it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, Protocol, cast

# One thing to measure, such as a method with a seed: names and JSON values that alone decide the result.
Cell = dict[str, Any]
# What was measured, as JSON: of a training that diverged {"diverged": why}.
Found = dict[str, Any]


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


def scored(
    store: CellStore, cells: Sequence[Cell], lams: Sequence[float], key: str
) -> Generator[Cell, None, dict[float, float]]:
    """Ask for the cells with each lam; return by lam the mean of `key`, -inf where a training diverged.

    Args:
        store: has each cell by the time the next one is asked for.
        cells: the trainings with one lam, one per seed, without that lam.
        lams: which are tried.
        key: of what was found.
    """
    for cell in cells:
        for lam in lams:
            yield {**cell, "lam": lam}
    scores = {}
    for lam in lams:
        found = [store[{**cell, "lam": lam}] for cell in cells]
        lost = any("diverged" in each for each in found)
        scores[lam] = -math.inf if lost else sum(each[key] for each in found) / len(found)
    return scores


def choose(
    store: CellStore, cells: Sequence[Cell], lams: Sequence[float]
) -> Generator[Cell, None, float | None]:
    """Ask for the trainings that a lam is chosen by, see `scored`; return it, None where all diverged.

    The lam with the largest mean accuracy on validation data is taken, of equal ones the first.
    """
    scores = yield from scored(store, cells, lams, "validation_accuracy")
    best = max(scores, key=scores.__getitem__)
    return best if scores[best] > -math.inf else None


def chosen(store: CellStore, asking: Generator[Cell, None, float | None]) -> float | None:
    """The lam that asking returns; None also where a training that it asks for is missing."""
    while True:
        try:
            needed = next(asking)
        except StopIteration as stop:
            return cast("float | None", stop.value)
        if needed not in store:
            return None
