"""What experiments that train share: a scenario, how lam is looked for, and accuracies as they are kept."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from experiments.experiment import Experiment, Results
from experiments.tables import percent, titled
from mas_ext.comparison.cells import Cell, CellStore, Found, scored
from mas_ext.comparison.options import Config, Purpose
from mas_ext.comparison.sweep import train
from mas_ext.importance import estimate_importance
from mas_ext.methods import Method
from mas_ext.methods.quadratic import Lam
from mas_ext.models import MultiHead
from mas_ext.scenarios import Scenario, Tensors, named

# Where every method's lam is looked for.
GRID = (1e-3, 1e-2, 1e-1, 1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6)

# The seed that lam is chosen with: none of those of the results.
CHOOSING_SEED = 1000


def by_decades(
    store: CellStore, cell: Cell, grid: Sequence[float], key: str
) -> Generator[Cell, None, float | None]:
    """Ask for a cell with every second lam of a grid, then with the decades beside the best one.

    As long as it gets better, which may leave the grid. The lam with the largest `key` is returned, of equal
    ones the one tried first, None where all trainings diverged.
    """
    scores: dict[float, float] = {}
    near: Sequence[float] = grid[1::2]
    while near:
        scores |= yield from scored(store, [cell], near, key)
        best = max(scores, key=scores.__getitem__)
        beside = (float(f"{factor * best:.0e}") for factor in (0.1, 10))
        near = [lam for lam in beside if lam not in scores]
    return best if scores[best] > -math.inf else None


@dataclass(frozen=True)
class Tuned(Experiment):
    """An experiment that chooses lam by what methods know of validation data.

    score: of what was found, the key of what is best when largest. grid: where lam is looked for.
    """

    score: ClassVar[str] = "validation_accuracy"
    grid: tuple[float, ...] = GRID

    def choice(
        self, results: Results, training: Cell | None
    ) -> Generator[Cell, None, float | None]:
        """Choose the lam of a training, a cell without lam; a method without lam has no such cell."""
        if training is None:
            return None
        return (yield from by_decades(results, training, self.grid, self.score))


def trained(
    config: Config,
    scenario: Scenario,
    method: Method,
    seed: int,
    purpose: Purpose = "final",
    **trainer: Any,
) -> Found:
    """Learn the scenario once, with the network and the training of a configuration."""
    model, settings = config.network(scenario, seed), config.training(seed, purpose)
    return train(model, method, scenario, settings, **trainer)


def told(config: Config, *others: str) -> dict[str, Any]:
    """What a configuration says of all trainings: without the methods and their lam, and without others."""
    of_cells = {"methods", "lam", "keep", *others}
    return {name: value for name, value in config.values().items() if name not in of_cells}


def lam_option(lam: Lam | None) -> dict[str, Lam]:
    """The options of a method with this lam; None is that of methods without lam."""
    return {} if lam is None else {"lam": lam}


# By scenario, the names of its data in data.toml.
DATA_SETS = {
    "split-digits": ("digits",),
    "split-mnist": ("mnist",),
    "permuted-mnist": ("mnist",),
    "split-cifar100": ("cifar100",),
    "recognition": ("mnist", "fashion-mnist", "kmnist", "notmnist", "cifar100"),
}


def scenario_of(config: Config, folder: str | None, seed: int) -> Scenario:
    """The scenario on data from this folder; the last two are kept."""
    return _built(config.scenario, folder, config.tasks, config.order, seed)


_built = functools.lru_cache(maxsize=2)(named.make_scenario)


def with_auto(
    methods: Iterable[tuple[str, Mapping[int, Found], Mapping[int, Found]]],
    share: Callable[[Found], float],
) -> list[str]:
    """A table of methods with lam "auto" beside their lam in hindsight, over the same seeds, if there are some.

    methods: name, what was found by seed with "auto", and with the other lam. share: what is compared.
    """
    rows = []
    for name, auto, hindsight in methods:
        both = sorted(auto.keys() & hindsight.keys())
        if not both:
            continue
        own, other = ([share(found[seed]) for seed in both] for found in (auto, hindsight))
        lams = [lam for seed in both for lam in auto[seed]["chosen_lam"] if lam is not None]
        rows.append(
            {
                "method": name,
                "auto, %": percent(own),
                "hindsight, %": percent(other),
                "difference": percent([a - b for a, b in zip(own, other, strict=True)]),
                "lam": f"{min(lams):.2g} to {max(lams):.2g}",
                "seeds": str(len(both)),
            }
        )
    told = 'With `lam="auto"`, beside the lam of the table above:'
    return [told, titled(rows)] if rows else []


def fewer(scenario: Scenario, train: int, test: int | None = None, seed: int = 0) -> Scenario:
    """A scenario with at most so many random samples of each task, to train and (None: all) to test on."""
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


def importance_of_head(model: MultiHead, head: int, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Omega of the backbone by the outputs of one head, from inputs without labels."""
    return estimate_importance(
        model, batches, forward=lambda model, x: model(x, head), exclude=["heads.*"]
    )


def matrix(found: Found) -> Tensor:
    """accuracy[t, k] of what was found by training, as it is in a file, NaN where nothing was measured."""
    return torch.from_numpy(np.array(found["accuracy"], dtype=float))
