"""A step that fails leaves nothing behind: what comes next is as if it had never been tried."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mas_ext import FusedMASPenalty, optim
from mas_ext.optim import fused

NAN, INF = float("nan"), float("inf")
FUSED: list[Any] = [optim.SGD, optim.Adam, optim.AdamW]
OTHERS: list[Any] = [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW]
each_mode = pytest.mark.parametrize("mode", ["gradient", "proximal", None])
each_fused = pytest.mark.parametrize("kind", FUSED)

# What each of them takes, spoiled.
COMMON = [("lr", v) for v in ("x", None, NAN, INF, -0.1)] + [
    ("weight_decay", v) for v in (NAN, -1.0)
]
OF_SGD = [("momentum", v) for v in (NAN, -0.5, "x", None)] + [
    ("dampening", v) for v in (NAN, "x", 10**400)
]
OF_ADAM = [("eps", v) for v in (NAN, -1e-8, "x")]
OF_ADAM += [("betas", v) for v in ((NAN, 0.9), (0.9, 1.0), (-0.1, 0.9), ("x", 0.9), {0.5, 0.9})]


@pytest.fixture(autouse=True)
def filled() -> Iterator[None]:
    """Uninitialised memory is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


class Case:
    """A penalised model with a frozen and a free part, and an optimizer of two groups."""

    def __init__(self, kind: Any, mode: Any, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2)).double()
        self.x = torch.rand(8, 4, dtype=torch.float64)
        self.penalty = FusedMASPenalty(self.model, lam=0.3)
        self.penalty.consolidate([self.x])
        if kind in (optim.SGD, torch.optim.SGD):
            options = {"momentum": 0.9, "weight_decay": 0.01, **options}
        groups = [{"params": [*layer.parameters()]} for layer in self.model]
        self.optimizer = kind(groups, lr=0.1, **options)
        if mode is not None:
            self.penalty.attach(self.optimizer, mode)

    def backward(self) -> None:
        self.optimizer.zero_grad()
        self.model[:2](self.x).square().sum().backward()  # the last layer has no gradient

    def held(self) -> list[Any]:
        """Parameters, gradients and the optimizer's state, copied."""
        parameters = [*self.model.parameters()]
        own = [
            {key: copy.deepcopy(t) for key, t in self.optimizer.state.get(p, {}).items()}
            for p in parameters
        ]
        grads = [None if p.grad is None else p.grad.clone() for p in parameters]
        return [*(p.detach().clone() for p in parameters), *grads, *own]

    def step(self) -> None:
        self.backward()
        self.optimizer.step()


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def fails_without_a_trace(
    case: Case, twin: Case, failing: Callable[[], Any], error: Any, match: str | None = None
) -> None:
    """In the first step and in a later one; the twin never fails."""
    for _ in range(2):
        case.backward()
        twin.backward()
        before = case.held()
        with pytest.raises(error, match=match):
            failing()
        assert equal(case.held(), before)
        for each in (case, twin):
            each.optimizer.step()
        assert equal(case.held(), twin.held())
        assert all(p.isfinite().all() for p in case.model.parameters())


def with_group(case: Case, group: int, name: str, value: Any) -> Callable[[], None]:
    def step() -> None:
        own = case.optimizer.param_groups[group]
        before, own[name] = own[name], value
        try:
            case.optimizer.step()
        finally:
            own[name] = before

    return step


@each_mode
@pytest.mark.parametrize("group", [0, 2])
@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [(optim.SGD, *c) for c in COMMON + OF_SGD]
    + [(k, *c) for k in FUSED[1:] for c in COMMON + OF_ADAM],
)
def test_a_number_out_of_range(kind: Any, name: str, value: Any, group: int, mode: Any) -> None:
    case, twin = Case(kind, mode), Case(kind, mode)
    step = with_group(case, group, name, value)
    fails_without_a_trace(case, twin, step, ValueError, rf"{name}.*: got")


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
@pytest.mark.parametrize("group", [0, 2])
@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [(torch.optim.SGD, *c) for c in COMMON + OF_SGD]
    + [(k, *c) for k in OTHERS[1:] for c in COMMON + OF_ADAM],
)
def test_a_number_out_of_range_in_an_optimizer_of_torch(
    kind: Any, name: str, value: Any, group: int, mode: Any
) -> None:
    """The penalty's gradient is not in .grad after it, from where the next step would add it once more."""
    case, twin = Case(kind, mode), Case(kind, mode)
    step = with_group(case, group, name, value)
    fails_without_a_trace(case, twin, step, ValueError, rf"{name}.*: got")


@pytest.mark.parametrize("kind", [optim.SGD, torch.optim.SGD])
@pytest.mark.parametrize(("name", "value"), [("momentum", 1.0), ("dampening", 1.5)])
def test_a_step_length_that_is_none(kind: Any, name: str, value: float) -> None:
    case, twin = Case(kind, "proximal"), Case(kind, "proximal")
    step = with_group(case, 1, name, value)
    fails_without_a_trace(case, twin, step, ValueError, f"{name}: got")


@each_mode
@each_fused
def test_a_sparse_gradient_in_the_last_group(kind: Any, mode: Any) -> None:
    case, twin = Case(kind, mode), Case(kind, mode)

    def failing() -> None:
        p = case.model[1].weight
        assert p.grad is not None
        before, p.grad = p.grad, p.grad.to_sparse()
        try:
            case.optimizer.step()
        finally:
            p.grad = before

    fails_without_a_trace(case, twin, failing, RuntimeError, "sparse gradient")


