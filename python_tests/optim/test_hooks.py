"""The penalty inside an optimizer against optimizers and proximal steps written out in NumPy."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from memory import largest_allocation
from oracles import naive
from oracles.product import LAM, SETTINGS, Array, Held, Settings, array, held, train, twin
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, NAdam, Optimizer, RMSprop
from torch.optim.lr_scheduler import OneCycleLR

import mas_ext
from mas_ext import FusedMASPenalty

# -- as a gradient ---------------------------------------------------------------------------------

GRADIENT: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.05),
    "sgd_momentum": lambda p: SGD(p, lr=0.02, momentum=0.9),
    "sgd_nesterov": lambda p: SGD(p, lr=0.02, momentum=0.8, nesterov=True),
    "sgd_dampening": lambda p: SGD(p, lr=0.05, momentum=0.8, dampening=0.5),
    "sgd_decay": lambda p: SGD(p, lr=0.05, weight_decay=0.1),
    "sgd_foreach": lambda p: SGD(p, lr=0.02, momentum=0.9, foreach=True),
    "sgd_fused": lambda p: SGD(p, lr=0.02, momentum=0.9, fused=True),
    "adam": lambda p: Adam(p, lr=0.1),
    "adam_decay": lambda p: Adam(p, lr=0.1, weight_decay=0.1),
    "adam_amsgrad": lambda p: Adam(p, lr=0.1, amsgrad=True),
    "adam_foreach": lambda p: Adam(p, lr=0.1, foreach=True),
    "adam_fused": lambda p: Adam(p, lr=0.1, fused=True),
    "adamw": lambda p: AdamW(p, lr=0.1, weight_decay=0.1),
    "adamw_foreach": lambda p: AdamW(p, lr=0.1, foreach=True),
    "adamw_fused": lambda p: AdamW(p, lr=0.1, fused=True),
    "rmsprop": lambda p: RMSprop(p, lr=0.05, momentum=0.5),
    "rmsprop_foreach": lambda p: RMSprop(p, lr=0.05, foreach=True),
    "adagrad": lambda p: Adagrad(p, lr=0.2),
    "adagrad_foreach": lambda p: Adagrad(p, lr=0.2, foreach=True),
    "adagrad_fused": lambda p: Adagrad(p, lr=0.2, fused=True),
    "nadam": lambda p: NAdam(p, lr=0.1),
}


FORMS = ("formula", "loss", "add_grad_", "attached", "free")


def path_in_form(
    form: str, make: Callable[[Held], Sequence[Optimizer]], schedule: bool = False
) -> Array:
    """12 steps with the penalty applied in one of its forms, the formula in the loss, or not at all."""
    case = held()
    optimizers = make(case)
    if form == "attached":
        for optimizer in optimizers:
            case.penalty.attach(optimizer)
    added = {"formula": case.naive_penalty, "loss": case.penalty}.get(form)
    schedules = [OneCycleLR(o, 0.1, total_steps=13) for o in optimizers if schedule]
    path = []
    for _ in range(12):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = case.loss()
        (loss if added is None else loss + added()).backward()
        if form == "add_grad_":
            case.penalty.add_grad_()
        for step in (*optimizers, *schedules):
            step.step()
        path.append(array(case.model.theta()))
    return np.stack(path)


def check_forms(make: Callable[[Held], Sequence[Optimizer]], schedule: bool = False) -> None:
    expected, *paths, free = [path_in_form(form, make, schedule) for form in FORMS]
    for path in paths:
        np.testing.assert_allclose(path, expected, rtol=1e-10, atol=1e-12)
    assert np.abs(expected - free).max() > 1e-2


@pytest.mark.parametrize("make", GRADIENT.values(), ids=GRADIENT)
def test_every_form_takes_the_same_steps(make: Callable[[Any], Optimizer]) -> None:
    check_forms(lambda case: [make(case.model.parameters())])


def test_as_a_gradient_in_float32() -> None:
    paths = []
    for attached in (True, False):
        case = held(dtype=torch.float32)
        optimizer = SGD(case.model.parameters(), lr=0.02, momentum=0.9)
        if attached:
            case.penalty.attach(optimizer)
        loss = case.loss if attached else lambda c=case: c.loss() + c.naive_penalty()
        paths.append(train(case, [optimizer], loss, 12))
    np.testing.assert_allclose(*paths, rtol=1e-4, atol=1e-5)


def one_sgd(case: Held) -> list[Optimizer]:
    a, b, c = case.model.parameters()
    groups = [{"params": [a], "lr": 0.05}, {"params": [b, c], "momentum": 0.5}]
    return [SGD(groups, lr=0.02)]


def two_sgd(case: Held) -> list[Optimizer]:
    a, b, c = case.model.parameters()
    return [SGD([a], lr=0.05), SGD([b, c], lr=0.02, momentum=0.5)]


def one_adamw(case: Held) -> list[Optimizer]:
    a, b, c = case.model.parameters()
    groups = [{"params": [a], "lr": 0.1}, {"params": [b, c], "betas": (0.5, 0.9)}]
    return [AdamW(groups, lr=0.02, weight_decay=0.1, fused=True)]


def adam_and_sgd(case: Held) -> list[Optimizer]:
    a, b, c = case.model.parameters()
    return [Adam([c, a], lr=0.1, foreach=True), SGD([b], lr=0.02, momentum=0.5, nesterov=True)]


@pytest.mark.parametrize("schedule", [False, True])
@pytest.mark.parametrize("make", [one_sgd, two_sgd, one_adamw, adam_and_sgd])
def test_groups_several_optimizers_and_schedules_pull_every_parameter_once(
    make: Callable[[Held], Sequence[Optimizer]], schedule: bool
) -> None:
    check_forms(make, schedule)


def test_an_optimizer_gives_gradients_to_its_own_parameters_only() -> None:
    case = held()
    optimizer = SGD([case.model.a], lr=0.1)
    case.penalty.attach(optimizer)
    optimizer.step()
    expected = naive.gradient(array(case.model.theta()), case.omega, case.anchor, case.alpha)
    assert case.model.a.grad is not None
    assert case.model.b.grad is None
    assert case.model.c.grad is None
    before = held().model
    np.testing.assert_allclose(
        array(case.model.a), array(before.a) - 0.1 * array(case.model.a.grad), rtol=1e-13
    )
    at_start = naive.gradient(array(before.theta()), case.omega, case.anchor, case.alpha)
    np.testing.assert_allclose(array(case.model.a.grad), at_start[:3], rtol=1e-12)
    assert not np.allclose(expected, at_start)


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
def test_a_removed_handle_pulls_no_more(mode: Any) -> None:
    case, other = held(), held()
    optimizer = SGD(case.model.parameters(), lr=0.1)
    handle = case.penalty.attach(optimizer, mode)
    handle.remove()
    handle.remove()
    path = train(case, [optimizer], case.loss, 3)
    free = train(other, [SGD(other.model.parameters(), lr=0.1)], other.loss, 3)
    assert np.array_equal(path, free)


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
def test_before_the_first_task_it_pulls_nothing_and_a_later_task_counts(mode: Any) -> None:
    case, free = held(), held()
    penalty = FusedMASPenalty(case.model, lam=LAM, anchor="own", omega_dtype=torch.float64)
    optimizer = SGD(case.model.parameters(), lr=0.1)
    penalty.attach(optimizer, mode)
    path = train(case, [optimizer], case.loss, 2)
    expected = train(free, [SGD(free.model.parameters(), lr=0.1)], free.loss, 2)
    assert np.array_equal(path, expected)

    anchor, x = array(case.model.theta()), torch.ones(1, 8, dtype=torch.float64)
    penalty.consolidate([x])
    omega = 2 * np.abs(anchor)[None]
    (theta,) = train(case, [optimizer], case.loss, 1)
    if mode == "gradient":
        # At its anchor the penalty has no gradient.
        np.testing.assert_allclose(theta, anchor - 0.1 * case.slope(anchor), rtol=1e-13)
    else:
        moved = anchor - 0.1 * case.slope(anchor)
        one, eta = np.full(1, LAM), np.full(8, 0.1)
        expected = naive.proximal(moved, omega, anchor[None], one, eta)
        np.testing.assert_allclose(theta, expected, rtol=1e-12)


def test_clipping_before_the_step_does_not_clip_the_penalty() -> None:
    case = held()
    optimizer = SGD(case.model.parameters(), lr=1.0)
    case.penalty.attach(optimizer)
    theta = array(case.model.theta())
    case.loss().backward()
    torch.nn.utils.clip_grad_norm_(case.model.parameters(), 0.25)
    optimizer.step()
    slope = case.slope(theta)
    clipped = slope * 0.25 / (np.linalg.norm(slope) + 1e-6)
    pull = naive.gradient(theta, case.omega, case.anchor, case.alpha)
    np.testing.assert_allclose(array(case.model.theta()), theta - clipped - pull, rtol=1e-11)
    assert np.linalg.norm(pull) > 1 > np.linalg.norm(clipped)


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
def test_accumulated_gradients_equal_the_large_batch_with_one_penalty(mode: Any) -> None:
    x = torch.randn(12, 8, dtype=torch.float64)
    ends = []
    for parts in (1, 4):
        case = held()
        optimizer = SGD(case.model.parameters(), lr=0.05, momentum=0.5)
        case.penalty.attach(optimizer, mode)
        for _ in range(3):
            optimizer.zero_grad()
            for piece in x.chunk(parts):
                ((case.model(piece) - 1).square().mean() / parts).backward()
            optimizer.step()
        ends.append(array(case.model.theta()))
    large, theta, momentum = held(), array(held().model.theta()), np.zeros(8)
    for _ in range(3):
        slope = (2 * array(x) * (array(x) * theta - 1)).mean(0) / 8
        pull = naive.gradient(theta, large.omega, large.anchor, large.alpha)
        momentum = 0.5 * momentum + slope + (pull if mode == "gradient" else 0)
        theta = theta - 0.05 * momentum
        if mode == "proximal":
            eta = np.full(8, 0.05 / 0.5)
            theta = naive.proximal(theta, large.omega, large.anchor, large.alpha, eta)
    np.testing.assert_allclose(ends[0], theta, rtol=1e-11)
    np.testing.assert_allclose(ends[1], theta, rtol=1e-11)


# -- as a proximal step ----------------------------------------------------------------------------


def naive_path(case: Held, s: Settings, lr: Callable[[int], Any], steps: int) -> Array:
    theta, optimizer, path = array(case.model.theta()), twin(s), []
    for k in range(steps):
        theta, eta = optimizer.step(theta, case.slope(theta), lr(k))
        theta = naive.proximal(theta, case.omega, case.anchor, case.alpha, eta)
        path.append(theta)
    return np.stack(path)


@pytest.mark.parametrize("s", SETTINGS.values(), ids=SETTINGS)
def test_each_proximal_step_is_the_formula(s: Settings) -> None:
    case = held()
    expected = naive_path(case, s, lambda _: float(s.options["lr"]), 8)
    optimizer = s.optimizer(case.model.parameters(), **s.options)
    case.penalty.attach(optimizer, "proximal")
    path = train(case, [optimizer], case.loss, 8)
    np.testing.assert_allclose(path, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["sgd_momentum", "adam", "adamw_amsgrad"])
def test_proximal_steps_follow_each_groups_lr_and_its_schedule(name: str) -> None:
    s, case = SETTINGS[name], held()
    per_element = np.array([0.1] * 3 + [0.02] * 5)
    expected = naive_path(case, s, lambda k: per_element * 0.5**k, 6)
    a, b, c = case.model.parameters()
    groups = [{"params": [a], "lr": 0.1}, {"params": [b, c], "lr": 0.02}]
    optimizer = s.optimizer(groups, **s.options)
    case.penalty.attach(optimizer, "proximal")
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    path = []
    for _ in range(6):
        path += list(train(case, [optimizer], case.loss, 1))
        schedule.step()
    np.testing.assert_allclose(path, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("optimizer", [SGD, RMSprop, Adagrad])
def test_a_given_eta_is_the_step_length(optimizer: Any) -> None:
    case, free = held(), held()
    (moved,) = train(free, [optimizer(free.model.parameters(), lr=0.1)], free.loss, 1)
    attached = optimizer(case.model.parameters(), lr=0.1)
    case.penalty.attach(attached, "proximal", eta=0.3)
    (theta,) = train(case, [attached], case.loss, 1)
    expected = naive.proximal(moved, case.omega, case.anchor, case.alpha, np.full(8, 0.3))
    np.testing.assert_allclose(theta, expected, rtol=1e-12)


def minimiser(case: Held) -> Array:
    """argmin sum h (theta - target)^2 / 2 + penalty, divided by lam on both sides."""
    h = array(case.h) / case.penalty.lam
    weight = 2 * case.omega
    return (h * array(case.target) + (weight * case.anchor).sum(0)) / (h + weight.sum(0))


@pytest.mark.parametrize("lam", [1e6, 1e30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_proximal_steps_are_stable_where_the_gradient_is_not(
    lam: float, dtype: torch.dtype
) -> None:
    ends = {}
    for mode in ("gradient", "proximal"):
        case = held(lam, dtype)
        optimizer = SGD(case.model.parameters(), lr=0.1, momentum=0.9)
        case.penalty.attach(optimizer, mode)
        ends[mode] = train(case, [optimizer], case.loss, 400)[-1]
    assert not np.isfinite(ends["gradient"]).any()
    rounding = 4 * torch.finfo(dtype).eps
    np.testing.assert_allclose(ends["proximal"], minimiser(case), rtol=rounding, atol=rounding)


@pytest.mark.parametrize("lr", [0.2, 0.05])
@pytest.mark.parametrize("name", ["sgd", "sgd_momentum", "sgd_nesterov", "sgd_dampening", "adam"])
def test_the_fixed_point_is_the_minimiser_of_loss_and_penalty_for_any_lr(
    name: str, lr: float
) -> None:
    case, s = held(), SETTINGS[name]
    optimizer = s.optimizer(case.model.parameters(), **{**s.options, "lr": lr})
    case.penalty.attach(optimizer, "proximal")
    path = train(case, [optimizer], case.loss, 600)
    np.testing.assert_allclose(path[-1], minimiser(case), rtol=1e-12)


# -- which parameters ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
def test_a_parameter_without_gradient_is_pulled_as_by_the_penalty_in_the_loss(mode: Any) -> None:
    case = held()
    theta = array(case.model.theta())
    optimizer = SGD(case.model.parameters(), lr=0.1)
    case.penalty.attach(optimizer, mode)
    case.model.a.sum().backward()
    optimizer.step()
    slope = np.array([1.0] * 3 + [0.0] * 5)
    if mode == "gradient":
        slope += naive.gradient(theta, case.omega, case.anchor, case.alpha)
        expected = theta - 0.1 * slope
    else:
        eta = np.full(8, 0.1)
        expected = naive.proximal(theta - 0.1 * slope, case.omega, case.anchor, case.alpha, eta)
    np.testing.assert_allclose(array(case.model.theta()), expected, rtol=1e-12)


def test_a_parameter_that_adam_has_not_stepped_stays() -> None:
    case = held()
    b = array(case.model.b)
    optimizer = Adam(case.model.parameters(), lr=0.1)
    case.penalty.attach(optimizer, "proximal")
    (case.model.a.sum() + case.model.c).backward()
    optimizer.step()
    assert np.array_equal(array(case.model.b), b)
    assert case.model.b.grad is None


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
@pytest.mark.parametrize("optimizer", [SGD, Adam])
@pytest.mark.parametrize("frozen", ["from the start", "later"])
def test_frozen_parameters_never_move_or_get_a_gradient(
    mode: Any, optimizer: Any, frozen: str
) -> None:
    case = held()
    attached = optimizer(case.model.parameters(), lr=0.1)
    case.penalty.attach(attached, mode)
    if frozen == "later":
        train(case, [attached], case.loss, 2)
        attached.zero_grad()
    case.model.b.requires_grad_(False)
    before = array(case.model.theta())
    train(case, [attached], case.loss, 3)
    after = array(case.model.theta())
    assert case.model.b.grad is None
    assert np.array_equal(after[3:7], before[3:7])
    assert (after[[0, 1, 2, 7]] != before[[0, 1, 2, 7]]).all()


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
def test_parameters_that_are_not_consolidated_are_left_to_the_optimizer(mode: Any) -> None:
    case, free = held(), held()
    penalty = FusedMASPenalty(case.model, lam=LAM, exclude=("b",))
    penalty.consolidate([torch.randn(3, 8, dtype=torch.float64)])
    optimizer = SGD(case.model.parameters(), lr=0.1)
    penalty.attach(optimizer, mode)
    path = train(case, [optimizer], case.loss, 3)
    unpulled = train(free, [SGD(free.model.parameters(), lr=0.1)], free.loss, 3)
    assert np.array_equal(path[:, 3:7], unpulled[:, 3:7])
    assert (path[-1, :3] != unpulled[-1, :3]).all()


def test_a_sparse_gradient_becomes_dense_as_with_the_penalty_in_the_loss() -> None:
    model = nn.Embedding(4, 2, sparse=True).double()
    penalty = FusedMASPenalty(model, lam=LAM, anchor="own", omega_dtype=torch.float64)
    anchor, x = array(model.weight), torch.arange(4)
    penalty.consolidate([x])
    omega = 2 * np.abs(anchor) / 4
    with torch.no_grad():
        model.weight += torch.randn_like(model.weight)
    theta = array(model.weight)
    optimizer = SGD(model.parameters(), lr=0.1)
    penalty.attach(optimizer)
    model(x[:2]).sum().backward()
    optimizer.step()
    slope = np.array([[1.0, 1.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    slope += 2 * LAM * omega * (theta - anchor)
    np.testing.assert_allclose(array(model.weight), theta - 0.1 * slope, rtol=1e-12)


# -- what is refused -------------------------------------------------------------------------------


def test_a_step_without_a_closure_may_say_so() -> None:
    case = held()
    optimizer = SGD(case.model.parameters(), lr=0.1)
    case.penalty.attach(optimizer)
    theta = array(case.model.theta())
    for step in (lambda: optimizer.step(None), lambda: optimizer.step(closure=None)):
        optimizer.zero_grad()
        step()
        theta = theta - 0.1 * naive.gradient(theta, case.omega, case.anchor, case.alpha)
        np.testing.assert_allclose(array(case.model.theta()), theta, rtol=1e-12)


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
def test_lbfgs_is_refused_with_a_hint(mode: Any) -> None:
    case = held()
    with pytest.raises(TypeError, match=r"LBFGS.*; add penalty\(\) to the loss in its closure"):
        case.penalty.attach(LBFGS(case.model.parameters()), mode)


def descend(theta: Array, case: Held, lr: float = 0.1) -> Array:
    """One step of gradient descent on loss + penalty."""
    pull = naive.gradient(theta, case.omega, case.anchor, case.alpha)
    return theta - lr * (case.slope(theta) + pull)


@pytest.mark.parametrize("positional", [True, False])
def test_the_penalty_goes_with_a_closure(positional: bool) -> None:
    """Which computes gradients anew inside the step, here twice."""
    case, losses = held(), []

    class Twice(SGD):
        def step(self, closure: Any = None) -> Any:
            closure()
            return super().step(closure)

    optimizer = Twice(case.model.parameters(), lr=0.1)
    case.penalty.attach(optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = case.loss()
        loss.backward()
        losses.append(loss)
        return loss

    theta = array(case.model.theta())
    for _ in range(3):
        found = optimizer.step(closure) if positional else optimizer.step(closure=closure)
        assert found is losses[-1]
        theta = descend(theta, case)
        np.testing.assert_allclose(array(case.model.theta()), theta, rtol=1e-12)
    assert len(losses) == 6


@pytest.mark.parametrize("inside", [True, False])
def test_a_step_inside_that_of_another_optimizer_or_a_method_has_the_penalty_once(
    inside: bool,
) -> None:
    case, other = held(), nn.Parameter(torch.zeros(2))

    class Own(SGD):
        def advance(self) -> None:
            self.step()

    optimizer = Own(case.model.parameters(), lr=0.1)
    case.penalty.attach(optimizer)
    theta = array(case.model.theta())

    def closure() -> Tensor:
        optimizer.zero_grad()
        case.loss().backward()
        optimizer.advance()
        return torch.zeros(())

    SGD([other], lr=0.1).step(closure) if inside else closure()
    np.testing.assert_allclose(array(case.model.theta()), descend(theta, case), rtol=1e-12)


def test_a_proximal_step_goes_with_a_closure() -> None:
    s, case = SETTINGS["sgd_momentum"], held()
    expected = naive_path(case, s, lambda _: 0.05, 4)
    optimizer = SGD(case.model.parameters(), **s.options)
    case.penalty.attach(optimizer, "proximal")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = case.loss()
        loss.backward()
        return loss

    for _ in range(4):
        optimizer.step(closure)
    np.testing.assert_allclose(array(case.model.theta()), expected[-1], rtol=1e-11)


class OwnSGD(SGD):
    """May do anything in its step."""


@pytest.mark.parametrize("optimizer", [RMSprop, Adagrad, NAdam, OwnSGD])
def test_an_optimizer_of_unknown_step_length_is_refused_without_eta(optimizer: Any) -> None:
    case = held()
    with pytest.raises(
        TypeError, match=rf"got {optimizer.__name__}, whose step length.* pass eta="
    ):
        case.penalty.attach(optimizer(case.model.parameters(), lr=0.1), "proximal")


@pytest.mark.parametrize("eta", [float("nan"), float("inf"), -0.1])
def test_a_wrong_eta_is_refused(eta: float) -> None:
    case = held()
    optimizer = SGD(case.model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=f"eta: got {eta}, expected a finite number from 0 up"):
        case.penalty.attach(optimizer, "proximal", eta=eta)


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
def test_a_penalty_is_attached_once(mode: Any) -> None:
    """A second time, as by an attach inside the loop over tasks, would double it."""
    case, other = held(), held()
    optimizer = SGD(case.model.parameters(), lr=0.1)
    handle = case.penalty.attach(optimizer, mode)
    with pytest.raises(RuntimeError, match="optimizer: got one that this penalty is attached to"):
        case.penalty.attach(optimizer, mode)
    second = FusedMASPenalty(case.model)
    second.attach(optimizer, mode)
    handle.remove()
    case.penalty.attach(optimizer, mode)
    other.penalty.attach(again := SGD(other.model.parameters(), lr=0.1), mode)
    path = train(case, [optimizer], case.loss, 3)
    assert np.array_equal(path, train(other, [again], other.loss, 3))


def test_an_optimizer_of_another_model_is_refused() -> None:
    case, other = held(), held()
    with pytest.raises(ValueError, match="optimizer: got one with none of the model's parameters"):
        case.penalty.attach(SGD(other.model.parameters(), lr=0.1))


def test_what_is_no_optimizer_is_refused() -> None:
    case = held()
    with pytest.raises(TypeError, match=r"got generator, expected a torch\.optim\.Optimizer"):
        case.penalty.attach(case.model.parameters())  # type: ignore[arg-type]
    schedule = OneCycleLR(SGD(case.model.parameters(), lr=0.1), 0.1, total_steps=2)
    with pytest.raises(TypeError, match=r"got OneCycleLR, .*: attach to its \.optimizer"):
        case.penalty.attach(schedule)  # type: ignore[arg-type]


def test_settings_that_mean_nothing_are_refused() -> None:
    case = held()
    optimizer = SGD(case.model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r'eta: got 0.1 with mode="gradient", expected none'):
        case.penalty.attach(optimizer, eta=0.1)
    with pytest.raises(ValueError, match="mode: got 'prox', expected 'gradient' or 'proximal'"):
        case.penalty.attach(optimizer, "prox")


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
@pytest.mark.parametrize("optimizer", [SGD, Adam])
def test_maximising_is_refused(mode: Any, optimizer: Any) -> None:
    case = held()
    a, b, c = case.model.parameters()
    groups = [{"params": [a]}, {"params": [b, c], "maximize": True}]
    with pytest.raises(ValueError, match="optimizer: got maximize=True, expected False"):
        case.penalty.attach(optimizer(groups, lr=0.1), mode)


def test_a_momentum_of_one_has_no_step_length() -> None:
    case = held()
    optimizer = SGD(case.model.parameters(), lr=0.1, momentum=1.0)
    with pytest.raises(ValueError, match=r"momentum: got 1\.0, expected less than 1"):
        case.penalty.attach(optimizer, "proximal")


# -- wrapped optimizers ----------------------------------------------------------------------------


class Delegating:
    """Is of the wrapped one's class and has its attributes, as what Fabric and Lightning hand out."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        kind = type(optimizer)
        self.__class__ = type(f"Wrapped{kind.__name__}", (Delegating, kind), {})  # type: ignore[assignment]

    def step(self, closure: Any = None) -> Any:
        return self._optimizer.step(*([] if closure is None else [closure]))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


