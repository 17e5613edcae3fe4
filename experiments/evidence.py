"""What decides whether a method has a property: one class per property, on data that everyone has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean, stdev
from typing import Any, ClassVar

import torch
from torch import Tensor

from experiments.learned import lam_option
from experiments.regression import VARIANTS, Regression
from experiments.tables import percent
from mas_ext.comparison.cells import Found
from mas_ext.methods import Method, Training, create
from mas_ext.methods.finetune import Finetune
from mas_ext.metrics import interval_text, mean_interval
from mas_ext.models import MultiHead, mlp
from mas_ext.scenarios import Scenario, Tensors
from mas_ext.scenarios import datasets as data
from mas_ext.scenarios.named import make_scenario, permuted, standardised
from mas_ext.trainer import Trainer

BATCH = 32
HIDDEN = (100, 100)


class Property(ABC):
    """A column of the table.

    title: of the column. evidence: what its cells show. references: methods measured in addition to those of
    the table. strengths: whether every lam is tried, and the best one, by `score`, decides.
    """

    title: ClassVar[str]
    evidence: ClassVar[str]
    references: ClassVar[tuple[str, ...]] = ()
    strengths: ClassVar[bool] = True

    def make(self, name: str, lam: float | None) -> Method:
        """The method, with its default lam where that is None."""
        return create(name, **lam_option(lam))

    @abstractmethod
    def measure(self, make: Callable[[], Method], seed: int) -> Found:
        """The evidence of one seed, by methods made anew for every training."""

    def score(self, found: Found) -> float:
        """The quantity that the best lam has most of."""
        return float(found["kept"] + found["new"])

    @abstractmethod
    def holds(self, founds: Sequence[Found], references: Mapping[str, Sequence[Found]]) -> bool:
        """Whether a method has the property, by its evidence and that of the references, one entry per seed."""

    @abstractmethod
    def shown(self, founds: Sequence[Found]) -> str:
        """The evidence in words."""


class Memory(Property):
    """The memory kept after five tasks is at most a tenth more than after two: that of new heads alone."""

    title = "constant memory"
    evidence = "held after five tasks over held after two"
    strengths = False

    def measure(self, make: Callable[[], Method], seed: int) -> Found:
        return {
            "held": fit(network(seed), make(), make_scenario("split-digits"), 1, seed).held_bytes
        }

    def holds(self, founds: Sequence[Found], references: Mapping[str, Sequence[Found]]) -> bool:
        return all(found["held"][-1] <= 1.1 * found["held"][1] for found in founds)

    def shown(self, founds: Sequence[Found]) -> str:
        return f"{fmean(found['held'][-1] / found['held'][1] for found in founds):.2f}"


class Agnostic(Property):
    """Where outputs are no classes, less than half of what fine-tuning forgets is forgotten."""

    title = "problem agnostic"
    evidence = "error of five regressions, % of the variance"
    references = ("finetune",)

    def make(self, name: str, lam: float | None) -> Method:
        return VARIANTS[name].make(**lam_option(lam))

    def measure(self, make: Callable[[], Method], seed: int) -> Found:
        experiment = Regression(samples=400, epochs=30, batch_size=50)
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            return {"error": fmean(experiment.learn(make())["error"][-1])}

    def score(self, found: Found) -> float:
        return -float(found["error"])

    def holds(self, founds: Sequence[Found], references: Mapping[str, Sequence[Found]]) -> bool:
        own, tuned = (fmean(f["error"] for f in each) for each in (founds, references["finetune"]))
        return own < tuned / 2

    def shown(self, founds: Sequence[Found]) -> str:
        return percent([found["error"] for found in founds], 1)


class Pretrained(Property):
    """More than half of what fine-tuning loses of a task that was learned without the method is kept."""

    title = "on pretrained"
    evidence = "accuracy kept of such a task / on the new one, %"
    references = ("finetune",)

    def measure(self, make: Callable[[], Method], seed: int) -> Found:
        model, scenario = network(seed), mixed(seed)
        fit(model, Finetune(), Scenario(scenario.tasks[:1]), 10, seed)
        (before, _), (kept, new) = fit(model, make(), scenario, [0, 10], seed).accuracy
        return {"before": before, "kept": kept, "new": new}

    def holds(self, founds: Sequence[Found], references: Mapping[str, Sequence[Found]]) -> bool:
        tuned = fmean(found["kept"] for found in references["finetune"])
        before, kept = (fmean(found[key] for found in founds) for key in ("before", "kept"))
        return kept - tuned > (before - tuned) / 2

    def shown(self, founds: Sequence[Found]) -> str:
        return " / ".join(percent([found[key] for found in founds], 1) for key in ("kept", "new"))


class Unlabelled(Property):
    """What is kept of a task depends on the samples that it is taken from, and not on their labels."""

    title = "unlabelled data"
    evidence = "what is kept moves with other samples / labels, %"
    strengths = False

    def measure(self, make: Callable[[], Method], seed: int) -> Found:
        scenario = Scenario(mixed(seed).tasks[:1])
        x, y = tensors(scenario.tasks[0].train)
        half = len(x) // 2
        samples = {
            "as they are": (x[:half], y[:half]),
            "labels": (x[:half], y[:half].roll(1)),
            "samples": (x[half : 2 * half], y[half : 2 * half]),
        }
        kept = {}
        for name, given in samples.items():
            method = make()
            take_from(method, *given)
            fit(network(seed), method, scenario, 1, seed)
            kept[name] = flat(method.state_dict())
        own = kept.pop("as they are")
        return {name: float((each - own).norm() / (own.norm() or 1)) for name, each in kept.items()}

    def holds(self, founds: Sequence[Found], references: Mapping[str, Sequence[Found]]) -> bool:
        return all(found["samples"] > 0 and found["labels"] == 0 for found in founds)

    def shown(self, founds: Sequence[Found]) -> str:
        moved = (fmean(found[key] for found in founds) for key in ("samples", "labels"))
        return " / ".join(f"{100 * each:.2g}" for each in moved)


class Adaptive(Property):
    """What is kept follows the samples that importance is taken from, three digits or the seven others."""

    title = "adaptive"
    evidence = "kept of digits told to keep minus of the others told, % points"

    def measure(self, make: Callable[[], Method], seed: int) -> Found:
        scenario = mixed(seed)
        order = torch.Generator().manual_seed(seed)
        digits = torch.randperm(10, generator=order)[:3]
        x, y = tensors(scenario.tasks[0].train)
        seen, labels = tensors(scenario.tasks[0].test)
        kept, new = {}, []
        for told in (True, False):
            chosen = torch.isin(y, digits) == told
            method, model = make(), network(seed)
            take_from(method, x[chosen], y[chosen])
            new.append(float(fit(model, method, scenario, 10, seed).accuracy[1, 1]))
            with torch.no_grad():
                right = (model.eval()(seen, 0).argmax(1) == labels).double()
            for part in (True, False):
                kept[told, part] = float(right[torch.isin(labels, digits) == part].mean())
        gain = kept[True, True] - kept[False, True] + kept[False, False] - kept[True, False]
        return {"gain": gain / 2, "kept": fmean(kept.values()), "new": fmean(new)}

    def holds(self, founds: Sequence[Found], references: Mapping[str, Sequence[Found]]) -> bool:
        mean, half = mean_interval([found["gain"] for found in founds])
        return mean > half

    def shown(self, founds: Sequence[Found]) -> str:
        return percent([found["gain"] for found in founds], 1)


class Order(Property):
    """Over random orders, accuracy on a task differs no more than with joint training, which has no order."""

    title = "consistency"
    evidence = "deviation over orders of a task's accuracy, % points"
    references = ("finetune", "joint")
    # 95 % of the quotients of two standard deviations of ten normal numbers are below: sqrt(F(0.95; 9, 9)).
    QUOTIENT = 1.78

    def measure(self, make: Callable[[], Method], seed: int) -> Found:
        """The evidence of one order of the tasks, that of the seed."""
        scenario = make_scenario("split-digits", order="random", seed=seed)
        last = fit(network(0), make(), scenario, 5, 0).accuracy[-1].tolist()
        names = [task.name for task in scenario.tasks]
        return {"accuracy": dict(sorted(zip(names, last, strict=True)))}

    def score(self, found: Found) -> float:
        return fmean(found["accuracy"].values())

    def deviation(self, founds: Sequence[Found]) -> float:
        """Standard deviation over seeds of a task's accuracy, mean over tasks."""
        if len(founds) < 2:
            return 0.0
        return fmean(stdev(f["accuracy"][task] for f in founds) for task in founds[0]["accuracy"])

    def holds(self, founds: Sequence[Found], references: Mapping[str, Sequence[Found]]) -> bool:
        return self.deviation(founds) <= self.QUOTIENT * self.deviation(references["joint"])

    def shown(self, founds: Sequence[Found]) -> str:
        mean = interval_text([100 * self.score(found) for found in founds], 1)
        return f"{100 * self.deviation(founds):.2f} (mean {mean} %)"


