"""Whose the rows of a gradient are, and which layout these owners make."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mas_ext.importance.exact.layout_proof import (
    _BOUNDED,
    _Choices,
    _is_open,
    _united,
    find_owners,
)
from mas_ext.importance.exact.precision import PRECISION_OF
from mas_ext.importance.exact.sample_layout import MIXED, UNKNOWN, SampleLayout, find_layout


class Mixing:
    """A tape whose only meeting has the gradient matrix @ (gradient of the values), one number a row."""

    def __init__(self, matrix: Tensor) -> None:
        self.samples, self.meetings, self.random = matrix.shape[1], ["the meeting"], False
        self._matrix = matrix

    def observe(self, observer: Any, y: Tensor, grad: Tensor) -> None:
        observer("the meeting", self._matrix @ grad)


def owners_of(rows: Any, dtype: torch.dtype = torch.float64) -> list[int]:
    matrix = torch.as_tensor(rows, dtype=torch.float64)
    values = torch.zeros(matrix.shape[1], 1, dtype=torch.float64)
    tape: Any = Mixing(matrix)
    return find_owners(tape, values, PRECISION_OF[dtype])[0].tolist()


@pytest.mark.parametrize("samples", [1, 2, 3, 128, 129, 130, 300])
def test_a_row_is_its_samples_whatever_its_size(samples: int) -> None:
    scale = torch.linspace(-3, 1e4, samples)[:, None]
    assert owners_of(scale * torch.eye(samples)) == list(range(samples))


def test_rows_without_a_gradient_are_unknown_and_those_of_several_samples_mixed() -> None:
    rows = [[1, 0, 0], [0, 0, 0], [0, 1, 1], [0.1, 5, 0], [0, 0, -2]]
    assert owners_of(rows) == [0, UNKNOWN, MIXED, MIXED, 2]


def test_several_samples_that_look_like_one_that_there_is_not() -> None:
    """With factors 1, 2 and 1/2: (-1.75 * 2 + 1/2) / (-1.75 + 1) = 4, which would be the fourth sample's."""
    assert owners_of([[0, -1.75, 1]]) == [MIXED]


def test_several_samples_that_look_like_another() -> None:
    """Factors go up to 8 in float16; (8 * 1 - 15 * 8) / (8 - 15) = 16 is that of no digit."""
    row = torch.zeros(1, 9)
    row[0, 0], row[0, 5] = 8, -15
    assert owners_of(row, torch.float16) == [MIXED]


def test_equal_parts_of_two_samples_are_mixed() -> None:
    """Their factors are 2^20 and 2^-20, of which the mean is all but 2^19, the factor of another sample."""
    row = torch.zeros(1, 60)
    row[0, 39:41] = 1
    assert owners_of(row) == [MIXED]


def test_owners_that_contradict_each_other_are_mixed() -> None:
    one, other = (
        torch.tensor([0, 1, UNKNOWN, 2, UNKNOWN]),
        torch.tensor([0, UNKNOWN, 1, 3, UNKNOWN]),
    )
    found = _united({0: one, 1: one}, {0: other, 2: other})
    assert found[0].tolist() == [0, 1, 1, MIXED, UNKNOWN]
    assert [found[i].tolist() for i in (1, 2)] == [one.tolist(), other.tolist()]


CHOICES: dict[str, tuple[Any, bool]] = {
    "a mask": (lambda x: x[x[:, 0] > 0], True),
    "integers": (lambda x: x[torch.tensor([1, 0])], False),
    "a slice": (lambda x: x[1:], False),
    "where": (lambda x: torch.where(x > 0, x, 0), False),
    "nonzero": (lambda x: x.nonzero(), True),
    "masked_select": (lambda x: x.masked_select(x > 0), True),
    "unique": (lambda x: x.unique(), True),
    "item": (lambda x: x.sum().item(), True),
    "a sort": (lambda x: x.sort(0).values, False),
}


@pytest.mark.parametrize("way", CHOICES)
def test_shapes_and_numbers_that_come_from_data_are_seen(way: str) -> None:
    function, expected = CHOICES[way]
    x = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    with _Choices() as choices:
        function(x)
    assert choices.found == expected


