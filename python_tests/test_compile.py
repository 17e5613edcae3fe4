"""The penalty inside torch.compile: one graph, compiled once, and the steps of a plain training in NumPy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from memory import largest_allocation
from oracles import naive
from oracles.product import Array, Product, array, held
from torch import Tensor, nn
from torch.optim import SGD

from mas_ext import FusedMASPenalty

Form = Literal["penalty", "add_grad_"]
LR = 0.05

# torch's compiler warns of itself: of what inductor imports, and when a graph that broke is resumed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another version of the package left there may call operators that are gone."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def recompiling_is_an_error(yes: bool) -> Any:
    return torch._dynamo.config.patch(error_on_recompile=yes)


def build(store: Any = "merged", dtype: torch.dtype = torch.float64) -> FusedMASPenalty:
    return FusedMASPenalty(
        Product(dtype), lam=0.7, anchor="own", store=store, omega_dtype=torch.float64
    )


def steps(
    penalty: FusedMASPenalty, form: Form, compiled: Callable[..., Any]
) -> Callable[[Tensor], Array]:
    """A step of SGD on |theta x - 1|^2 / 2 with the penalty, of which the loss or the gradient is compiled."""
    model = penalty.model
    optimizer = SGD(model.parameters(), lr=LR)
    added = compiled(penalty.add_grad_)

    def total(x: Tensor) -> Tensor:
        loss = 0.5 * (model(x) - 1).square().sum()
        return loss + penalty() if form == "penalty" else loss

    compiled_total = compiled(total)

    def step(x: Tensor) -> Array:
        optimizer.zero_grad()
        compiled_total(x).backward()
        if form == "add_grad_":
            added()
        optimizer.step()
        return array(model.theta())

    return step


def in_one_graph(act: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(act, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("form", ["penalty", "add_grad_"])
@pytest.mark.parametrize(("store", "first"), [("merged", 1), ("per_task", 2)])
def test_a_training_of_many_tasks_is_compiled_once(form: Form, store: str, first: int) -> None:
    """From the first task on; store "per_task" once more when its state gets a second row."""
    penalty = build(store)
    step = steps(penalty, form, in_one_graph)
    theta, omega, anchor = array(penalty.model.theta()), np.zeros((0, 8)), np.zeros((0, 8))
    for task in range(5):
        for k in range(4):
            penalty.lam = 0.1 + 0.2 * k
            x = torch.randn(8, dtype=torch.float64)
            slope = array(x) * (array(x) * theta - 1)
            pull = naive.gradient(theta, omega, anchor, np.full(task, penalty.lam))
            theta = theta - LR * (slope + pull)
            with recompiling_is_an_error(task > first or k > 0):
                np.testing.assert_allclose(step(x), theta, rtol=1e-11)
        importance = {name: torch.rand_like(p) for name, p in penalty.model.named_parameters()}
        penalty.consolidate(importance=importance)
        flat = np.concatenate([array(w).ravel() for w in importance.values()])
        omega, anchor = np.concatenate([omega, flat[None]]), np.concatenate([anchor, theta[None]])


@pytest.mark.parametrize("form", ["penalty", "add_grad_"])
def test_a_state_that_was_loaded_needs_no_new_graph(form: Form) -> None:
    penalty, x = build(), torch.ones(8, dtype=torch.float64)
    penalty.consolidate([x[None]])
    start = {key: t.clone() for key, t in penalty.model.state_dict().items()}
    state = {key: t.clone() for key, t in penalty.state_dict().items()}
    step = steps(penalty, form, in_one_graph)
    path = [step(x) for _ in range(3)]
    penalty.consolidate([x[None]])
    penalty.model.load_state_dict(start)
    penalty.load_state_dict(state)
    with recompiling_is_an_error(True):
        for theta in path:
            np.testing.assert_array_equal(step(x), theta)


def test_a_copy_is_compiled_for_itself() -> None:
    penalty, x = build(), torch.ones(8, dtype=torch.float64)
    penalty.consolidate([x[None]])
    both = copy.deepcopy({"model": penalty.model, "penalty": penalty})
    step = steps(both["penalty"], "penalty", in_one_graph)
    expected = steps(penalty, "penalty", lambda act: act)
    for _ in range(3):
        np.testing.assert_allclose(step(x), expected(x), rtol=1e-13)


@pytest.mark.parametrize("form", ["penalty", "add_grad_"])
def test_frozen_parameters_and_those_of_two_dtypes(form: Form) -> None:
    model = nn.ParameterDict(
        {
            "a": nn.Parameter(torch.randn(3)),
            "b": nn.Parameter(torch.randn(4).double()),
            "c": nn.Parameter(torch.randn(5)),
        }
    )
    penalty = FusedMASPenalty(model, lam=0.5, anchor="own")
    omega = {name: torch.rand_like(p) for name, p in model.items()}
    anchor = {name: p.detach().clone() for name, p in model.items()}
    penalty.consolidate(importance=omega)
    with torch.no_grad():
        for p in model.values():
            p += torch.randn_like(p)
    model["c"].requires_grad_(False)
    if form == "penalty":
        value = in_one_graph(lambda: penalty() + 0)()
        value.backward()
    else:
        value = in_one_graph(penalty.add_grad_)()
    distance = {name: (p - anchor[name]).detach().double() for name, p in model.items()}
    expected = sum(0.5 * float((omega[n] * d**2).sum()) for n, d in distance.items())
    assert value.item() == pytest.approx(expected, rel=1e-6)
    assert model["c"].grad is None
    for name in ("a", "b"):
        torch.testing.assert_close(
            model[name].grad, (omega[name] * distance[name]).to(model[name].dtype)
        )


@pytest.mark.filterwarnings("ignore:parameters .* got a new module:RuntimeWarning")
@pytest.mark.parametrize("whole", [False, True])
def test_a_changed_model_is_followed_outside_of_the_graph(whole: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
    penalty = FusedMASPenalty(model, anchor="own", omega_dtype=torch.float64)
    penalty.consolidate([torch.randn(6, 4, dtype=torch.float64)])
    compiled = torch.compile(lambda: penalty() + 0, backend="aot_eager", fullgraph=whole)
    assert compiled().item() == 0
    omega, anchor = penalty.omega["1.weight"].clone(), penalty.anchor["1.weight"].clone()
    rest = penalty.omega["1.bias"].clone(), penalty.anchor["1.bias"].clone()
    model[1] = nn.Linear(3, 5).double()
    if whole:
        with pytest.raises(Exception, match=r"FusedMASPenalty\._fit"):
            compiled()
        penalty()
    expected = (omega * (model[1].weight[:2] - anchor) ** 2).sum()
    expected = expected + (rest[0] * (model[1].bias[:2] - rest[1]) ** 2).sum()
    for _ in range(2):
        assert compiled().item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
def test_an_optimizer_that_is_compiled_has_the_penalty_in_its_step(mode: Any) -> None:
    """Not in one graph: torch breaks it before the hooks of a step."""
    case, momentum = held(), np.zeros(8)
    # Without foreach, torch 2.13 compiles the momentum of a 0-dim parameter wrongly, with no penalty too.
    optimizer = SGD(case.model.parameters(), lr=LR, momentum=0.5, foreach=True)
    case.penalty.attach(optimizer, mode)
    step = torch.compile(optimizer.step, backend="aot_eager")
    theta = array(case.model.theta())
    for _ in range(4):
        optimizer.zero_grad()
        case.loss().backward()
        step()
        pull = naive.gradient(theta, case.omega, case.anchor, case.alpha)
        momentum = 0.5 * momentum + case.slope(theta) + (pull if mode == "gradient" else 0)
        theta = theta - LR * momentum
        if mode == "proximal":
            eta = np.full(8, LR / 0.5)
            theta = naive.proximal(theta, case.omega, case.anchor, case.alpha, eta)
        np.testing.assert_allclose(array(case.model.theta()), theta, rtol=1e-11)


def test_inductor_adds_the_gradient_in_place() -> None:
    model = nn.Linear(300, 200)
    penalty = FusedMASPenalty(model, anchor="own")
    penalty.consolidate([torch.randn(2, 300)])
    compiled = torch.compile(penalty.add_grad_, fullgraph=True)
    anchor = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += torch.randn_like(model.weight)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    value = compiled()
    distance, omega = (model.weight.detach() - anchor).double(), penalty.omega["weight"].double()
    assert value.item() == pytest.approx(float((omega * distance**2).sum()), rel=1e-6)
    torch.testing.assert_close(model.weight.grad, (1 + 2 * omega * distance).float())
    torch.testing.assert_close(model.bias.grad, torch.ones(200))
    assert largest_allocation(compiled) < 4 * 300 * 200 / 100


def test_inductor_differentiates_the_loss() -> None:
    penalty = build()
    penalty.consolidate([torch.ones(1, 8, dtype=torch.float64)])
    step = steps(penalty, "penalty", lambda act: torch.compile(act, fullgraph=True))
    twin = copy.deepcopy({"model": penalty.model, "penalty": penalty})["penalty"]
    expected = steps(twin, "penalty", lambda act: act)
    for _ in range(3):
        x = torch.randn(8, dtype=torch.float64)
        np.testing.assert_allclose(step(x), expected(x), rtol=1e-12)
