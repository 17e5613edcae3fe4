"""lam chosen from each new task alone, beside the one that is best in hindsight, which nobody knows in time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.datasets import Datasets
from experiments.experiment import Experiment, Page, Results
from experiments.learned import DATA_SETS, by_decades, fewer, scenario_of
from experiments.on_pretrained import OnPretrained
from experiments.regression import ARMS, Regression
from experiments.tables import number, percent, titled
from mas_ext import models
from mas_ext.comparison.cells import Cell, Found, chosen
from mas_ext.comparison.options import Config
from mas_ext.comparison.sweep import train
from mas_ext.methods import create
from mas_ext.methods.method import Method, Training
from mas_ext.methods.quadratic import Quadratic
from mas_ext.models import MultiHead
from mas_ext.scenarios import Scenario, Task, Tensors
from mas_ext.training.settings import Settings


class Problem(NamedTuple):
    """Tasks to learn, a network before the first of them, and how they are trained."""

    scenario: Scenario
    network: MultiHead
    settings: Settings


def _mnist(folder: str | None, seed: int, samples: int, **config: Any) -> Problem:
    base = Config.read({"hidden": [200, 200], "batch_size": 128, "methods": ["finetune"], **config})
    scenario = fewer(scenario_of(base, folder, seed), samples, 2000, seed)
    return Problem(scenario, base.network(scenario, seed), base.settings)


def _pretrained(folder: str | None, seed: int) -> Problem:
    """CIFAR-10 as it was learned elsewhere, then 1,000 images of each group of ten of CIFAR-100's classes."""
    whole = OnPretrained(data=folder)
    first, *groups = whole.scenario(seed).tasks
    scenario = Scenario((first, *fewer(Scenario(tuple(groups)), 1000, None, seed).tasks))
    settings = replace(whole.base.settings, epochs=[0, 3, 3, 3])
    return Problem(scenario, whole.network(scenario, seed), settings)


def _datasets(folder: str | None, seed: int) -> Problem:
    whole = Datasets(data=folder, train=1000, test=500)
    scenario = whole.scenario(seed)
    return Problem(scenario, whole.network(scenario, seed), whole.base.settings)


