"""The penalty under GradScaler, autocast and 16-bit parameters, against plain training in NumPy's float64."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import pytest
import torch
from oracles import naive
from oracles.product import LAM, SETTINGS, Array, Held, Settings, array, held, twin
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from mas_ext import FusedMASPenalty

# -- GradScaler ------------------------------------------------------------------------------------

Scaler = torch.amp.GradScaler


def scaler_of_changing_scale(device: str = "cpu") -> Scaler:
    return Scaler(device, init_scale=1024.0, growth_interval=2)


def scaled_path(
    case: Held,
    optimizer: Optimizer,
    overflows: Collection[int],
    loss: Callable[[], Tensor] | None = None,
    unscaled: Callable[[], Any] | None = None,
) -> Array:
    """The parameters after each of 7 steps; unscaled() is called with gradients that are unscaled."""
    scaler, path = scaler_of_changing_scale(case.h.device.type), []
    for k in range(7):
        optimizer.zero_grad()
        value = (loss or case.loss)()
        scaler.scale(value * float("inf") if k in overflows else value).backward()
        if unscaled is not None:
            scaler.unscale_(optimizer)
            unscaled()
        scaler.step(optimizer)
        scaler.update()
        path.append(array(case.model.theta()))
    return np.stack(path)


def pull(case: Held, theta: Array) -> Array:
    return naive.gradient(theta, case.omega, case.anchor, case.alpha)


def plain_path(case: Held, s: Settings, mode: str, overflows: Collection[int]) -> Array:
    """The same in float64, without any scale: an overflow leaves everything as it was."""
    theta, optimizer, path, lr = array(case.model.theta()), twin(s), [], float(s.options["lr"])
    for k in range(7):
        if k not in overflows:
            slope = case.slope(theta) + (pull(case, theta) if mode == "gradient" else 0)
            theta, eta = optimizer.step(theta, slope, lr)
            if mode == "proximal":
                theta = naive.proximal(theta, case.omega, case.anchor, case.alpha, eta)
        path.append(theta)
    return np.stack(path)


SCALED = ["sgd", "sgd_momentum", "sgd_fused", "sgd_tensor_lr", "adam", "adam_fused", "adamw_fused"]


@pytest.mark.parametrize("overflows", [(), (1, 4, 5), (0, 1, 3)])
@pytest.mark.parametrize("mode", ["gradient", "proximal"])
@pytest.mark.parametrize("name", SCALED)
def test_scaled_gradients_change_nothing_and_a_skipped_step_applies_nothing(
    name: str, mode: Any, overflows: Collection[int]
) -> None:
    case, s = held(), SETTINGS[name]
    if name == "sgd_fused" and 0 in overflows:  # torch leaves its momentum uninitialised then
        s = Settings(SGD, {"lr": 0.05, "fused": True})
    expected = plain_path(case, s, mode, overflows)
    optimizer = s.optimizer(case.model.parameters(), **s.options)
    case.penalty.attach(optimizer, mode)
    path = scaled_path(case, optimizer, overflows)
    np.testing.assert_allclose(path, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
@pytest.mark.parametrize("fused", [False, True])
def test_gradients_that_were_unscaled_by_hand(fused: bool, mode: Any) -> None:
    s = Settings(Adam, {"lr": 0.1, "fused": fused})
    case = held()
    expected = plain_path(case, s, mode, (2,))
    optimizer = Adam(case.model.parameters(), **s.options)
    case.penalty.attach(optimizer, mode)
    path = scaled_path(case, optimizer, (2,), unscaled=lambda: None)
    np.testing.assert_allclose(path, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("form", ["loss", "add_grad_"])
def test_the_loss_form_and_the_gradient_by_hand_under_a_scaler(form: str, fused: bool) -> None:
    s = Settings(AdamW, {"lr": 0.1, "fused": fused})
    case = held()
    expected = plain_path(case, s, "gradient", (0, 2))
    optimizer = AdamW(case.model.parameters(), **s.options)
    if form == "loss":
        path = scaled_path(case, optimizer, (0, 2), loss=lambda: case.loss() + case.penalty())
    else:
        path = scaled_path(case, optimizer, (0, 2), unscaled=case.penalty.add_grad_)
    np.testing.assert_allclose(path, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("first", ["clip", "add_grad_"])
def test_clipping_under_a_scaler_clips_the_penalty_where_it_is_there_already(
    first: str, fused: bool
) -> None:
    case = held()
    theta = array(case.model.theta())
    slope, added, length = case.slope(theta), pull(case, theta), 0.25
    optimizer = SGD(case.model.parameters(), lr=1.0, fused=fused)
    scaler = scaler_of_changing_scale()
    scaler.scale(case.loss()).backward()
    scaler.unscale_(optimizer)
    if first == "clip":
        case.penalty.attach(optimizer)
        slope = slope * length / (np.linalg.norm(slope) + 1e-6) + added
    else:
        case.penalty.add_grad_()
        slope = (slope + added) * length / (np.linalg.norm(slope + added) + 1e-6)
    clip_grad_norm_(case.model.parameters(), length)
    scaler.step(optimizer)
    np.testing.assert_allclose(array(case.model.theta()), theta - slope, rtol=1e-11)
    assert np.linalg.norm(added) > 1


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
@pytest.mark.parametrize("fused", [False, True])
def test_accumulated_scaled_gradients_get_the_penalty_once(fused: bool, mode: Any) -> None:
    case = held()
    theta, x = array(case.model.theta()), torch.randn(12, 8, dtype=torch.float64)
    optimizer = SGD(case.model.parameters(), lr=0.1, fused=fused)
    case.penalty.attach(optimizer, mode)
    scaler = scaler_of_changing_scale()
    for _ in range(3):
        optimizer.zero_grad()
        for part in x.chunk(4):
            scaler.scale((case.model(part) - 1).square().mean() / 4).backward()
        scaler.step(optimizer)
        scaler.update()
        slope = (2 * array(x) * (array(x) * theta - 1)).mean(0) / 8
        if mode == "gradient":
            theta = theta - 0.1 * (slope + pull(case, theta))
        else:
            eta = np.full(8, 0.1)
            theta = theta - 0.1 * slope
            theta = naive.proximal(theta, case.omega, case.anchor, case.alpha, eta)
    np.testing.assert_allclose(array(case.model.theta()), theta, rtol=1e-11)


class NoReading(TorchDispatchMode):
    """No number of a tensor is read by Python: on a GPU, that would wait for it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
