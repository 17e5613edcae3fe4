"""The fused optimizers against optimizers in NumPy, and torch's with the penalty attached."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import pytest
import torch
from memory import largest_allocation
from optim.test_mixed_precision import NoReading, plain_path, pull, scaled_path
from oracles import naive
from oracles.product import LAM, SETTINGS, Array, Held, Settings, array, held, train, twin
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from mas_ext import FusedMASPenalty, optim
from mas_ext.optim import fused as module

FUSED: dict[Any, Any] = {
    torch.optim.SGD: optim.SGD,
    torch.optim.Adam: optim.Adam,
    torch.optim.AdamW: optim.AdamW,
}
# No foreach, and no fused, which is what these are.
CASES = {
    name: s
    for name, s in SETTINGS.items()
    if s.optimizer in FUSED and not {"foreach", "fused"} & s.options.keys()
}
each_case = pytest.mark.parametrize("s", CASES.values(), ids=CASES)
each_mode = pytest.mark.parametrize("mode", ["gradient", "proximal"])
each_optimizer = pytest.mark.parametrize("optimizer", [optim.SGD, optim.Adam, optim.AdamW])


def fused(s: Settings, parameters: Any) -> Any:
    return FUSED[s.optimizer](parameters, **s.options)


def formula(case: Held, s: Settings, mode: str, steps: int) -> Array:
    theta, optimizer, path = array(case.model.theta()), twin(s), []
    for _ in range(steps):
        slope = case.slope(theta) + (pull(case, theta) if mode == "gradient" else 0)
        theta, eta = optimizer.step(theta, slope, float(s.options["lr"]))
        if mode == "proximal":
            theta = naive.proximal(theta, case.omega, case.anchor, case.alpha, eta)
        path.append(theta)
    return np.stack(path)


@each_case
@each_mode
def test_each_step_is_the_formula(s: Settings, mode: Any) -> None:
    case = held()
    expected = formula(case, s, mode, 8)
    optimizer = fused(s, case.model.parameters())
    case.penalty.attach(optimizer, mode)
    path = train(case, [optimizer], case.loss, 8)
    np.testing.assert_allclose(path, expected, rtol=1e-10, atol=1e-12)


def groups(model: Any, optimizer: Any) -> Any:
    a, b, c = model.parameters()
    second = {"momentum": 0.5} if issubclass(optimizer, torch.optim.SGD) else {"amsgrad": True}
    return optimizer([{"params": [c, a], "lr": 0.1}, {"params": [b], **second}], lr=0.02)


@each_mode
@pytest.mark.parametrize("optimizer", FUSED, ids=["sgd", "adam", "adamw"])
@pytest.mark.parametrize("store", ["merged", "per_task"])
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("free", ["b", "c"])  # of a group alone, and before one that is held
def test_the_path_of_torchs_optimizer_with_the_penalty_attached(
    optimizer: Any, mode: Any, store: Any, backend: Any, free: str
) -> None:
    """Several groups, a schedule, a parameter that is not held, and steps before the first task."""
    paths = []
    for kind in (optimizer, FUSED[optimizer]):
        case = held()
        penalty = FusedMASPenalty(
            case.model,
            LAM,
            store=store,
            exclude=(free,),
            omega_dtype=torch.float64,
            backend=backend,
        )
        stepping = groups(case.model, kind)
        schedule = OneCycleLR(stepping, 0.1, total_steps=20)
        penalty.attach(stepping, mode)
        path = []
        for k in range(12):
            if k in (4, 8):
                generator = torch.Generator().manual_seed(k)
                x = torch.randn(3, 8, dtype=torch.float64, generator=generator)
                penalty.consolidate([x])
            path += list(train(case, [stepping], case.loss, 1))
            schedule.step()
        paths.append(np.stack(path))
    np.testing.assert_allclose(paths[1], paths[0], rtol=1e-10, atol=1e-12)
    assert np.abs(np.diff(paths[0][4:], axis=0)).max() > 1e-2


@pytest.mark.parametrize("optimizer", FUSED, ids=["sgd", "adam", "adamw"])
def test_one_call_steps_all_groups(optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for name in ("sgd_", "adamw_"):
        kernel = getattr(module, name)

        def counted(theta: Any, *args: Any, kernel: Any = kernel, **named: Any) -> None:
            calls.append(len(theta))
            kernel(theta, *args, **named)

        monkeypatch.setattr(module, name, counted)
    ours = [nn.Parameter(torch.ones(3) * i) for i in range(6)]
    theirs = [nn.Parameter(torch.ones(3) * i) for i in range(6)]
    both = [
        kind([{"params": [p], "lr": 0.1 * (i + 1)} for i, p in enumerate(theta)], **options)
        for kind, theta in ((FUSED[optimizer], ours), (optimizer, theirs))
        for options in [{"momentum": 0.9} if optimizer is torch.optim.SGD else {"amsgrad": True}]
    ]
    for i in range(4):
        for theta, stepping in zip((ours, theirs), both, strict=True):
            for k, p in enumerate(theta):  # one of them begins later
                p.grad = (p.detach() - 1) if (k, i) != (2, 0) else None
            stepping.step()
    assert calls == [5, 6, 6, 6]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@each_case
@each_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_parameters_take_torchs_path_to_rounding(
    s: Settings, mode: Any, dtype: torch.dtype
) -> None:
    paths = []
    for make in (s.optimizer, FUSED[s.optimizer]):
        torch.manual_seed(0)
        theta = nn.Parameter(torch.randn(64).to(dtype))
        penalty = FusedMASPenalty(nn.ParameterList([theta]), 0.3, anchor="own")
        penalty.consolidate(importance={"0": torch.rand(64)})
        optimizer = make([theta], **{**s.options, "lr": float(s.options["lr"]) / 4})
        penalty.attach(optimizer, mode)
        for _ in range(6):
            optimizer.zero_grad()
            (0.5 * (theta - 1).float().square()).sum().backward()
            optimizer.step()
        paths.append(array(theta))
        kept = {key: t.dtype for key, t in optimizer.state[theta].items() if t is not None}
        assert all(t == dtype for key, t in kept.items() if key != "step")
    tolerance = 24 * torch.finfo(dtype).eps
    np.testing.assert_allclose(paths[1], paths[0], rtol=tolerance, atol=tolerance)


# -- GradScaler ------------------------------------------------------------------------------------


@each_case
@each_mode
@pytest.mark.parametrize("overflows", [(), (1, 4, 5), (0, 1, 3)])
def test_a_skipped_step_applies_nothing_and_scaled_gradients_change_nothing(
    s: Settings, mode: Any, overflows: Collection[int]
) -> None:
    case = held()
    expected = plain_path(case, s, mode, overflows)
    optimizer = fused(s, case.model.parameters())
    case.penalty.attach(optimizer, mode)
    path = scaled_path(case, optimizer, overflows)
    np.testing.assert_allclose(path, expected, rtol=1e-10, atol=1e-12)


@each_optimizer
@each_mode
def test_no_number_is_read_in_a_step(optimizer: Any, mode: Any) -> None:
    case = held()
    stepping = optimizer(case.model.parameters(), lr=0.1)
    case.penalty.attach(stepping, mode)
    train(case, [stepping], case.loss, 1)
    stepping.grad_scale, stepping.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    with NoReading():
        stepping.step()


# -- state -----------------------------------------------------------------------------------------


@each_case
@pytest.mark.parametrize("to_torch", [False, True])
def test_a_state_dict_goes_on_in_torchs_optimizer_and_back(s: Settings, to_torch: bool) -> None:
    kinds = [s.optimizer, FUSED[s.optimizer]]
    case, other = held(), held()
    first = kinds[to_torch](case.model.parameters(), **s.options)
    train(case, [first], case.loss, 4)
    other.model.load_state_dict(case.model.state_dict())
    second = kinds[not to_torch](other.model.parameters(), **s.options)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    expected = train(case, [first], case.loss, 4)
    np.testing.assert_allclose(train(other, [second], other.loss, 4), expected, rtol=1e-12)
    keys = [
        {k for k, t in o.state[p].items() if t is not None}
        for o, p in ((first, case.model.a), (second, other.model.a))
    ]
    assert keys[0] == keys[1]


@pytest.mark.parametrize("counted", [5.0, torch.tensor(5.0, dtype=torch.float64)])
def test_a_step_that_was_counted_in_float64_or_as_a_number(counted: Any) -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = optim.AdamW([p])
    p.grad = torch.ones(3)
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][0]["step"] = counted
    state["param_groups"][0]["fused"] = None
    optimizer.load_state_dict(state)
    optimizer.step()
    assert float(optimizer.state[p]["step"]) == 6.0
    assert optimizer.state[p]["step"].dtype == torch.float32
    assert optimizer.param_groups[0]["fused"]


@each_optimizer
def test_a_copy_has_no_penalty_as_it_has_no_hooks(optimizer: Any) -> None:
    case = held()
    stepping = optimizer(case.model.parameters(), lr=0.1)
    case.penalty.attach(stepping)
    copied = copy.deepcopy(stepping)
    copied.attach(case.penalty, "gradient")
    with pytest.raises(RuntimeError, match="penalty attached"):
        case.penalty.attach(stepping)


# -- which parameters ------------------------------------------------------------------------------


@each_optimizer
@each_mode
def test_a_parameter_without_gradient_goes_as_with_torchs_optimizer(
    optimizer: Any, mode: Any
) -> None:
    ends = []
    (torchs,) = (theirs for theirs, ours in FUSED.items() if ours is optimizer)
    for kind in (optimizer, torchs):
        case = held()
        stepping = kind(case.model.parameters(), lr=0.1)
        case.penalty.attach(stepping, mode)
        (case.model.a.sum() + case.model.c).backward()
        stepping.step()
        train(case, [stepping], case.loss, 1)
        stepping.zero_grad()
        case.loss().backward()
        case.model.b.grad = None
        stepping.step()
        ends.append(array(case.model.theta()))
    np.testing.assert_allclose(ends[0], ends[1], rtol=1e-12)


@each_optimizer
@each_mode
def test_frozen_parameters_never_move_or_get_a_gradient(optimizer: Any, mode: Any) -> None:
    case = held()
    stepping = optimizer(case.model.parameters(), lr=0.1)
    case.penalty.attach(stepping, mode)
    train(case, [stepping], case.loss, 2)
    stepping.zero_grad()
    case.model.b.requires_grad_(False)
    before = array(case.model.theta())
    train(case, [stepping], case.loss, 2)
    assert case.model.b.grad is None
    assert np.array_equal(array(case.model.theta())[3:7], before[3:7])
    assert (array(case.model.theta())[:3] != before[:3]).all()


@each_optimizer
@each_mode
def test_a_removed_handle_pulls_no_more(optimizer: Any, mode: Any) -> None:
    case, free = held(), held()
    stepping = optimizer(case.model.parameters(), lr=0.1)
    handle = case.penalty.attach(stepping, mode)
    handle.remove()
    handle.remove()
    other = optimizer(free.model.parameters(), lr=0.1)
    path = train(case, [stepping], case.loss, 3)
    assert np.array_equal(path, train(free, [other], free.loss, 3))
    case.penalty.attach(stepping, mode)
    handle.remove()  # ended already: it is not the new one's
    assert not np.array_equal(
        train(case, [stepping], case.loss, 1), train(free, [other], free.loss, 1)
    )


@each_mode
def test_the_penalty_goes_with_a_closure(mode: Any) -> None:
    s, case = SETTINGS["sgd_momentum"], held()
    expected = formula(case, s, mode, 3)
    optimizer = fused(s, case.model.parameters())
    case.penalty.attach(optimizer, mode)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = case.loss()
        loss.backward()
        return loss

    losses = [optimizer.step(closure) for _ in range(3)]
    np.testing.assert_allclose(array(case.model.theta()), expected[-1], rtol=1e-11)
    assert all(isinstance(loss, Tensor) for loss in losses)


def test_hooks_on_the_step_are_called() -> None:
    case, seen = held(), []
    optimizer = optim.SGD(case.model.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    train(case, [optimizer], case.loss, 1)
    assert seen == ["before", "after"]


def test_channels_last_and_momentum_in_another_order() -> None:
    ends = []
    for kind in (torch.optim.SGD, optim.SGD):
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        penalty = FusedMASPenalty(model, LAM, anchor="own")
        penalty.consolidate([torch.randn(2, 3, 8, 8)])
        optimizer = kind(model.parameters(), lr=0.01, momentum=0.9)
        penalty.attach(optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(1, 3, 8, 8)).sum().backward()
            optimizer.step()
            own = optimizer.state[model.weight]
            own["momentum_buffer"] = own["momentum_buffer"].contiguous()
        ends.append(array(model.weight))
    np.testing.assert_allclose(ends[1], ends[0], rtol=1e-5, atol=1e-6)


# -- what is refused -------------------------------------------------------------------------------


@each_optimizer
@pytest.mark.parametrize("key", ["foreach", "maximize", "differentiable"])
def test_what_the_fused_step_lacks_is_refused(optimizer: Any, key: str) -> None:
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=f"{key}: got True, expected {key} to be off"):
        optimizer([{"params": [p], key: True}], lr=0.1)
    state = optimizer([p], lr=0.1).state_dict()
    state["param_groups"][0][key] = True
    with pytest.raises(ValueError, match=f"{key}: got True"):
        optimizer([p], lr=0.1).load_state_dict(state)


def test_settings_that_mean_nothing_are_refused() -> None:
    case = held()
    optimizer = optim.SGD(case.model.parameters(), lr=0.1, momentum=1.0)
    with pytest.raises(ValueError, match="mode: got 'prox', expected 'gradient' or 'proximal'"):
        case.penalty.attach(optimizer, "prox")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"momentum: got 1\.0, expected less than 1"):
        case.penalty.attach(optimizer, "proximal")
    with pytest.raises(ValueError, match=r"eta: got 0\.1 with"):
        case.penalty.attach(optimizer, eta=0.1)
    optimizer.param_groups[0]["lr"] = torch.ones((), device="meta")
    case.loss().backward()
    with pytest.raises(TypeError, match="lr: got a tensor on meta, expected a number"):
        optimizer.step()


def test_a_sparse_gradient_is_refused() -> None:
    model = nn.Embedding(4, 2, sparse=True)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    model(torch.arange(2)).sum().backward()
    with pytest.raises(RuntimeError, match="parameters: got a sparse gradient of shape"):
        optimizer.step()


@each_optimizer
@each_mode
def test_an_offloaded_state_goes_by_hooks(optimizer: Any, mode: Any) -> None:
    paths = []
    for place in (None, "cpu"):
        case = held()
        penalty = FusedMASPenalty(case.model, LAM, state_device=place)  # type: ignore[arg-type]
        penalty.consolidate([torch.ones(3, 8, dtype=torch.float64)])
        stepping = optimizer(case.model.parameters(), lr=0.1)
        penalty.attach(stepping, mode)
        paths.append(train(case, [stepping], case.loss, 4))
    np.testing.assert_allclose(*paths, rtol=1e-12)


def test_a_given_eta_is_the_step_length() -> None:
    case, free = held(), held()
    (moved,) = train(free, [optim.SGD(free.model.parameters(), lr=0.1)], free.loss, 1)
    optimizer = optim.SGD(case.model.parameters(), lr=0.1)
    case.penalty.attach(optimizer, "proximal", eta=0.3)
    (theta,) = train(case, [optimizer], case.loss, 1)
    expected = naive.proximal(moved, case.omega, case.anchor, case.alpha, np.full(8, 0.3))
    np.testing.assert_allclose(theta, expected, rtol=1e-12)


# -- memory ----------------------------------------------------------------------------------------


@each_optimizer
@each_mode
@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_makes_no_temporary_of_parameter_size(
    optimizer: Callable[..., Any], mode: Any, scaled: bool
) -> None:
    model = nn.Linear(300, 200)
    penalty = FusedMASPenalty(model)
    penalty.consolidate([torch.randn(2, 300)])
    stepping = optimizer(model.parameters(), lr=1e-3)
    penalty.attach(stepping, mode)
    model(torch.randn(2, 300)).sum().backward()
    stepping.step()  # the moments are there from here on
    if scaled:
        stepping.grad_scale, stepping.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    before = model.weight.detach().clone()
    assert largest_allocation(stepping.step) < 4 * 300 * 200 / 100
    assert not torch.equal(model.weight, before)


@each_optimizer
def test_a_scaler_leaves_the_scale_and_the_overflow_to_the_step(optimizer: Any) -> None:
    """It would wait for the GPU to read them."""
    assert optimizer([nn.Parameter(torch.ones(2))])._step_supports_amp_scaling
