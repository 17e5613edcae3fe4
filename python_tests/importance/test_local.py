"""Local importance (l-MAS): every layer alone, against its definition layer by layer and sample by sample."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo import Wired, observed, real

from mas_ext import estimate_importance

pytestmark = pytest.mark.usefixtures("one_thread")

Omega = dict[str, Tensor]


def local(model: nn.Module, batches: list[Tensor], **options: Any) -> Omega:
    return estimate_importance(model, batches, method="local", **options)


def naive(model: nn.Sequential, batches: list[Tensor]) -> Omega:
    """Each layer of a sequence by itself: |d (its output, after a ReLU that follows)^2 / d its parameters|."""
    model.eval()
    omega = {name: torch.zeros_like(p, requires_grad=False) for name, p in model.named_parameters()}
    for sample in torch.cat(batches).split(1):
        x = sample
        for (name, layer), (_, follower) in pairwise([*model.named_children(), ("", None)]):
            y = layer(x.detach().clone())
            if theta := dict(layer.named_parameters(prefix=name)):
                after = y.clamp(min=0) if isinstance(follower, nn.ReLU) else y
                grads = torch.autograd.grad((after * after).sum(), list(theta.values()))
                for key, g in zip(theta, grads, strict=True):
                    omega[key] += g.abs()
            x = y
    samples = sum(len(batch) for batch in batches)
    return {name: t / samples for name, t in omega.items()}


def assert_close(got: Omega, expected: Omega, tolerance: float = 1e-10) -> None:
    assert got.keys() == expected.keys()
    for name, right in expected.items():
        assert right.any(), name
        error = float((got[name].double() - right).norm())
        assert error <= tolerance * float(right.norm()), name


def test_linear_layers_are_the_closed_form() -> None:
    """2 |y_i x_j| and 2 |y_i|, where y is what the ReLU lets through."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    x = torch.randn(7, 4, dtype=torch.float64)
    h = model[1](model[0](x)).detach()
    y = model[2](h).detach()
    closed = {
        "0.weight": 2 * torch.einsum("ni,nj->ij", h, x.abs()) / 7,
        "0.bias": 2 * h.mean(0),
        "2.weight": 2 * torch.einsum("ni,nj->ij", y.abs(), h) / 7,
        "2.bias": 2 * y.abs().mean(0),
    }
    assert_close(local(model, [x[:4], x[4:]]), closed)


SEQUENCES: dict[str, tuple[Callable[[], nn.Sequential], Callable[[int], Tensor]]] = {
    "linear, positions": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2)),
        real(5, 4),
    ),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 3, stride=2, groups=2, bias=False),
            nn.ReLU(),
            nn.ConvTranspose2d(4, 2, 2, stride=2),
            nn.Flatten(),
            nn.Linear(128, 3),
        ),
        real(3, 9, 9),
    ),
    "norms": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 2, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 2),
            nn.GroupNorm(2, 4),
            nn.ReLU(),
            nn.Flatten(2),
            nn.Linear(9, 6),
            nn.LayerNorm(6),
            nn.RMSNorm(6),
            nn.Linear(6, 2),
        ),
        real(3, 5, 5),
    ),
    "other activations": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.LeakyReLU(), nn.Linear(5, 5), nn.GELU(), nn.Linear(5, 2)),
        real(4),
    ),
    "the output is a ReLU's": (lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU()), real(4)),
}  # fmt: skip


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", SEQUENCES)
def test_every_layer_gets_its_definition(name: str, dtype: torch.dtype, tolerance: float) -> None:
    make, inputs = SEQUENCES[name]
    model: Any = observed(make(), inputs)
    batches = [inputs(5), inputs(6), inputs(1)]
    omega = local(model.to(dtype), [batch.to(dtype) for batch in batches])
    assert {t.dtype for t in omega.values()} == {dtype}
    assert_close(omega, naive(model.double(), [batch.double() for batch in batches]), tolerance)


