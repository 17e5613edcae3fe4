"""Riemannian Walk against a naive training that walks step by step, in float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from oracles.naive_training import (
    SETTINGS,
    Batch,
    Naive,
    Weights,
    compare,
    learn,
    resumed,
    start,
    steps,
)
from torch import Tensor

from mas_ext.methods.rwalk import RWalk
from mas_ext.optim.hooks import Mode

pytestmark = pytest.mark.usefixtures("one_thread")

# Six steps a task: an interval of four, and one of two.
LAM, ALPHA, INTERVAL, EPS = 0.5, 0.7, 4, 0.01


@dataclass
class NaiveRWalk(Naive):
    interval: int = INTERVAL
    running: Weights = field(default_factory=dict)
    score: Weights = field(default_factory=dict)
    first: Weights = field(default_factory=dict)
    path: Weights = field(default_factory=dict)
    new: Weights = field(default_factory=dict)

    def begin(self) -> None:
        self.steps = 0
        self.new = {n: torch.zeros_like(t) for n, t in self.held().items()}
        self.depart()

    def depart(self) -> None:
        self.first = self.held()
        self.path = {n: torch.zeros_like(t) for n, t in self.first.items()}

    def stepped(self, batch: Batch, g: Weights, before: Weights) -> None:
        for name, path in self.path.items():
            path -= g[name] * (self.theta[name] - before[name])
        if self.steps % self.interval == 0:
            for name, total in self.fisher(batch.x, batch.y).items():
                now = total / len(batch.y)
                old = self.running.get(name, now)
                self.running[name] = ALPHA * now + (1 - ALPHA) * old
        self.steps += 1
        if self.steps % self.interval == 0:
            self.arrive()

    def arrive(self) -> None:
        for name, path in self.path.items():
            moved = self.theta[name] - self.first[name]
            gain = path / (self.running[name] * moved**2 / 2 + EPS)
            self.new[name] += torch.where(gain > 0, gain, 0)
        self.depart()

    def end(self, x: Tensor, y: Tensor) -> None:
        self.arrive()
        for name, new in self.new.items():
            self.score[name] = (self.score.get(name, new) + new) / 2
        parts = []
        for each in (self.running, self.score):
            largest = torch.cat([t.flatten() for t in each.values()]).max()
            parts.append({n: t / largest for n, t in each.items()})
        omega = {n: LAM * (parts[0][n] + parts[1][n]) for n in self.score}
        self.terms = [(omega, self.held())]


def rwalk(**options: Any) -> RWalk:
    return RWalk(**{"lam": LAM, "alpha": ALPHA, "interval": INTERVAL, "eps": EPS, **options})


def check(naive: NaiveRWalk) -> None:
    compare(rwalk(mode=naive.mode, labels=naive.labels, interval=naive.interval), naive)


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_rwalk_is_its_formula(setting: str, optimizer: str, mode: Mode) -> None:
    check(NaiveRWalk(setting, optimizer, mode=mode))


@pytest.mark.parametrize("interval", [1, 3, 100])
def test_any_interval(interval: int) -> None:
    check(NaiveRWalk("class", interval=interval))


@pytest.mark.parametrize("labels", ["all", "reversed"])
def test_other_labels(labels: str) -> None:
    check(NaiveRWalk("domain", labels=labels))


def test_the_clipped_gradient_is_integrated() -> None:
    check(NaiveRWalk("domain", clip=0.2))


@pytest.mark.parametrize("setting", ["task", "domain"])
def test_regression(setting: str) -> None:
    check(NaiveRWalk(setting, squared=True, labels="normal"))


def test_the_penalty_holds_and_both_parts_count() -> None:
    free, held = (learn(rwalk(lam=lam), "domain")[2][-1] for lam in (0.0, LAM))
    assert float((free["backbone.0.weight"] - held["backbone.0.weight"]).abs().max()) > 0.01
    method = rwalk()
    learn(method, "domain")
    assert method.penalty is not None
    omega = torch.cat([w.flatten() for w in method.penalty.omega.values()])
    assert 1 < float(omega.max()) < 2  # each part is 1 somewhere, and seldom both at one place
    assert float(omega.min()) >= 0


def test_a_task_without_epochs_has_no_path() -> None:
    """It is held by nothing, and those after it as always."""
    learning = start(rwalk(), "domain", epochs=[0, 2, 2])
    found = []
    for _ in steps(learning):
        if not learning.inside:
            found.append(learning.method.penalty.omega)  # type: ignore[attr-defined]
    assert not any(w.any() for w in found[0].values())
    assert all(w.any() for w in found[1].values())


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("after", [7, 9, 11, 12])
def test_a_stopped_run_goes_on_to_the_same_bits(setting: str, after: int) -> None:
    resumed(rwalk, setting, after)