class Unconstructed(Optimizer):
    """An Optimizer without what the constructor makes, as accelerate's."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.optimizer.param_groups

    def step(self, closure: Any = None) -> Any:
        self.optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)


class Duck:
    """No Optimizer at all."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.step = optimizer, optimizer.step

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()


class Hiding(Unconstructed):
    """Holds it by a name of its own."""

    def __init__(self, optimizer: Any) -> None:
        self.base = optimizer

    optimizer = property(lambda self: self.base)


WRAPPED: dict[str, Callable[[Any], Any]] = {
    "delegating": Delegating,
    "unconstructed": Unconstructed,
    "duck": Duck,
    "duck of delegating": lambda o: Duck(Delegating(o)),
    "unconstructed of unconstructed": lambda o: Unconstructed(Unconstructed(o)),
}


@pytest.mark.parametrize("kind", [SGD, mas_ext.optim.SGD])
@pytest.mark.parametrize("wrap", WRAPPED)
def test_a_wrapped_optimizer_pulls(wrap: str, kind: Any) -> None:
    case = held()
    optimizer = WRAPPED[wrap](kind(case.model.parameters(), lr=0.1))
    handle = case.penalty.attach(optimizer)
    with pytest.raises(RuntimeError, match=r"attached"):
        case.penalty.attach(optimizer)
    theta = array(case.model.theta())
    for _ in range(2):
        optimizer.zero_grad()
        case.loss().backward()
        optimizer.step()
        theta = descend(theta, case)
        np.testing.assert_allclose(array(case.model.theta()), theta, rtol=1e-12)
    handle.remove()
    optimizer.zero_grad()
    case.loss().backward()
    optimizer.step()
    np.testing.assert_allclose(
        array(case.model.theta()), theta - 0.1 * case.slope(theta), rtol=1e-12
    )


