"""From per-sample gradients of derived tensors to sums for parameters, against one sample at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mas_ext.importance.exact.gradient_forms import Dense, PerSample, Product
from mas_ext.importance.exact.nodes import GradientSource
from mas_ext.importance.exact.pull_back import Moves, pull_back

SAMPLES = 7
Parts = dict[str, Tensor]


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


class AloneOnly(torch.autograd.Function):
    """exp(p), whose backward pass writes into a tensor, and so can't be run for many gradients at once."""

    @staticmethod
    def forward(ctx: Any, p: Tensor) -> Tensor:
        ctx.save_for_backward(p)
        return p.exp()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (p,) = ctx.saved_tensors
        return torch.zeros_like(p).copy_(grad * p.exp())


def met(tensors: Sequence[Tensor], theta: Parts) -> list[GradientSource]:
    """Sources with gradients of some samples, products of factors where they are matrices."""
    sources = []
    for t in tensors:
        form: PerSample = Dense(real(SAMPLES, *t.shape))
        if t.dim() > 1:
            form = Product(real(SAMPLES, 3, t.shape[-2]), real(SAMPLES, 3, t.shape[-1]))
        sources.append(GradientSource(frozenset(theta), t, t.detach(), 1, [form]))
    return sources


def one_by_one(sources: Sequence[GradientSource], theta: Parts, square: bool) -> Parts:
    totals = {name: torch.zeros_like(p) for name, p in theta.items()}
    for k in range(SAMPLES):
        value = sum(
            (source.tensor * source.forms[0].dense(k, k + 1, source.tensor)[0].detach()).sum()
            for source in sources
        )
        grads = torch.autograd.grad(value, [*theta.values()], retain_graph=True)
        for total, g in zip(totals.values(), grads, strict=True):
            total += g.square() if square else g.abs()
    return totals


# The derived tensors of v (4), w (4, 5), a (2, 5) and b (4, 2), and what is pulled back sample by sample.
WAYS: dict[str, tuple[Callable[[Parts], Sequence[Tensor]], str]] = {
    "one to one": (lambda p: [p["v"].exp()], ""),
    "one to one, with a sign": (lambda p: [-p["w"].tanh()], ""),
    "some elements": (lambda p: [p["v"][1:].exp()], ""),
    "a permutation": (lambda p: [p["w"].flip(0).exp()], ""),
    "two parts of different elements": (lambda p: [p["v"][:2].exp(), p["v"][2:].tanh()], ""),
    "two parts of the same elements": (lambda p: [p["v"].exp(), p["v"].tanh()], "v"),
    "two parts of which one element is the same": (
        lambda p: [p["v"][:2].exp(), p["v"][1:].exp()],
        "v",
    ),
    "itself and a part": (lambda p: [p["v"], p["v"].exp()], "v"),
    "many to one": (lambda p: [p["v"].softmax(0)], "v"),
    "one to many": (lambda p: [torch.cat([p["v"].exp(), p["v"]])], "v"),
    "differences": (lambda p: [p["v"] - p["v"].mean()], "v"),
    "one of two": (lambda p: [p["v"].softmax(0) + 1, p["w"].exp()], "v"),
    "itself": (lambda p: [p["w"], p["w"]], ""),
    "a sum": (lambda p: [torch.add(p["w"], p["b"] @ p["a"], alpha=3)], ""),
    "a difference": (lambda p: [p["w"] - (p["b"] @ p["a"]) / 4], ""),
    "a transpose": (lambda p: [(p["w"] + 2 * (p["a"].T @ p["b"].T).T).mT], ""),
    "another transpose": (lambda p: [(p["a"].mT @ p["b"].permute(1, 0)).transpose(-1, 0)], ""),
    "no transpose": (lambda p: [(p["b"] @ p["a"]).transpose(1, 1).permute(0, 1)], "ab"),
    "of three dimensions": (lambda p: [p["w"][:, None].transpose(0, 1)], ""),
    "alone only": (lambda p: [AloneOnly.apply(p["v"]).softmax(0)], "v"),
    "a cast": (lambda p: [p["w"] + (p["b"].float() @ p["a"].float()).double()], ""),
    "a factor learned": (lambda p: [(p["b"] @ p["a"]) * p["v"][0]], "abv"),
    "a product with itself": (lambda p: [p["w"] @ p["w"].T], ""),
    "a scale of rows": (lambda p: [p["v"][:, None] * (p["b"] @ p["a"])], "abv"),
    "a scale of a number": (lambda p: [p["w"] * p["v"].sum()], "v"),
}


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_sums_are_those_of_samples_one_by_one(way: str, square: bool) -> None:
    derive, dense = WAYS[way]
    theta = {"v": real(4), "w": real(4, 5), "a": real(2, 5), "b": real(4, 2)}
    theta = {name: p.requires_grad_() for name, p in theta.items()}
    tensors = derive(theta)
    used = torch.autograd.grad(
        sum(t.sum() for t in tensors), [*theta.values()], retain_graph=True, allow_unused=True
    )
    theta = {name: p for (name, p), g in zip(theta.items(), used, strict=True) if g is not None}
    sources, moves = met(tensors, theta), Moves()
    expected = one_by_one(sources, theta, square)
    for _ in range(2):  # with what the first time found out
        totals = pull_back(sources, theta, square, False, moves, ())
        assert totals.keys() == theta.keys()
        for name, total in totals.items():
            torch.testing.assert_close(total, expected[name], rtol=1e-5, atol=1e-6)
        assert moves.dense == {*dense}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 50])
def test_sixteen_bits(dtype: torch.dtype, size: int) -> None:
    """bfloat16's totals are moved at once; float16 has not the range."""
    p = real(size).clamp(-1, 0.3).to(dtype).requires_grad_()
    g = 2e4 * torch.rand(SAMPLES, size)
    source = GradientSource(frozenset("p"), p.exp() * p.tanh(), p.detach(), 1, [Dense(g)])
    moves = Moves()
    total = pull_back([source], {"p": p}, False, False, moves, ())["p"]
    p = p.detach().double().requires_grad_()
    (slope,) = torch.autograd.grad((p.exp() * p.tanh()).sum(), p)
    expected = (slope * g).abs().sum(0)
    assert float((total - expected).norm() / expected.norm()) < 0.02
    assert (moves.dense == {"p"}) == (dtype == torch.float16)


def test_many_samples_are_pulled_back_at_once() -> None:
    p, passes = real(4).requires_grad_(), []
    inner = p * 1.0
    inner.register_hook(lambda grad: passes.append(1))
    source = GradientSource(frozenset("p"), inner.softmax(0), p.detach(), 1, [Dense(real(200, 4))])
    pull_back([source], {"p": p}, False, False, Moves(), ())
    assert len(passes) < 20
