"""Synaptic Intelligence against a naive training that integrates step by step, in float64."""

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
    assert_close,
    compare,
    learn,
    weights,
)
from torch import Tensor

from mas_ext.methods import Training
from mas_ext.methods.si import SI
from mas_ext.models import MultiHead
from mas_ext.optim.hooks import Mode

pytestmark = pytest.mark.usefixtures("one_thread")

LAM, XI = 0.5, 0.01


@dataclass
class NaiveSI(Naive):
    running: Weights = field(default_factory=dict)
    first: Weights = field(default_factory=dict)
    path: Weights = field(default_factory=dict)

    def begin(self) -> None:
        self.first = self.held()
        self.path = {n: torch.zeros_like(t) for n, t in self.first.items()}

    def stepped(self, batch: Batch, g: Weights, before: Weights) -> None:
        for name, path in self.path.items():
            path -= g[name] * (self.theta[name] - before[name])

    def end(self, x: Tensor, y: Tensor) -> None:
        for name, path in self.path.items():
            moved = self.theta[name] - self.first[name]
            omega = self.running.get(name, torch.zeros_like(path)) + path / (moved**2 + XI)
            self.running[name] = torch.maximum(omega, torch.zeros_like(omega))
        self.terms = [({n: LAM * w for n, w in self.running.items()}, self.held())]


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_si_is_its_path_integral(setting: str, optimizer: str, mode: Mode) -> None:
    compare(SI(LAM, XI, mode), NaiveSI(setting, optimizer, mode=mode))


@pytest.mark.parametrize("setting", ["task", "domain"])
def test_regression(setting: str) -> None:
    compare(SI(LAM, XI), NaiveSI(setting, squared=True))


def test_sums_below_zero_count_as_zero() -> None:
    """Weight decay leads some parameters uphill, and that counts."""

    def make(parameters: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=0.5)

    naive = NaiveSI("domain", decay=0.5)
    compare(SI(LAM, XI, naive.mode), naive, optimizer=make)
    omega = torch.cat([w.flatten() for w in naive.running.values()])
    assert 0 < int((omega == 0).sum()) < len(omega)


def test_the_clipped_gradient_is_integrated() -> None:
    clipped = compare(SI(LAM, XI), NaiveSI("domain", clip=0.2))
    assert not torch.allclose(
        clipped[0]["backbone.0.weight"],
        compare(SI(LAM, XI), NaiveSI("domain"))[0]["backbone.0.weight"],
    )


def test_the_penalty_holds() -> None:
    free, held = (learn(SI(lam, XI), "domain")[2][-1] for lam in (0.0, LAM))
    assert float((free["backbone.0.weight"] - held["backbone.0.weight"]).abs().max()) > 0.01


def begun(method: SI, model: MultiHead, **options: Any) -> Training:
    def make(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, 0.1, **options)

    optimizer = make(model.parameters())
    training = Training(model, optimizer, 0, "domain", 0, lambda n: [], make)
    method.begin_task(training)
    return training


def network() -> MultiHead:
    model = MultiHead(torch.nn.Identity(), 3)
    model.add_head(2)
    return model


def test_a_step_that_the_scaler_skips_counts_for_nothing() -> None:
    method, model = SI(LAM, XI), network().double()
    training = begun(method, model)
    scaler = torch.amp.GradScaler("cpu")
    right = {n: torch.zeros_like(t) for n, t in weights(model).items()}
    first = weights(model)
    skipped = []
    for factor in (1.0, float("inf"), 2.0):
        before = weights(model)
        training.optimizer.zero_grad()
        x, y = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
        loss = method.loss(training, x, y)
        own = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        scaler.scale(factor * loss).backward()
        scaler.step(training.optimizer)
        scaler.update()
        method.after_step(training, x, y)
        skipped.append(all(torch.equal(t, before[n]) for n, t in weights(model).items()))
        if not skipped[-1]:
            for (name, path), g in zip(right.items(), own, strict=True):
                path -= factor * g * (weights(model)[name] - before[name])
    assert skipped == [False, True, False]
    assert_close(method.state_dict()["path"], right)
    method.end_task(training)
    assert method.penalty is not None
    moved = {n: t - first[n] for n, t in weights(model).items()}
    assert_close(
        method.penalty.omega,
        {n: (path / (moved[n] ** 2 + XI)).clamp(min=0) for n, path in right.items()},
    )


def test_a_fused_optimizer_under_a_scaler_is_refused() -> None:
    method, model = SI(LAM, XI, "proximal"), network()
    training = begun(method, model, fused=True)
    scaler = torch.amp.GradScaler("cpu")
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    scaler.scale(method.loss(training, x, y)).backward()
    before = weights(model)
    with pytest.raises(RuntimeError, match="fused=True under a GradScaler"):
        scaler.step(training.optimizer)
    assert_close(weights(model), before)


def test_sixteen_bits_are_integrated_in_thirty_two() -> None:
    method, model = SI(LAM, XI), network().bfloat16()
    training = begun(method, model)
    for _ in range(3):
        training.optimizer.zero_grad()
        method.loss(training, torch.ones(1, 3).bfloat16(), torch.tensor([0])).backward()
        g, before = [p.grad.float() for p in model.parameters()], weights(model)  # type: ignore[union-attr]
        old = {n: t.clone() for n, t in method.state_dict()["path"].items()}
        training.optimizer.step()
        for (name, t), own in zip(method.state_dict()["path"].items(), g, strict=True):
            assert t.dtype == torch.float32
            moved = weights(model)[name].float() - before[name].float()
            torch.testing.assert_close(t, old[name] - own * moved, rtol=1e-6, atol=0)


def test_what_has_no_gradient_has_no_part_in_it() -> None:
    """Frozen parameters, and those that the loss does not reach."""
    model = network().double()
    model.unused = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    model.heads[0].bias.requires_grad_(False)
    method = SI(LAM, XI)
    training = begun(method, model)
    method.loss(training, torch.randn(4, 3).double(), torch.tensor([0, 1, 1, 0])).backward()
    training.optimizer.step()
    path = method.state_dict()["path"]
    assert path.keys() == {"unused", "heads.0.weight"}
    assert torch.equal(path["unused"], torch.zeros(2, dtype=torch.float64))
    assert float(path["heads.0.weight"].min()) > 0  # a step of SGD lowers the loss by every weight
    method.end_task(training)
    assert method.state_dict()["path"] == method.state_dict()["start"] == {}


def test_sparse_gradients() -> None:
    model = MultiHead(torch.nn.EmbeddingBag(10, 4, sparse=True), 4)
    model.add_head(2)
    method = SI(LAM, XI)
    training = begun(method, model)
    before = weights(model)["backbone.weight"]
    method.loss(training, torch.tensor([[1, 2], [5, 1]]), torch.tensor([0, 1])).backward()
    training.optimizer.step()
    moved = weights(model)["backbone.weight"] - before
    right = moved.square() / 0.1  # dtheta = -lr g
    torch.testing.assert_close(method.state_dict()["path"]["backbone.weight"], right)
    assert int(moved.any(1).sum()) == 3
