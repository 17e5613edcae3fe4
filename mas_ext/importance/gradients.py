"""Gradients of objectives, and sums of their absolute values or squares, by parameter name."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from mas_ext.kernels import backends
from mas_ext.kernels.accumulate import accumulate_
from mas_ext.kernels.backends import Backend
from mas_ext.kernels.dtypes import compute_dtype
from mas_ext.parameters.lockstep import Lockstep

Totals = dict[str, Tensor]

# Numbers in the gradients that are added at once.
_AT_ONCE = 1 << 16


class Summation(NamedTuple):
    """What is summed of per-sample gradients, absolute values or squares, and by which kernels."""

    backend: Backend
    square: bool = False


_Key = TypeVar("_Key")


def zeros(theta: Mapping[str, Tensor]) -> Totals:
    """Totals of 0 like these parameters."""
    return {
        name: torch.zeros_like(p, dtype=compute_dtype(p.dtype), requires_grad=False)
        for name, p in theta.items()
    }


def column_sum(values: Tensor, c: int) -> Tensor:
    """sum_k values[k, c]; a ValueError where that depends on no parameter."""
    if not values.requires_grad:
        raise ValueError(
            "output: got one that depends on no parameter, expected a differentiable one"
        )
    with torch.enable_grad():
        return values[:, c].sum()


def gradient(values: Tensor, c: int, theta: Mapping[_Key, Tensor]) -> dict[_Key, Tensor]:
    """d sum_k values[k, c] / d theta by key; absent where there is none. To be called for c = 0, 1, ..."""
    column = column_sum(values, c)
    found = torch.autograd.grad(
        column, [*theta.values()], retain_graph=c + 1 < values.shape[1], allow_unused=True
    )
    dense = (g.to_dense() if g is not None and g.is_sparse else g for g in found)
    return {name: g for name, g in zip(theta, dense, strict=True) if g is not None}


def accumulate(totals: Totals, found: Mapping[str, Tensor], how: Summation) -> None:
    """totals += abs(found), or its square, by name."""
    if how.square:
        for name, g in found.items():
            g = g.to(totals[name].dtype)
            totals[name].addcmul_(g, g)
        return
    kinds: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for name, g in found.items():
        into, added = kinds.setdefault((g.device, g.dtype), ([], []))
        into.append(totals[name])
        added.append(g)
    for (device, _), (into, added) in kinds.items():
        accumulate_(into, added, 1.0, backends.serves(device, how.backend))


def accumulate_gradients(
    totals: Totals, values: Tensor, theta: Mapping[str, Tensor], how: Summation
) -> None:
    """totals += abs(d sum_k values[k, c] / d theta), or its square, for every c.

    Gradients are added while the pass goes on, so that those of a whole model are never there together.
    """
    ready: Totals = {}
    numbers = 0

    def add_up() -> None:
        nonlocal numbers
        accumulate(totals, ready, how)
        ready.clear()
        numbers = 0

    def take(name: str, g: Tensor | None) -> Tensor | None:
        nonlocal numbers
        if g is None:  # of a function of the model's own that has no gradient here
            return None
        ready[name] = g.to_dense() if g.is_sparse else g
        numbers += g.numel()
        if numbers >= _AT_ONCE:
            add_up()
        return None if g.is_sparse else g.new_zeros(()).expand_as(g)  # for autograd to keep

    handles = []
    try:
        for name, p in theta.items():
            handles.append(p.register_hook(partial(take, name)))
        for c in range(values.shape[1]):
            gradient(values, c, theta)
            add_up()
    finally:
        for handle in handles:
            handle.remove()


def accumulate_sharded(
    lockstep: Lockstep,
    values: Tensor,
    theta: Mapping[str, Tensor],
    how: Summation,
    factor: float = 1.0,
    into: Totals | None = None,
) -> None:
    """lockstep's sums += factor abs(d sum_k values[k, c] / d theta), or its square, for every c.

    theta: the whole parameters by name that count. into: sketches, to be added to instead of the sums.
    """

    def take(unit: Mapping[str, Tensor]) -> Totals:
        slopes = {n: p.grad for n, p in unit.items() if n in theta and p.grad is not None}
        wide = {n: g.to(compute_dtype(g.dtype)) for n, g in slopes.items()}
        return {n: factor * (g.square() if how.square else g.abs()) for n, g in wide.items()}

    for c in range(values.shape[1]):
        retain = c + 1 < values.shape[1]
        lockstep.backward(column_sum(values, c), take=take, into=into, retain=retain)
