"""Importance by its definition: a loop over single samples in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Omega = dict[str, Tensor]


def cast(batch: Any, dtype: torch.dtype) -> Any:
    if isinstance(batch, dict):
        return {key: cast(item, dtype) for key, item in batch.items()}
    return batch.to(dtype) if batch.is_floating_point() else batch


def samples_of(batch: Any) -> list[Any]:
    if isinstance(batch, dict):
        columns = [samples_of(item) for item in batch.values()]
        return [dict(zip(batch, row, strict=True)) for row in zip(*columns, strict=True)]
    return list(batch.split(1))


def waves(y: Tensor) -> Tensor:
    """An objective that rises for some samples and falls for others, with every parameter."""
    flat = y.flatten(1)
    return (30 * flat @ torch.arange(flat.shape[1]).to(flat).cos()).sin()


# Each objective, and the same as a list of numbers from the output of one sample.
OBJECTIVES: dict[Any, Callable[[Tensor], list[Tensor]]] = {
    "l2": lambda y: [(y * y).sum()],
    "l1": lambda y: [torch.where(y > 0, y, -y).sum()],
    "vector": lambda y: list(y.flatten()),
    waves: lambda y: [sum(30 * f * math.cos(i) for i, f in enumerate(y.flatten())).sin()],
}


def loop(
    model: nn.Module, batches: Sequence[Any], forward: Any = None, objective: Any = waves
) -> tuple[Omega, Omega]:
    """The mean of |gradient| over single samples, and what the batch approximation makes of it."""
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    model.eval()
    theta = {
        name.replace("_orig_mod.", ""): p for name, p in model.named_parameters() if p.requires_grad
    }
    exact = {name: torch.zeros_like(p, requires_grad=False) for name, p in theta.items()}
    approximate = {name: t.clone() for name, t in exact.items()}
    samples = 0
    for batch in batches:
        sums: dict[int, Omega] = {}
        for sample in samples_of(batch):
            samples += 1
            output = model(sample) if forward is None else forward(model, sample)
            for k, value in enumerate(OBJECTIVES[objective](output[0])):
                grads = torch.autograd.grad(
                    value, list(theta.values()), retain_graph=True, allow_unused=True
                )
                total = sums.setdefault(k, {name: torch.zeros_like(t) for name, t in exact.items()})
                for name, g in zip(theta, grads, strict=True):
                    if g is not None:
                        g = g.to_dense() if g.is_sparse else g
                        exact[name] += g.abs()
                        total[name] += g
        for total in sums.values():
            for name, t in total.items():
                approximate[name] += t.abs()
    return (
        {name: t / samples for name, t in exact.items()},
        {name: t / samples for name, t in approximate.items()},
    )


def assert_close(got: Omega, expected: Omega, tolerance: float, noise: Sequence[str] = ()) -> None:
    """Relative L2 error of every tensor; a tensor of noise is small beside the others."""
    assert got.keys() == expected.keys()
    largest = max(float(t.abs().max()) for t in expected.values() if t.numel())
    for name, right in expected.items():
        error = float((got[name].double() - right).norm())
        if name in noise:
            assert float(got[name].abs().max()) <= tolerance * largest, name
        else:
            assert error <= tolerance * float(right.norm()), (name, error / float(right.norm()))