@pytest.mark.parametrize("wrap", ["delegating", "unconstructed", "duck"])
def test_a_wrapped_optimizers_step_size_is_that_of_the_real_one(wrap: str) -> None:
    s, case = SETTINGS["sgd_momentum"], held()
    expected = naive_path(case, s, lambda _: 0.05, 3)
    optimizer = WRAPPED[wrap](SGD(case.model.parameters(), **s.options))
    case.penalty.attach(optimizer, "proximal")
    path = train(case, [optimizer], case.loss, 3)
    np.testing.assert_allclose(path, expected, rtol=1e-11)


class Ready(Hiding):
    """Has all that hooks need, but a step that calls them."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        self._optimizer_step_pre_hooks = self._optimizer_step_post_hooks = {}  # type: ignore[assignment]


def test_a_wrapper_that_hides_the_optimizer_is_refused() -> None:
    """Its hooks would never be called."""
    case = held()
    with pytest.raises(
        TypeError, match=r"got Ready, whose step calls no hooks, expected the torch"
    ):
        case.penalty.attach(Ready(SGD(case.model.parameters(), lr=0.1)))
    with pytest.raises(
        TypeError, match=r"got Hiding, whose step calls no hooks, expected the torch"
    ):
        case.penalty.attach(Hiding(SGD(case.model.parameters(), lr=0.1)))


def test_a_wrapper_with_an_inherited_step_is_refused() -> None:
    """It lacks what torch's constructor gives, although its class has a step that calls hooks."""

    class Inheriting(SGD):
        def __init__(self, optimizer: Any) -> None:
            self.base = optimizer

    case = held()
    inner = SGD(case.model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="got Inheriting, whose step calls no hooks"):
        case.penalty.attach(Inheriting(inner))


