"""Cells: what is known is not measured again, and lam is the best on validation data."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest

from experiments.learned import by_decades
from mas_ext.comparison.cells import Cell, Found, choose, chosen, fill

Asking = Generator[Cell, None, float | None]
GRID = (1e-3, 1e-2, 1e-1, 1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6)


class Kept:
    """A store in memory."""

    def __init__(self) -> None:
        self.known: list[tuple[Cell, Found]] = []
        self.seconds: list[float] = []

    def __contains__(self, cell: Cell) -> bool:
        return any(each == cell for each, _ in self.known)

    def __getitem__(self, cell: Cell) -> Found:
        return next(found for each, found in self.known if each == cell)

    def add(self, cell: Cell, found: Found, seconds: float) -> None:
        self.known.append((cell, found))
        self.seconds.append(seconds)


def test_what_is_missing_is_measured() -> None:
    """In the order of the plan, which reads what was found before."""
    store = Kept()
    store.add({"x": 2}, {"y": 4}, 0.0)

    def plan() -> Iterator[Cell]:
        for x in (3, 2):
            yield {"x": x}
        yield {"x": store[{"x": 3}]["y"]}

    fill(store, plan(), lambda cell: {"y": cell["x"] ** 2})
    assert store.known == [({"x": x}, {"y": x * x}) for x in (2, 3, 9)]
    assert all(0 <= each < 10 for each in store.seconds)


def ask(store: Kept, asking: Callable[[], Asking], scores: Any) -> list[float]:
    """Choose a lam by scores(lam, seed), NaN where it diverges; returns the lam in the order of asking."""
    asked = []
    for needed in asking():
        assert needed.keys() == {"method", "seed", "lam"}
        if needed not in store:
            assert chosen(store, asking()) is None
            asked.append(needed["lam"])
            score = scores(needed["lam"], needed["seed"])
            found = {"diverged": "nan"} if math.isnan(score) else {"validation_accuracy": score}
            store.add(needed, found, 0.0)
    return asked


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (1e2, [1e-2, 1e0, 1e2, 1e4, 1e6, 1e1, 1e3]),
        (1e1, [1e-2, 1e0, 1e2, 1e4, 1e6, 1e-1, 1e1]),
        (1e6, [1e-2, 1e0, 1e2, 1e4, 1e6, 1e5, 1e7]),
        (1e8, [1e-2, 1e0, 1e2, 1e4, 1e6, 1e5, 1e7, 1e8, 1e9]),
        (1e-3, [1e-2, 1e0, 1e2, 1e4, 1e6, 1e-3, 1e-1, 1e-4]),
    ],
)
def test_decades(best: float, tried: list[float]) -> None:
    """With a peak at one value; of equal ones the one tried first, never one that diverges."""

    def score(lam: float, seed: int) -> float:
        steps = abs(math.log10(lam / best))
        return math.nan if steps > 7.5 else 1 - steps / 10

    store = Kept()

    def asking() -> Asking:
        return by_decades(store, {"method": "mas", "seed": 7}, GRID, "validation_accuracy")

    assert ask(store, asking, score) == tried
    assert chosen(store, asking()) == best


def test_a_list() -> None:
    """The best mean over seeds is taken, of equal ones the first; lam with which one diverged is not."""
    scores = {
        0.1: (0.5, 0.7),
        5.0: (0.9, 0.3),
        1.0: (0.65, 0.6),
        2.0: (0.6, 0.65),
        9.0: (1.0, math.nan),
    }
    store, cells = Kept(), [{"method": "si", "seed": seed} for seed in (0, 1)]
    asked = ask(store, lambda: choose(store, cells, list(scores)), lambda lam, n: scores[lam][n])
    assert asked == 2 * list(scores)
    assert chosen(store, choose(store, cells, list(scores))) == 1.0
    assert chosen(store, choose(store, cells[:1], [0.1, 5.0])) == 5.0


@pytest.mark.parametrize("by", [choose, by_decades])
def test_where_all_diverge(by: Any) -> None:
    store, cell = Kept(), {"method": "mas", "seed": 0}
    given = ([cell], GRID[:2]) if by is choose else (cell, GRID[:4], "validation_accuracy")
    ask(store, lambda: by(store, *given), lambda lam, seed: math.nan)
    assert len(store.known) >= 2
    assert chosen(store, by(store, *given)) is None


def test_another_score() -> None:
    store = Kept()
    store.add({"lam": 1.0}, {"gain": -2.0}, 0.0)
    assert chosen(store, by_decades(store, {}, [1.0, 1.0], "gain")) is None  # asks for more
    for lam in (0.1, 10.0):
        store.add({"lam": lam}, {"gain": -3.0}, 0.0)
    assert chosen(store, by_decades(store, {}, [1.0, 1.0], "gain")) == 1.0
