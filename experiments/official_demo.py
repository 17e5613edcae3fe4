"""The demo that came with the MAS authors' code: digits in pairs, SGD, lam = 1."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from experiments.experiment import Experiment, Page, Results
from experiments.learned import matrix, trained
from experiments.tables import percent, table
from mas_ext.comparison.cells import Cell, Found
from mas_ext.comparison.charts import canvas, legend, look
from mas_ext.comparison.options import Config
from mas_ext.importance import estimate_importance
from mas_ext.methods.finetune import Finetune
from mas_ext.methods.mas import MAS
from mas_ext.methods.method import Method, Training
from mas_ext.scenarios import Scenario, Tensors, from_datasets
from mas_ext.scenarios import datasets as data
from mas_ext.scenarios.named import standardised
from mas_ext.training.settings import MakeOptimizer

PAIRS = ((1, 2), (3, 4), (5, 6), (7, 8), (9, 0))
NAMES = ["/".join(map(str, pair)) for pair in PAIRS]


class Variant(NamedTuple):
    """How W is made, how importance is estimated (None: fine-tuning), the learning rate of later tasks."""

    omega: str
    importance: str | None
    later_lr: float

    def __str__(self) -> str:
        return "fine-tuning" if self.importance is None else f"{self.omega}, {self.importance}"


# What Demo.ipynb in the authors' repository prints: accuracy on each task after the last, and forgetting, in %.
PUBLISHED = {
    Variant("re-estimated", "batch", 1e-2): ((99.40, 99.80, 98.43, 99.20, 99.50), 0.083),
    Variant("accumulated", "batch", 1e-3): ((99.49, 99.65, 98.00, 98.10, 99.04), 0.071),
}
VARIANTS = (
    *PUBLISHED,
    Variant("re-estimated", "exact", 1e-2),
    Variant("accumulated", "exact", 1e-3),
    Variant("accumulated", "batch", 1e-2),
    Variant("none", None, 1e-2),
    Variant("none", None, 1e-3),
)
BASE = Config.read(
    {
        "hidden": [256, 256],
        "optimizer": "sgd",
        "lr": 0.01,
        "epochs": [10, 20, 20, 20, 20],
        "batch_size": 150,
        "methods": ["mas"],
    }
)


def paced(later_lr: float) -> MakeOptimizer:
    """SGD with momentum, at the learning rate of the first task and then at another one."""
    tasks = itertools.count()

    def make(parameters: Iterable[nn.Parameter], lr: float) -> Optimizer:
        return torch.optim.SGD(parameters, later_lr if next(tasks) else lr, momentum=0.9)

    return make


class Reestimated(MAS):
    """W is estimated again after every task, at the present weights, on the data of all tasks so far."""

    def begin_task(self, training: Training) -> None:
        super().begin_task(training)
        if training.task == 0:
            self._kept: list[tuple[int | None, list[tuple[Tensor, Tensor]]]] = []

    def end_task(self, training: Training) -> None:
        """W = sum over tasks of the mean over its samples, each by its own head."""
        self._kept.append((training.head, list(training.batches(None))))
        total: dict[str, Tensor] = {}
        own = training.own_parameters
        for head, batches in self._kept:
            self._head = head
            task = estimate_importance(
                training.model, batches, self.importance, self.objective, self.forward, exclude=own
            )
            total = {name: omega + total.get(name, 0) for name, omega in task.items()}
        self.penalty = self.build(training.model, own)
        self.penalty.consolidate(importance=total)


# By how W is made; accumulated as in the paper, W = sum of Omega_t.
METHODS: dict[str, type[Method]] = {
    "re-estimated": Reestimated,
    "accumulated": MAS,
    "none": Finetune,
}


@dataclass(frozen=True)
class OfficialDemo(Experiment):
    """Mean accuracy and forgetting with importance re-estimated on all data, and accumulated.

    base: how it is learned. dataset: of digits.
    """

    title: ClassVar[str] = "The official demo"
    base: Config = BASE
    dataset: str = "mnist"

    def quick(self) -> OfficialDemo:
        """The digits of scikit-learn, one seed."""
        settings = replace(self.base.settings, epochs=[2, 2, 2, 2, 2], batch_size=32)
        base = replace(self.base, settings=settings)
        return replace(self, base=base, dataset="digits", seeds=1, data=None)

    def data_sets(self) -> tuple[str, ...]:
        return (self.dataset,)

    def protocol(self) -> dict[str, Any]:
        names = ("hidden", "optimizer", "epochs", "batch_size")
        values = self.base.values()
        return {"dataset": self.dataset, **{name: values[name] for name in names}}

    def plan(self, results: Results) -> Iterator[Cell]:
        """The authors' two and what they are compared with, with one seed, then with the next."""
        for seed in range(self.seeds):
            for variant in VARIANTS:
                yield {**variant._asdict(), "seed": seed}

    def measure(self, cell: Cell) -> Found:
        options = {} if cell["importance"] is None else {"importance": cell["importance"]}
        method = METHODS[cell["omega"]](**options)
        settings = replace(self.base.settings, optimizer=paced(cell["later_lr"]))
        return trained(replace(self.base, settings=settings), self.scenario(), method, cell["seed"])

    def scenario(self) -> Scenario:
        """The digits in the authors' pairs."""
        train, test = data.load_dataset(self.dataset, self.data)

        def of(pair: tuple[int, int], part: Tensors) -> Tensors:
            return part.subset(torch.isin(part.y, torch.tensor(pair)))

        pairs = [(of(pair, train), of(pair, test)) for pair in PAIRS]
        return standardised(from_datasets(pairs, NAMES))

    def show(self, results: Results) -> Page:
        """A table, and a picture of accuracy by task."""
        titles = (
            "W",
            "later lr",
            "accuracy, %",
            "theirs",
            "forgetting, % points",
            "theirs",
            "seeds",
        )
        rows, seeds = [], 0
        for variant in VARIANTS:
            if matrices := self.matrices(results, variant):
                seeds = max(seeds, len(matrices))
                last, forgotten = PUBLISHED.get(variant, ((), None))
                rows.append(
                    (
                        str(variant),
                        f"{variant.later_lr:g}",
                        percent([float(m[-1].mean()) for m in matrices]),
                        f"{sum(last) / len(last):.2f}" if last else "",
                        percent([float((m.diagonal() - m[-1]).mean()) for m in matrices], 3),
                        "" if forgotten is None else f"{forgotten:.3f}",
                        str(len(matrices)),
                    )
                )
        text = [
            table(titles, rows),
            f"Mean and 95 % interval over {seeds} of {self.seeds} seeds. {results.place()}",
            "![accuracy by task](official-demo.svg)",
        ]
        return Page("\n\n".join(text), {"official-demo.svg": self._by_task(results)})

    def matrices(self, results: Results, variant: Variant) -> list[Tensor]:
        """accuracy[t, k] of every seed that did not diverge."""
        return [matrix(found) for found in results.by_seed(**variant._asdict()).values()]

    def _by_task(self, results: Results) -> Any:
        """Accuracy on each task after the last one; hollow when it was new; crosses: theirs."""
        figure, (panel,) = canvas(1, 1, 3.6)
        for i, variant in enumerate(VARIANTS):
            if matrices := self.matrices(results, variant):
                mean = 100 * torch.stack(matrices).mean(0)
                x = torch.arange(len(PAIRS)) + 0.1 * (i - len(VARIANTS) / 2 + 0.5)
                how = {**look(i), "linestyle": ""}
                panel.plot(x, mean[-1], label=f"{variant}, lr {variant.later_lr:g}", **how)
                panel.plot(x, mean.diagonal(), **how, markerfacecolor="none")
                if variant in PUBLISHED:
                    panel.plot(x, PUBLISHED[variant][0], "x", color="black", markersize=7)
        panel.set_xticks(range(len(PAIRS)), NAMES)
        panel.set(xlabel="task", ylabel="accuracy in %")
        legend(figure, panel, 3)
        return figure