def test_a_wrapper_of_itself_is_refused() -> None:
    case = held()
    wrapper = Duck(SGD(case.model.parameters(), lr=0.1))
    wrapper.optimizer = wrapper
    with pytest.raises(TypeError, match="got Duck, expected a torch"):
        case.penalty.attach(wrapper)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
def test_betas_may_be_tensors(mode: Any) -> None:
    paths = []
    for betas in ((0.9, 0.99), torch.tensor([0.9, 0.99], dtype=torch.float64).unbind()):
        case = held()
        optimizer = Adam(case.model.parameters(), lr=0.1, betas=betas, foreach=False)  # type: ignore[arg-type]
        case.penalty.attach(optimizer, mode)
        paths.append(train(case, [optimizer], case.loss, 3)[-1])
    np.testing.assert_allclose(paths[1], paths[0], rtol=1e-12)


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
def test_a_step_that_calls_its_parents_pulls_once(mode: Any) -> None:
    """torch calls the hooks of both; so it does in a step after one that failed."""

    class Own(SGD):
        fails = False

        def step(self, closure: Any = None) -> Any:
            if self.fails:
                raise MemoryError
            return super().step(closure)

    case, other = held(), held()
    SGD(case.model.parameters(), lr=0.1)  # by now the parent's step has hooks
    optimizer = Own(case.model.parameters(), lr=0.1)
    case.penalty.attach(optimizer, mode, eta=0.1 if mode == "proximal" else None)
    other.penalty.attach(plain := SGD(other.model.parameters(), lr=0.1), mode)
    expected = train(other, [plain], other.loss, 2)
    np.testing.assert_allclose(train(case, [optimizer], case.loss, 1)[-1], expected[0], rtol=1e-12)
    Own.fails = True
    with pytest.raises(MemoryError):
        optimizer.step()
    Own.fails = False
    np.testing.assert_allclose(train(case, [optimizer], case.loss, 1)[-1], expected[1], rtol=1e-12)