# What may stand for a tensor that the optimizer keeps, or for a gradient.
SPOILED: dict[str, Callable[[Tensor], Any]] = {
    "shape": lambda t: t[None],
    "size": lambda t: torch.zeros(1000, dtype=t.dtype),
    "dtype": lambda t: t.to(torch.bfloat16),
    "number": lambda t: 7.0,
    "None": lambda t: None,
}


@pytest.mark.parametrize("how", SPOILED)
@pytest.mark.parametrize(
    ("kind", "name"),
    [(optim.SGD, "momentum_buffer")]
    + [(k, n) for k in FUSED[1:] for n in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step")],
)
def test_what_it_keeps_of_a_parameter_in_the_last_group_is_spoiled(
    kind: Any, name: str, how: str
) -> None:
    """A group before it that another call steps has not made its step then."""
    options = {"amsgrad": True} if name == "max_exp_avg_sq" else {}
    other = {"momentum": 0.0} if kind is optim.SGD else {"amsgrad": not options}
    case, twin = Case(kind, "proximal", **options), Case(kind, "proximal", **options)
    for each in (case, twin):
        each.optimizer.param_groups[0].update(other)
        each.step()
        each.backward()
    own = case.optimizer.state[case.model[1].weight]
    before, own[name] = own[name], SPOILED[how](own[name])
    held = case.held()
    if (name, how) == ("momentum_buffer", "None"):
        return  # torch's sign of a first step
    with pytest.raises((ValueError, TypeError, RuntimeError), match=name):
        case.optimizer.step()
    assert equal(case.held(), held)
    own[name] = before
    for each in (case, twin):
        each.optimizer.step()
    assert equal(case.held(), twin.held())


@pytest.mark.parametrize("kind", [optim.SGD])
def test_a_step_length_that_is_none_of_a_group_without_gradients(kind: Any) -> None:
    case, twin = Case(kind, "proximal"), Case(kind, "proximal")
    step = with_group(case, 2, "momentum", 1.0)
    fails_without_a_trace(case, twin, step, ValueError, "momentum: got")


@pytest.mark.parametrize("failure", [MemoryError, KeyboardInterrupt])
@each_mode
@each_fused
def test_a_kernel_that_fails(
    kind: Any, mode: Any, failure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, twin = Case(kind, mode), Case(kind, mode)

    def failing() -> None:
        def fail(*args: Any, **named: Any) -> None:
            raise failure

        with monkeypatch.context() as patch:
            patch.setattr(fused, "sgd_" if kind is optim.SGD else "adamw_", fail)
            case.optimizer.step()

    fails_without_a_trace(case, twin, failing, failure)


@pytest.mark.parametrize("allocation", range(4))
@each_mode
@each_fused
def test_memory_that_runs_out_on_the_way(
    kind: Any, mode: Any, allocation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, twin = Case(kind, mode), Case(kind, mode)
    case.backward()
    before, left = case.held(), [allocation]

    def limited(real: Any) -> Any:
        def allocate(*args: Any, **named: Any) -> Tensor:
            if left[0] == 0:
                raise MemoryError
            left[0] -= 1
            return real(*args, **named)

        return allocate

    with monkeypatch.context() as patch:
        for name in ("empty_like", "zeros_like"):
            patch.setattr(torch, name, limited(getattr(torch, name)))
        with pytest.raises(MemoryError):
            case.optimizer.step()
    assert equal(case.held(), before)
    case.optimizer.step()
    twin.step()
    assert equal(case.held(), twin.held())


@each_mode
@each_fused
def test_a_closure_that_fails(kind: Any, mode: Any) -> None:
    case, twin = Case(kind, mode), Case(kind, mode)

    def closure() -> None:
        raise ArithmeticError

    fails_without_a_trace(case, twin, lambda: case.optimizer.step(closure), ArithmeticError)


@each_fused
@pytest.mark.parametrize("added", [{"foreach": True}, {"lr": NAN}, {"weight_decay": -1.0}])
def test_a_group_that_is_refused_is_not_added(kind: Any, added: dict[str, Any]) -> None:
    case = Case(kind, None)
    new = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=f"{next(iter(added))}: "):
        case.optimizer.add_param_group({"params": [new], **added})
    assert len(case.optimizer.param_groups) == 3
    case.step()
    assert new.tolist() == [1.0, 1.0]


@each_fused
@pytest.mark.parametrize("changed", [{"foreach": True}, {"lr": NAN}, {"weight_decay": "x"}])
def test_a_state_that_is_refused_is_not_taken(kind: Any, changed: dict[str, Any]) -> None:
    case, twin = Case(kind, "gradient"), Case(kind, "gradient")
    for each in (case, twin):
        each.step()
    state = copy.deepcopy(case.optimizer.state_dict())
    state["param_groups"][1] |= changed
    for own in state["state"].values():
        own.clear()
    with pytest.raises(ValueError, match=f"{next(iter(changed))}: got"):
        case.optimizer.load_state_dict(state)
    for each in (case, twin):
        each.step()
    assert equal(case.held(), twin.held())


@each_fused
def test_numbers_are_checked_when_the_optimizer_is_made(kind: Any) -> None:
    for name in ("lr", "weight_decay"):
        with pytest.raises(ValueError, match="nan"):
            kind([nn.Parameter(torch.ones(2))], **{"lr": 0.1, name: NAN})