def test_it_is_no_batch_approximation() -> None:
    """y_i x_j changes its sign from sample to sample."""
    model = nn.Sequential(nn.Linear(4, 3)).double()
    x = torch.randn(8, 4, dtype=torch.float64)
    mean = 2 * torch.einsum("ni,nj->ij", model(x).detach(), x).abs() / 8
    assert float((local(model, [x])["0.weight"] - mean).norm()) > 0.1 * float(mean.norm())


RELUS: dict[str, Callable[[Tensor], Tensor]] = {
    "nn.ReLU": nn.ReLU(),
    "nn.ReLU in place": nn.ReLU(inplace=True),
    "F.relu": F.relu,
    "F.relu in place": lambda h: F.relu(h, inplace=True),
    "F.relu_": F.relu_,
    "torch.relu": torch.relu,
    "Tensor.relu": Tensor.relu,
    "Tensor.relu_": Tensor.relu_,
}


@pytest.mark.parametrize("name", RELUS)
@pytest.mark.parametrize("layer", ["linear", "conv"])
def test_every_spelling_of_relu(layer: str, name: str) -> None:
    """All mean the same, and not what no ReLU means."""
    first = nn.Linear(6, 6) if layer == "linear" else nn.Conv1d(2, 2, 3, padding=1)
    shape = (6,) if layer == "linear" else (2, 3)
    tail = nn.Sequential(nn.Flatten(), nn.Linear(6, 2))
    x = torch.randn(5, *shape, dtype=torch.float64)
    model = Wired(lambda m, x: m.tail(RELUS[name](m.first(x))), first=first, tail=tail).double()
    omega = local(model, [x])
    right = naive(nn.Sequential(first, nn.ReLU(), *tail), [x])
    assert_close(omega, dict(zip(omega, right.values(), strict=True)))
    other = naive(nn.Sequential(first, nn.Tanh(), *tail), [x])["0.weight"]
    assert float((other - right["0.weight"]).norm()) > 0.01 * float(other.norm())


def test_a_relu_somewhere_else_does_not_count() -> None:
    """After another operation, or on another layer's output."""
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    model = Wired(lambda m, x: F.relu(m.a(x) + 1) + m.b(x), a=a, b=b).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    omega = local(model, [x])
    for name, layer in (("a", a), ("b", b)):
        y = layer(x).detach().abs()
        torch.testing.assert_close(
            omega[f"{name}.weight"], 2 * torch.einsum("ni,nj->ij", y, x.abs()) / 5
        )


def test_it_knows_nothing_of_the_layers_behind() -> None:
    """Its input is held constant, and so is everything after it."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    before = local(model, [x])
    with torch.no_grad():
        model[2].weight.mul_(-3)
    after = local(model, [x])
    for name in ("0.weight", "0.bias"):
        assert torch.equal(before[name], after[name])
    assert not torch.equal(before["2.weight"], after["2.weight"])


def test_a_layer_used_twice_adds_its_uses_before_their_absolute_value() -> None:
    a = nn.Linear(4, 4)
    model = Wired(lambda m, x: m.a(torch.tanh(m.a(x))), a=a).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    omega = local(model, [x])
    first = a(x).detach()
    h = torch.tanh(first)
    uses = torch.einsum("ni,nj->nij", first, x) + torch.einsum("ni,nj->nij", a(h).detach(), h)
    torch.testing.assert_close(omega["a.weight"], 2 * uses.abs().mean(0))


def test_frozen_and_excluded_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2)).double()
    model[0].requires_grad_(False)
    x = torch.randn(5, 4, dtype=torch.float64)
    omega = local(model, [x], exclude=["3.*"])
    model.requires_grad_(True)
    right = naive(model, [x])
    assert_close(omega, {name: right[name] for name in ("2.weight", "2.bias")})


def test_the_model_is_left_as_it_was() -> None:
    make, inputs = SEQUENCES["norms"]
    model = observed(make(), inputs).train()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    batch, random = inputs(4), torch.get_rng_state()
    local(model, [batch])
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
