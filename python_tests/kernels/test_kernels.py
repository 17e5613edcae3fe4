"""Every kernel against NumPy in float64: reference, CPU, CUDA sources on CPU threads, and CUDA on a GPU."""

from __future__ import annotations

import importlib
import os
import pkgutil
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from backends import EMULATED, FOLDER, SANITIZED, Backend, load_emulated, refuse_other_bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import naive
from torch import Tensor
from torch._subclasses import FakeTensorMode

from mas_ext import kernels
from mas_ext.kernels.accumulate import accumulate_
from mas_ext.kernels.dtypes import compute_dtype, from_codes, to_codes
from mas_ext.kernels.flat_state import State
from mas_ext.kernels.merge import merge_
from mas_ext.kernels.penalty import add_grad_, penalty, penalty_gradient
from mas_ext.kernels.proximal import proximal_

# Every kernel is registered when its file is imported.
for _file in pkgutil.iter_modules(kernels.__path__):
    importlib.import_module(f"mas_ext.kernels.{_file.name}")

CHUNK = 8192


class Case(NamedTuple):
    """One call's tensors, and the same numbers in NumPy's float64."""

    theta: list[Tensor]
    offsets: list[int]
    omega: Tensor
    anchor: Tensor
    alpha: Tensor
    remainder: Tensor

    def state(self, native: bool) -> State:
        return State(*self[1:], native)

    def rows(self, flat: Tensor, i: int) -> naive.Array:
        n = self.theta[i].numel()
        return values(flat[:, self.offsets[i] : self.offsets[i] + n])

    def pieces(self) -> Iterator[tuple[int, naive.Array, naive.Array, naive.Array]]:
        for i, t in enumerate(self.theta):
            yield i, flat_array(t), self.rows(self.omega, i), self.rows(self.anchor, i)


def array(t: Tensor) -> naive.Array:
    return t.detach().double().cpu().numpy().copy()