def _arms(folder: str | None, seed: int) -> Problem:
    """Five arms, whose accuracy is the share of the torques' variance that is explained."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        whole = Regression()
        parts = zip(ARMS, whole.data_of(2200), whole.data_of(500), strict=True)
        tasks = [Task(name, Tensors(*a), Tensors(*b), (), 2) for name, a, b in parts]
        network = models.mlp((8,), whole.hidden)
    loss: dict[str, Any] = {"task_loss": F.mse_loss, "score": explained}
    settings = Settings(lr=whole.lr, epochs=30, batch_size=whole.batch_size, **loss)
    return Problem(Scenario(tuple(tasks)), network, settings)


def explained(output: Tensor, target: Tensor) -> Tensor:
    """1 - squared error over variance, of (N, outputs) each."""
    return 1 - (output - target).square().mean() / target.var(0).mean()


# By name, what makes them of the folder of the data and a seed.
PROBLEMS: dict[str, Callable[[str | None, int], Problem]] = {
    "arms": _arms,
    "split MNIST": partial(_mnist, scenario="split-mnist", samples=4000, epochs=4),
    "permuted MNIST": partial(
        _mnist, scenario="permuted-mnist", samples=10000, tasks=10, setting="domain", epochs=2
    ),
    "CIFAR-10, CIFAR-100": _pretrained,
    "data sets": _datasets,
}
# Their options, beside lam and the form; a Fisher information of labels is none of torques.
METHODS: dict[str, Mapping[str, Any]] = {"mas": {}, "online-ewc": {}}
OF_ARMS = {"online-ewc": {"labels": "normal"}}


class InUnits(Method):
    """Another method that notes, of the second task, its loss and what the penalty at lam 1 comes to.

    lam is so small that the task is learned as if there were no penalty.
    """

    def __init__(self, method: Quadratic) -> None:
        self.method = method
        self.loss_before = self.energy = math.nan

    def begin_task(self, training: Training) -> None:
        self.method.begin_task(training)
        if training.task == 1:
            losses = [
                len(y) * training.task_loss(training.logits(x), y).detach()
                for x, y in training.batches(None)
            ]
            self.loss_before = float(sum(losses)) / sum(len(y) for _, y in training.batches(None))

    def end_task(self, training: Training) -> None:
        penalty = self.method.penalty
        assert penalty is not None
        if training.task == 1:
            self.energy = float(penalty().detach()) / penalty.lam
        self.method.end_task(training)


@dataclass(frozen=True)
class Automatic(Experiment):
    """Every method with lam "auto", and with the lam of a grid that is best on the test data of all tasks.

    grids: where that is looked for, as it is chosen elsewhere: every second value, then beside the best.
    """

    title: ClassVar[str] = "lam by itself"
    seeds: int = 3
    problems: tuple[str, ...] = tuple(PROBLEMS)
    methods: tuple[str, ...] = tuple(METHODS)
    grids: Mapping[str, Sequence[float]] = field(
        default_factory=lambda: {
            "mas": (1e-3, 1e-2, 1e-1, 1e0, 1e1, 1e2),
            "online-ewc": (1e0, 1e1, 1e2, 1e3, 1e4, 1e5),
        }
    )
    max_samples: int = 300

    def data_sets(self) -> tuple[str, ...]:
        if self.problems == ("arms",):
            return ()
        return (*DATA_SETS["recognition"], "cifar10-test", "resnet20")

    def quick(self) -> Automatic:
        """The arms, which need no data, and MAS."""
        return replace(self, problems=("arms",), methods=("mas",), seeds=1)

    def protocol(self) -> dict[str, Any]:
        return {"mode": "proximal", "validation": 0.1, "keep": 0.5, "max_samples": self.max_samples}

    def _cell(self, problem: str, method: str, seed: int) -> Cell:
        return {"problem": problem, "method": method, "seed": seed}

    def _oracle(self, results: Results, cell: Cell) -> Any:
        grid = self.grids[cell["method"]]
        return by_decades(results, cell, grid, "average_accuracy")

    def plan(self, results: Results) -> Iterator[Cell]:
        """Of each seed, fine-tuning, then of each method what was chosen, and then what could have been."""
        for seed in range(self.seeds):
            for problem in self.problems:
                yield {**self._cell(problem, "finetune", seed), "lam": None}
            for method in self.methods:
                for problem in self.problems:
                    cell = self._cell(problem, method, seed)
                    yield {**cell, "lam": "auto"}
                    yield {**cell, "lam": "unit"}
                    yield from self._oracle(results, cell)

    def measure(self, cell: Cell) -> Found:
        name, method, seed, lam = (cell[key] for key in ("problem", "method", "seed", "lam"))
        scenario, network, settings = PROBLEMS[name](self.data, seed)
        settings = replace(settings, seed=seed, validation=0.1)
        if method == "finetune":
            return train(network, create(method), scenario, settings)
        given = {**METHODS[method], **(OF_ARMS.get(method, {}) if name == "arms" else {})}
        given |= {"mode": "proximal", "max_samples": self.max_samples}
        if lam != "unit":
            return train(network, create(method, lam=lam, **given), scenario, settings)
        noted = InUnits(create(method, lam=1e-12, **given))  # type: ignore[arg-type]
        epochs = settings.epochs if isinstance(settings.epochs, int) else settings.epochs[:2]
        train(network, noted, Scenario(scenario.tasks[:2]), replace(settings, epochs=epochs))
        return {"loss": noted.loss_before, "energy": noted.energy}

    def show(self, results: Results) -> Page:
        """A table per method, and the distances and spreads over all problems."""
        text = []
        for method in self.methods:
            rows, distances, seeds = [], [], list[Seed]()
            for problem in self.problems:
                found = [*self._seeds(results, problem, method)]
                if found:
                    rows.append(_row(problem, found))
                    distances.append(fmean(each.own - each.best for each in found))
                    seeds += found
            if rows:
                text += [
                    f"**`{method}`**",
                    titled(rows),
                    f"On average {-100 * fmean(distances):.1f} points behind hindsight, at most "
                    f"{-100 * min(distances):.1f}. {_spreads(seeds)}",
                ]
        return Page("\n\n".join([*text, results.place()]))

    def _seeds(self, results: Results, problem: str, method: str) -> Iterator[Seed]:
        """What was found of a problem, seed by seed, where all of it was."""
        for seed in range(self.seeds):
            cell = self._cell(problem, method, seed)
            lam = chosen(results, self._oracle(results, cell))
            needed = [{**self._cell(problem, "finetune", seed), "lam": None}]
            needed += [{**cell, "lam": each} for each in ("auto", "unit")]
            if lam is None or not all(each in results for each in needed):
                continue
            finetuned, automatic, unit = (results[each] for each in needed)
            # online EWC calls lam what is twice that of the penalty.
            factor = 0.5 if method == "online-ewc" else 1.0
            tried = {
                factor * float(other["lam"]): found["average_accuracy"]
                for other, found in results.where(**cell)
                if isinstance(other["lam"], float | int) and "average_accuracy" in found
            }
            yield Seed(
                finetuned["average_accuracy"],
                automatic["average_accuracy"],
                factor * lam,
                tried,
                [each for each in automatic["chosen_lam"] if each is not None],
                unit["energy"] / unit["loss"],
            )


class Seed(NamedTuple):
    """What was found of a problem and a method with one seed.

    plain, own: average accuracy of fine-tuning, and with lam "auto". lam: the best one in hindsight. tried:
    accuracy by lam. chosen: for each task after the first, the geometric mean of its choice and those before.
    per_loss: what the penalty at lam 1 comes to, over the loss.
    """

    plain: float
    own: float
    lam: float
    tried: Mapping[float, float]
    chosen: Sequence[float]
    per_loss: float

    @property
    def best(self) -> float:
        """Average accuracy with the best lam in hindsight."""
        return self.tried[self.lam]

    def as_good(self, points: float) -> list[float]:
        """The lam with which accuracy is at most so many points below the best."""
        return [lam for lam, found in self.tried.items() if found >= self.best - points / 100]


def _row(problem: str, seeds: Sequence[Seed]) -> dict[str, str]:
    """A line of the table."""
    taken = [lam for seed in seeds for lam in seed.chosen]
    return {
        "problem": problem,
        "fine-tuning, %": percent([seed.plain for seed in seeds], 1),
        "auto, %": percent([seed.own for seed in seeds], 1),
        "hindsight, %": percent([seed.best for seed in seeds], 1),
        "lam, auto": f"{min(taken):.2g} to {max(taken):.2g}",
        "lam, hindsight": ", ".join(number(seed.lam) for seed in seeds),
        "in units of the loss": ", ".join(number(seed.lam * seed.per_loss) for seed in seeds),
        "in units of the choice": ", ".join(number(seed.lam / seed.chosen[-1]) for seed in seeds),
    }


def _spreads(seeds: Sequence[Seed]) -> str:
    """How far the best lam of the problems, and others as good, lie apart, raw and in units."""

    def told(points: float) -> str:
        units: tuple[Callable[[Seed], float], ...] = (
            lambda seed: 1.0,
            lambda seed: seed.per_loss,
            lambda seed: 1 / seed.chosen[-1],
        )
        raw, loss, choice = (
            _decades([[unit(seed) * lam for lam in seed.as_good(points)] for seed in seeds])
            for unit in units
        )
        return f"{raw:.1f} decades, in units of the loss {loss:.1f}, in units of the last choice {choice:.1f}"

    return f"The best lam spans {told(0)}; one within half a point of it {told(0.5)}."


def _decades(sets: Sequence[Sequence[float]]) -> float:
    """The fewest decades within which there is a value of every set."""
    values = sorted((math.log10(value), i) for i, values in enumerate(sets) for value in values)
    spans = []
    for start, (low, _) in enumerate(values):
        missing = {*range(len(sets))}
        for high, i in values[start:]:
            missing.discard(i)
            if not missing:
                spans.append(high - low)
                break
    return min(spans)
