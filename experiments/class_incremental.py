"""Class-incremental without old images: half of the classes at once, then the others in small groups."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.comparison import Comparison, Variant
from experiments.experiment import Results
from experiments.learned import by_decades, lam_option, matrix
from experiments.tables import percent
from mas_ext.comparison.cells import Cell, Found
from mas_ext.comparison.options import FIRST_WEIGHTS, Config
from mas_ext.comparison.sweep import train
from mas_ext.methods import MAS, Method, Setting, Training
from mas_ext.methods.ewc import EWCDR
from mas_ext.methods.finetune import Finetune
from mas_ext.methods.lwf import LwF
from mas_ext.methods.quadratic import MeanOverOutputs
from mas_ext.models import MultiHead, residual
from mas_ext.scenarios import Scenario, Task, Tensors
from mas_ext.scenarios import datasets as data
from mas_ext.scenarios.named import standardised
from mas_ext.trainer import Trainer
from mas_ext.training.run import Result
from mas_ext.training.settings import Settings

BASE = Config.read(
    {
        "scenario": "split-cifar100",
        "optimizer": "sgd",
        "lr": 0.1,
        "epochs": 4,
        "batch_size": 16,
        "schedule": "cosine",
        "amp": "bfloat16",
        "methods": ["finetune"],
    }
)


class NewOutputs(Method):
    """The task loss is over the new classes alone, as in the code of EWC-DR's authors."""

    def loss(self, training: Training, x: Tensor, y: Tensor) -> Tensor:
        return training.new_task_loss(training.logits(x), y)


class NewFinetune(NewOutputs, Finetune):
    """Fine-tuning of the new classes alone."""


class MeanMAS(NewOutputs, MeanOverOutputs, MAS):
    """MAS with the mean importance over classes."""


class MeanEWC(NewOutputs, EWCDR):
    """EWC and EWC-DR with the mean importance over classes."""


# The proximal form minimises the same as the gradient form, and does not diverge.
PROXIMAL: dict[str, Any] = {"mode": "proximal"}
MAKE: dict[str, Callable[..., Method]] = {
    "finetune": NewFinetune,
    "mas": functools.partial(MeanMAS, **PROXIMAL),
    "mas, by batch": functools.partial(MeanMAS, importance="batch", **PROXIMAL),
    "ewc": functools.partial(MeanEWC, labels="true", at_most=None, **PROXIMAL),
    "ewc, by batch": functools.partial(
        MeanEWC, labels="true", at_most=None, importance="batch", **PROXIMAL
    ),
    "ewc-dr": functools.partial(MeanEWC, **PROXIMAL),
    "ewc-dr, by batch": functools.partial(MeanEWC, importance="batch", **PROXIMAL),
    "lwf": LwF,
}


# Where the search for lam begins.
STARTS = {
    "mas": 0.1,
    "mas, by batch": 0.1,
    "ewc": 100.0,
    "ewc, by batch": 1000.0,
    "ewc-dr": 10000.0,
    "ewc-dr, by batch": 10000.0,
    "lwf": 1.0,
}

_PRETRAINED: dict[str, MultiHead] = {}