PROPERTIES: dict[str, Property] = {
    "memory": Memory(),
    "agnostic": Agnostic(),
    "pretrained": Pretrained(),
    "unlabelled": Unlabelled(),
    "adaptive": Adaptive(),
    "order": Order(),
}


def network(seed: int) -> MultiHead:
    """A network for images of the digits, with the first weights of this seed."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return mlp((1, 8, 8), HIDDEN)


def mixed(seed: int) -> Scenario:
    """The ten digits, then again with their pixels in another order."""
    return standardised(permuted(*data.load_dataset("digits"), 2, seed))


def fit(model: MultiHead, method: Method, scenario: Scenario, epochs: Any, seed: int) -> Any:
    """The result of a training."""
    return Trainer(model, method, epochs=epochs, batch_size=BATCH, seed=seed).fit(scenario)


def tensors(part: Any) -> tuple[Tensor, Tensor]:
    """All samples and labels of a data set in memory."""
    assert isinstance(part, Tensors)
    return part.batch(torch.arange(len(part)))


def take_from(method: Method, x: Tensor, y: Tensor) -> None:
    """Have the method consolidate the first task from these samples."""
    end_task = method.end_task

    def told(training: Training) -> None:
        batches = list(zip(x.split(BATCH), y.split(BATCH), strict=True))
        end_task(replace(training, batches=lambda n: batches) if training.task == 0 else training)

    setattr(method, "end_task", told)  # noqa: B010


def flat(state: Any) -> Tensor:
    """All numbers in the floating-point tensors of a state, (n,) float64."""
    if isinstance(state, Tensor) and state.is_floating_point():
        return state.detach().double().flatten()
    inner = state.values() if isinstance(state, Mapping) else state
    nested = isinstance(state, (Mapping, list, tuple))
    return torch.cat([torch.empty(0, dtype=torch.float64), *map(flat, inner if nested else ())])
