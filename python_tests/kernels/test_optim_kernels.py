"""The steps of SGD and AdamW with a penalty in them, against NumPy in float64, on every backend."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from backends import Backend, refuse_other_bits
from kernels.test_kernels import (
    Case,
    array,
    close,
    each_dtype,
    each_narrow_dtype,
    each_rows,
    flat_array,
    make,
    with_both_anchors,
)
from oracles import naive
from torch import Tensor

from mas_ext.kernels.flat_state import State
from mas_ext.kernels.optim import AdamWRule, SGDRule, adamw_, flat_rules, sgd_

Array = naive.Array

SGD: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "first": {"momentum": 0.9, "dampening": 0.5, "first": True},
    "dampening": {"momentum": 0.8, "dampening": 0.5},
    "nesterov, decay": {"momentum": 0.8, "nesterov": True, "decay": 0.25},
}
ETA = 0.5


def run_sgd(
    case: Case,
    grad: list[Tensor],
    buffer: list[Tensor],
    options: dict[str, Any],
    proximal: bool,
    backend: Backend,
    scale: Tensor | None = None,
    overflow: Tensor | None = None,
) -> None:
    o = {"momentum": 0.0, "dampening": 0.0, "decay": 0.0, "nesterov": False, "first": False}
    o |= options
    sgd_(
        *(case.theta, grad, buffer if o["momentum"] else [], case.state(backend.native)),
        [0.125, o["momentum"], o["dampening"], o["decay"], ETA, o["nesterov"], o["first"]],
        [len(case.theta)],
        *(proximal, scale, overflow),
    )


def run_adamw(
    case: Case,
    grad: list[Tensor],
    moments: list[list[Tensor]],
    step: list[Tensor],
    proximal: bool,
    backend: Backend,
    scale: Tensor | None = None,
    overflow: Tensor | None = None,
    l2: float = 0.0,
) -> None:
    largest = moments[2] if len(moments) == 3 else []
    adamw_(
        *(case.theta, grad, *moments[:2], largest, step, case.state(backend.native)),
        *([0.125, 0.75, 0.5, 0.25, 0.5, l2], [len(case.theta)], proximal, scale, overflow),
    )


def partly_held(case: Case) -> Case:
    """The same where the penalty holds only two tensors of three."""
    return case._replace(offsets=[-1 if i % 3 == 2 else o for i, o in enumerate(case.offsets)])


def inputs(case: Case, count: int) -> list[list[Tensor]]:
    """Tensors like the parameters: a gradient, and moments from 0 up."""
    return [[torch.randn_like(t) for t in case.theta]] + [
        [torch.rand_like(t) for t in case.theta] for _ in range(count)
    ]


def slopes(
    case: Case, whole: Case, grad: list[Tensor], scale: float, proximal: bool
) -> list[Array]:
    """The gradients with the penalty's."""
    return [
        flat_array(grad[i]) / scale
        + (naive.gradient(x, w, a, array(case.alpha)) * (case.offsets[i] >= 0 and not proximal))
        for i, x, w, a in whole.pieces()
    ]


def approached(case: Case, whole: Case, i: int, x: Array, eta: Array, proximal: bool) -> Array:
    if not proximal or case.offsets[i] < 0:
        return x
    return naive.proximal(
        x, whole.rows(case.omega, i), whole.rows(case.anchor, i), array(case.alpha), eta
    )


@each_dtype
@each_rows
@pytest.mark.parametrize("proximal", [False, True])
@pytest.mark.parametrize("name", SGD)
def test_sgd(
    backend: Backend,
    dtype: torch.dtype,
    omega_dtype: torch.dtype,
    rows: int,
    proximal: bool,
    name: str,
) -> None:
    whole = make(dtype, omega_dtype, rows, device=backend.device)
    case = partly_held(whole)
    grad, buffer = inputs(case, 1)
    scale = torch.tensor(4.0, device=backend.device)
    o = {"momentum": 0.0, "dampening": 0.0, "decay": 0.0} | SGD[name]
    before = [flat_array(t) for t in case.theta]
    old = [flat_array(b) for b in buffer]
    g = slopes(case, whole, grad, 4.0, proximal)
    run_sgd(case, grad, buffer, SGD[name], proximal, backend, scale)
    for i, x in enumerate(before):
        size = np.abs(g[i]) + np.abs(x) + np.abs(old[i]) + 8
        total = g[i] + o["decay"] * x
        if o["momentum"]:
            kept = o["momentum"] * old[i] + (1 - o["dampening"]) * total
            kept = total if o.get("first") else kept
            close(buffer[i], kept, size)
            total = total + o["momentum"] * kept if o.get("nesterov") else kept
        else:
            assert np.array_equal(flat_array(buffer[i]), old[i])
        expected = approached(case, whole, i, x - 0.125 * total, np.full(x.shape, ETA), proximal)
        close(case.theta[i], expected, 4 * size)


