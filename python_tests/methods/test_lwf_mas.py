"""LwF and MAS together, against a training written out in float64: distillation and penalty."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from oracles import naive_distillation
from oracles.naive_training import (
    SETTINGS,
    Batch,
    Naive,
    Weights,
    compare,
)
from torch import Tensor

from mas_ext import methods

pytestmark = pytest.mark.usefixtures("one_thread")

LAM, DISTILLATION, TEMPERATURE = 0.2, 0.7, 3.0


@dataclass
class Both(Naive):
    """Task loss + distillation from the weights before the task + lam sum_t Omega_t (theta - theta*)^2."""

    teacher: Weights = field(default_factory=dict)
    omega: Weights = field(default_factory=dict)

    def begin(self) -> None:
        self.teacher = {n: t.clone() for n, t in self.theta.items()} if self.task else {}

    def outputs(self, x: Tensor, theta: Weights, head: int) -> Tensor:
        hidden = torch.tanh(x @ theta["backbone.0.weight"].T + theta["backbone.0.bias"])
        return hidden @ theta[f"heads.{head}.weight"].T + theta[f"heads.{head}.bias"]

    def loss(self, batch: Batch, theta: Weights) -> Tensor:
        own = 0 if self.setting == "domain" else self.task
        y = batch.y - (2 * self.task if self.setting == "class" else 0)
        loss = naive_distillation.cross_entropy(self.outputs(batch.x, theta, own), y)
        if not self.teacher:
            return loss
        old = {"task": [[k] for k in range(self.task)], "domain": [[0]]}
        for heads in old.get(self.setting, [list(range(self.task))]):
            now, before = (
                torch.cat([self.outputs(batch.x, each, k) for k in heads], 1)
                for each in (theta, self.teacher)
            )
            loss = loss + DISTILLATION * naive_distillation.distance(now, before, TEMPERATURE)
        return loss

    def end(self, x: Tensor, y: Tensor) -> None:
        new = {n: torch.zeros_like(t) for n, t in self.held().items()}
        for sample in x.split(1):
            g = self.gradients(lambda theta: self.logits(sample, theta).square().sum())  # noqa: B023
            new = {n: t + g[n].abs() / len(x) for n, t in new.items()}
        self.omega = {n: self.omega.get(n, 0) + t for n, t in new.items()}
        self.terms = [({n: LAM * t for n, t in self.omega.items()}, self.held())]


def make() -> methods.Method:
    return methods.create(
        "lwf-mas", lam=LAM, distillation=DISTILLATION, temperature=TEMPERATURE, warm_up=0
    )


@pytest.mark.parametrize("setting", SETTINGS)
def test_training_is_the_one_written_out(setting: str) -> None:
    compare(make(), Both(setting))