def test_the_scale_and_the_overflow_are_read_on_the_device(mode: Any) -> None:
    case = held()
    optimizer = SGD(case.model.parameters(), lr=torch.tensor(0.1), fused=True)
    case.penalty.attach(optimizer, mode)
    before, after = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    *_, hook = [*before.values(), *after.values()]
    case.loss().backward()
    optimizer.grad_scale = torch.tensor(2.0)  # type: ignore[attr-defined]
    optimizer.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]
    with NoReading():
        hook(optimizer, (optimizer,), {})
    with NoReading(), pytest.raises(AssertionError):
        float(optimizer.grad_scale)  # type: ignore[attr-defined]


def test_nothing_is_read_in_the_other_forms() -> None:
    case = held()
    with NoReading():
        case.penalty().backward()
        case.penalty.add_grad_()


# -- autocast and 16-bit parameters ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_leaves_the_penalty_alone(dtype: torch.dtype) -> None:
    case = held(dtype=dtype)
    expected = LAM * float((case.omega * (array(case.model.theta()) - case.anchor) ** 2).sum())
    with torch.autocast("cpu", torch.bfloat16):
        value = case.penalty()
        case.penalty.add_grad_()
    assert value.dtype == dtype
    assert value.item() == pytest.approx(expected, rel=1e-6)
    grad = np.concatenate([array(p.grad).ravel() for p in case.model.parameters()])
    np.testing.assert_allclose(grad, pull(case, array(case.model.theta())), rtol=1e-5, atol=1e-5)


def rounded(x: Array, dtype: torch.dtype) -> Array:
    return array(torch.from_numpy(x).to(dtype))


@pytest.mark.parametrize("mode", ["gradient", "proximal"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_step_of_a_training_in_16_bits_is_the_formula_rounded(
    dtype: torch.dtype, mode: Any
) -> None:
    """Ten tasks; anchors, importance and sums are as exact as for a float32 parameter."""
    theta = nn.Parameter(torch.randn(64).to(dtype))
    model = nn.ParameterList([theta])
    penalty = FusedMASPenalty(model, lam=0.3, anchor="own")
    unit = torch.finfo(dtype).eps
    optimizer = SGD([theta], lr=0.125)
    penalty.attach(optimizer, mode)
    omega, anchor = np.zeros((0, 64)), np.zeros((0, 64))
    for task in range(10):
        target = torch.randn(64).to(dtype)
        for _ in range(6):
            before, alpha = array(theta), np.full(task, 0.3)
            optimizer.zero_grad()
            (0.5 * (theta - target).float().square()).sum().backward()
            slope = array(theta.grad)
            optimizer.step()
            eta = np.full(64, 0.125)
            if mode == "gradient":
                added = naive.gradient(before, omega, anchor, alpha)
                expected = before - eta * rounded(slope + added, dtype)
            else:
                moved = rounded(before - eta * slope, dtype)
                expected = naive.proximal(moved, omega, anchor, alpha, eta)
            # The stored result is rounded once; torch's step may round its product before.
            size = np.abs(before) + np.abs(expected) + np.abs(eta * slope)
            assert np.all(np.abs(array(theta) - expected) <= 1.01 * unit * size)
            value = naive.penalty(array(theta), omega, anchor, alpha)
            assert penalty().item() == pytest.approx(value, rel=2e-6)
        importance = torch.rand(64)
        omega = np.concatenate([omega, array(importance)[None]])
        anchor = np.concatenate([anchor, array(theta)[None]])
        penalty.consolidate(importance={"0": importance})
    mean = (omega * anchor).sum(0) / omega.sum(0)
    np.testing.assert_allclose(array(penalty.anchor["0"]), mean, rtol=1e-5, atol=1e-6)
    assert penalty.anchor["0"].dtype == torch.float32