# What the codes of an omega of 8 bits mean.
CODES = np.array([0.0] + [(1 + c % 8 / 8) * 2.0 ** (c // 8 - 15) for c in range(1, 256)])


def values(omega: Tensor) -> naive.Array:
    """What is stored, whatever the dtype."""
    return CODES[omega.cpu().numpy()] if omega.dtype == torch.uint8 else array(omega)


def stored(omega: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype != torch.uint8:
        return omega.to(dtype)
    middles = (CODES[1:] + CODES[:-1]) / 2
    return torch.from_numpy(np.searchsorted(middles, array(omega)).astype(np.uint8))


def flat_array(t: Tensor) -> naive.Array:
    """A tensor's elements in memory order."""
    return array(t.detach().as_strided((t.numel(),), (1,)))


SHAPES = [(0,), (), (1,), (3, 5), (0, 4), (8191,), (8192,), (8193,), (2, 7919), (3, 4, 5, 6), (0,)]


def make(
    dtype: torch.dtype,
    omega_dtype: torch.dtype = torch.float32,
    rows: int = 1,
    shapes: list[tuple[int, ...]] = SHAPES,
    device: str = "cpu",
) -> Case:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    theta = [random(*s).to(dtype).to(device) for s in shapes]
    offsets, end = [], 0
    for t in theta:
        offsets.append(end)
        end += -(-t.numel() // 64) * 64
    return Case(
        theta,
        offsets,
        stored(random(rows, end).abs(), omega_dtype).to(device),
        random(rows, end).to(compute_dtype(dtype)).to(device),
        random(rows).abs().to(device),
        random().abs().to(device),
    )


DTYPES = [
    (theta, omega)
    for theta in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    for omega in (torch.float32, torch.bfloat16, torch.uint8)
] + [(torch.float64, torch.float64)]
# Half a unit in the last place of the stored result, and a few roundings of the arithmetic.
ROUNDING = {
    torch.float64: 1e-14,
    torch.float32: 1e-6,
    torch.float16: 2**-11 + 1e-5,
    torch.bfloat16: 2**-8 + 1e-5,
}

UNIT = {torch.uint8: 2**-3, torch.bfloat16: 2**-7, torch.float32: 1e-6, torch.float64: 1e-14}

each_dtype = pytest.mark.parametrize(("dtype", "omega_dtype"), DTYPES)
each_rows = pytest.mark.parametrize("rows", [1, 3])


def close(got: Tensor, expected: naive.Array, scale: naive.Array | float = 0.0) -> None:
    """Equal up to the rounding of got's dtype, relative to the result and to what it is made of."""
    tolerance = ROUNDING[got.dtype]
    error = np.abs(flat_array(got) - expected)
    bound = tolerance * (np.abs(expected) + scale) + (1e-7 if got.dtype == torch.float16 else 1e-30)
    assert np.all(error <= bound), f"{np.max(error - bound)} too much"


def expected_value(case: Case) -> float:
    alpha = array(case.alpha)
    return float(alpha[0] * float(case.remainder)) + sum(
        naive.penalty(x, w, a, alpha) for _, x, w, a in case.pieces()
    )


@each_dtype
@each_rows
def test_value(backend: Backend, dtype: torch.dtype, omega_dtype: torch.dtype, rows: int) -> None:
    case = make(dtype, omega_dtype, rows, device=backend.device)
    value = penalty(case.theta, case.state(backend.native))
    assert value.dtype == compute_dtype(dtype)
    assert value.shape == ()
    precision = 1e-14 if dtype == torch.float64 else 2e-7
    assert float(value) == pytest.approx(expected_value(case), rel=precision)


@each_dtype
@each_rows
def test_new_gradient(
    backend: Backend, dtype: torch.dtype, omega_dtype: torch.dtype, rows: int
) -> None:
    case = make(dtype, omega_dtype, rows, device=backend.device)
    upstream = torch.tensor(-1.5, dtype=compute_dtype(dtype), device=backend.device)
    grads = penalty_gradient(case.theta, case.state(backend.native), upstream)
    for i, x, w, a in case.pieces():
        assert grads[i].dtype == dtype
        assert grads[i].shape == case.theta[i].shape
        terms = np.einsum("t,ti->i", array(case.alpha), w * np.abs(x - a))
        close(grads[i], -1.5 * naive.gradient(x, w, a, array(case.alpha)), 6 * terms)


@each_dtype
@each_rows
def test_gradient_is_added(
    backend: Backend, dtype: torch.dtype, omega_dtype: torch.dtype, rows: int
) -> None:
    case = make(dtype, omega_dtype, rows, device=backend.device)
    grads = [torch.full_like(t, 0.375) for t in case.theta]
    value = add_grad_(case.theta, grads, case.state(backend.native))
    assert torch.equal(value, penalty(case.theta, case.state(backend.native)))
    for i, x, w, a in case.pieces():
        terms = np.einsum("t,ti->i", array(case.alpha), w * np.abs(x - a))
        close(grads[i], 0.375 + naive.gradient(x, w, a, array(case.alpha)), 4 * terms + 0.4)


@each_dtype
@each_rows
def test_proximal_step(
    backend: Backend, dtype: torch.dtype, omega_dtype: torch.dtype, rows: int
) -> None:
    case = make(dtype, omega_dtype, rows, device=backend.device)
    pieces = list(case.pieces())
    proximal_(case.theta, [], case.state(backend.native), 0.25, 1.0, 0.0)
    for i, x, w, a in pieces:
        expected = naive.proximal(x, w, a, array(case.alpha), np.float64(0.25))
        close(case.theta[i], expected, np.abs(x) + 4 * np.abs(a).max(0, initial=0))


@each_dtype
@each_rows
def test_proximal_step_with_second_moment(
    backend: Backend, dtype: torch.dtype, omega_dtype: torch.dtype, rows: int
) -> None:
    case = make(dtype, omega_dtype, rows, device=backend.device)
    pieces = list(case.pieces())
    moments = [torch.rand_like(t) for t in case.theta]
    proximal_(case.theta, moments, case.state(backend.native), 0.01, 4.0, 1e-2)
    for i, x, w, a in pieces:
        eta = 0.01 / (np.sqrt(4 * flat_array(moments[i])) + float(np.float32(1e-2)))
        expected = naive.proximal(x, w, a, array(case.alpha), eta)
        tolerance = np.abs(x) + 4 * np.abs(a).max(0, initial=0)
        close(case.theta[i], expected, tolerance * (8e6 if dtype == torch.float64 else 1))


@pytest.mark.parametrize("alpha", [1e6, 1e38, 1e300])
@each_rows
def test_proximal_step_freezes_at_huge_strength(backend: Backend, alpha: float, rows: int) -> None:
    case = make(torch.float32, rows=rows, device=backend.device)
    case.alpha.fill_(alpha)
    case.omega[:, : case.omega.shape[1] // 2] = 0
    pieces = list(case.pieces())
    proximal_(case.theta, [], case.state(backend.native), 1.0, 1.0, 0.0)
    for i, x, w, a in pieces:
        weight = w.sum(0)
        mean = np.einsum("ti,ti->i", w, a) / np.where(weight > 0, weight, 1)
        got = flat_array(case.theta[i])
        assert np.array_equal(got[weight == 0], x[weight == 0])
        held = weight > 1e-3
        np.testing.assert_allclose(got[held], mean[held], rtol=1e-5, atol=5e-3)


def test_proximal_step_of_length_zero_moves_nothing(backend: Backend) -> None:
    case = make(torch.float32, device=backend.device)
    before = [t.clone() for t in case.theta]
    moments = [torch.zeros_like(t) for t in case.theta]
    proximal_(case.theta, [], case.state(backend.native), 0.0, 1.0, 0.0)
    proximal_(case.theta, moments, case.state(backend.native), 0.0, 1.0, 0.0)
    assert all(torch.equal(t, b) for t, b in zip(case.theta, before, strict=True))


def test_a_huge_correction_of_nothing_is_nothing(backend: Backend) -> None:
    case = make(torch.float32, device=backend.device)
    pieces = list(case.pieces())
    moments = [torch.zeros_like(t) for t in case.theta]
    proximal_(case.theta, moments, case.state(backend.native), 0.001, 1e300, 0.01)
    for i, x, w, a in pieces:
        expected = naive.proximal(x, w, a, array(case.alpha), np.float64(0.1))
        close(case.theta[i], expected, np.abs(x) + np.abs(a).max(0, initial=0))


def test_proximal_step_moves_nothing_at_the_anchor(backend: Backend) -> None:
    case = make(torch.float32, device=backend.device)
    for t, offset in zip(case.theta, case.offsets, strict=True):
        t.copy_(case.anchor[0, offset : offset + t.numel()].view(t.shape))
    before = [t.clone() for t in case.theta]
    proximal_(case.theta, [], case.state(backend.native), 0.3, 1.0, 0.0)
    assert all(torch.equal(t, b) for t, b in zip(case.theta, before, strict=True))


@pytest.mark.parametrize("alpha", [1e38, 1e300])
def test_gradient_at_huge_strength_is_not_nan(backend: Backend, alpha: float) -> None:
    case = make(torch.float32, device=backend.device)
    case.alpha.fill_(alpha)
    case.omega[:, ::2] = 0
    for sign in (1.0, -1.0):
        upstream = torch.tensor(sign, device=backend.device)
        grads = penalty_gradient(case.theta, case.state(backend.native), upstream)
        for i, x, w, a in case.pieces():
            got = flat_array(grads[i])
            assert np.all(got[w[0] == 0] == 0)
            assert np.array_equal(np.sign(got), sign * np.sign(w[0] * (x - a[0])))


@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_accumulate(backend: Backend, dtype: torch.dtype) -> None:
    grads = make(dtype, device=backend.device).theta
    omegas = [torch.full_like(g, 0.5, dtype=compute_dtype(dtype)) for g in grads]
    accumulate_(omegas, grads, 0.3, backend.native)
    for omega, grad in zip(omegas, grads, strict=True):
        close(omega, 0.5 + 0.3 * np.abs(flat_array(grad)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_16_bits_is_read(backend: Backend, dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16, device=backend.device).view(dtype)
    total = torch.zeros(2**16, device=backend.device)
    accumulate_([total], [every], 1.0, backend.native)
    torch.testing.assert_close(total, every.float().abs(), rtol=0, atol=0, equal_nan=True)
    # With their signs: the pull of an anchor at 0.
    finite = every[every.isfinite()]
    one = torch.ones(1, dtype=torch.float64, device=backend.device)
    omega, anchor = torch.ones(2, 1, len(finite), device=backend.device)
    anchor.zero_()
    state = State([0], omega, anchor, one / 2, one[0], backend.native)
    (gradient,) = penalty_gradient([finite], state, one[0].float())
    assert torch.equal(gradient, finite)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_are_rounded_to_16_bits_as_torch_does(backend: Backend, dtype: torch.dtype) -> None:
    # Every number of 16 bits, the middle to the next one (a tie), and what is just beside those.
    start = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float()
    bits = start.view(torch.int32)
    half = torch.where(start.abs() < 2**-14, 0, 0x1000) if dtype == torch.float16 else 0x8000
    tiny = start + 2.0**-25 if dtype == torch.float16 else start
    near = [bits + half + by for by in (-1, 0, 1)] + [bits - 1, bits, bits + 1]
    x = torch.cat([*(n.to(torch.int32).view(torch.float32) for n in near), tiny])
    x = torch.cat([x, torch.tensor([65504.0, 65519.9, 65520.0, 7e4, 1e6, 1e38, float("inf")])])
    x = torch.cat([x, -x]).to(backend.device)
    theta = torch.zeros(len(x), dtype=dtype, device=backend.device)
    one = torch.ones(1, dtype=torch.float64, device=backend.device)
    state = State([0], torch.ones_like(x)[None], -x[None], one / 2, one[0], backend.native)
    (gradient,) = penalty_gradient([theta], state, one[0].float())
    torch.testing.assert_close(gradient, x.to(dtype), rtol=0, atol=0, equal_nan=True)


@each_dtype
@pytest.mark.parametrize(
    ("moves_anchor", "keep"), [(True, 1.0), (True, 0.7), (True, 0.0), (False, 0.7)]
)
def test_merge(
    backend: Backend, dtype: torch.dtype, omega_dtype: torch.dtype, moves_anchor: bool, keep: float
) -> None:
    case = make(dtype, omega_dtype, device=backend.device)
    case.omega[:, ::3] = 0
    importance = [torch.rand_like(t, dtype=compute_dtype(dtype)) for t in case.theta]
    for t in importance:
        t.view(-1)[::6] = 0
    pieces = list(case.pieces())
    added = merge_(case.state(backend.native), case.theta, importance, keep, 0.8, moves_anchor, 3)
    assert added.shape == (len(case.theta),)
    for i, x, w, a in pieces:
        new = 0.8 * flat_array(importance[i])
        total = keep * w[0] + new
        got_omega, got_anchor = case.rows(case.omega, i)[0], case.rows(case.anchor, i)[0]
        # Stochastic rounding goes to either neighbour, a whole unit in the last place at the most.
        unit = UNIT[omega_dtype]
        least = CODES[1] if omega_dtype == torch.uint8 else 1e-30
        assert np.all(np.abs(got_omega - total) <= unit * total + least)
        fine = 1e-14 if dtype == torch.float64 else 1e-6
        if moves_anchor:
            share = np.where(total > 0, new / np.where(total > 0, total, 1), 1)
            expected = a[0] + share * (x - a[0])
            cost = float(np.sum(keep * w[0] * share * (x - a[0]) ** 2))
            assert float(added[i]) == pytest.approx(cost, rel=10 * fine, abs=1e-30)
        else:
            expected = a[0]
            assert float(added[i]) == 0
        np.testing.assert_allclose(got_anchor, expected, rtol=fine, atol=4 * fine)


@pytest.mark.parametrize("distance", [1e-25, 1e25])
def test_squares_of_float32_are_taken_in_float64(backend: Backend, distance: float) -> None:
    """They are no numbers of float32; in the value alpha brings them back."""
    case = make(torch.float32, shapes=[(100,)], device=backend.device)
    case.theta[0].fill_(distance)
    case.anchor.zero_()
    case.omega.fill_(1)
    case.remainder.zero_()
    case.alpha.fill_(1 / distance**2)
    assert float(penalty(case.theta, case.state(backend.native))) == pytest.approx(100, rel=1e-6)
    importance = [torch.ones_like(case.theta[0])]
    added = merge_(case.state(backend.native), case.theta, importance, 1.0, 1.0, True, 0)
    assert float(added[0]) == pytest.approx(100 * distance**2 / 2, rel=1e-6, abs=0)


def test_merge_never_goes_below_zero(backend: Backend) -> None:
    case = make(torch.float32, shapes=[(100,)], device=backend.device)
    importance = [torch.full_like(case.theta[0], -1e9)]
    merge_(case.state(backend.native), case.theta, importance, 1.0, 1.0, False, 0)
    assert torch.equal(case.omega[0, :100], torch.zeros(100, device=backend.device))


def test_a_huge_gain_of_nothing_is_nothing(backend: Backend) -> None:
    case = make(torch.float32, shapes=[(100,)], device=backend.device)
    before, importance = case.omega.clone(), [torch.zeros_like(case.theta[0])]
    merge_(case.state(backend.native), case.theta, importance, 1.0, 1e300, True, 0)
    assert torch.equal(case.omega, before)


def test_merge_does_not_hide_nan(backend: Backend) -> None:
    case = make(torch.float32, shapes=[(10,)], device=backend.device)
    case.omega[:, ::2] = 0
    importance = [torch.full_like(case.theta[0], float("nan"))]
    merge_(case.state(backend.native), case.theta, importance, 1.0, 1.0, True, 0)
    assert case.omega[0, :10].isnan().all()


@pytest.mark.parametrize("omega_dtype", [torch.float32, torch.bfloat16])
def test_merge_does_not_hide_any_nan(backend: Backend, omega_dtype: torch.dtype) -> None:
    case = make(torch.float32, omega_dtype, shapes=[(1000,)], device=backend.device)
    # All bits set: whatever is added to them would make them a number.
    nan = torch.full((1000,), 0x7FFFFFFF, dtype=torch.int32, device=backend.device)
    merge_(case.state(backend.native), case.theta, [nan.view(torch.float32)], 1.0, 1.0, False, 5)
    assert case.omega[0, :1000].isnan().all()


@pytest.mark.parametrize("omega_dtype", [torch.bfloat16, torch.uint8])
def test_a_rounded_omega_grows_without_bias(backend: Backend, omega_dtype: torch.dtype) -> None:
    n, entries = 4096, 100
    case = make(torch.float32, omega_dtype, shapes=[(n,)], device=backend.device)
    case.omega.copy_(stored(torch.full(case.omega.shape, 8.0), omega_dtype))
    importance = [torch.full_like(case.theta[0], 0.02)]
    for entry in range(entries):
        merge_(case.state(backend.native), case.theta, importance, 1.0, 1.0, True, entry)
    mean = float(case.rows(case.omega, 0).mean())
    assert mean == pytest.approx(8.0 + 0.02 * entries, rel=0.005)
    # Rounded to nearest, it would never have left 8.
    nearest = stored(torch.tensor([8.0 + 0.02]), omega_dtype)
    assert values(nearest)[0] == 8.0


@pytest.mark.parametrize("omega_dtype", [torch.bfloat16, torch.uint8])
def test_a_part_with_a_shift_is_rounded_as_in_the_whole(
    backend: Backend, omega_dtype: torch.dtype
) -> None:
    importance = torch.rand(5000, device=backend.device) + 0.1

    def merged(begin: int, shift: int) -> Tensor:
        case = make(torch.float32, omega_dtype, shapes=[(5000 - begin,)], device=backend.device)
        case.omega.zero_()
        given = [importance[begin:].clone()]
        merge_(case.state(backend.native), case.theta, given, 1.0, 1.0, False, 3, shift)
        return case.omega[0, : 5000 - begin]

    whole = merged(0, 0)
    assert torch.equal(merged(1003, 1003), whole[1003:])
    assert not torch.equal(merged(1003, 1002), whole[1003:])


def test_8_bits_below_the_least_are_right_on_average(backend: Backend) -> None:
    case = make(torch.float32, torch.uint8, shapes=[(100_000,)], device=backend.device)
    case.omega.zero_()
    importance = [torch.full_like(case.theta[0], 0.3 * CODES[1])]
    merge_(case.state(backend.native), case.theta, importance, 1.0, 1.0, True, 5)
    assert case.omega.max() == 1
    assert float(case.rows(case.omega, 0).mean()) == pytest.approx(0.3 * CODES[1], rel=0.02)


def test_8_bits_stay_as_they_are_without_importance(backend: Backend) -> None:
    case = make(torch.float32, torch.uint8, shapes=[(256,)], device=backend.device)
    case.omega.copy_(torch.arange(256, dtype=torch.uint8)[None])
    importance = [torch.zeros_like(case.theta[0])]
    for entry in range(10):
        merge_(case.state(backend.native), case.theta, importance, 1.0, 1.0, True, entry)
    assert torch.equal(case.omega[0].cpu(), torch.arange(256, dtype=torch.uint8))


def test_8_bits_never_grow_beyond_their_largest(backend: Backend) -> None:
    case = make(torch.float32, torch.uint8, shapes=[(9,)], device=backend.device)
    importance = [torch.full_like(case.theta[0], 1e30)]
    importance[0][::2] = float("inf")
    merge_(case.state(backend.native), case.theta, importance, 1.0, 1.0, False, 0)
    assert case.omega[0, :9].tolist() == [255] * 9


def test_codes_are_those_of_the_nearest_values() -> None:
    assert np.array_equal(array(from_codes(torch.arange(256, dtype=torch.uint8))), CODES)
    x = torch.exp(12 * torch.randn(3, 5000).t())
    assert torch.equal(to_codes(x), stored(x, torch.uint8))
    assert to_codes(torch.tensor([0.0, float("inf"), float("nan")])).tolist() == [0, 255, 255]


@each_dtype
def test_every_backend_gives_the_reference_bits(
    backend: Backend, dtype: torch.dtype, omega_dtype: torch.dtype
) -> None:
    case = make(dtype, omega_dtype, 2, device=backend.device)
    upstream = torch.tensor(0.7, dtype=compute_dtype(dtype), device=backend.device)
    expected = penalty_gradient(case.theta, case.state(False), upstream)
    got = penalty_gradient(case.theta, case.state(backend.native), upstream)
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))
    one = make(dtype, omega_dtype, 1, device=backend.device)
    one.omega[:, ::3] = 0
    importance = [torch.rand_like(t, dtype=compute_dtype(dtype)) for t in one.theta]
    results = []
    for compiled in (False, backend.native):
        omega, anchor = one.omega.clone(), one.anchor.clone()
        state = one._replace(omega=omega, anchor=anchor).state(compiled)
        merge_(state, one.theta, importance, 1.0, 0.9, True, 7)
        results.append((omega, anchor))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


each_narrow_dtype = pytest.mark.parametrize(
    ("dtype", "omega_dtype"),
    [both for both in DTYPES if both[0] in (torch.bfloat16, torch.float16)],
)


def with_both_anchors(case: Case) -> Iterator[Case]:
    """Parameters of 16 bits with anchors of as many, and the same numbers with anchors in float32."""
    narrow = case.anchor.to(case.theta[0].dtype)
    for anchor in (narrow, narrow.float()):
        theta = [t.clone() for t in case.theta]
        yield case._replace(theta=theta, omega=case.omega.clone(), anchor=anchor)


@each_narrow_dtype
@each_rows
def test_anchors_of_16_bits_give_the_bits_of_float32(
    backend: Backend, dtype: torch.dtype, omega_dtype: torch.dtype, rows: int
) -> None:
    whole = make(dtype, omega_dtype, rows, device=backend.device)
    moments = [t.abs() for t in whole.theta]
    upstream = torch.tensor(0.7, device=backend.device)
    results = []
    for case in with_both_anchors(whole):
        state = case.state(backend.native)
        value = penalty(case.theta, state)
        grads = penalty_gradient(case.theta, state, upstream)
        added = [torch.full_like(t, 0.375) for t in case.theta]
        again = add_grad_(case.theta, added, state)
        proximal_(case.theta, [], state, 0.25, 1.0, 0.0)
        once = [t.clone() for t in case.theta]
        proximal_(case.theta, moments, state, 0.01, 4.0, 1e-2)
        results.append([value, again, *grads, *added, *once, *case.theta])
        assert not torch.equal(case.theta[-3], whole.theta[-3])
    for narrow, wide in zip(*results, strict=True):
        assert torch.equal(narrow, wide)


@each_narrow_dtype
def test_anchors_of_16_bits_beside_a_merge(
    backend: Backend, dtype: torch.dtype, omega_dtype: torch.dtype
) -> None:
    whole = make(dtype, omega_dtype, device=backend.device)
    importance = [t.float().abs() for t in whole.theta]
    narrow, wide = with_both_anchors(whole)
    for case in (narrow, wide):
        merge_(case.state(backend.native), case.theta, importance, 0.7, 0.8, False, 3)
    assert torch.equal(narrow.omega, wide.omega)
    assert narrow.anchor.dtype == dtype
    assert torch.equal(narrow.anchor.float(), wide.anchor)
    for i, _, _, a in narrow.pieces():
        assert np.array_equal(a[0], wide.rows(wide.anchor, i)[0])


@pytest.mark.parametrize("alpha", [1e-60, 0.1, 1e8, 1e300])
@each_rows
@each_dtype
def test_every_backend_takes_the_reference_step(
    backend: Backend, dtype: torch.dtype, omega_dtype: torch.dtype, rows: int, alpha: float
) -> None:
    case = make(dtype, omega_dtype, rows, device=backend.device)
    case.alpha.mul_(alpha)
    case.omega[:, ::3] = 0
    moments = [torch.rand_like(t) for t in case.theta]
    for t in moments:
        t.view(-1)[::2] = 0
    eta = 1e60 if alpha < 1e-30 else 0.3
    for second_moment, eps in (([], 0.0), (moments, 0.01), (moments, 0.0)):
        results = []
        for compiled in (False, backend.native):
            theta = [t.clone() for t in case.theta]
            proximal_(theta, second_moment, case.state(compiled), eta, 2.0, eps)
            results.append(theta)
        for i, x, _, a in case.pieces():
            expected, got = results[0][i], results[1][i]
            # With moments not bit by bit: torch's square root may be off by a unit in the last place.
            close(got, flat_array(expected), np.abs(x) + np.abs(a).max(0, initial=0))
            assert second_moment or torch.equal(got, expected)
            assert x.size < 2 or np.any(flat_array(got) != x)


@pytest.mark.parametrize("shift", [1, 3])
def test_misaligned_tensors(backend: Backend, shift: int) -> None:
    case = make(torch.float32, shapes=[(10007,), (64,), (501,)], device=backend.device)
    moved = []
    for t in case.theta:
        room = torch.full((t.numel() + 8,), float("nan"), device=backend.device)
        moved.append(room[shift : shift + t.numel()].copy_(t))
    grads = [torch.zeros(t.numel() + 8, device=backend.device) for t in case.theta]
    shifted = [g[shift : shift + t.numel()] for g, t in zip(grads, moved, strict=True)]
    value = add_grad_(moved, shifted, case.state(backend.native))
    assert float(value) == pytest.approx(expected_value(case), rel=2e-7)
    for i, x, w, a in case.pieces():
        close(shifted[i], naive.gradient(x, w, a, array(case.alpha)), 1e-3)
        outside = torch.cat([grads[i][:shift], grads[i][shift + moved[i].numel() :]])
        assert torch.equal(outside, torch.zeros(8, device=backend.device))


def test_rows_of_odd_length(backend: Backend) -> None:
    case = make(torch.float32, rows=3, shapes=[(257,), (30,)], device=backend.device)
    odd = case.omega.shape[1] + 1
    omega, anchor = torch.rand(2, 3, odd, generator=torch.Generator().manual_seed(2))
    case = case._replace(omega=omega.to(backend.device), anchor=anchor.to(backend.device))
    grads = [torch.zeros_like(t) for t in case.theta]
    value = add_grad_(case.theta, grads, case.state(backend.native))
    assert float(value) == pytest.approx(expected_value(case), rel=2e-7)
    for i, x, w, a in case.pieces():
        close(grads[i], naive.gradient(x, w, a, array(case.alpha)), 10.0)


def test_memory_order_is_followed(backend: Backend) -> None:
    case = make(torch.float32, shapes=[(2, 3, 4, 5), (6, 7)], device=backend.device)
    theta = [
        case.theta[0].to(memory_format=torch.channels_last),
        case.theta[1].t().contiguous().t(),
    ]
    assert not theta[0].is_contiguous()
    case = case._replace(theta=theta)
    one = torch.ones((), device=backend.device)
    grads = penalty_gradient(case.theta, case.state(backend.native), one)
    for i, x, w, a in case.pieces():
        assert grads[i].stride() == theta[i].stride()
        close(grads[i], naive.gradient(x, w, a, array(case.alpha)), 1e-3)


def test_gradients_with_other_strides(backend: Backend) -> None:
    case = make(torch.float32, shapes=[(6, 7), (5,)], device=backend.device)
    grads = [torch.ones(7, 6, device=backend.device).t(), torch.ones(5, device=backend.device)]
    add_grad_(case.theta, grads, case.state(backend.native))
    for i, x, w, a in case.pieces():
        close(grads[i].contiguous(), 1 + naive.gradient(x, w, a, array(case.alpha)), 2.0)
    expanded = [torch.ones(1, device=backend.device).expand(6, 7), grads[1]]
    with pytest.raises(RuntimeError, match="single memory location"):
        add_grad_(case.theta, expanded, case.state(backend.native))


def test_what_goes_with_a_tensor_may_have_other_strides(backend: Backend) -> None:
    case = make(torch.float32, shapes=[(6, 7), (5,)], device=backend.device)
    like = [torch.rand(6, 7, device=backend.device), torch.rand(5, device=backend.device)]
    other = [like[0].t().contiguous().t(), like[1]]
    results = []
    for companions in (like, other):
        theta = [t.clone() for t in case.theta]
        proximal_(theta, companions, case.state(backend.native), 0.01, 4.0, 1e-2)
        total = [torch.ones_like(t) for t in case.theta]
        accumulate_(total, companions, 0.5, backend.native)
        omega, anchor = case.omega[:1].clone(), case.anchor[:1].clone()
        state = case._replace(omega=omega, anchor=anchor).state(backend.native)
        merge_(state, case.theta, companions, 1.0, 0.5, True, 1)
        results.append([*theta, *total, omega, anchor])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    close(results[1][2], 1 + 0.5 * flat_array(like[0]))


def test_more_tensors_than_a_launch_holds(backend: Backend) -> None:
    case = make(torch.float32, shapes=[(i % 5,) for i in range(1701)], device=backend.device)
    grads = [torch.zeros_like(t) for t in case.theta]
    value = add_grad_(case.theta, grads, case.state(backend.native))
    assert float(value) == pytest.approx(expected_value(case), rel=2e-7)
    for i, x, w, a in case.pieces():
        close(grads[i], naive.gradient(x, w, a, array(case.alpha)), 1e-3)


def test_only_empty_tensors(backend: Backend) -> None:
    case = make(torch.float32, shapes=[(0,), (3, 0)], device=backend.device)
    value = penalty(case.theta, case.state(backend.native))
    assert float(value) == pytest.approx(float(case.alpha[0] * case.remainder), rel=1e-6)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(backend: Backend, poison: float) -> None:
    case = make(torch.float32, shapes=[(100,)], device=backend.device)
    case.theta[0][17] = poison
    assert not torch.isfinite(penalty(case.theta, case.state(backend.native)))


def test_the_same_bits_for_every_thread_count_and_run(backend: Backend) -> None:
    case = make(torch.float32, shapes=[(300_007,), (5,), (70_001,)], device=backend.device)
    threads = torch.get_num_threads()
    seen = set()
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            if backend.native:
                seen.add(float(penalty(case.theta, case.state(True))))
            else:
                seen.add(
                    float(penalty(case.theta, case.state(False)))
                    if count == 1
                    else next(iter(seen))
                )
    finally:
        torch.set_num_threads(threads)
    assert len(seen) == 1


def test_uninitialised_memory_is_never_read(backend: Backend) -> None:
    case = make(torch.float32, rows=2, device=backend.device)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        one = torch.ones((), device=backend.device)
        value = penalty(case.theta, case.state(backend.native))
        grads = penalty_gradient(case.theta, case.state(backend.native), one)
    finally:
        torch.use_deterministic_algorithms(False)
    assert float(value) == pytest.approx(expected_value(case), rel=2e-7)
    assert all(torch.isfinite(g).all() for g in grads)


SNIPPET = """
import hashlib, torch
from mas_ext.kernels.backends import instruction_set
from mas_ext.kernels.flat_state import State
from mas_ext.kernels.penalty import penalty, penalty_gradient
from mas_ext.kernels.proximal import proximal_
torch.manual_seed(0)
digest = hashlib.sha256()
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    wide = dtype == torch.float64
    theta = [torch.randn(20011).to(dtype), torch.randn(37).to(dtype)]
    flat = torch.rand(2, 20096, dtype=torch.float64 if wide else torch.float32)
    alpha = torch.rand(3, dtype=torch.float64)
    state = State([0, 20032], flat, flat.sin(), alpha[:2], alpha[2], True)
    value = penalty(theta, state)
    grads = penalty_gradient(theta, state, torch.ones((), dtype=flat.dtype))
    proximal_(theta, [t.abs() for t in theta], state, 0.1, 2.0, 1e-8)
    for t in (value, *grads, *theta):
        digest.update(t.detach().double().numpy().tobytes())
print(instruction_set(), digest.hexdigest())
"""


def test_every_instruction_set_gives_the_same_bits() -> None:
    refuse_other_bits(SNIPPET)


# -- what is refused -------------------------------------------------------------------------------


def kernel(operator: Any) -> Any:
    """The implementation: a call of the operator with a meta tensor would end at its shapes."""
    return operator.__wrapped__


BAD_CALLS = {
    "integers": (lambda c: {"theta": [t.int() for t in c.theta]}, "theta.0.: got torch.int32"),
    "complex": (
        lambda c: {"theta": [t.cfloat() for t in c.theta]},
        "theta.0.: got torch.complex64",
    ),
    "mixed dtypes": (lambda c: {"theta": [c.theta[0], c.theta[1].double()]}, "theta.1."),
    "no tensors": (lambda c: {"theta": [], "offsets": []}, "theta: got an empty list"),
    "gaps": (lambda c: {"theta": [c.theta[0], torch.randn(3, 4)[:, ::2]]}, "theta.1.: got strides"),
    "expanded": (
        lambda c: {"theta": [torch.ones(1).expand(4), c.theta[1]]},
        "theta.0.: got strides",
    ),
    "too few offsets": (lambda c: {"offsets": [0]}, "offsets: got 1"),
    "negative offset": (lambda c: {"offsets": [0, -1]}, "offsets.1.: got -1"),
    "offset behind the end": (lambda c: {"offsets": [0, 10**9]}, "omega: got"),
    "first offset behind the end": (lambda c: {"offsets": [10**9, 0]}, "omega: got"),
    "two devices": (
        lambda c: {"theta": [c.theta[0], c.theta[1].to("meta")]},
        "theta.1.: got .*meta",
    ),
    "omega elsewhere": (lambda c: {"omega": c.omega.to("meta")}, "omega: got .* on meta"),
    "anchor elsewhere": (lambda c: {"anchor": c.anchor.to("meta")}, "anchor: got .* on meta"),
    "alpha elsewhere": (lambda c: {"alpha": c.alpha.to("meta")}, "alpha: got .* on meta"),
    "remainder elsewhere": (
        lambda c: {"remainder": c.remainder.to("meta")},
        "remainder: got .* on meta",
    ),
    "one element too few": (
        lambda c: {"omega": c.omega[:, :69].clone(), "anchor": c.anchor[:, :69].clone()},
        "omega: got .*at least 70",
    ),
    "a row too many": (
        lambda c: {"omega": c.omega[[0, 1, 1]], "anchor": c.anchor[[0, 1, 1]]},
        "omega: got",
    ),
    "strided alpha": (lambda c: {"alpha": c.alpha.repeat(2)[::2]}, "alpha: got"),
    "short omega": (lambda c: {"omega": c.omega[:, :64].contiguous()}, "omega: got"),
    "strided omega": (lambda c: {"omega": c.omega.t().contiguous().t()}, "omega: got"),
    "float16 omega": (lambda c: {"omega": c.omega.half()}, "omega: got torch.float16"),
    "float64 omega": (lambda c: {"omega": c.omega.double()}, "omega: got torch.float64"),
    "float16 anchor": (lambda c: {"anchor": c.anchor.half()}, "anchor: got torch.float16"),
    "other anchor": (lambda c: {"anchor": torch.zeros(2, 999)}, "anchor: got shape"),
    "rows that are missing": (lambda c: {"omega": c.omega[:1].contiguous()}, "omega: got"),
    "no alpha": (lambda c: {"alpha": c.alpha[:0]}, "alpha: got"),
    "float32 alpha": (lambda c: {"alpha": c.alpha.float()}, "alpha: got torch.float32"),
    "float32 remainder": (lambda c: {"remainder": c.remainder.float()}, "remainder: got"),
}


@pytest.mark.parametrize("name", list(BAD_CALLS))
def test_bad_state_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, message = BAD_CALLS[name]
    case = make(torch.float32, rows=2, shapes=[(4,), (3, 2)])
    case = case._replace(**change(case))
    with pytest.raises((ValueError, TypeError), match=message):
        kernel(penalty)(case.theta, case.state(True))


def test_an_anchor_of_other_16_bits_is_refused() -> None:
    case = make(torch.bfloat16, shapes=[(4,), (3, 2)])
    expected = "anchor: got torch.float16 on .* of torch.float32 or torch.bfloat16"
    with pytest.raises(ValueError, match=expected):
        kernel(penalty)(case.theta, case._replace(anchor=case.anchor.half()).state(True))


def test_a_bad_upstream_gradient_is_refused() -> None:
    case = make(torch.float32, shapes=[(4,), (3, 2)])
    for bad in (torch.ones(2), torch.ones(1), torch.ones((), device="meta")):
        with pytest.raises(ValueError, match="grad_output: got"):
            kernel(penalty_gradient)(case.theta, case.state(True), bad)


def test_importance_of_another_precision_is_refused() -> None:
    for omega, grad in ((torch.float32, torch.float64), (torch.float64, torch.float32)):
        with pytest.raises(ValueError, match=r"grad\[0\]: got .*, expected one that adds up in"):
            accumulate_([torch.zeros(4, dtype=omega)], [torch.ones(4, dtype=grad)], 1.0, True)


def test_nothing_is_remembered_of_a_call() -> None:
    case = make(torch.float32, shapes=[(4,), (3, 2)])
    for offsets in ([0, 64], [64, 0], [64, 100]):
        moved = case._replace(offsets=offsets)
        value = float(kernel(penalty)(moved.theta, moved.state(True)))
        assert value == pytest.approx(expected_value(moved), rel=2e-7)
    offsets = [8, 64]
    state = case._replace(offsets=offsets).state(True)
    kernel(penalty)(case.theta, state)
    offsets[1] = 10**9
    with pytest.raises(ValueError, match="omega: got"):
        kernel(penalty)(case.theta, state)


def test_bad_gradients_are_refused_before_anything_is_written() -> None:
    case = make(torch.float32, shapes=[(4,), (3, 2)])
    good = [torch.zeros_like(t) for t in case.theta]
    for bad, message in (
        (good[:1], "grad: got 1 tensors, expected 2"),
        ([good[0], torch.zeros(2, 3)], "grad.1.: got .* of shape .2, 3."),
        ([good[0], good[1].double()], "grad.1.: got torch.float64"),
        ([good[0], good[1].to("meta")], "grad.1.: got .* on meta"),
    ):
        with pytest.raises(ValueError, match=message):
            kernel(add_grad_)(case.theta, bad, case.state(True))
        assert torch.equal(good[0], torch.zeros(4))


def freed(t: Tensor) -> Tensor:
    t.untyped_storage().resize_(0)
    return t


def shrunk(t: Tensor) -> Tensor:
    t.untyped_storage().resize_(t.nbytes - 1)
    return t


def shrunk_before(t: Tensor) -> Tensor:
    """A view that ends where its storage ended; as many bytes as it has itself are left."""
    view = torch.cat([t.flatten(), t.flatten()])[t.numel() :].view(t.shape)
    view.untyped_storage().resize_(t.nbytes)
    return view


def fake(t: Tensor) -> Tensor:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return mode.from_tensor(t)


# What is no tensor with numbers in memory, and what is said of it.
HOSTILE: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "None": (lambda t: None, "got NoneType, expected a tensor"),
    "a number": (lambda t: 3.0, "got float, expected a tensor"),
    "an array": (lambda t: t.numpy(), "got ndarray, expected a tensor"),
    "a list": (lambda t: [t], "got list, expected a tensor"),
    "freed": (freed, "without memory"),
    "shrunk": (shrunk, "got a storage of"),
    "shrunk before": (shrunk_before, "got a storage of"),
    "negated": (torch._neg_view, "negative bit"),
    "zeros": (lambda t: torch._efficientzerotensor(t.shape), "without memory"),
    "fake": (fake, "without memory"),
    "meta": (lambda t: t.to("meta"), "meta"),
    "sparse": (lambda t: t.to_sparse(), "expected"),
    "nested": (lambda t: torch.nested.nested_tensor([t]), "expected"),
    "complex": (lambda t: t.cfloat(), "complex64"),
    "bool": (lambda t: t.bool(), "torch.bool"),
    "gaps": (lambda t: torch.cat([t, t], -1)[..., ::2], "strides|shape"),
}


PLACES = ("theta", "grad", "omega", "anchor", "alpha", "remainder")


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype.*:UserWarning")
@pytest.mark.parametrize(
    ("kind", "place"),
    [(kind, place) for kind in HOSTILE for place in PLACES if kind != "gaps" or place == "theta"],
)
@pytest.mark.parametrize("extension", ["cpu", "cuda"])
def test_what_is_no_tensor_in_memory_is_refused(kind: str, place: str, extension: str) -> None:
    change, message = HOSTILE[kind]
    case = make(torch.float32, shapes=[(4,), (3, 2)])
    call: dict[str, Any] = {**case._asdict(), "grad": [torch.zeros_like(t) for t in case.theta]}
    first, before = call["grad"][0], case.theta[0].clone()
    if place in ("theta", "grad"):
        call[place] = [call[place][0], change(call[place][1])]
    else:
        call[place] = change(call[place])
    state = State(*(call[k] for k in Case._fields[1:]), True)
    scratch = torch.empty(2, dtype=torch.float64)
    run = getattr(EMULATED, extension).penalty
    with pytest.raises(
        (ValueError, TypeError), match=rf"{place}.*: got.*{message.removeprefix('got ')}"
    ):
        run(call["theta"], call["grad"], 2, state, None, scratch, torch.empty(()), 1)
    assert torch.equal(first, torch.zeros(4))
    assert torch.equal(case.theta[0], before)


def test_the_extension_refuses_numbers_that_mean_nothing() -> None:
    case = make(torch.float32, shapes=[(4,), (3, 2)])
    state, theta = case.state(True), case.theta
    grad = [torch.zeros_like(t) for t in theta]
    scratch, value = torch.empty(2, dtype=torch.float64), torch.empty(())
    for compiled in (EMULATED.cpu, EMULATED.cuda):
        for mode in (-1, 3):
            with pytest.raises(ValueError, match="gradient: expected 0, 1 or 2"):
                compiled.penalty(theta, grad, mode, state, None, scratch, value, 1)
        with pytest.raises(ValueError, match=r"scratch: got .* of shape \(1,\)"):
            compiled.penalty(theta, grad, 2, state, None, scratch[:1], value, 1)
        with pytest.raises(ValueError, match=r"value: got torch\.float64"):
            compiled.penalty(theta, grad, 2, state, None, scratch, value.double(), 1)
        one = torch.ones(1, dtype=torch.float64)
        single = state._replace(alpha=one, omega=state.omega[:1], anchor=state.anchor[:1])
        for shift in (-(2**62) - 1, 2**62 + 1):
            with pytest.raises(ValueError, match=r"shift: expected a number of up to 2\^62"):
                compiled.merge(single, theta, grad, 1.0, 1.0, True, 0, shift, scratch, scratch, 1)
        turned = [grad[0], torch.zeros(2, 3).t()]
        with pytest.raises(EMULATED.OtherStrides, match="another order"):
            compiled.penalty(theta, turned, 2, state, None, scratch, value, 1)
        for offset in (2**63 - 3, 2**62, -2, 2**63):
            odd = state._replace(offsets=[0, offset])
            with pytest.raises(ValueError, match=r"omega: got|from 0 up"):
                compiled.penalty(theta, grad, 2, odd, None, scratch, value, 1)
        none = State([0, -1], *State.empty(2, torch.device("cpu"), True)[1:])
        numbers = ([0.1, 0.0, 0.0, 0.0, 0.1, 0.0, 0.0], [2], False, None, None, 1)
        with pytest.raises(ValueError, match="expected -1 without a state"):
            compiled.sgd(theta, grad, [], none, *numbers)
    for threads in (-1, 0, 4097, 2**31 - 1):
        with pytest.raises(ValueError, match="threads: expected a number from 1 to 4096"):
            EMULATED.cpu.penalty(theta, grad, 2, state, None, scratch, value, threads)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grad)


@pytest.mark.parametrize("there", [False, True])
def test_missing_or_old_emulated_kernels_are_not_loaded(tmp_path: Path, there: bool) -> None:
    if there:
        built = next(FOLDER.glob("_C_emulated*"))
        old = shutil.copy(built, tmp_path)
        os.utime(old, (0, 0))
    with pytest.raises(pytest.fail.Exception, match="older than its sources: run `make emulated`"):
        load_emulated(tmp_path)


# -- the operators ---------------------------------------------------------------------------------


def operator_calls(case: Case, compiled: bool) -> dict[str, tuple[Any, ...]]:
    theta = [t.clone() for t in case.theta]
    like = [torch.rand_like(t) for t in theta]
    one = torch.ones((), dtype=compute_dtype(theta[0].dtype))
    state = case._replace(omega=case.omega.clone(), anchor=case.anchor.clone()).state(compiled)
    left, right = [torch.randn(4, 2), torch.randn(3, 1)], [torch.randn(2, 5), torch.randn(1, 6)]
    updates = (
        *([torch.rand(4, 5), torch.rand(3, 6)], [1.0, 2.0], [1, 1], [0.5, 1.5]),
        *([torch.randn(3, 2)], [torch.randn(2, 6)], [0, 1], [0.5]),
        *(torch.tensor(0.7, dtype=torch.float64), compiled),
    )
    added = ([torch.rand_like(t) for t in left], [torch.rand_like(t) for t in right])
    return {
        "penalty": (theta, *state),
        "penalty_gradient": (theta, *state, one),
        "add_grad_": (theta, like, *state),
        "add_grad_alone_": (theta, like, *state),
        "proximal_": (theta, like, *state, 0.1, 1.5, 1e-8),
        "sgd_": (
            *(theta, like, [torch.rand_like(t) for t in theta], *state),
            *([0.1, 0.9, 0.1, 0.01, 0.5, 0.0, 0.0], [len(theta)], True, one, one),
        ),
        "adamw_": (
            *(theta, like, *([torch.rand_like(t) for t in theta] for _ in range(3))),
            *([torch.ones(()) for _ in theta], *state),
            *([0.1, 0.9, 0.99, 1e-8, 0.01, 0.02], [len(theta)], False, one, None),
        ),
        "accumulate_": (like, theta, 0.5, compiled),
        "merge_": (*state, theta, like, 1.0, 0.5, True, 1),
        "low_rank_value": (left, right, *updates),
        "low_rank_with_gradients": (left, right, *updates),
        "low_rank_add_grad_": (left, right, *added, *updates),
        "per_sample_": (
            torch.rand(1, 2, 2, 3),
            torch.rand(4, 5, 2),
            torch.rand(4, 6, 3),
            torch.arange(-1, 9, dtype=torch.int32).view(2, 5) % 6,
            False,
            compiled,
        ),
    }


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("name", sorted(torch.ops.mas_ext))
def test_opcheck(name: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    args = operator_calls(make(torch.float32, shapes=[(4,), (3, 2)]), compiled)[name]
    torch.library.opcheck(getattr(torch.ops.mas_ext, name).default, args)


# What each kernel writes, by the place among its arguments; of a state omega and anchor.
WRITTEN = {
    "add_grad_": (1,),
    "add_grad_alone_": (1,),
    "proximal_": (0,),
    "sgd_": (0, 2),
    "adamw_": (0, 2, 3, 4, 5),
    "accumulate_": (0,),
    "merge_": (1, 2),
    "low_rank_add_grad_": (2, 3),
    "per_sample_": (0,),
}


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("name", WRITTEN)
def test_what_a_kernel_writes_has_a_new_version(name: str, compiled: bool) -> None:
    """So that autograd refuses to go backward through it; what is read keeps its version."""
    args = operator_calls(make(torch.float32, shapes=[(4,), (3, 2)]), compiled)[name]
    places = [[a] if isinstance(a, Tensor) else a for a in args]
    places = [a if isinstance(a, list) and all(map(torch.is_tensor, a)) else [] for a in places]
    before = [[t._version for t in tensors] for tensors in places]
    getattr(torch.ops.mas_ext, name).default(*args)
    for i, (tensors, versions) in enumerate(zip(places, before, strict=True)):
        for t, version in zip(tensors, versions, strict=True):
            assert (t._version > version) == (i in WRITTEN[name]), i


def test_every_kernel_that_writes_is_among_these() -> None:
    mutable = {name for name in torch.ops.mas_ext if name.endswith("_")}
    assert mutable == WRITTEN.keys()


def test_opcheck_of_the_gradient(backend: Backend) -> None:
    case = make(torch.float32, shapes=[(4,), (3, 2)], device=backend.device)
    theta = [t.requires_grad_() for t in case.theta]
    torch.library.opcheck(torch.ops.mas_ext.penalty.default, (theta, *case.state(backend.native)))


@each_rows
def test_gradcheck(backend: Backend, rows: int) -> None:
    case = make(torch.float64, torch.float64, rows, [(4,), (3, 2)], backend.device)
    theta = [t.requires_grad_() for t in case.theta]
    state = case.state(backend.native)
    assert torch.autograd.gradcheck(lambda *t: penalty(list(t), state), theta)


def test_double_backward_is_refused(backend: Backend) -> None:
    case = make(torch.float64, shapes=[(4,)], device=backend.device)
    theta = [t.requires_grad_() for t in case.theta]
    value = penalty(theta, case.state(backend.native))
    (grad,) = torch.autograd.grad(value, theta, create_graph=True)
    with pytest.raises(NotImplementedError, match="create_graph"):
        grad.sum().backward()


# -- any shape -------------------------------------------------------------------------------------


@settings(
    max_examples=10 if SANITIZED else 40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=4).map(tuple), min_size=1, max_size=6),
    dtypes=st.sampled_from(DTYPES),
    rows=st.integers(1, 4),
    order=st.permutations(range(4)),
)
def test_any_shape(
    backend: Backend,
    shapes: list[tuple[int, ...]],
    dtypes: tuple[torch.dtype, torch.dtype],
    rows: int,
    order: list[int],
) -> None:
    case = make(*dtypes, rows, shapes, backend.device)
    theta = [
        t.permute([k for k in order if k < t.dim()])
        .contiguous()
        .permute(np.argsort([k for k in order if k < t.dim()]).tolist())
        if t.dim()
        else t
        for t in case.theta
    ]
    case = case._replace(theta=theta)
    grads = [torch.zeros_like(t) for t in theta]
    value = add_grad_(theta, grads, case.state(backend.native))
    assert float(value) == pytest.approx(expected_value(case), rel=1e-6)
    for i, x, w, a in case.pieces():
        terms = np.einsum("t,ti->i", array(case.alpha), w * np.abs(x - a))
        close(grads[i], naive.gradient(x, w, a, array(case.alpha)), 4 * terms)