BOUNDS: dict[str, tuple[Any, bool]] = {
    "relu6": (F.relu6, True),
    "hardtanh": (F.hardtanh, True),
    "clamp of small numbers": (lambda x: x.clamp(min=1e-6), True),
    "clamp of large numbers": (lambda x: x.clamp(max=10), True),
    "clamp from 1": (lambda x: x.clamp(min=1), False),
    "clamp to 1/2": (lambda x: x.clamp(-0.5, 0.5), False),
    "clamp to a tensor": (lambda x: x.clamp(max=torch.ones(3)), False),
    "threshold": (lambda x: F.threshold(x, 0.1, 0.0), True),
    "a high threshold": (lambda x: F.threshold(x, 1.0, 0.0), False),
    "hardshrink": (F.hardshrink, False),
    "softshrink": (lambda x: F.softshrink(x, 0.2), True),
    "narrow hardtanh": (lambda x: F.hardtanh(x, 0.0, 0.3), False),
}


@pytest.mark.parametrize("way", BOUNDS)
def test_bounds_that_random_numbers_are_within(way: str) -> None:
    function, expected = BOUNDS[way]
    node = function(torch.rand(3, requires_grad=True)).grad_fn
    assert _BOUNDED.search(node.name())
    assert _is_open(node) == expected


# Owners by the first dimensions, samples, whether rows may be listed one by one; the kind, and the rows listed.
LAYOUTS: dict[str, tuple[Any, bool, str | None, Any]] = {
    "leading": ([0, 0, 1, 1, 2, 2], True, "leading", None),
    "leading, some unknown": ([0, -1, -1, 1, 2, -1], True, "leading", None),
    "trailing": ([0, 1, 2, 0, 1, 2], True, "trailing", None),
    "inner": ([[0, 1, 2], [0, 1, 2]], False, "inner", None),
    "inner, two a sample": ([[0, 0, 1, 1, 2, 2]], False, "inner", None),
    "backwards": ([2, 1, 0], False, "table", [[2], [1], [0]]),
    "ragged": ([0, 1, 1, 2, -1], True, "table", [[0, -1], [1, 2], [3, -1]]),
    "in two dimensions": ([[0, 2], [1, 1], [2, 0]], True, "table", [[0, 5], [2, 3], [1, 4]]),
    "in two dimensions, not by row": ([[0, 2], [1, 1], [2, 0]], False, None, None),
    "in images": ([[2, 2], [1, -1], [0, 0]], False, "table", [[2], [1], [0]]),
    "mixed": ([0, 1, MIXED], True, None, None),
    "a mixed image": ([[2, 2], [MIXED, MIXED], [0, 0]], False, None, None),
}


@pytest.mark.parametrize("way", LAYOUTS)
def test_layouts(way: str) -> None:
    owners, by_row, kind, table = LAYOUTS[way]
    layout = find_layout(3, torch.tensor(owners), by_row)
    assert (None if layout is None else layout.kind) == kind
    found = None if layout is None or layout.table is None else layout.table.tolist()
    assert found == table


ROWS = torch.tensor([[0, 5], [2, 3], [1, -1]])


@pytest.mark.parametrize(
    ("layout", "shape", "varies"),
    [
        (SampleLayout(3, "leading"), (4,), False),
        (SampleLayout(3, "leading"), (2, 4), False),
        (SampleLayout(3, "leading"), (3, 1, 1), True),
        (SampleLayout(3, "inner"), (2, 1, 4), False),
        (SampleLayout(3, "inner"), (3, 1), True),
        (SampleLayout(3, "table", ROWS, 2), (4,), False),
        (SampleLayout(3, "table", ROWS, 2), (2, 1), True),
        (SampleLayout(3, "table", ROWS, 2), (3, 1, 1), True),
        (SampleLayout(3, "table", ROWS, 1), (2, 1), False),
    ],
)
def test_what_varies_with_the_sample(
    layout: SampleLayout, shape: tuple[int, ...], varies: bool
) -> None:
    assert layout.varies(shape, 3) == varies


def test_sums_of_samples() -> None:
    """Of rows 0 and 5 for the first sample, 2 and 3 for the second, and row 1 for the last."""
    g = torch.randn(3, 2, 4, dtype=torch.float64)
    layout = SampleLayout(3, "table", ROWS, 2)
    rows = g.flatten(0, 1)
    expected = torch.stack([rows[0] + rows[5], rows[2] + rows[3], rows[1]])
    torch.testing.assert_close(layout.sum_to(g, (4,)), expected)
    torch.testing.assert_close(layout.sum_to(g, (1,)), expected.sum(1, keepdim=True))
    inner = SampleLayout(2, "inner")
    torch.testing.assert_close(inner.sum_to(g, (3, 1, 4)), g.transpose(0, 1)[:, :, None])
    torch.testing.assert_close(inner.sum_to(g, (4,)), g.sum(0))
