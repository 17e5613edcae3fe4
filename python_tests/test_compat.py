"""The numbers of other codes, by their own rules written out in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mas_ext import FusedMASPenalty, compat, estimate_importance

SIZES = [4, 4, 4, 3]  # the last batch is a short one


def network() -> nn.Module:
    """Dropout and BatchNorm behave differently in training mode."""
    return nn.Sequential(
        nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, 3)
    ).double()


def batches(task: int, sizes: list[int] = SIZES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(task)
    return [torch.randn(n, 5, dtype=torch.float64, generator=generator) for n in sizes]


def moved(model: nn.Module) -> None:
    """What learning a task does to the parameters."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, dtype=p.dtype), alpha=0.3)


def gradients(model: nn.Module, value: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(model.parameters())))


def check(
    penalty: FusedMASPenalty,
    model: nn.Module,
    omega: list[Tensor],
    anchor: list[Tensor],
    lam: float,
) -> None:
    """lam sum omega (theta - anchor)^2 and its gradient, and omega itself."""
    for name, w in zip(dict(model.named_parameters()), omega, strict=True):
        torch.testing.assert_close(penalty.omega[name], w, rtol=1e-10, atol=1e-14)
    moved(model)
    value = sum(
        lam * (w * (p - a) ** 2).sum()
        for w, p, a in zip(omega, model.parameters(), anchor, strict=True)
    )
    assert isinstance(value, Tensor)
    assert value.detach() > 0
    torch.testing.assert_close(penalty(), value, rtol=1e-10, atol=0)
    for got, expected in zip(gradients(model, penalty()), gradients(model, value), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("objective", ["l2", "l1", "vector"])
def test_official(objective: compat.Objective) -> None:
    model = network()
    penalty = compat.official(model, 0.7, objective, omega_dtype=torch.float64)
    omega = [torch.zeros_like(p) for p in model.parameters()]
    for task in range(2):
        moved(model)
        running = [torch.zeros_like(p) for p in model.parameters()]
        model.eval()
        for index, x in enumerate(batches(task)):
            size = len(x)  # its running mean takes all batches to be as large as the present one
            out = model(x)
            values = {
                "l2": [out.pow(2).sum()],
                "l1": [out.abs().sum()],
                "vector": [out[:, c].sum() for c in range(3)],
            }[str(objective)]
            for i, p in enumerate(model.parameters()):
                added = sum(torch.autograd.grad(v, p, retain_graph=True)[0].abs() for v in values)
                running[i] = (running[i] * index * size + added) / ((index + 1) * size)
        model.train()
        omega = [w + new for w, new in zip(omega, running, strict=True)]
        anchor = [p.detach().clone() for p in model.parameters()]
        penalty.consolidate(batches(task))
    check(penalty, model, omega, anchor, 0.7)


def avalanche_omega(model: nn.Module, data: list[Tensor]) -> list[Tensor]:
    model.train()
    omega = [torch.zeros_like(p) for p in model.parameters()]
    for x in data:
        value = torch.linalg.vector_norm(model(x), dim=1).square().mean()
        omega = [w + g.abs() for w, g in zip(omega, gradients(model, value), strict=True)]
    return [w / len(data) for w in omega]


def test_avalanche() -> None:
    model = network()
    twin = copy.deepcopy(model)
    penalty = compat.avalanche(model, lambda_reg=2.0, alpha=0.3, omega_dtype=torch.float64)
    omega: list[Tensor] = []
    for task in range(3):
        moved(model)
        twin.load_state_dict(model.state_dict())
        torch.manual_seed(task)
        new = avalanche_omega(twin, batches(task))
        omega = [0.3 * w + 0.7 * n for w, n in zip(omega or new, new, strict=True)] if task else new
        anchor = [p.detach().clone() for p in model.parameters()]
        torch.manual_seed(task)
        penalty.consolidate(batches(task))
        for got, expected in zip(model.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(got, expected)  # the pass counts for the running statistics
    assert model.training
    check(penalty, model, omega, anchor, 2.0)


def test_avalanche_takes_the_first_importance_of_a_new_head_in_full() -> None:
    model = nn.ModuleDict({"body": nn.Linear(5, 4), "0": nn.Linear(4, 2)}).double()
    head = "0"

    def forward(m: nn.ModuleDict, x: Tensor) -> Tensor:
        out: Tensor = m[head](m["body"](x).tanh())
        return out

    penalty = compat.avalanche(model, alpha=0.25, forward=forward, omega_dtype=torch.float64)
    penalty.consolidate(batches(0, [5]))
    first = {n: w.clone() for n, w in penalty.omega.items()}
    head, model["1"] = "1", nn.Linear(4, 2).double()
    penalty.consolidate(batches(1, [5]))
    loss = forward(model, batches(1, [5])[0]).pow(2).sum(1).mean()
    new = {n: p for n, p in model.named_parameters() if not n.startswith("0")}
    grads = dict(zip(new, torch.autograd.grad(loss, list(new.values())), strict=True))
    torch.testing.assert_close(penalty.omega["1.weight"], grads["1.weight"].abs())
    torch.testing.assert_close(penalty.omega["0.weight"], 0.25 * first["0.weight"])
    torch.testing.assert_close(
        penalty.omega["body.bias"], 0.25 * first["body.bias"] + 0.75 * grads["body.bias"].abs()
    )


def test_avalanche_observes() -> None:
    model = network().eval()
    passed, observed = (compat.avalanche(model, omega_dtype=torch.float64) for _ in range(2))
    torch.manual_seed(1)
    passed.consolidate(batches(0))
    torch.manual_seed(1)
    for x in batches(0):
        observed.observe(x)
    observed.consolidate()
    for name, w in passed.omega.items():
        torch.testing.assert_close(observed.omega[name], w)
    observed.observe(batches(1)[0])  # nothing of the first task is pending any more
    observed.consolidate()
    assert observed.num_tasks == 2


def facil_omega(model: nn.Module, data: list[Tensor]) -> list[Tensor]:
    """Of whole batches alone."""
    model.train()
    omega = [torch.zeros_like(p) for p in model.parameters()]
    for x in data:
        value = torch.linalg.vector_norm(model(x), dim=1).mean()
        omega = [w + g.abs() * len(x) for w, g in zip(omega, gradients(model, value), strict=True)]
    return [w / (len(data) * len(data[0])) for w in omega]


def test_facil() -> None:
    model, data = network(), [batches(task, [4, 4, 4]) for task in range(3)]
    penalty = compat.facil(model, lamb=3.0, alpha=0.4, omega_dtype=torch.float64)
    omega = [torch.zeros_like(p) for p in model.parameters()]
    for x in data:
        moved(model)
        torch.manual_seed(5)
        new = facil_omega(copy.deepcopy(model), x)
        omega = [0.4 * w + 0.6 * n for w, n in zip(omega, new, strict=True)]
        anchor = [p.detach().clone() for p in model.parameters()]
        torch.manual_seed(5)
        penalty.consolidate(x)
    check(penalty, model, omega, anchor, 1.5)


def test_facil_with_tasks_weighed_by_their_classes() -> None:
    model, classes = network(), [2, 3, 5]
    estimator = compat.BatchMeans(compat.norm, training=True)
    penalty = FusedMASPenalty(model, importance=estimator, omega_dtype=torch.float64)
    omega = [torch.zeros_like(p) for p in model.parameters()]
    for t, count in enumerate(classes):
        moved(model)
        data, old = batches(t, [4, 4]), sum(classes[:t]) / sum(classes[: t + 1])
        torch.manual_seed(t)
        new = facil_omega(copy.deepcopy(model), data)
        omega = [old * w + (1 - old) * n for w, n in zip(omega, new, strict=True)]
        anchor = [p.detach().clone() for p in model.parameters()]
        torch.manual_seed(t)
        penalty.consolidate(data, weight=count)
        penalty.lam = 3.0 / (2 * sum(classes[: t + 1]))
    model.eval()
    total = sum(classes)
    for got, w in zip(penalty.omega.values(), omega, strict=True):
        torch.testing.assert_close(got / total, w, rtol=1e-10, atol=1e-14)
    moved(model)
    expected = sum(
        1.5 * (w * (p - a) ** 2).sum()
        for w, p, a in zip(omega, model.parameters(), anchor, strict=True)
    )
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(penalty(), expected, rtol=1e-10, atol=0)


def test_whole_batches_in_eval_mode_are_the_batch_approximation() -> None:
    model, data = network(), batches(0, [4, 4, 4])
    total = compat.BatchMeans()
    for x in data:
        total.add(model, x)
    total.add(model, data[0][:0])  # nothing
    assert total.samples == 3
    expected = estimate_importance(model, data, "batch")
    for name, omega in total.mean().items():
        torch.testing.assert_close(omega, expected[name])


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = network()
    penalty = compat.facil(model)
    penalty.consolidate(batches(0))
    moved(model)
    penalty.save(tmp_path / "penalty")
    estimator = compat.BatchMeans(compat.norm, training=True)
    loaded = compat.Averaged.load(
        tmp_path / "penalty", model, objective=compat.norm, importance=estimator
    )
    torch.testing.assert_close(loaded(), penalty())


Make = Callable[..., FusedMASPenalty]


@pytest.mark.parametrize("make", [compat.official, compat.avalanche, compat.facil])
def test_excluded_heads_are_not_held(make: Make) -> None:
    penalty = make(network(), exclude=("4.*",))
    penalty.consolidate(batches(0))
    assert set(penalty.omega) == {"0.weight", "0.bias", "1.weight", "1.bias"}
