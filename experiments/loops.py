"""What experiments without classes share: their methods with lam, the loop over a task, EWC of any function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from experiments.experiment import Cell, Found, Results
from experiments.learned import CHOOSING_SEED, Tuned
from mas_ext.compare.cells import chosen
from mas_ext.methods.method import Method, Training
from mas_ext.methods.quadratic import Quadratic
from mas_ext.parameters.names import named_parameters

# The head that is trained, x and y.
Batch = tuple[int | None, Tensor, Tensor]
Network = Callable[[Tensor], Tensor]


def learn_task(
    method: Method, training: Training, epochs: int, order: Callable[[], Iterable[Batch]]
) -> float:
    """Learn a task, by the batches that `order` gives for each epoch; returns the last one's loss.

    Where that is not finite, the task is not ended.
    """
    method.begin_task(training)
    for _ in range(epochs):
        for training.head, x, y in order():
            training.optimizer.zero_grad()
            loss = method.loss(training, x, y)
            loss.backward()
            training.optimizer.step()
            method.after_step(training, x, y)
    if loss.isfinite():
        method.end_task(training)
    return float(loss.detach())


class SquaredGradients(Quadratic):
    """EWC with F_i = 1/N sum_k sum_c (d f_c(sample k) / d theta_i)^2, f given by `outputs`."""

    def __init__(self, lam: float, **given: Any) -> None:
        """lam: as in the paper of EWC, with its half."""
        super().__init__(lam / 2, merge="sum", **given)

    def samples(self, training: Training, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """What f takes of a batch, each with samples in dimension 0."""
        return (x,)

    def outputs(self, training: Training, network: Network, *sample: Tensor) -> Tensor:
        """f of one sample, (C,), by the network, x (N, ...) -> (N, outputs)."""
        raise NotImplementedError

    def end_task(self, training: Training) -> None:
        """See Method.end_task."""
        assert self.penalty is not None
        theta = named_parameters(training.model, self.penalty.exclude)
        values = {name: parameter.detach() for name, parameter in theta.items()}

        def of_one(values: Mapping[str, Tensor], *sample: Tensor) -> Tensor:
            def network(x: Tensor) -> Tensor:
                given: Any = (x, training.head)
                found: Tensor = torch.func.functional_call(training.model, dict(values), given)
                return found

            return self.outputs(training, network, *sample)

        total, count = {name: torch.zeros_like(value) for name, value in values.items()}, 0
        for x, y in training.batches(None):
            samples = self.samples(training, x, y)
            jacobians = torch.func.vmap(torch.func.jacrev(of_one), (None, *[0] * len(samples)))
            for name, each in jacobians(values, *samples).items():
                total[name] += each.detach().square().sum((0, 1))
            count += len(x)
        self.penalty.consolidate(importance={name: each / count for name, each in total.items()})


class Variant(NamedTuple):
    """What makes the method, and the name of that whose lam it takes: None where it has none."""

    make: Any
    lam_of: str | None = None


@dataclass(frozen=True)
class InOwnLoop(Tuned):
    """Methods that learn in a loop of the experiment's, each with the lam of the best `score`.

    variants: by name.
    """

    variants: ClassVar[Mapping[str, Variant]]

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
        found = [f for _, f in results.where(method=name, purpose="final", lam=lam)]
        return lam, [f for f in found if "diverged" not in f]
