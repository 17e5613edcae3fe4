"""What is kept with importance from unlabelled data, and from only the part of them that will be met again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from experiments.experiment import Experiment, Page, Results
from experiments.learned import importance_of_head
from experiments.tables import percent, titled
from mas_ext.comparison.cells import Cell, Found
from mas_ext.comparison.charts import canvas, legend, look
from mas_ext.comparison.options import Config
from mas_ext.methods.finetune import Finetune
from mas_ext.methods.mas import MAS
from mas_ext.methods.method import Training
from mas_ext.models import MultiHead
from mas_ext.scenarios import Scenario, Tensors, from_datasets
from mas_ext.scenarios import datasets as data
from mas_ext.scenarios.named import permuted
from mas_ext.trainer import Trainer

BASE = Config.read({"hidden": [100, 100], "lr": 1e-3, "epochs": 3, "methods": ["mas"]})

SOURCES = {
    "training data": "labelled training data, without the labels",
    "test data": "other unlabelled data",
    "part": "only the samples of the part",
}


class Images(NamedTuple):
    """Samples of the first task: x (N, 1, H, W), y (N,), and which are of the part, (N,) bool."""

    x: Tensor
    y: Tensor
    part: Tensor


def two_classes(x: Tensor, y: Tensor, generator: torch.Generator) -> Images:
    """Two digits of ten."""
    digits = torch.randperm(10, generator=generator)[:2]
    return Images(x, y, torch.isin(y, digits))


def slanted(x: Tensor, y: Tensor, generator: torch.Generator) -> Images:
    """A way of writing: the third of the digits that leans most to the right, by second moments."""
    weight = x[:, 0] / x[:, 0].sum((1, 2), keepdim=True)
    down, right = (torch.arange(n, dtype=x.dtype) for n in x.shape[2:])
    across, along = (weight.sum(1) * right).sum(1), (weight.sum(2) * down).sum(1)
    from_left, from_top = right - across[:, None], down - along[:, None]
    mixed = torch.einsum("nij,ni,nj->n", weight, from_top, from_left)
    slant = -mixed / torch.einsum("nij,ni->n", weight, from_top.square())
    return Images(x, y, slant > slant.quantile(2 / 3))


def inverted(x: Tensor, y: Tensor, generator: torch.Generator) -> Images:
    """A corruption: half of the images are black on white."""
    part = torch.rand(len(x), generator=generator) < 0.5
    return Images(torch.where(part[:, None, None, None], 1 - x, x), y, part)


PARTS: dict[str, Callable[[Tensor, Tensor, torch.Generator], Images]] = {
    "two classes": two_classes,
    "slanted": slanted,
    "inverted": inverted,
}


class GivenImportance(MAS):
    """MAS of later tasks, with an importance that is given.

    It is scaled to a total strength: only what is important differs.
    """

    def __init__(self, lam: float, importance: Mapping[str, Tensor], strength: float) -> None:
        super().__init__(lam)
        scale = strength / total(importance)
        self.given = {name: scale * each for name, each in importance.items()}

    def begin_task(self, training: Training) -> None:
        if training.task == 0:
            self.penalty = self.build(training.model, training.own_parameters)
            self.penalty.consolidate(importance=self.given)
        else:
            super().begin_task(training)

    def end_task(self, training: Training) -> None:
        """The last task: there is nothing to consolidate for."""


@dataclass(frozen=True)
class Adaptivity(Experiment):
    """Accuracy on a part of the first task and on the rest of it, after a second one, by source of importance.

    base: network and training. samples: of a task, to train on. digits: scikit-learn's, then the same with
    their pixels mixed, instead of MNIST, then Fashion-MNIST.
    """

    title: ClassVar[str] = "Unlabelled data and adaptivity"
    base: Config = BASE
    samples: int = 10_000
    lams: tuple[float, ...] = (1e-1, 1e0, 1e1, 1e2, 1e3)
    digits: bool = False

    def quick(self) -> Adaptivity:
        """The digits of scikit-learn, one strength and seed."""
        return replace(self, digits=True, lams=(1.0,), seeds=1, data=None)

    def data_sets(self) -> tuple[str, ...]:
        return ("digits",) if self.digits else ("mnist", "fashion-mnist")

    def protocol(self) -> dict[str, Any]:
        values = self.base.values()
        names = ("hidden", "optimizer", "lr", "epochs", "batch_size")
        own = {"samples": self.samples, "lams": self.lams, "digits": self.digits}
        return {**{name: values[name] for name in names}, **own}

    def plan(self, results: Results) -> Iterator[Cell]:
        """Every part with one seed, then with two, ..."""
        for seed in range(self.seeds):
            for part in PARTS:
                yield {"part": part, "seed": seed}

    def measure(self, cell: Cell) -> Found:
        """Every source and strength, after the same first task."""
        seed = cell["seed"]
        first, second, met, tested = self.tasks(cell["part"], seed)
        settings = self.base.training(seed, "final")
        scenario = from_datasets([(Tensors(first.x, first.y), Tensors(tested.x, tested.y)), second])
        learned = self.base.network(scenario, seed)
        Trainer(learned, Finetune(), **vars(settings)).fit(Scenario(scenario.tasks[:1]))
        sources = {"training data": first.x, "test data": met.x, "part": met.x[met.part]}
        omegas = {
            source: importance_of_head(learned, 0, x.split(100)) for source, x in sources.items()
        }
        found, strength = [], total(omegas["training data"])
        for source, lam in self._variants():
            method = GivenImportance(lam, omegas[source or "training data"], strength)
            model, epochs = copy.deepcopy(learned), [0, *settings.epochs_of(1)]
            result = Trainer(model, method, **{**vars(settings), "epochs": epochs}).fit(scenario)
            after = {"after": shares(model, tested), "new": result.accuracy[1, 1]}
            found.append({"source": source, "lam": lam, **after})
        return {"before": shares(learned, tested), "variants": found}

    def rows(
        self, results: Results, part: str, source: str | None, lam: float
    ) -> list[dict[str, float]]:
        """Accuracies of a variant, by seed."""
        return [
            {
                "part before": found["before"]["part"],
                "rest before": found["before"]["rest"],
                "part kept": each["after"]["part"],
                "rest kept": each["after"]["rest"],
                "new task": each["new"],
            }
            for _, found in results.where(part=part)
            for each in found["variants"]
            if each["source"] == source and each["lam"] == lam
        ]

    def tasks(self, part: str, seed: int) -> tuple[Images, tuple[Tensors, Tensors], Images, Images]:
        """The first task's images to learn; the second task; the first's for importance, and to test on."""
        train, test = data.load_dataset("digits" if self.digits else "mnist", self.data)
        if self.digits:
            (_, mixed) = permuted(train, test, 2, seed).tasks
            second: Any = mixed.train, mixed.test
        else:
            second = data.load_dataset("fashion-mnist", self.data)
        generator = torch.Generator().manual_seed(seed)

        def some(tensors: Tensors, n: int | None = None) -> tuple[Tensor, Tensor]:
            return tensors.batch(torch.randperm(len(tensors), generator=generator)[:n])

        x, y = some(train, self.samples)
        new = Tensors(*some(second[0], self.samples)), second[1]
        seen, labels = some(test)
        # One way to make the part for all of them: the same two digits, the same slant.
        whole = PARTS[part](torch.cat([x, seen]), torch.cat([y, labels]), generator)
        ends = [len(x), len(seen) // 2, len(seen) - len(seen) // 2]
        first, met, tested = (
            Images(*parts) for parts in zip(*(each.split(ends) for each in whole), strict=True)
        )
        return first, new, met, tested

    def show(self, results: Results) -> Page:
        """Tables for each part: at lam 1, as in the paper, and differences; a picture of all strengths."""
        text = []
        for part in PARTS:
            rows = []
            for source, lam in self._variants():
                found = self.rows(results, part, source, lam)
                if found and lam in (0.0, 1.0):
                    name = "none" if source is None else f"{source}, lam {lam:g}"
                    means = {
                        f"{key}, %": percent([each[key] for each in found]) for key in found[0]
                    }
                    rows.append({"importance from": name, **means, "seeds": str(len(found))})
            if rows:
                text += [f"**{part}**", titled(rows), self._differences(results, part)]
        text += [results.place(), "![kept of the part and of the rest](adaptivity.svg)"]
        return Page("\n\n".join(text), {"adaptivity.svg": self._picture(results)})

    def _differences(self, results: Results, part: str) -> str:
        """Accuracies with importance from a source minus those from training data, paired by seed."""
        rows = []
        for source in ("test data", "part"):
            for key in ("part kept", "rest kept", "new task"):
                row = {"minus training data, % points": source, "of": key}
                for lam in self.lams:
                    own, other = (
                        self.rows(results, part, each, lam) for each in (source, "training data")
                    )
                    pairs = zip(own, other, strict=True)
                    row[f"lam {lam:g}"] = percent([a[key] - b[key] for a, b in pairs])
                rows.append(row)
        return titled(rows)

    def _variants(self) -> list[tuple[str | None, float]]:
        return [(None, 0.0), *((source, lam) for lam in self.lams for source in SOURCES)]

    def _picture(self, results: Results) -> Any:
        """By part: accuracy lost on it against that on the rest, one point per strength."""
        figure, panels = canvas(len(PARTS), 1, 2.6)
        for panel, part in zip(panels, PARTS, strict=True):
            for i, source in enumerate(SOURCES):
                points = []
                for lam in self.lams:
                    if found := self.rows(results, part, source, lam):
                        lost = [
                            [each[f"{k} before"] - each[f"{k} kept"] for k in ("rest", "part")]
                            for each in found
                        ]
                        points.append(100 * torch.tensor(lost).mean(0))
                if points:
                    panel.plot(*torch.stack(points).T, label=source, **look(i))
            panel.axline((0, 0), slope=1, color="grey", linewidth=0.8)
            panel.set_title(part, fontsize="medium")
        legend(figure, panels[0], 3)
        figure.supxlabel("lost on the rest, % points", fontsize="medium")
        figure.supylabel("lost on the part, % points", fontsize="medium")
        return figure


def total(omega: Mapping[str, Tensor]) -> float:
    """The sum of all importance."""
    return sum(float(each.double().sum()) for each in omega.values())


@torch.no_grad()
def shares(model: MultiHead, images: Images) -> dict[str, float]:
    """Accuracy of the first head on the part and on the rest."""
    model.eval()
    right = (model(images.x, 0).argmax(1) == images.y).double()
    return {"part": float(right[images.part].mean()), "rest": float(right[~images.part].mean())}
