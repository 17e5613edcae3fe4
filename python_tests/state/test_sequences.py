"""Any sequence of operations on a model and its penalty, against a list of tasks in float64."""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tiny
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from snapshots import equal, snapshot
from times import TIMES
from torch import Tensor, nn

from mas_ext import FusedMASPenalty
from mas_ext.optim import SGD

Array = npt.NDArray[np.float64]
NAMES = ["a", "b", "c", "inner.a", "inner.b"]
SHAPES = [(2,), (3,), (5,)]
GAMMA = 0.5
names, seeds = st.sampled_from(NAMES), st.integers(0, 10_000)
numbers = st.sampled_from([0.0, 0.25, 1.0, 3.0])


def draw(seed: int, shape: tuple[int, ...]) -> Array:
    return np.random.default_rng(seed).random(shape)


def resized(old: Array, shape: tuple[int, ...]) -> Array:
    """The leading part, and 0 beside it."""
    new, kept = (
        np.zeros(shape),
        tuple(slice(0, min(a, b)) for a, b in zip(shape, old.shape, strict=True)),
    )
    new[kept] = old[kept]
    return new


@dataclass
class Oracle:
    """Every task by itself: omega and anchor by name; what each name was last seen to stand for."""

    merge: str
    latest: bool
    lam: float = 0.7
    totals: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    omega: dict[str, list[Array]] = field(default_factory=dict)
    anchor: dict[str, list[Array]] = field(default_factory=dict)
    seen: dict[str, Any] = field(default_factory=dict)
    followed: dict[str, str] = field(default_factory=dict)

    def follow(self, theta: dict[str, Tensor]) -> None:
        """Names first; a name that is gone follows its parameter to a name that is free."""
        for name in [n for n in self.omega if n not in theta]:
            now = [n for n, p in theta.items() if p is self.seen.get(name)]
            if now and now[0] not in self.omega:
                self.move(name, now[0])
                self.followed[name] = now[0]
        gone = {n: p for n, p in self.seen.items() if not any(p is q for q in theta.values())}
        self.seen = gone | theta
        self.fit(theta)

    def fit(self, theta: dict[str, Tensor]) -> None:
        """In the shapes that the parameters have now."""
        for name in self.omega.keys() & theta.keys():
            shape = tuple(theta[name].shape)
            self.omega[name] = [resized(w, shape) for w in self.omega[name]]
            self.anchor[name] = [resized(a, shape) for a in self.anchor[name]]

    def move(self, old: str, new: str) -> None:
        for kind in (self.omega, self.anchor, self.seen):
            if old in kind:
                kind[new] = kind.pop(old)  # type: ignore[attr-defined]

    def add(self, theta: dict[str, Tensor], importance: dict[str, Array], weight: float) -> None:
        for name in [n for n in self.omega if n not in theta]:
            del self.omega[name], self.anchor[name]
        for name in theta.keys() & (self.omega.keys() | importance.keys()):
            x = theta[name].detach().double().numpy().copy()
            zeros = [np.zeros(x.shape)] * len(self.totals)
            self.omega[name] = [
                *self.omega.get(name, zeros),
                importance.get(name, np.zeros(x.shape)),
            ]
            self.anchor[name] = [*self.anchor.get(name, zeros), x]
        self.totals.append(sum(float(w.sum()) for w in importance.values()))
        self.weights.append(weight)

    def gains(self) -> list[float]:
        ages = range(len(self.totals) - 1, -1, -1)
        if self.merge == "consistent":
            return [w / s for w, s in zip(self.weights, self.totals, strict=True)]
        return [
            w * (GAMMA**k if self.merge == "decay" else 1.0)
            for k, w in zip(ages, self.weights, strict=True)
        ]

    def scale(self) -> float:
        if self.merge != "consistent" or not self.totals:
            return self.lam
        return self.lam * sum(self.weights) / sum(self.gains()) if sum(self.gains()) else 0.0

    def terms(self, name: str) -> list[tuple[Array, Array]]:
        """W_t and A_t of each term of the penalty."""
        anchors = self.anchor[name]
        if self.latest:
            anchors = [anchors[-1]] * len(anchors)
        scale = self.scale()
        return [
            (scale * g * w, a)
            for g, w, a in zip(self.gains(), self.omega[name], anchors, strict=True)
        ]

    def held(self, theta: dict[str, Tensor]) -> dict[str, Array]:
        return {n: theta[n].detach().double().numpy() for n in self.omega if n in theta}

    def value(self, theta: dict[str, Tensor]) -> float:
        held = self.held(theta).items()
        return sum(float((w * (x - a) ** 2).sum()) for n, x in held for w, a in self.terms(n))

    def gradient(self, theta: dict[str, Tensor]) -> dict[str, Array]:
        held = self.held(theta).items()
        return {n: sum(2 * w * (x - a) for w, a in self.terms(n)) for n, x in held}  # type: ignore[misc]

    def proximal(self, theta: dict[str, Tensor], eta: float) -> dict[str, Array]:
        """The minimiser of penalty + |x' - x|^2 / (2 eta), by its normal equation."""
        return {
            n: (x + sum(2 * eta * w * a for w, a in self.terms(n)))
            / (1 + sum(2 * eta * w for w, _ in self.terms(n)))
            for n, x in self.held(theta).items()
        }


