"""EWC and online EWC against a naive training with T separate penalties, in float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from oracles.naive_training import SETTINGS, Naive, Weights, assert_close, learn, resumed
from torch import Tensor

from mas_ext import methods
from mas_ext.methods import Method
from mas_ext.methods.ewc import EWC, OnlineEWC

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


def compare(method: Method, naive: NaiveEWC, importance_epochs: int = 0) -> None:
    model, log, found = learn(
        method,
        naive.setting,
        optimizer=naive.optimizer,
        lr=naive.lr,
        importance_epochs=importance_epochs,
        squared=naive.squared,
    )
    for got, right in zip(found, naive.learn(model.first, log), strict=True):
        assert_close(got, right)


@pytest.mark.parametrize("setting", SETTINGS)
def test_ewc_is_t_penalties(setting: str) -> None:
    compare(EWC(LAM), NaiveEWC(setting))


@pytest.mark.parametrize("setting", SETTINGS)
def test_online_ewc_is_one_penalty_that_fades(setting: str) -> None:
    compare(OnlineEWC(LAM, gamma=0.7), NaiveEWC(setting, gamma=0.7))


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
    compare(EWC(LAM, labels="normal"), naive, importance_epochs)
    naive = NaiveEWC(setting, squared=True, gamma=0.7)
    compare(OnlineEWC(LAM, gamma=0.7, labels="normal"), naive, importance_epochs)


@pytest.mark.parametrize("name", ["ewc", "online-ewc", "imm-mode"])
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


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["ewc", "online-ewc"])
def test_a_stopped_run_goes_on_to_the_same_bits(name: str, setting: str) -> None:
    resumed(lambda: methods.create(name, lam=LAM), setting, after=11)
    resumed(lambda: methods.create(name, lam=LAM), setting, after=12, importance_epochs=1)


def test_what_is_kept_is_as_wide_as_the_parameters() -> None:
    method = EWC(LAM)
    learn(method, "domain")
    assert method.penalty is not None
    assert {t.dtype for t in method.penalty.omega.values()} == {torch.float64}