@each_narrow_dtype
@each_rows
@pytest.mark.parametrize("proximal", [False, True])
@pytest.mark.parametrize("rule", ["sgd", "momentum", "adamw", "amsgrad"])
def test_anchors_of_16_bits_give_the_bits_of_float32(
    backend: Backend,
    dtype: torch.dtype,
    omega_dtype: torch.dtype,
    rows: int,
    proximal: bool,
    rule: str,
) -> None:
    whole = partly_held(make(dtype, omega_dtype, rows, device=backend.device))
    grad, *given = inputs(whole, {"sgd": 0, "momentum": 1, "adamw": 2, "amsgrad": 3}[rule])
    results = []
    for case in with_both_anchors(whole):
        moments = [[t.clone() for t in each] for each in given]
        if rule in ("sgd", "momentum"):
            options = SGD["momentum"] if moments else {}
            run_sgd(case, grad, moments[0] if moments else [], options, proximal, backend)
        else:
            step = [torch.ones((), device=backend.device) for _ in case.theta]
            run_adamw(case, grad, moments, step, proximal, backend)
        results.append([*case.theta, *(t for each in moments for t in each)])
    for narrow, wide in zip(*results, strict=True):
        assert torch.equal(narrow, wide)


@each_dtype
@each_rows
@pytest.mark.parametrize("proximal", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("l2", [0.0, 0.375])
def test_adamw(
    backend: Backend,
    dtype: torch.dtype,
    omega_dtype: torch.dtype,
    rows: int,
    proximal: bool,
    amsgrad: bool,
    l2: float,
) -> None:
    whole = make(dtype, omega_dtype, rows, device=backend.device)
    case = partly_held(whole)
    grad, *moments = inputs(case, 3 if amsgrad else 2)
    step = [
        torch.full((), i % 4, device=backend.device, dtype=torch.float32) for i in range(len(grad))
    ]
    scale = torch.tensor(4.0, device=backend.device)
    before = [flat_array(t) for t in case.theta]
    old = [[flat_array(t) for t in m] for m in moments]
    g = slopes(case, whole, grad, 4.0, proximal)
    g = [slope + l2 * x for slope, x in zip(g, before, strict=True)]
    run_adamw(case, grad, moments, step, proximal, backend, scale, l2=l2)
    for i, x in enumerate(before):
        count, size = i % 4 + 1, np.abs(g[i]) + np.abs(x) + 8
        mean = 0.75 * old[0][i] + 0.25 * g[i]
        square = 0.5 * old[1][i] + 0.5 * g[i] ** 2
        used = np.maximum(square, old[2][i]) if amsgrad else square
        eta = 0.125 / (np.sqrt(used / (1 - 0.5**count)) + 0.25)
        moved = x * (1 - 0.125 * 0.5) - eta * mean / (1 - 0.75**count)
        close(case.theta[i], approached(case, whole, i, moved, eta, proximal), 4 * size)
        for got, new in zip(moments, (mean, square, used), strict=False):
            close(got[i], new, size**2)
        assert float(step[i]) == count


def test_an_overflow_leaves_every_bit(backend: Backend) -> None:
    case = make(torch.float32, device=backend.device)
    grad, *moments = inputs(case, 3)
    step = [torch.ones((), device=backend.device) for _ in grad]
    everything = [*case.theta, *grad, *moments[0], *moments[1], *moments[2], *step]
    before = [t.clone() for t in everything]
    overflow = torch.tensor(1.0, device=backend.device)
    for proximal in (False, True):
        run_sgd(case, grad, moments[0], SGD["momentum"], proximal, backend, overflow=overflow)
        run_adamw(case, grad, moments, step, proximal, backend, overflow=overflow)
    assert all(torch.equal(t, b) for t, b in zip(everything, before, strict=True))
    run_sgd(case, grad, moments[0], SGD["momentum"], False, backend, overflow=overflow * 0)
    assert not torch.equal(case.theta[5], before[5])


def test_every_tensor_follows_its_own_rule(backend: Backend) -> None:
    shapes = [(5,), (3, 2), (9000,), (4,)]
    case = make(torch.float64, torch.float64, shapes=shapes, device=backend.device)
    whole = case._replace(theta=[t.clone() for t in case.theta])
    grad, buffer = inputs(case, 1)
    x, g, b = ([flat_array(t) for t in each] for each in (case.theta, grad, buffer))
    held = slopes(case, whole, grad, 1.0, False)
    rules = [
        SGDRule(0.5, 0.75, 0.25, 0.125, 0.0, nesterov=True, first=False),
        SGDRule(0.25, 0.5, 0.0, 0.0, 0.0, nesterov=False, first=False),
        SGDRule(0.125, 0.25, 0.0, 0.0, 0.0, nesterov=False, first=True),
    ]
    state = case.state(backend.native)
    sgd_(case.theta, grad, buffer, state, flat_rules(rules), [1, 2, 1], False, None, None)
    first = 0.75 * b[0] + 0.75 * (held[0] + 0.125 * x[0])
    close(case.theta[0], x[0] - 0.5 * (held[0] + 0.125 * x[0] + 0.75 * first), 8.0)
    for i in (1, 2):
        close(case.theta[i], x[i] - 0.25 * (0.5 * b[i] + held[i]), 8.0)
    close(case.theta[3], x[3] - 0.125 * held[3], 8.0)

    free = State.empty(4, torch.device(backend.device), backend.native)
    x = [flat_array(t) for t in case.theta]
    moments = [[torch.zeros_like(t) for t in case.theta] for _ in range(2)]
    step = [torch.zeros((), device=backend.device) for _ in range(4)]
    both = [AdamWRule(0.5, 0.9, 0.99, 0.25, 0.125, 0.0), AdamWRule(0.25, 0.5, 0.75, 0.5, 0.0, 0.25)]
    adamw_(
        *(case.theta, grad, *moments, [], step, free, flat_rules(both), [3, 1], False, None, None)
    )
    for i in range(3):  # the first step's moments, corrected, are the gradient and its square
        close(case.theta[i], x[i] * (1 - 0.0625) - 0.5 * g[i] / (np.abs(g[i]) + 0.25), 8.0)
    total = g[3] + 0.25 * x[3]
    close(case.theta[3], x[3] - 0.25 * total / (np.abs(total) + 0.5), 8.0)
    assert [float(t) for t in step] == [1.0] * 4


def test_without_a_penalty(backend: Backend) -> None:
    case = make(torch.float64, torch.float64, device=backend.device)
    grad, buffer = inputs(case, 1)
    before = [flat_array(t) for t in case.theta]
    old = [flat_array(b) for b in buffer]
    empty = State.empty(len(grad), torch.device(backend.device), backend.native)
    free = Case(case.theta, *empty[:-1])
    run_sgd(free, grad, buffer, SGD["momentum"], True, backend)
    for i, x in enumerate(before):
        close(case.theta[i], x - 0.125 * (0.9 * old[i] + flat_array(grad[i])), 1.0)


@pytest.mark.parametrize("alpha", [1e38, 1e300])
@each_rows
def test_huge_strength_freezes_instead_of_nan(backend: Backend, alpha: float, rows: int) -> None:
    case = make(torch.float32, rows=rows, device=backend.device)
    case.alpha.fill_(alpha)
    grad, *moments = inputs(case, 2)
    step = [torch.ones((), device=backend.device) for _ in grad]
    for run in (
        lambda: run_sgd(case, grad, moments[0], SGD["momentum"], True, backend),
        lambda: run_adamw(case, grad, moments, step, True, backend),
    ):
        run()
        for i, _, w, a in case.pieces():
            mean = (w * a).sum(0) / w.sum(0)
            held = w.sum(0) > 1e-3
            np.testing.assert_allclose(
                flat_array(case.theta[i])[held], mean[held], rtol=1e-4, atol=5e-3
            )


def test_more_tensors_than_a_launch_holds(backend: Backend) -> None:
    case = make(torch.float32, shapes=[(i % 5,) for i in range(1001)], device=backend.device)
    grad, *moments = inputs(case, 2)
    step = [torch.zeros((), device=backend.device) for _ in grad]
    g = slopes(case, case, grad, 1.0, False)
    before = [flat_array(t) for t in case.theta]
    run_sgd(case, grad, [], {}, False, backend)
    for i, x in enumerate(before):
        close(case.theta[i], x - 0.125 * g[i], 8.0)
    run_adamw(case, grad, moments, step, False, backend)
    assert {float(s) for s in step} == {1.0}


def test_misaligned_and_strided_tensors(backend: Backend) -> None:
    paths = []
    for shift in (0, 1):
        torch.manual_seed(1)
        case = make(torch.float32, shapes=[(8191,), (60, 50)], device=backend.device)
        grad, *moments = inputs(case, 2)
        step = [torch.zeros((), device=backend.device) for _ in grad]
        lists = [case.theta, grad, *moments]
        for tensors in lists:
            room = torch.empty(tensors[0].numel() + shift, device=backend.device)
            tensors[0] = room[shift:].copy_(tensors[0])
            tensors[1] = tensors[1].t().contiguous().t() if shift else tensors[1]
        case.theta[1] = case.theta[1].contiguous()
        run_adamw(case, grad, moments, step, True, backend)
        run_sgd(case, grad, moments[0], SGD["momentum"], False, backend)
        paths.append([t.contiguous() for tensors in lists for t in tensors])
    assert all(torch.equal(a, b) for a, b in zip(*paths, strict=True))


SNIPPET = """
import hashlib, torch
from mas_ext.kernels.backends import instruction_set
from mas_ext.kernels.flat_state import State
from mas_ext.kernels.optim import adamw_, sgd_
torch.manual_seed(0)
digest = hashlib.sha256()
for threads in (1, 2):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    x, g, m, v, w = (torch.rand(100_003) for _ in range(5))
    step, alpha = torch.zeros(()), torch.tensor([0.7], dtype=torch.float64)
    state = State([0], w[None], g[None].clone(), alpha, alpha[0], True)
    for proximal in (False, True):
        sgd_([x], [g], [m], state, [0.1, 0.9, 0.1, 0.01, 0.5, 0, 0], [1], proximal, None, None)
        rule = [0.1, 0.9, 0.99, 1e-8, 0.01, 0]
        adamw_([x], [g], [m], [v], [], [step], state, rule, [1], proximal, None, None)
    bits = [t.numpy().tobytes() for t in (x, m, v)]
    digest.update(bits[0])
    assert threads == 1 or bits == first
    first = bits
print(instruction_set(), digest.hexdigest())
"""


def test_every_instruction_set_and_thread_count_gives_the_same_bits() -> None:
    refuse_other_bits(SNIPPET)


WIDE = {"dtype": torch.float64}
STATE = State(
    [0, 4],
    torch.ones(1, 10),
    torch.ones(1, 10),
    torch.ones(1, **WIDE),
    torch.ones((), **WIDE),
    True,
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": STATE._replace(offsets=[0, -2])}, r"offsets.1.: got -2"),
        ({"exp_avg": [torch.zeros(4)]}, "exp_avg: got 1 tensors, expected 2"),
        ({"exp_avg_sq": [torch.zeros(4), torch.zeros(6).double()]}, r"exp_avg_sq.1.: got"),
        ({"max_exp_avg_sq": [torch.zeros(3), torch.zeros(6)]}, r"max_exp_avg_sq.0.: got"),
        ({"grad": [torch.zeros(4).half(), torch.zeros(6)]}, r"grad.0.: got torch.float16"),
        ({"step": [torch.zeros(())]}, "step: got 1 tensors, expected 2"),
        ({"step": [torch.zeros(()), torch.zeros(()).double()]}, "step: got torch.float64"),
        ({"rules": [0.1] * 5}, "rules: got 5 numbers, expected 6 for each of 1 counts"),
        ({"counts": [1]}, "counts: got 1 tensors in all, expected 2"),
        ({"counts": [3]}, "counts: got 3 tensors more, expected from 0 to 2"),
        ({"counts": [-1]}, "counts: got -1 tensors more, expected from 0 to 2"),
        ({"scale": torch.ones(2)}, r"scale: got torch.float32 on cpu of shape \(2,\)"),
        ({"overflow": torch.ones((), device="meta")}, "overflow: got torch.float32 on meta"),
        ({"state": STATE._replace(omega=torch.zeros(1, 9))}, "omega: got .* at least 10"),
    ],
)
def test_bad_calls_are_refused_before_anything_is_written(
    change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    theta = [torch.ones(4), torch.ones(6)]
    like = [torch.ones(4), torch.ones(6)]
    arguments: dict[str, Any] = {
        "theta": theta,
        "grad": like,
        "exp_avg": like,
        "exp_avg_sq": like,
        "max_exp_avg_sq": [],
        "step": [torch.zeros(()), torch.zeros(())],
        "state": STATE,
        "rules": [0.1, 0.9, 0.9, 1e-8, 0.0, 0.0],
        "counts": [2],
        "proximal": False,
        "scale": None,
        "overflow": None,
    }
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(adamw_)(**{**arguments, **change})
    assert all(torch.equal(t, torch.ones_like(t)) for t in (*theta, *like))