@dataclass(frozen=True)
class ClassIncremental(Comparison):
    """MAS, EWC, EWC-DR and LwF on one large task and small ones after it, with all classes side by side.

    classes: how many there are; first, later: of the first task and of each later one. pretraining: epochs of
    the first task, which all methods have in common.
    """

    title: ClassVar[str] = "Class-incremental without old images"
    name: ClassVar[str] = "class-incremental"
    automatic: ClassVar[Sequence[Variant]] = ()
    score: ClassVar[str] = "validation_by_class"
    base: Config = BASE
    settings: tuple[Setting, ...] = ("class",)
    variants: Sequence[Variant] = tuple(
        Variant(name, {}, None if name == "finetune" else name) for name in MAKE
    )
    classes: int = 50
    first: int = 25
    later: int = 5
    pretraining: int = 15
    max_samples: int | None = 1000
    seeds: int = 3

    def quick(self) -> ClassIncremental:
        """Six digits, then two at a time, one seed, few methods."""
        base = replace(self.base, scenario="split-digits")
        few = [v for v in self.variants if v.method in ("finetune", "mas", "ewc-dr")]
        small: dict[str, Any] = {
            "classes": 10,
            "first": 6,
            "later": 2,
            "pretraining": 8,
            "data": None,
        }
        return replace(self, base=base, variants=few, seeds=1, **small)

    def protocol(self) -> dict[str, Any]:
        sizes = {"classes": self.classes, "first": self.first, "later": self.later}
        told = {"model": "resnet8 of 8, 16 and 32 channels", "pretraining": self.pretraining}
        return {**super().protocol(), **told, **sizes}

    def scenario(self, seed: int) -> Scenario:
        """The classes in an order of the seed, images of 16 x 16 pixels (digits: 8 x 8)."""
        name = {"split-cifar100": "cifar100", "split-digits": "digits"}[str(self.base.scenario)]
        train, test = images(name, self.data)
        generator = torch.Generator().manual_seed(seed)
        classes = torch.randperm(int(train.y.max()) + 1, generator=generator)[: self.classes]
        groups = [classes[: self.first], *classes[self.first :].split(self.later)]

        def task(number: int, group: Tensor) -> Task:
            own = [part.subset(torch.isin(part.y, group)) for part in (train, test)]
            return Task(str(number), own[0], own[1], tuple(sorted(group.tolist())))

        return Scenario(tuple(task(number, group) for number, group in enumerate(groups)), name)

    def choice(
        self, results: Results, training: Cell | None
    ) -> Generator[Cell, None, float | None]:
        """Choose the lam of a training from where a trial suggested, by decades."""
        if training is None:
            return None
        start = STARTS[training["method"]]
        return (yield from by_decades(results, training, (start, start), self.score))

    def method(self, cell: Cell) -> Method:
        given = lam_option(cell["lam"])
        estimated = cell["method"] not in ("finetune", "lwf")
        samples = {"max_samples": self.max_samples} if estimated else {}
        return MAKE[cell["method"]](**given, **samples)

    def measure(self, cell: Cell) -> Found:
        scenario = self.scenario(cell["seed"])
        settings = replace(self.base.training(cell["seed"], cell["purpose"]), setting="class")
        results: list[Result] = []

        def keep(news: object) -> None:
            if isinstance(news, Result):
                results[:] = [news]

        epochs = settings.epochs_of(len(scenario.tasks))
        later = replace(settings, epochs=[0, *epochs[1:]])
        model = self.pretrained(scenario, settings)
        found = train(model, self.method(cell), scenario, later, callbacks=[keep])
        if "diverged" not in found:
            sizes = torch.tensor([len(task.classes) for task in scenario.tasks])
            found[self.score] = _by_class(results[-1].validation[-1], sizes)
            found["by_class"] = [
                _by_class(row[: t + 1], sizes[: t + 1])
                for t, row in enumerate(results[-1].accuracy)
            ]
        return found

    def pretrained(self, scenario: Scenario, settings: Settings) -> MultiHead:
        """A network that has learned the first task, once for all methods with these settings."""
        first = replace(settings, epochs=self.pretraining)
        key = json.dumps([self.protocol(), self.data, first.described()])
        if key not in _PRETRAINED:
            with torch.random.fork_rng([]):
                torch.manual_seed(settings.seed + FIRST_WEIGHTS)
                backbone = residual.small(scenario.shape[0], (8, 16, 32), 1, residual.Padded)
            network = MultiHead(backbone, 32)
            Trainer(network, Finetune(), **vars(first)).fit(Scenario(scenario.tasks[:1]))
            _PRETRAINED[key] = network
        return copy.deepcopy(_PRETRAINED[key])

    def columns(
        self, setting: Setting, variant: Variant, founds: Sequence[Found]
    ) -> dict[str, str]:
        """Over all classes at the end, and the mean of that over tasks; of the first task and of new ones."""
        matrices = [matrix(found) for found in founds]
        by_class = [found["by_class"] for found in founds]
        return {
            "all classes at the end, %": percent([each[-1] for each in by_class]),
            "mean over tasks, %": percent([sum(each) / len(each) for each in by_class]),
            "first task before, %": percent([float(m[0, 0]) for m in matrices]),
            "first task at the end, %": percent([float(m[-1, 0]) for m in matrices]),
            "new tasks when new, %": percent([float(m.diagonal()[1:].mean()) for m in matrices]),
        }


def _by_class(accuracy: Tensor, sizes: Tensor) -> float:
    """The mean over tasks, weighted by their numbers of classes."""
    return float((accuracy * sizes).sum() / sizes.sum())


@functools.lru_cache(maxsize=1)
def images(name: str, folder: str | None) -> tuple[Tensors, Tensors]:
    """Standardised images of a data set to train and to test on, those of CIFAR-100 at half their size."""
    train, test = data.load_dataset(name, folder)
    both = Scenario((Task("all", train, test, classes=tuple(train.y.unique().tolist())),))
    (task,) = standardised(both).tasks

    def shrunk(part: Any) -> Tensors:
        x, y = part.batch(torch.arange(len(part)))
        return Tensors(F.avg_pool2d(x, 2) if x.shape[-1] == 32 else x, y)

    return shrunk(task.train), shrunk(task.test)
