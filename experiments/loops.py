"""Experiments without classes: methods of the package, in a loop that draws its own order of samples."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from experiments.experiment import Results
from experiments.learned import CHOOSING_SEED, Tuned, lam_option
from mas_ext.comparison.cells import Cell, Found, chosen
from mas_ext.comparison.charts import canvas, legend, look
from mas_ext.failures import Diverged, Vanished
from mas_ext.methods.method import Method, Setting, TaskLoss, Training
from mas_ext.methods.quadratic import Lam, Quadratic
from mas_ext.models import MultiHead
from mas_ext.parameters.names import named_parameters

# Head, inputs and targets.
Batch = tuple[int | None, Tensor, Tensor]
Pair = tuple[Tensor, Tensor]


class SquaredGradients(Quadratic):
    """EWC with F_i = 1/N sum_k sum_c (d f_c(sample k) / d theta_i)^2, where f are the outputs.

    To rounding, this is EWC with labels "normal". Stored results come from sums in the order of vmap, and what
    is learned after a consolidation depends on the last bits.
    """

    def __init__(self, lam: Lam) -> None:
        super().__init__(lam if isinstance(lam, str) else lam / 2, anchor="own")

    def entries(self, training: Training, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """Further arguments of f for the samples of a batch, each (N, ...)."""
        return ()

    def values(self, training: Training, output: Tensor, *entries: Tensor) -> Tensor:
        """f of one sample, (C,), from the output of the network, (1, outputs), and its entries, (1, ...)."""
        return output[0]

    def end_task(self, training: Training) -> None:
        assert self.penalty is not None
        model = training.model
        theta = {n: p.detach() for n, p in named_parameters(model, self.penalty.exclude).items()}

        def of_one(theta: dict[str, Tensor], x: Tensor, *entries: Tensor) -> Tensor:
            given: Any = (x[None], training.head)
            output: Tensor = torch.func.functional_call(model, theta, given)
            return self.values(training, output, *(each[None] for each in entries))

        total, count = {name: torch.zeros_like(value) for name, value in theta.items()}, 0
        for x, y in training.batches(None):
            samples = (x, *self.entries(training, x, y))
            jacobians = torch.func.vmap(torch.func.jacrev(of_one), (None, *[0] * len(samples)))
            for name, each in jacobians(theta, *samples).items():
                total[name] += each.detach().square().sum((0, 1))
            count += len(x)
        self.penalty.consolidate(importance={name: each / count for name, each in total.items()})


class Variant(NamedTuple):
    """Makes a method; its lam is chosen with the method called lam_of, None where it has none."""

    make: Callable[..., Method]
    lam_of: str | None = None


@dataclass(frozen=True)
class InOwnLoop(Tuned):
    """Methods that learn in a loop of the experiment's, each with the lam of the best `score`.

    variants: by name. epochs: of a task. batch_size, lr: of a step by Adam.
    """

    variants: ClassVar[Mapping[str, Variant]]
    epochs: int = 1
    batch_size: int = 128
    lr: float = 2e-3

    @abstractmethod
    def measure_seeded(self, cell: Cell) -> Found:
        """Measure one cell, with torch's random numbers from its seed."""

    def measure(self, cell: Cell) -> Found:
        with torch.random.fork_rng([]):
            torch.manual_seed(cell["seed"])
            try:
                return self.measure_seeded(cell)
            except (Diverged, Vanished) as error:
                return {"diverged": str(error)}

    def method(self, cell: Cell) -> Method:
        """The method of a cell, with its lam."""
        return self.variants[cell["method"]].make(**lam_option(cell["lam"]))

    def training(
        self,
        model: MultiHead,
        task: int,
        setting: Setting,
        head: int | None,
        data: Pair,
        task_loss: TaskLoss,
    ) -> Training:
        """The training of a task, with Adam."""

        def batches(n: int | None) -> list[Pair]:
            x, y = (part[:n].split(self.batch_size) for part in data)
            return list(zip(x, y, strict=True))

        make = partial(torch.optim.Adam, lr=self.lr)
        optimizer = make(model.parameters())
        return Training(model, optimizer, task, setting, head, batches, make, task_loss=task_loss)

    def learn_task(
        self, method: Method, training: Training, order: Callable[[], Iterable[Batch]]
    ) -> None:
        """Learn a task, by the batches that `order` gives for each epoch.

        Raises:
            Diverged: the last loss is not finite; the task is not ended then.
        """
        method.begin_task(training)
        for _ in range(self.epochs):
            for training.head, x, y in order():
                training.optimizer.zero_grad()
                loss = method.loss(training, x, y)
                loss.backward()
                training.optimizer.step()
                method.after_step(training, x, y)
        if not loss.isfinite():
            raise Diverged(
                f"loss: got {float(loss.detach())} in task {training.task}, expected a finite one"
            )
        method.end_task(training)

    def choosing(self, name: str) -> Cell | None:
        """The training that the lam of a method is tried in."""
        lam_of = self.variants[name].lam_of
        if lam_of is None:
            return None
        return {"method": lam_of, "seed": CHOOSING_SEED, "purpose": "choose"}

    def cells(self, results: Results, seed: int) -> Iterator[Cell]:
        """Every method with this seed, and before it what its lam is chosen by."""
        for name, variant in self.variants.items():
            lam = yield from self.choice(results, self.choosing(name))
            if lam is not None or variant.lam_of is None:
                yield {"method": name, "lam": lam, "seed": seed, "purpose": "final"}

    def finals(self, results: Results, name: str) -> tuple[float | None, list[Found]]:
        """The chosen lam, and what was found of every seed that did not diverge."""
        lam = chosen(results, self.choice(results, self.choosing(name)))
        return lam, list(results.by_seed(method=name, purpose="final", lam=lam).values())


def course(by_method: Mapping[str, Sequence[Tensor]], task: str, quantity: str) -> Any:
    """Shares [t, k] of task k after task t, of every seed, (T, T): a picture of their means in per cent.

    Left the mean over the tasks so far, right each task after the last one.
    """
    figure, panels = canvas(2, 1, 3.0)
    for i, (name, seeds) in enumerate(by_method.items()):
        mean = 100 * torch.stack(list(seeds)).mean(0)
        ticks = range(1, len(mean) + 1)
        so_far = [float(row[: t + 1].mean()) for t, row in enumerate(mean)]
        panels[0].plot(ticks, so_far, label=name, **look(i))
        panels[1].plot(ticks, mean[-1], **look(i))
    for panel, words in zip(panels, (f"{task}s learned", task), strict=True):
        panel.set_xticks(ticks)
        panel.set_xlabel(words)
    panels[0].set_title(f"mean over the {task}s so far", fontsize="medium")
    panels[1].set_title(f"after the last {task}", fontsize="medium")
    figure.supylabel(quantity, fontsize="medium")
    legend(figure, panels[0])
    return figure