class Sequences(RuleBasedStateMachine):
    """A model of vectors in two modules, its penalty, and the oracle."""

    @initialize(
        form=st.sampled_from(tiny.FORMS),
        state_device=st.sampled_from([None, "cpu"]),
        native=st.booleans(),
    )
    def start(self, form: tuple[str, str, str], state_device: Any, native: bool) -> None:
        self.model, self.spare = nn.Module(), list[nn.Parameter]()
        self.model.add_module("inner", nn.Module())
        for k, name in enumerate(NAMES[:4]):
            self.put(name, nn.Parameter(torch.from_numpy(draw(k, (3,)))))
        self.penalty = FusedMASPenalty(
            self.model, 0.7, merge=form[0], anchor=form[1], store=form[2], gamma=GAMMA,
            state_device=state_device,
            omega_dtype=torch.float64, backend="native" if native else "reference",
        )  # fmt: skip
        self.oracle, self.store = Oracle(form[0], form[1] == "latest"), form[2]

    # -- the model

    @property
    def theta(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())

    def put(self, name: str, p: nn.Parameter | None) -> None:
        module, _, key = name.rpartition(".")
        owner = self.model.get_submodule(module)
        owner._parameters.pop(key, None)
        if p is not None:
            owner.register_parameter(key, p)

    @rule(name=names, seed=seeds)
    def train(self, name: str, seed: int) -> None:
        if name in self.theta:
            with torch.no_grad():
                self.theta[name].copy_(torch.from_numpy(draw(seed, tuple(self.theta[name].shape))))

    @rule(name=names)
    def remove(self, name: str) -> None:
        p = self.theta.get(name)
        if isinstance(p, nn.Parameter) and len(self.theta) > 1:
            self.spare.append(p)
            self.put(name, None)

    @precondition(lambda self: self.spare)
    @rule(name=names, which=seeds)
    def bring_back(self, name: str, which: int) -> None:
        if name not in self.theta:
            self.put(name, self.spare.pop(which % len(self.spare)))

    @rule(old=names, new=names)
    def move(self, old: str, new: str) -> None:
        p = self.theta.get(old)
        if isinstance(p, nn.Parameter) and new not in self.theta:
            self.put(old, None)
            self.put(new, p)

    @rule(a=names, b=names)
    def swap(self, a: str, b: str) -> None:
        p, q = self.theta.get(a), self.theta.get(b)
        if isinstance(p, nn.Parameter) and isinstance(q, nn.Parameter) and p is not q:
            self.put(a, q)
            self.put(b, p)

    @rule(name=names, shape=st.sampled_from(SHAPES), seed=seeds)
    def replace(self, name: str, shape: tuple[int, ...], seed: int) -> None:
        """A new one: of the same size, wider, narrower, or where there was none."""
        self.put(name, nn.Parameter(torch.from_numpy(draw(seed, shape))))

    @rule(name=names, frozen=st.booleans())
    def freeze(self, name: str, frozen: bool) -> None:
        if name in self.theta:
            self.theta[name].requires_grad_(not frozen)

    @rule()
    def replace_module(self) -> None:
        """The same parameters in another module."""
        inner = nn.Module()
        for key, p in self.model.get_submodule("inner")._parameters.items():
            inner.register_parameter(key, p)
        self.model.add_module("inner", inner)

    # -- the penalty

    @rule(chosen=st.sets(names, min_size=1), weight=numbers, seed=seeds)
    def consolidate(self, chosen: set[str], weight: float, seed: int) -> None:
        """All of the parameters, or some."""
        theta = self.theta
        given = {
            n: draw(seed + k, tuple(theta[n].shape)) + 0.1
            for k, n in enumerate(NAMES)
            if n in theta
        }
        given = {n: w for n, w in given.items() if n in chosen}
        if given and len(self.oracle.totals) < 5:
            self.penalty.consolidate(
                importance={n: torch.from_numpy(w) for n, w in given.items()}, weight=weight
            )
            self.oracle.follow(theta)
            self.oracle.add(theta, given, weight)
            self.oracle.follow(theta)

    @rule(lam=numbers)
    def set_lam(self, lam: float) -> None:
        self.penalty.lam = self.oracle.lam = lam

    @precondition(lambda self: self.store == "per_task" and self.oracle.totals)
    @rule(t=seeds, weight=numbers)
    def set_weight(self, t: int, weight: float) -> None:
        t %= len(self.oracle.totals)
        self.penalty.set_weight(t, weight)
        self.oracle.weights[t] = weight

    @precondition(lambda self: self.store == "per_task" and self.oracle.totals)
    @rule(t=seeds)
    def drop(self, t: int) -> None:
        t %= len(self.oracle.totals)
        self.penalty.drop(t)
        self.oracle.fit(self.theta)
        for each in self.oracle.anchor.values():
            if self.oracle.latest and len(each) > 1:
                each[-2] = each[-1]
        for kind in (self.oracle.omega, self.oracle.anchor):
            for each in kind.values():
                del each[t]
        del self.oracle.totals[t], self.oracle.weights[t]
        if not self.oracle.totals:
            self.oracle.omega, self.oracle.anchor = {}, {}

    @rule(old=names, new=names)
    def rename(self, old: str, new: str) -> None:
        if old in self.oracle.omega and new not in self.oracle.omega:
            self.oracle.seen.pop(new, None)
            self.oracle.seen.pop(old, None)
            self.penalty.rename(old, new)
            self.oracle.move(old, new)
            self.oracle.fit(self.theta)
        elif old in self.oracle.omega or self.oracle.followed.get(old) != new:
            with pytest.raises(KeyError):
                self.penalty.rename(old, new)

    # -- what changes nothing

    @rule(what=st.integers(0, 7))
    def fail(self, what: int) -> None:
        theta = self.theta
        name = next(iter(theta))
        bad = {name: torch.full_like(theta[name], -1.0)}
        calls: list[Callable[[], Any]] = [
            lambda: setattr(self.penalty, "lam", float("nan")),
            lambda: self.penalty.consolidate(importance=bad),
            lambda: self.penalty.consolidate(importance={"nothing": torch.ones(1)}),
            lambda: self.penalty.consolidate(importance={name: torch.ones(7)}),
            lambda: self.penalty.consolidate(importance={name: torch.ones(3)}, weight=-1.0),
            lambda: self.penalty.rename("nothing", "more"),
            lambda: self.penalty.drop(99),
            lambda: self.penalty.load_state_dict({"config": torch.zeros(3)}),
        ]
        if what == 1 and self.penalty._state.rule.signed:
            return
        self.oracle.follow(theta)
        self.penalty.state_dict()
        before = snapshot(self.penalty)
        with pytest.raises((ValueError, KeyError, RuntimeError, IndexError)):
            calls[what]()
        assert equal(snapshot(self.penalty), before)

    @rule(how=st.sampled_from(["deep", "pickle", "file", "state"]))
    def copied(self, how: str) -> None:
        """The copy, or what was saved, goes on in place of the original."""
        theta = self.theta
        if how == "deep":
            pair = copy.deepcopy((self.model, self.penalty))
        elif how == "pickle":
            pair = pickle.loads(pickle.dumps((self.model, self.penalty)))
        else:
            self.oracle.follow(theta)
            self.saved(how)
            return
        self.model, self.penalty = pair
        now = {id(p): self.theta[n] for n, p in theta.items()}
        # A copy has parameters of its own, and knows none that are elsewhere.
        self.oracle.seen = {n: now[id(p)] for n, p in self.oracle.seen.items() if id(p) in now}

    def saved(self, how: str) -> None:
        rule_ = self.penalty._state.rule
        own = {"backend": rule_.backend, "state_device": rule_.state_device}
        if how == "file":
            with tempfile.TemporaryDirectory() as folder:
                self.penalty.save(Path(folder) / "file")
                self.penalty = FusedMASPenalty.load(Path(folder) / "file", self.model, **own)
        else:
            state = self.penalty.state_dict()
            self.penalty = FusedMASPenalty(
                self.model, merge=rule_.merge, anchor=rule_.anchor, store=rule_.store, gamma=GAMMA,
                omega_dtype=torch.float64, **own,
            )  # fmt: skip
            self.penalty.load_state_dict(state)
        self.oracle.seen, self.oracle.followed = dict(self.theta), {}

    # -- what must be right

    @rule()
    def value_and_gradient(self) -> None:
        theta = self.theta
        for p in theta.values():
            p.grad = None
        value = self.penalty()
        self.oracle.follow(theta)
        assert value.item() == pytest.approx(self.oracle.value(theta), rel=1e-9, abs=1e-12)
        if value.requires_grad:
            value.backward()
        self.compare({n: p.grad for n, p in theta.items()}, self.oracle.gradient(theta))

    @rule()
    def added_gradient(self) -> None:
        theta = self.theta
        for p in theta.values():
            p.grad = None
        value = self.penalty.add_grad_()
        self.oracle.follow(theta)
        assert value.item() == pytest.approx(self.oracle.value(theta), rel=1e-9, abs=1e-12)
        self.compare({n: p.grad for n, p in theta.items()}, self.oracle.gradient(theta))

    @rule(eta=st.sampled_from([0.0, 0.3, 1e6]))
    def proximal(self, eta: float) -> None:
        theta = self.theta
        self.penalty.bound()
        self.oracle.follow(theta)
        free = {n for n, p in theta.items() if p.requires_grad}
        right = {n: x for n, x in self.oracle.proximal(theta, eta).items() if n in free}
        self.penalty.proximal_([*theta.values()], eta)
        for name, x in right.items():
            np.testing.assert_allclose(theta[name].detach().numpy(), x, rtol=1e-9, atol=1e-9)

    @rule(fused=st.booleans(), mode=st.sampled_from(["gradient", "proximal"]))
    def attached(self, fused: bool, mode: Any) -> None:
        theta = self.theta
        optimizer: Any = (SGD if fused else torch.optim.SGD)(self.model.parameters(), lr=0.1)
        handle = self.penalty.attach(optimizer, mode)
        for p in theta.values():
            p.grad = None
        self.oracle.follow(theta)
        step, pull = self.oracle.proximal(theta, 0.1), self.oracle.gradient(theta)
        right = (
            step
            if mode == "proximal"
            else {n: theta[n].detach().numpy() - 0.1 * g for n, g in pull.items()}
        )
        frozen = {n for n, p in theta.items() if not p.requires_grad}
        optimizer.step()
        handle.remove()
        for name in right.keys() - frozen:
            np.testing.assert_allclose(
                theta[name].detach().numpy(), right[name], rtol=1e-9, atol=1e-9
            )

    @rule()
    def told(self) -> None:
        theta = self.theta
        omega, alpha = self.penalty.omega, self.penalty.alpha
        self.oracle.follow(theta)
        assert set(omega) == set(self.oracle.omega)
        assert self.penalty.num_tasks == len(self.oracle.totals)
        gains = [self.oracle.scale() * g for g in self.oracle.gains()]
        np.testing.assert_allclose(alpha.numpy(), gains, rtol=1e-9)

    def compare(self, grads: dict[str, Tensor | None], right: dict[str, Array]) -> None:
        for name, p in self.theta.items():
            grad = grads[name]
            expected = right.get(name, np.zeros(p.shape)) if p.requires_grad else np.zeros(p.shape)
            got = np.zeros(p.shape) if grad is None else grad.numpy()
            np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.usefixtures("one_thread")
def test_any_sequence_is_the_list_of_tasks() -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Sequences,
        settings=settings(
            max_examples=250 * TIMES,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=[*HealthCheck],
        ),
    )
