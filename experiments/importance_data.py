"""Which data importance may come from where the old ones are gone, and whether BatchNorm may learn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from experiments import cifar
from experiments.experiment import Cell, Experiment, Found, Page, Results
from experiments.learned import fewer, lam_option, matrix
from experiments.tables import number, percent, titled
from mas_ext.comparison.sweep import train
from mas_ext.methods import create
from mas_ext.models import mlp
from mas_ext.scenarios import Scenario, Tensors, from_datasets, split
from mas_ext.scenarios import datasets as data
from mas_ext.trainer import Trainer
from mas_ext.training.settings import Settings

DATA = {
    "old": "images of the old task",
    "new": "images of the new task",
    "noise": "noise, of each pixel's own distribution",
}
STATISTICS = {True: "as they were", False: "learned, too"}
LEARNING = Settings(epochs=[0, 4], batch_size=32, lr=1e-3, amp="bfloat16")


@dataclass(frozen=True)
class ImportanceData(Experiment):
    """A network that was trained elsewhere learns one more task; only what MAS sees of the old one differs.

    samples: that importance is taken from. lams: strengths. digits: on digits, with a network trained here.
    """

    title: ClassVar[str] = "Which data importance may come from"
    seeds: int = 3
    samples: int = 500
    lams: tuple[float, ...] = (0.01, 1.0, 100.0)
    digits: bool = False

    def quick(self) -> ImportanceData:
        """Digits, the first five before, one seed."""
        return replace(self, digits=True, seeds=1, lams=self.lams[:2], data=None)

    def data_sets(self) -> tuple[str, ...]:
        return ("digits",) if self.digits else ("cifar10-test", "cifar100", "resnet20")

    def protocol(self) -> dict[str, Any]:
        return {"model": "mlp" if self.digits else "resnet20, pretrained", "samples": self.samples}

    def plan(self, results: Results) -> Iterator[Cell]:
        """Every seed without a penalty, then by the data, and by the old data with BatchNorm learning."""
        for seed in range(self.seeds):
            for kept in STATISTICS:
                yield {"data": None, "statistics": kept, "lam": None, "seed": seed}
            for name in DATA:
                for kept in STATISTICS if name == "old" else (True,):
                    for lam in self.lams:
                        yield {"data": name, "statistics": kept, "lam": lam, "seed": seed}

    def measure(self, cell: Cell) -> Found:
        known, new = self._tasks(cell["seed"])
        seen = self._seen(cell, known, new)
        first = replace(known.tasks[0], train=seen)
        if self.digits:
            with torch.random.fork_rng([]):
                torch.manual_seed(cell["seed"])
                network = mlp(known.shape)
            Trainer(network, "finetune", epochs=20, seed=cell["seed"]).fit(known)
        else:
            network = cifar.trained(self.data)
        network.keep_statistics = cell["statistics"]
        method = create("finetune" if cell["data"] is None else "mas", **lam_option(cell["lam"]))
        settings = replace(LEARNING, seed=cell["seed"], amp=None if self.digits else LEARNING.amp)
        return train(network, method, Scenario((first, new)), settings)

    def _tasks(self, seed: int) -> tuple[Scenario, Any]:
        """The task that the network knows, and the one that it learns."""
        if self.digits:
            both = split(*data.load_dataset("digits"), 2)
            return Scenario(both.tasks[:1]), both.tasks[1]
        images = cifar.unseen(self.data)
        index = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        parts = images.subset(index[: self.samples]), images.subset(index[self.samples :])
        return from_datasets([parts], ["cifar10"]), cifar.groups(self.data).tasks[0]

    def _seen(self, cell: Cell, known: Scenario, new: Any) -> Tensors:
        """What importance is taken from, with labels that nothing reads."""
        task = new if cell["data"] == "new" else known.tasks[0]
        few = fewer(Scenario((task,)), self.samples, seed=cell["seed"]).tasks[0].train
        assert isinstance(few, Tensors)
        x, _ = few.batch(torch.arange(len(few)))
        if cell["data"] == "noise":
            generator = torch.Generator().manual_seed(cell["seed"])
            x = x.mean(0) + x.std(0) * torch.randn(x.shape, generator=generator)
        classes = torch.tensor(known.tasks[0].classes)
        return Tensors(x, classes[torch.arange(len(x)) % len(classes)])

    def show(self, results: Results) -> Page:
        """The old and the new task at the end, by data and lam."""
        rows = []
        for cell in (cell for cell in self.plan(results) if cell["seed"] == 0):
            found = results.by_seed(**{n: v for n, v in cell.items() if n != "seed"})
            ends = [matrix(found[seed])[-1].tolist() for seed in sorted(found)]
            name = "no penalty" if cell["data"] is None else DATA[cell["data"]]
            rows.append(
                {
                    "importance from": name,
                    "BatchNorm's statistics": STATISTICS[cell["statistics"]],
                    "lam": number(cell["lam"]),
                    "old task, %": percent([old for old, _ in ends], 1),
                    "new task, %": percent([new for _, new in ends], 1),
                }
            )
        text = f"Mean and 95 % interval over {self.seeds} seeds. {results.place()}"
        return Page(f"{titled(rows)}\n\n{text}")
