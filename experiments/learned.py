"""What experiments that train share: a scenario learned once as a cell, and lam chosen on validation data."""

from __future__ import annotations

import functools
import math
from collections.abc import Generator
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from experiments.experiment import Cell, Found, Results
from mas_ext.compare.options import Config, Purpose
from mas_ext.compare.sweep import learn
from mas_ext.compare.tables import summary
from mas_ext.failures import Diverged, Vanished
from mas_ext.methods import Method
from mas_ext.scenarios import Scenario, Tensors
from mas_ext.scenarios import named as catalogue

# Where every method's lam is looked for.
GRID = (1e-3, 1e-2, 1e-1, 1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6)

# Seeds that lam is chosen with, apart from those of the results.
CHOOSING_SEED = 1000


def scenario_of(protocol: Config, folder: str | None, seed: int) -> Scenario:
    """The protocol's scenario on data from this folder; the last two are kept."""
    return _built(protocol.scenario, folder, protocol.tasks, protocol.order, seed)


def fewer(scenario: Scenario, train: int, test: int | None = None, seed: int = 0) -> Scenario:
    """The same tasks with so many random samples of each at most, to train and (None: all) to test on."""
    generator = torch.Generator().manual_seed(seed)

    def some(part: Dataset[Any], count: int | None) -> Dataset[Any]:
        assert isinstance(part, Tensors)
        if count is None:
            return part
        return part.subset(torch.randperm(len(part), generator=generator)[:count])

    tasks = [
        replace(task, train=some(task.train, train), test=some(task.test, test))
        for task in scenario.tasks
    ]
    return Scenario(tuple(tasks), scenario.name)


_built = functools.lru_cache(maxsize=2)(catalogue.build)


def measured(
    protocol: Config, scenario: Scenario, method: Method, seed: int, purpose: Purpose
) -> Found:
    """The scenario learned once: `mas_ext.compare.tables.summary` and accuracy, (T, T), or diverged and why."""
    try:
        result = learn(protocol, scenario, method, seed, purpose)
    except (Diverged, Vanished) as error:
        return {"diverged": str(error)}
    found = summary(result, [task.name for task in scenario.tasks], None)
    return {**found, "accuracy": result.accuracy}


def matrix(found: Found) -> Tensor:
    """accuracy[t, k] of what `measured` found, as it is in a file, NaN where nothing was measured."""
    return torch.from_numpy(np.array(found["accuracy"], dtype=float))


def choose(
    results: Results,
    cell: Cell,
    grid: tuple[float, ...] = GRID,
    key: str = "validation_accuracy",
) -> Generator[Cell, None, float | None]:
    """Ask for what is needed to choose the lam of `cell`; returns it, None where all diverged.

    Every second value of the grid is tried, then the decades beside the best, as long as it gets better, beyond
    the grid, too. The best has the largest `key`, of equal ones it is the one tried first.
    """

    def score(lam: float) -> float:
        found = results[{**cell, "lam": lam}]
        return -math.inf if "diverged" in found else float(found[key])

    tried: list[float] = []
    near = list(grid[1::2])
    while near:
        for lam in near:
            yield {**cell, "lam": lam}
        tried += near
        best = max(tried, key=score)
        beside = (float(f"{factor * best:.0e}") for factor in (0.1, 10))
        near = [lam for lam in beside if lam not in tried]
    return best if score(best) > -math.inf else None


def chosen(
    results: Results,
    cell: Cell,
    grid: tuple[float, ...] = GRID,
    key: str = "validation_accuracy",
) -> float | None:
    """What `choose` returned; None, too, where it did not get there yet."""
    asking = choose(results, cell, grid, key)
    while True:
        try:
            needed = next(asking)
        except StopIteration as stop:
            return cast("float | None", stop.value)
        if needed not in results:
            return None
