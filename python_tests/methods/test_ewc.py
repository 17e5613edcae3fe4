"""EWC, online EWC and EWC-DR against a naive training with T separate penalties, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from oracles.naive_training import (
    INPUTS,
    SETTINGS,
    Naive,
    Weights,
    assert_close,
    compare,
    learn,
    start,
    steps,
)
from torch import Tensor

from mas_ext import estimate_fisher, methods
from mas_ext.methods.ewc import EWC, EWCDR, OnlineEWC
from mas_ext.scenarios import Tensors, from_datasets

pytestmark = pytest.mark.usefixtures("one_thread")

LAM = 30.0


@dataclass
class NaiveEWC(Naive):
    """gamma None: a term for every task; else one, with gamma."""

    gamma: float | None = None
    running: Weights = field(default_factory=dict)

    def end(self, x: Tensor, y: Tensor) -> None:
        fisher = self.mean_fisher(x, y)
        if self.gamma is None:
            self.terms.append(({n: LAM / 2 * f for n, f in fisher.items()}, self.held()))
            return
        self.running = {n: self.gamma * self.running.get(n, 0) + f for n, f in fisher.items()}
        omega = {n: LAM / 2 * self.gamma * f for n, f in self.running.items()}
        self.terms = [(omega, self.held())]


@dataclass
class NaiveEWCDR(Naive):
    """W <- (C - c) / C W + c / C F for what was held before, C classes in all and c new ones; c / C F else."""

    labels: str = "reversed"
    at_most: float = math.inf
    running: Weights = field(default_factory=dict)

    def end(self, x: Tensor, y: Tensor) -> None:
        share = 1 / (self.task + 1)  # two classes a task
        for name, f in self.mean_fisher(x, y).items():
            old = self.running.get(name, torch.zeros_like(f))
            self.running[name] = (1 - share) * old + share * f.clamp(max=self.at_most)
        self.terms = [({n: LAM / 2 * w for n, w in self.running.items()}, self.held())]


@pytest.mark.parametrize("setting", SETTINGS)
def test_ewc_is_t_penalties(setting: str) -> None:
    compare(EWC(LAM), NaiveEWC(setting))


@pytest.mark.parametrize("setting", SETTINGS)
def test_online_ewc_is_one_penalty_that_fades(setting: str) -> None:
    compare(OnlineEWC(LAM, gamma=0.7), NaiveEWC(setting, gamma=0.7))


@pytest.mark.parametrize("setting", SETTINGS)
def test_ewc_dr_is_a_mean_of_reversed_logits(setting: str) -> None:
    for most in (None, 0.01):
        compare(EWCDR(LAM, at_most=most), NaiveEWCDR(setting, at_most=most or math.inf))
    naive = NaiveEWCDR(setting, by_batch=True)
    compare(EWCDR(LAM, "batch", None), naive, importance_epochs=1)


def test_tasks_of_ewc_dr_count_by_their_classes() -> None:
    """Heads of 3 and then 1 outputs: W = 3/4 F_1 + 1/4 F_2, of the heads, too."""
    x = torch.randn(8, INPUTS, dtype=torch.float64)
    labels = torch.arange(8) % 3, torch.full((8,), 3)
    data = [Tensors(x, y) for y in labels]
    learning = start(EWCDR(LAM, at_most=None), "class", data=from_datasets([(d, d) for d in data]))
    found = []
    for _ in steps(learning):
        if not learning.inside:
            model, y = learning.model, labels[len(found)]
            found.append(estimate_fisher(model, [(x, y)], "reversed"))
    first, second = found
    penalty = learning.method.penalty  # type: ignore[attr-defined]
    held = {name: float(penalty.scale) * w for name, w in penalty.omega.items()}
    right = {n: LAM / 2 * (first.get(n, 0 * f) * 3 + f) / 4 for n, f in second.items()}
    assert len(right) == len(first) + 2
    assert_close(held, right)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_proximal(optimizer: str) -> None:
    naive = NaiveEWC("domain", optimizer, mode="proximal")
    compare(EWC(LAM, mode="proximal"), naive)


def test_adam_in_gradient_mode() -> None:
    compare(EWC(LAM), NaiveEWC("task", "adam"))


def test_the_mean_over_all_labels() -> None:
    compare(EWC(LAM, labels="all"), NaiveEWC("class", labels="all"))


@pytest.mark.parametrize("importance_epochs", [0, 1])
@pytest.mark.parametrize("setting", ["task", "domain"])
def test_regression(setting: str, importance_epochs: int) -> None:
    naive = NaiveEWC(setting, squared=True)
    compare(EWC(LAM, labels="normal"), naive, importance_epochs=importance_epochs)
    naive = NaiveEWC(setting, squared=True, gamma=0.7)
    compare(OnlineEWC(LAM, gamma=0.7, labels="normal"), naive, importance_epochs=importance_epochs)
    mean = EWCDR(LAM, at_most=None, labels="normal")
    compare(mean, NaiveEWCDR(setting, squared=True), importance_epochs=importance_epochs)


@pytest.mark.parametrize("name", ["ewc", "online-ewc", "ewc-dr", "rwalk", "imm-mode"])
def test_labels_without_a_cross_entropy_are_refused(name: str) -> None:
    for labels in ("true", "sampled"):
        with pytest.raises(
            ValueError, match=f"labels: got '{labels}' with a task loss .* 'normal'"
        ):
            learn(methods.create(name, labels=labels), "domain", squared=True)


def test_importance_gathered_in_the_last_epoch() -> None:
    compare(EWC(LAM), NaiveEWC("class"), importance_epochs=1)


def test_the_penalty_holds() -> None:
    """What the comparisons compare is no fine-tuning: the penalty moves weights by far more than 1e-10."""
    free, held = (learn(EWC(lam), "domain")[2][-1] for lam in (0.0, LAM))
    assert float((free["backbone.0.weight"] - held["backbone.0.weight"]).abs().max()) > 0.01


def test_a_strength_of_0_takes_no_part_in_the_step() -> None:
    """It is fine-tuning, also with an optimizer for which there is no proximal step."""

    def make(parameters: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.RMSprop(parameters, lr)

    free = learn(methods.create("finetune"), "class", optimizer=make)[2][-1]
    held = learn(EWC(0.0, mode="proximal"), "class", optimizer=make)[2][-1]
    for name, t in free.items():
        assert torch.equal(t, held[name])
    with pytest.raises(TypeError, match="RMSprop"):
        learn(EWC(LAM, mode="proximal"), "class", optimizer=make)


def test_what_is_kept_is_as_wide_as_the_parameters() -> None:
    method = EWC(LAM)
    learn(method, "domain")
    assert method.penalty is not None
    assert {t.dtype for t in method.penalty.omega.values()} == {torch.float64}