@pytest.mark.parametrize("kind", [SGD, mas_ext.optim.SGD])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_has_no_penalty_until_it_is_attached(copied: Any, kind: Any) -> None:
    """torch copies no hooks."""
    case = held()
    optimizer = kind(case.model.parameters(), lr=0.1)
    case.penalty.attach(optimizer)
    model, penalty, own = copied((case.model, case.penalty, optimizer))
    penalty.attach(own)
    theta = array(model.theta())
    model.theta()  # from here on only the copy moves
    own.step()
    pull = naive.gradient(theta, case.omega, case.anchor, case.alpha)
    np.testing.assert_allclose(array(model.theta()), theta - 0.1 * pull, rtol=1e-12)
    assert np.array_equal(array(case.model.theta()), theta)


# -- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
def test_add_grad_makes_no_temporary_of_parameter_size(frozen: bool) -> None:
    model = nn.Linear(300, 200)
    penalty = FusedMASPenalty(model)
    penalty.consolidate([torch.randn(2, 300)])
    model(torch.randn(2, 300)).sum().backward()
    model.bias.requires_grad_(not frozen)
    size = 4 * 300 * 200
    assert largest_allocation(lambda: penalty().backward()) >= size
    assert largest_allocation(penalty.add_grad_) < size / 100


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
@pytest.mark.parametrize("optimizer", [SGD, Adam, AdamW])
@pytest.mark.parametrize("scaled", [False, True])
def test_an_attached_penalty_makes_no_temporary_of_parameter_size(
    optimizer: Any, mode: Any, scaled: bool
) -> None:
    model = nn.Linear(300, 200)
    penalty = FusedMASPenalty(model)
    penalty.consolidate([torch.randn(2, 300)])
    attached = optimizer(model.parameters(), lr=1e-3, fused=True)
    penalty.attach(attached, mode)
    model(torch.randn(2, 300)).sum().backward()
    attached.step()  # Adam's state is there from here on
    if scaled:
        attached.grad_scale, attached.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    before = model.weight.detach().clone()
    assert largest_allocation(attached.step) < 4 * 300 * 200 / 100
    assert not torch.equal(model.weight, before)
