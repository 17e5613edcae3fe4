"""Any sequence of operations on a model and its penalty, against a list of tasks in float64."""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
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
from interrupts import Stop
from snapshots import equal, snapshot
from times import TIMES
from torch import Tensor, nn

from mas_ext import FusedMASPenalty
from mas_ext.optim import SGD

Array = npt.NDArray[np.float64]
NAMES = ["a", "b", "c", "inner.a", "inner.b"]
SHAPES = [(2,), (3,), (5,)]
GAMMA = 0.5
# How far results may be from the oracle's, relative to the sums that they come from: by the parameters' dtype,
# and by omega's, which is rounded in every merge, or once.
ROUGH = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
OMEGA_ROUGH = {
    torch.float64: (1e-9, 1e-9),
    torch.bfloat16: (0.05, 5e-3),
    torch.uint8: (0.85, 0.07),
}
names, seeds = st.sampled_from(NAMES), st.integers(0, 10_000)
numbers = st.sampled_from([0.0, 0.25, 1.0, 3.0])
dtypes = st.sampled_from([*ROUGH])
# The line of the library at which a call is interrupted, most often none.
lines = st.one_of(st.none(), st.none(), st.integers(1, 300))


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

    def bound(self, theta: dict[str, Tensor]) -> dict[str, Array]:
        """What a gradient is the difference of."""
        held = self.held(theta).items()
        return {
            n: sum((2 * w * (abs(x) + abs(a)) for w, a in self.terms(n)), 0 * x) for n, x in held
        }

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
        omega_dtype=st.sampled_from([torch.float64, *OMEGA_ROUGH]),
        anchor_dtype=st.sampled_from([None, torch.bfloat16]),
        exclude=st.sampled_from([(), ("inner.*",)]),
    )
    def start(self, form: tuple[str, str, str], native: bool, exclude: Any, **options: Any) -> None:
        self.model, self.spare = nn.Module(), list[nn.Parameter]()
        self.model.add_module("inner", nn.Module())
        self.exclude: tuple[str, ...] = exclude
        for k, name in enumerate(NAMES[:4]):
            self.put(name, nn.Parameter(torch.from_numpy(draw(k, (3,)))))
        if form[1] == "own":
            options["anchor_dtype"] = None
        self.options = {
            "merge": form[0],
            "anchor": form[1],
            "store": form[2],
            "gamma": GAMMA,
            "backend": "native" if native else "reference",
            "exclude": exclude,
            **options,
        }
        self.penalty = FusedMASPenalty(self.model, 0.7, **self.options)
        self.oracle, self.store = Oracle(form[0], form[1] == "latest"), form[2]
        # The narrowest dtype that parameters had so far: the state was rounded to it.
        self.rough = OMEGA_ROUGH[options["omega_dtype"]][self.store == "per_task"]

    # -- the model

    def walk(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All names, of which a tied parameter has several."""
        for prefix, module in (("", self.model), ("inner.", self.model.get_submodule("inner"))):
            for key, p in module._parameters.items():
                assert p is not None
                yield prefix + key, p

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Each parameter once, under its first name."""
        return dict(self.model.named_parameters())

    @property
    def theta(self) -> dict[str, Tensor]:
        """Those that are not excluded, by any name."""
        out = {id(p) for n, p in self.walk() if self.excluded(n)}
        return {n: p for n, p in self.parameters.items() if id(p) not in out}

    def put(self, name: str, p: nn.Parameter | None) -> None:
        module, _, key = name.rpartition(".")
        owner = self.model.get_submodule(module)
        owner._parameters.pop(key, None)
        if p is not None:
            owner.register_parameter(key, p)

    @rule(name=names, seed=seeds)
    def train(self, name: str, seed: int) -> None:
        if name in self.parameters:
            p = self.parameters[name]
            with torch.no_grad():
                p.copy_(torch.from_numpy(draw(seed, tuple(p.shape))))

    @rule(name=names)
    def remove(self, name: str) -> None:
        p = dict(self.walk()).get(name)
        if p is not None and len(self.theta) > 1:
            self.spare.append(p)
            self.put(name, None)

    @precondition(lambda self: self.spare)
    @rule(name=names, which=seeds)
    def bring_back(self, name: str, which: int) -> None:
        p = self.spare[which % len(self.spare)]
        if name not in dict(self.walk()) and not any(p is q for _, q in self.walk()):
            self.put(name, p)
            self.spare = [q for q in self.spare if q is not p]

    @rule(old=names, new=names)
    def move(self, old: str, new: str) -> None:
        known = dict(self.walk())
        if old in known and new not in known and not self.tied(known[old]):
            self.put(old, None)
            self.put(new, known[old])

    @rule(a=names, b=names)
    def swap(self, a: str, b: str) -> None:
        p, q = (dict(self.walk()).get(name) for name in (a, b))
        if p is not None and q is not None and p is not q and not self.tied(p) and not self.tied(q):
            self.put(a, q)
            self.put(b, p)

    @rule(a=names, b=names)
    def tie(self, a: str, b: str) -> None:
        """Two names for one parameter, of which the first stays the first, and both or none are excluded."""
        known = dict(self.walk())
        if a in self.parameters and a != b and len({self.excluded(a), self.excluded(b)}) == 1:
            self.put(b, known[a])
            if self.parameters.get(a) is not known[a]:
                self.put(b, known.get(b))

    def excluded(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.exclude)

    def tied(self, p: nn.Parameter | None) -> bool:
        return sum(q is p for _, q in self.walk()) > 1

    @rule(name=names, shape=st.sampled_from(SHAPES), seed=seeds)
    def replace(self, name: str, shape: tuple[int, ...], seed: int) -> None:
        """A new one: of the same size, wider, narrower, or where there was none."""
        self.put(name, nn.Parameter(torch.from_numpy(draw(seed, shape))))

    @rule(name=names, frozen=st.booleans())
    def freeze(self, name: str, frozen: bool) -> None:
        if name in self.parameters:
            self.parameters[name].requires_grad_(not frozen)

    @rule()
    def replace_module(self) -> None:
        """The same parameters in another module."""
        inner = nn.Module()
        for key, p in self.model.get_submodule("inner")._parameters.items():
            inner.register_parameter(key, p)
        self.model.add_module("inner", inner)

    @rule(dtype=dtypes)
    def cast(self, dtype: torch.dtype) -> None:
        self.model.to(dtype)

    @rule(name=names, dtype=dtypes)
    def cast_one(self, name: str, dtype: torch.dtype) -> None:
        if name in self.parameters:
            p = self.parameters[name]
            p.grad, p.data = None, p.data.to(dtype)

    @rule(dtype=dtypes)
    def cast_penalty(self, dtype: torch.dtype) -> None:
        """Its state keeps its dtypes."""
        self.penalty.to(dtype)

    @rule()
    def to_meta_and_back(self) -> None:
        """Parameters are others then, and those that were tied are no more."""
        values = {n: p.detach().clone() for n, p in self.walk()}
        self.model.zero_grad()
        self.model.to("meta")
        with suppress(TypeError):
            self.penalty()
        self.model.to_empty(device="cpu")
        with torch.no_grad():
            for n, p in self.walk():
                p.copy_(values[n])

    # -- the penalty

    def attempt(self, call: Callable[[], Any], at: int | None, done: Callable[[], bool]) -> bool:
        """Whether the call had an effect: an interrupted one may have, wholly, or not."""
        try:
            Stop(at, KeyboardInterrupt).run(call)
        except KeyboardInterrupt:
            had = done()
            self.penalty.bound()
            return had
        assert done()
        return True

    @rule(chosen=st.sets(names, min_size=1), weight=numbers, seed=seeds, at=lines)
    def consolidate(self, chosen: set[str], weight: float, seed: int, at: int | None) -> None:
        """All of the parameters, or some."""
        theta, before = self.theta, len(self.oracle.totals)
        given = {
            n: draw(seed + k, tuple(theta[n].shape)) + 0.1
            for k, n in enumerate(NAMES)
            if n in theta
        }
        given = {n: w for n, w in given.items() if n in chosen}
        if given and before < 5:
            omega = {n: torch.from_numpy(w) for n, w in given.items()}
            had = self.attempt(
                lambda: self.penalty.consolidate(importance=omega, weight=weight),
                at,
                lambda: self.penalty.num_tasks > before,
            )
            self.follow(theta)
            if had:
                self.oracle.add(theta, given, weight)
                self.follow(theta)

    @rule(lam=numbers, at=lines)
    def set_lam(self, lam: float, at: int | None) -> None:
        had = self.attempt(
            lambda: setattr(self.penalty, "lam", lam), at, lambda: self.penalty.lam == lam
        )
        if at is not None:
            self.penalty.bound()
            self.follow(self.theta)
        if had:
            self.oracle.lam = lam

    @precondition(lambda self: self.store == "per_task" and self.oracle.totals)
    @rule(t=seeds, weight=numbers, at=lines)
    def set_weight(self, t: int, weight: float, at: int | None) -> None:
        t %= len(self.oracle.totals)
        had = self.attempt(
            lambda: self.penalty.set_weight(t, weight),
            at,
            lambda: self.penalty._state.memory.entries[t].weight == weight,
        )
        if at is not None:
            self.penalty.bound()
            self.follow(self.theta)
        if had:
            self.oracle.weights[t] = weight

    @precondition(lambda self: self.store == "per_task" and self.oracle.totals)
    @rule(t=seeds, at=lines)
    def drop(self, t: int, at: int | None) -> None:
        t, before = t % len(self.oracle.totals), len(self.oracle.totals)
        had = self.attempt(
            lambda: self.penalty.drop(t), at, lambda: self.penalty.num_tasks < before
        )
        if at is not None and not had:
            self.follow(self.theta)
        self.oracle.fit(self.theta)
        if had:
            for each in self.oracle.anchor.values():
                if self.oracle.latest and len(each) > 1:
                    each[-2] = each[-1]
            for kind in (self.oracle.omega, self.oracle.anchor):
                for each in kind.values():
                    del each[t]
            del self.oracle.totals[t], self.oracle.weights[t]
            if not self.oracle.totals:
                self.oracle.omega, self.oracle.anchor = {}, {}
        if at is not None and had:
            self.penalty.bound()
            self.follow(self.theta)

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

    @rule(what=st.integers(0, 4), at=lines)
    def interrupted(self, what: int, at: int | None) -> None:
        """What reads, or follows the model: whatever it got done, the state is whole."""
        calls: list[Callable[[], Any]] = [
            self.penalty,
            self.penalty.add_grad_,
            self.penalty.state_dict,
            lambda: self.penalty.omega,
            lambda: self.penalty.load_state_dict(self.penalty.state_dict()),
        ]
        if what == 4:
            self.penalty.bound()
            self.follow(self.theta)
        with suppress(KeyboardInterrupt):
            Stop(at, KeyboardInterrupt).run(calls[what])
        self.penalty.bound()
        self.follow(self.theta)

    # -- what changes nothing

    @rule(what=st.integers(0, 12))
    def fail(self, what: int) -> None:
        theta = self.theta
        if not theta:
            return
        name = next(iter(theta))
        bad = {name: torch.full_like(theta[name], -1.0)}
        huge = {name: torch.full(theta[name].shape, 1e308, dtype=torch.float64)}
        calls: list[Callable[[], Any]] = [
            lambda: setattr(self.penalty, "lam", float("nan")),
            lambda: self.penalty.consolidate(importance=bad),
            lambda: self.penalty.consolidate(importance={"nothing": torch.ones(1)}),
            lambda: self.penalty.consolidate(importance={name: torch.ones(7)}),
            lambda: self.penalty.consolidate(importance={name: torch.ones(3)}, weight=-1.0),
            lambda: self.penalty.rename("nothing", "more"),
            lambda: self.penalty.drop(99),
            lambda: self.penalty.load_state_dict({"config": torch.zeros(3)}),
            lambda: self.penalty.consolidate([torch.ones(2, 2)]),
            lambda: self.penalty.observe(torch.ones(2, 2)),
            lambda: self.penalty.consolidate(importance=huge),
            lambda: self.penalty.set_weight(99, 1.0),
            lambda: setattr(self.penalty, "lam", 1e308 * 10),
        ]
        if what == 1 and self.penalty._state.rule.signed:
            return
        if what in (8, 9) and not any(p.requires_grad for p in theta.values()):
            return  # nothing is measured
        self.follow(theta)
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
            self.follow(theta)
            self.saved(how)
            return
        self.model, self.penalty = pair
        now = {id(p): self.theta[n] for n, p in theta.items()}
        # A copy has parameters of its own, and knows none that are elsewhere.
        self.oracle.seen = {n: now[id(p)] for n, p in self.oracle.seen.items() if id(p) in now}

    def saved(self, how: str) -> None:
        own = {key: self.options[key] for key in ("backend", "state_device")}
        known = [name for name, _ in self.walk()]
        if not all(any(fnmatchcase(n, e) for n in known) for e in self.exclude):
            return  # a pattern that matches nothing is refused
        if how == "file":
            with tempfile.TemporaryDirectory() as folder:
                self.penalty.save(Path(folder) / "file")
                self.penalty = FusedMASPenalty.load(Path(folder) / "file", self.model, **own)
        else:
            state = self.penalty.state_dict()
            self.penalty = FusedMASPenalty(self.model, **self.options)
            self.penalty.load_state_dict(state)
        self.oracle.seen, self.oracle.followed = dict(self.theta), {}

    # -- what must be right

    def tolerance(self, theta: dict[str, Tensor]) -> dict[str, float]:
        """By name, relative to what the numbers are sums of."""
        return {n: max(self.rough, ROUGH[p.dtype]) for n, p in theta.items()}

    def right_value(self, value: Tensor, theta: dict[str, Tensor]) -> None:
        held, rough = self.oracle.held(theta), self.rough
        size = sum(
            float((w * (abs(x) + abs(a)) ** 2).sum())
            for n, x in held.items()
            for w, a in self.oracle.terms(n)
        )
        rough = max([rough, *(1e-6 for p in theta.values() if p.dtype != torch.float64)])
        assert abs(value.item() - self.oracle.value(theta)) <= rough * size + 1e-12

    @rule()
    def value_and_gradient(self) -> None:
        theta = self.theta
        for p in self.parameters.values():
            p.grad = None
        value = self.penalty()
        self.follow(theta)
        self.right_value(value, theta)
        if value.requires_grad:
            value.backward()
        self.compare({n: p.grad for n, p in theta.items()}, self.oracle.gradient(theta))

    @rule()
    def added_gradient(self) -> None:
        theta = self.theta
        for p in self.parameters.values():
            p.grad = None
        value = self.penalty.add_grad_()
        self.follow(theta)
        self.right_value(value, theta)
        self.compare({n: p.grad for n, p in theta.items()}, self.oracle.gradient(theta))

    @rule(eta=st.sampled_from([0.0, 0.3, 1e6]))
    def proximal(self, eta: float) -> None:
        theta = self.theta
        self.penalty.bound()
        self.follow(theta)
        free = {n for n, p in theta.items() if p.requires_grad}
        right = {n: x for n, x in self.oracle.proximal(theta, eta).items() if n in free}
        self.penalty.proximal_([*self.parameters.values()], eta)
        for name, x in right.items():
            self.close(theta, name, theta[name], x, 4.0)

    @rule(fused=st.booleans(), mode=st.sampled_from(["gradient", "proximal"]))
    def attached(self, fused: bool, mode: Any) -> None:
        theta = self.theta
        optimizer: Any = (SGD if fused else torch.optim.SGD)(self.model.parameters(), lr=0.1)
        handle = self.penalty.attach(optimizer, mode)
        for p in self.parameters.values():
            p.grad = None
        self.penalty.bound()
        self.follow(theta)
        step, pull = self.oracle.proximal(theta, 0.1), self.oracle.gradient(theta)
        bound = self.oracle.bound(theta)
        right = (
            step
            if mode == "proximal"
            else {n: theta[n].detach().double().numpy() - 0.1 * g for n, g in pull.items()}
        )
        frozen = {n for n, p in theta.items() if not p.requires_grad}
        optimizer.step()
        handle.remove()
        for name in right.keys() - frozen:
            self.close(theta, name, theta[name], right[name], 4.0 + bound[name])

    @rule()
    def told(self) -> None:
        theta = self.theta
        omega, alpha = self.penalty.omega, self.penalty.alpha
        self.follow(theta)
        assert set(omega) == set(self.oracle.omega)
        assert self.penalty.num_tasks == len(self.oracle.totals)
        gains = [self.oracle.scale() * g for g in self.oracle.gains()]
        np.testing.assert_allclose(alpha.numpy(), gains, rtol=1e-9)

    def follow(self, theta: dict[str, Tensor]) -> None:
        """The oracle follows the model, and is rounded where the state is."""
        self.oracle.follow(theta)
        narrow = [p.dtype for n, p in theta.items() if n in self.oracle.omega]
        if any(dtype != torch.float64 for dtype in narrow):
            self.rough = max(self.rough, ROUGH[torch.float32])
        if self.options["anchor_dtype"] in narrow:
            self.rough = max(self.rough, ROUGH[torch.bfloat16])

    def close(self, theta: dict[str, Tensor], name: str, got: Tensor, x: Array, size: Any) -> None:
        """Up to rounding of numbers of a size."""
        rough = self.tolerance(theta)[name]
        assert (abs(got.detach().double().numpy() - x) <= rough * size + 1e-12).all(), name

    def compare(self, grads: dict[str, Tensor | None], right: dict[str, Array]) -> None:
        theta = self.theta
        bound = self.oracle.bound(theta)
        for name, p in theta.items():
            grad = grads[name]
            expected = right.get(name, np.zeros(p.shape)) if p.requires_grad else np.zeros(p.shape)
            got = torch.zeros_like(p) if grad is None else grad
            self.close(theta, name, got, expected, bound.get(name, 0.0))


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
