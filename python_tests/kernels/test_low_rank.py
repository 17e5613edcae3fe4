"""The penalty on low-rank updates, against the whole update in float64 and autograd."""

from __future__ import annotations

from typing import Any, NamedTuple

import backends
import pytest
import torch
from backends import SANITIZED, Backend
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mas_ext.kernels.dtypes import compute_dtype, from_codes
from mas_ext.kernels.low_rank import (
    UpdateState,
    low_rank_add_grad_,
    low_rank_value,
    low_rank_with_gradients,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
OMEGAS = [torch.float32, torch.bfloat16, torch.uint8, torch.float64]
PAIRS = [(t, o) for t in DTYPES for o in OMEGAS if o != torch.float64 or t == torch.float64]
ON_CPU = Backend(True, "cpu")
# Of the sum of the absolute values of all terms.
ROUNDING = {torch.float32: 2e-6, torch.float64: 1e-14}


class Weight(NamedTuple):
    """Sizes of a weight, and the ranks of its own products and of the anchor's."""

    rows: int
    columns: int
    ranks: list[int]
    anchor: list[int]


class Case(NamedTuple):
    left: list[Tensor]
    right: list[Tensor]
    state: UpdateState


def make(
    weights: list[Weight],
    dtype: torch.dtype = torch.float32,
    omega: torch.dtype = torch.float32,
    backend: Backend = ON_CPU,
    transposed: bool = False,
) -> Case:
    generator = torch.Generator().manual_seed(len(weights))

    def factor(*shape: int) -> Tensor:
        drawn = torch.randn(shape[::-1] if transposed else shape, generator=generator)
        drawn = drawn.to(backend.device, dtype)
        return drawn.T if transposed else drawn

    def importance(*shape: int) -> Tensor:
        drawn = torch.rand(shape, generator=generator)
        if omega == torch.uint8:
            drawn = (drawn * 256).floor()
        return drawn.to(backend.device, omega)

    own = [(w, r) for w in weights for r in w.ranks]
    old = [(w, r) for w in weights for r in w.anchor]
    return Case(
        [factor(w.rows, r) for w, r in own],
        [factor(r, w.columns) for w, r in own],
        UpdateState(
            [importance(w.rows, w.columns) for w in weights],
            # Codes mean numbers up to 2^17.
            [(2.0 + i) * (2**-17 if omega == torch.uint8 else 1) for i in range(len(weights))],
            [len(w.ranks) for w in weights],
            [0.5 + r for _, r in own],
            [factor(w.rows, r) for w, r in old],
            [factor(r, w.columns) for w, r in old],
            [len(w.anchor) for w in weights],
            [1.5 - r for _, r in old],
            torch.tensor(3.7e-4, dtype=torch.float64, device=backend.device),
            backend.native,
        ),
    )


def dense(case: Case) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Value and gradients in float64, by the whole update of every weight."""
    state = case.state
    left, right = (
        [t.detach().cpu().double().requires_grad_() for t in side]
        for side in (case.left, case.right)
    )
    total, i, j = torch.zeros((), dtype=torch.float64), 0, 0
    for w, omega in enumerate(state.omega):
        stored = omega.cpu()
        weight = (from_codes(stored) if omega.dtype == torch.uint8 else stored).double()
        update = torch.zeros_like(weight)
        for _ in range(state.counts[w]):
            update = update + state.scale[i] * left[i] @ right[i]
            i += 1
        for _ in range(state.anchor_counts[w]):
            old_left, old_right = state.anchor_left[j].cpu(), state.anchor_right[j].cpu()
            update = update - state.anchor_scale[j] * old_left.double() @ old_right.double()
            j += 1
        total = total + state.alpha.cpu() * state.unit[w] * (weight * update**2).sum()
    total.backward()
    zeros = [torch.zeros_like(t) for t in (*left, *right)]
    grads = [z if t.grad is None else t.grad for t, z in zip([*left, *right], zeros, strict=True)]
    return total.detach(), grads[: len(left)], grads[len(left) :]


def without_signs(case: Case) -> Case:
    """All terms add up: how large the sums are that rounding is a part of."""
    state = case.state
    return Case(
        [t.abs() for t in case.left],
        [t.abs() for t in case.right],
        state._replace(
            scale=[abs(s) for s in state.scale],
            anchor_left=[t.abs() for t in state.anchor_left],
            anchor_right=[t.abs() for t in state.anchor_right],
            anchor_scale=[-abs(s) for s in state.anchor_scale],
        ),
    )


def assert_close(
    found: Tensor, expected: Tensor, bound: Tensor, dtype: torch.dtype, own: float = 0.0
) -> None:
    """Up to rounding of the arithmetic on terms of this size, and up to `own` times the largest element."""
    assert found.shape == expected.shape
    error = (found.detach().cpu().double() - expected).abs()
    if error.numel():
        largest = ROUNDING[compute_dtype(dtype)] * float(bound.max())
        assert float(error.max()) <= largest + own * float(expected.abs().max()) + 1e-30


def check(case: Case) -> None:
    dtype = case.left[0].dtype
    expected, *expected_grads = dense(case)
    size, *sizes = dense(without_signs(case))
    wanted, bounds = [*expected_grads[0], *expected_grads[1]], [*sizes[0], *sizes[1]]
    assert_close(low_rank_value(*case), expected, size, dtype)
    value, grads = low_rank_with_gradients(*case)
    assert value.dtype == compute_dtype(dtype)
    assert_close(value, expected, size, dtype)
    for found, grad, bound in zip(grads, wanted, bounds, strict=True):
        assert found.dtype == compute_dtype(dtype)
        assert_close(found, grad, bound, dtype)
    own = [torch.randn_like(t) for t in (*case.left, *case.right)]
    before = [t.cpu().double().clone() for t in own]
    count = len(case.left)
    added = low_rank_add_grad_(case.left, case.right, own[:count], own[count:], case.state)
    assert_close(added, expected, size, dtype)
    eps = 2 * torch.finfo(dtype).eps
    for found, grad, start, bound in zip(own, wanted, before, bounds, strict=True):
        assert_close(found, start + grad, bound + start.abs(), dtype, eps)


SMALL = [Weight(5, 7, [2], [3]), Weight(1, 1, [1], [1]), Weight(50, 49, [3, 1], [])]


@pytest.mark.parametrize(("dtype", "omega"), PAIRS)
def test_is_the_whole_updates(dtype: torch.dtype, omega: torch.dtype, backend: Backend) -> None:
    check(make(SMALL, dtype, omega, backend))


@pytest.mark.parametrize(
    "weights",
    [
        [Weight(100, 130, [8], [8])],
        [
            Weight(49, 800, [3, 9], [17]),
            Weight(96, 48, [1], []),
        ],  # more columns than stay in a cache
        [Weight(60, 70, [70], [66])],  # more ranks than a block's sums
        [Weight(1000, 3, [4], [4])],  # more strips than groups
        [Weight(5, 6, [2], [])] * 200,  # more weights than one launch takes
    ],
    ids=["even", "wide", "many ranks", "tall", "many"],
)
def test_sizes(weights: list[Weight], backend: Backend) -> None:
    check(make(weights, torch.float32, torch.uint8, backend))


def test_factors_may_lie_in_any_order(backend: Backend) -> None:
    check(make(SMALL, torch.float32, torch.float32, backend, transposed=True))


@pytest.mark.parametrize(
    "weight",
    [
        Weight(0, 4, [2], [1]),
        Weight(4, 0, [2], [1]),
        Weight(4, 3, [0], [2]),
        Weight(4, 3, [2], [0]),
    ],
    ids=["no rows", "no columns", "no ranks", "no ranks of the anchor"],
)
def test_empty_sizes(weight: Weight, backend: Backend) -> None:
    check(make([weight, *SMALL], torch.float32, torch.float32, backend))


SIZES = st.integers(0, 70)
RANKS = st.lists(st.integers(0, 20), max_size=3)


@settings(
    max_examples=10 if SANITIZED else 40,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(st.builds(Weight, SIZES, SIZES, RANKS, RANKS), max_size=3), st.sampled_from(PAIRS))
def test_drawn_sizes(
    backend: Backend, weights: list[Weight], dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    check(make([Weight(3, 3, [1], []), *weights], *dtypes, backend))


def test_what_wants_no_gradient_gets_none(backend: Backend) -> None:
    case = make(SMALL, backend=backend)
    _, left, right = dense(case)
    grads = [[torch.zeros_like(t) for t in side] for side in (case.left, case.right)]
    grads[0][0], grads[1][2] = (torch.empty(0, device=backend.device) for _ in range(2))
    low_rank_add_grad_(case.left, case.right, *grads, case.state)
    for found, expected in zip([*grads[0], *grads[1]], [*left, *right], strict=True):
        if found.numel():
            assert_close(found, expected, 10 * expected.abs(), torch.float32)
    assert grads[0][0].numel() == grads[1][2].numel() == 0


def test_its_gradient_goes_through_autograd(backend: Backend) -> None:
    case = make(SMALL, torch.float16, torch.float32, backend)
    _, left, right = dense(case)
    leaves = [[t.requires_grad_() for t in side] for side in (case.left, case.right)]
    value, _ = low_rank_with_gradients(*leaves, case.state)
    (3 * value).backward()
    for leaf, expected in zip([*leaves[0], *leaves[1]], [*left, *right], strict=True):
        assert leaf.grad is not None
        assert leaf.grad.dtype == torch.float16
        assert_close(leaf.grad, 3 * expected, 10 * expected.abs(), torch.float16, 1e-3)


def test_a_second_derivative_is_refused(backend: Backend) -> None:
    case = make(SMALL, backend=backend)
    left = [t.requires_grad_() for t in case.left]
    value, _ = low_rank_with_gradients(left, case.right, case.state)
    with pytest.raises(NotImplementedError, match="can't be differentiated again"):
        torch.autograd.grad(value, left, create_graph=True)


def test_other_factors_of_the_same_update_have_the_same_value(backend: Backend) -> None:
    """B R and R^-1 A give the same update: the value does not change along R, nor to first order."""
    case = make([Weight(30, 40, [4], [4])], torch.float64, torch.float64, backend)
    turn = torch.randn(4, 4, dtype=torch.float64, device=backend.device)
    left, right = [case.left[0] @ turn], [torch.linalg.solve(turn, case.right[0])]
    before, grads = low_rank_with_gradients(*case)
    torch.testing.assert_close(low_rank_value(left, right, case.state), before, rtol=1e-10, atol=0)
    change = (grads[0] * (case.left[0] @ turn)).sum() - (grads[1] * (turn @ case.right[0])).sum()
    assert abs(float(change)) < 1e-10 * float(before)


def test_bits_do_not_depend_on_threads() -> None:
    case = make([Weight(500, 300, [8], [8]), Weight(30, 900, [3], [])])
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        value, grads = low_rank_with_gradients(*case)
        found.append([value, *grads])
    torch.set_num_threads(before)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.equal(a, b)


def wrong(case: Case, **fields: Any) -> Case:
    return case._replace(state=case.state._replace(**fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"omega": [torch.rand(5, 6)] * 3}, r"right\[0\]: got .* expected .* of shape \(2, 6\)"),
        ({"omega": [torch.rand(7, 5).T] * 3}, r"omega\[0\]: got strides"),
        ({"omega": [torch.rand(5, 7).half()] * 3}, r"omega\[0\]: got torch.float16"),
        ({"omega": [torch.rand(5, 7).double()] * 3}, r"omega\[0\]: got torch.float64"),
        ({"counts": [1, 1, 1]}, "counts: got"),
        ({"counts": [5, -1, 0]}, "counts: got"),
        ({"anchor_scale": [1.0]}, "anchor_left: got 2 tensors, expected 1"),
        ({"alpha": torch.ones(1, dtype=torch.float64)}, "alpha: got"),
    ],
)
def test_wrong_arguments(fields: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        low_rank_value(*wrong(make(SMALL), **fields))


def test_gradients_must_lie_apart() -> None:
    case = make(SMALL)
    grads = [[torch.zeros_like(t) for t in side] for side in (case.left, case.right)]
    grads[0][0] = torch.zeros(1, 2).expand(5, 2)
    with pytest.raises(ValueError, match=r"left_grad\[0\]: got strides"):
        low_rank_add_grad_(case.left, case.right, *grads, case.state)


def test_all_instruction_sets_agree_to_rounding() -> None:
    program = """
import torch
from mas_ext.kernels import backends
from mas_ext.kernels.low_rank import UpdateState, low_rank_with_gradients
g = torch.Generator().manual_seed(0)
draw = lambda *s: torch.randn(s, generator=g)
state = UpdateState([draw(70, 90).abs()], [1.0], [1], [1.0], [draw(70, 3)], [draw(3, 90)], [1], [1.0],
    torch.ones((), dtype=torch.float64), True)
value, grads = low_rank_with_gradients([draw(70, 5)], [draw(5, 90)], state)
numbers = (value, grads[0].norm(), grads[1].norm())
print(backends.instruction_set(), ":".join(f"{float(x):.3e}" for x in numbers))
"""
    backends.refuse_other_bits(program)
