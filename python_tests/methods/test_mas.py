"""MAS and its variants against a naive training with a term for every task, in float64."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from oracles.naive_training import SETTINGS, Naive, Weights, compare, learn
from torch import Tensor

from mas_ext import methods

pytestmark = pytest.mark.usefixtures("one_thread")

LAM = 0.2


@dataclass
class NaiveMAS(Naive):
    """kind: "exact", "batch", "vector" or "local"; consistent: MAS-alpha."""

    kind: str = "exact"
    consistent: bool = False
    tasks: list[tuple[Weights, Weights]] = field(default_factory=list)

    def end(self, x: Tensor, y: Tensor) -> None:
        omega = self.local(x) if self.kind == "local" else self.importance(x)
        self.tasks.append((omega, self.held()))
        if self.consistent:
            totals = [sum(float(w.sum()) for w in omega.values()) for omega, _ in self.tasks]
            inverse = sum(1 / s for s in totals)
            alphas = [LAM * len(totals) / inverse / s for s in totals]
            self.terms = [
                ({n: a * w for n, w in omega.items()}, anchor)
                for a, (omega, anchor) in zip(alphas, self.tasks, strict=True)
            ]
            return
        total: Weights = {}
        for omega, _ in self.tasks:
            total = {n: total.get(n, 0) + w for n, w in omega.items()}
        self.terms = [({n: LAM * w for n, w in total.items()}, self.held())]

    def importance(self, x: Tensor) -> Weights:
        """1/N sum abs of the gradients of samples, of batches, or of single outputs."""
        total = {n: torch.zeros_like(t) for n, t in self.held().items()}
        for part in x.split(len(x) if self.kind == "batch" else 1):
            outputs = range(self.logits(part, self.theta).shape[1])
            for chosen in outputs if self.kind == "vector" else [None]:

                def value(theta: Weights) -> Tensor:
                    z = self.logits(part, theta)  # noqa: B023
                    return z.square().sum() if chosen is None else z[0, chosen]  # noqa: B023

                g = self.gradients(value)
                total = {n: t + g[n].abs() / len(x) for n, t in total.items()}
        return total

    def local(self, x: Tensor) -> Weights:
        """1/N sum_k 2 abs(y_i x_j) of each layer; the bias has an input of 1."""
        theta = self.theta
        z = x @ theta["backbone.0.weight"].T + theta["backbone.0.bias"]
        layers = {"backbone.0": (x, z)}
        for name in {n.rpartition(".")[0] for n in self.held()} - layers.keys():
            h = torch.tanh(z)
            layers[name] = h, h @ theta[f"{name}.weight"].T + theta[f"{name}.bias"]
        found = {}
        for name, (inputs, y) in layers.items():
            found[f"{name}.weight"] = torch.einsum("ki,kj->ij", y.abs(), inputs.abs()) * 2 / len(x)
            found[f"{name}.bias"] = 2 * y.abs().mean(0)
        return found


NAMES = {
    "mas": ("exact", False),
    "mas-batch": ("batch", False),
    "mas-vector": ("vector", False),
    "mas-alpha": ("exact", True),
    "local-mas": ("local", False),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", NAMES)
def test_variants(name: str, setting: str) -> None:
    kind, consistent = NAMES[name]
    naive = NaiveMAS(setting, kind=kind, consistent=consistent)
    size = 100 if kind == "batch" else 8
    compare(methods.create(name, lam=LAM), naive, batch_size=size)


@pytest.mark.parametrize("name", ["mas", "mas-alpha"])
def test_regression(name: str) -> None:
    naive = NaiveMAS("task", consistent=name == "mas-alpha", squared=True)
    compare(methods.create(name, lam=LAM), naive)


def test_importance_from_some_samples() -> None:
    """Those that come first in the task's own order, in which importance is taken from all samples, too."""
    few, read = methods.MAS(LAM, max_samples=3), []
    estimate = few.forward

    def forward(model: torch.nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        read.append(batch[0])
        return estimate(model, batch)

    few.forward = forward  # type: ignore[method-assign]
    learn(few, "domain", epochs=1)
    assert len(torch.cat(read).unique(dim=0)) == 3 * 3  # of three tasks


def test_they_differ() -> None:
    """What the comparisons compare is neither fine-tuning nor one and the same."""
    ends = [learn(methods.create("finetune"), "domain")[2][-1]]
    ends += [learn(methods.create(name, lam=LAM), "domain")[2][-1] for name in NAMES]
    weights = [end["backbone.0.weight"] for end in ends]
    for i, one in enumerate(weights):
        for other in weights[:i]:
            assert float((one - other).abs().max()) > 1e-3
