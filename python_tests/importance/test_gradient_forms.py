"""The forms of per-sample gradients, and their sums, against gradients written out."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from mas_ext.importance.exact import gradient_forms
from mas_ext.importance.exact.gradient_forms import Dense, Lookup, PerSample, Product, total_of

SAMPLES, OUTPUTS, INPUTS = 3, 4, 5


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def ids(positions: int) -> Tensor:
    return torch.randint(-1, OUTPUTS, (SAMPLES, positions))


def pixels(taps: int, positions: int, pixels: int) -> Tensor:
    return torch.randint(-1, pixels, (taps, positions), dtype=torch.int32)


# Of a matrix (OUTPUTS, INPUTS).
MATRIX = {
    "dense": lambda: Dense(real(SAMPLES, OUTPUTS, INPUTS)),
    "dense, in another shape": lambda: Dense(real(SAMPLES, 1, OUTPUTS * INPUTS)),
    "product": lambda: Product(real(SAMPLES, 2, OUTPUTS), real(SAMPLES, 2, INPUTS)),
    "product, one position": lambda: Product(real(SAMPLES, 1, OUTPUTS), real(SAMPLES, 1, INPUTS)),
    "product by pixels": lambda: Product(
        real(SAMPLES, 6, OUTPUTS), real(SAMPLES, 2, INPUTS), pixels(1, 6, 2)
    ),
    "product in groups": lambda: Product(
        real(SAMPLES, 2, OUTPUTS), real(SAMPLES, 2, 2 * INPUTS), None, 2
    ),
    "lookup": lambda: Lookup(ids(6), real(SAMPLES, 6, INPUTS)),
    "lookup of nothing": lambda: Lookup(torch.full((SAMPLES, 2), -1), real(SAMPLES, 2, INPUTS)),
}
# Of a kernel (OUTPUTS, INPUTS, 3), in one or in two groups.
KERNEL = {
    "one group": lambda: Product(
        real(SAMPLES, 4, OUTPUTS), real(SAMPLES, 6, INPUTS), pixels(3, 4, 6)
    ),
    "other sizes": lambda: Product(
        real(SAMPLES, 2, OUTPUTS), real(SAMPLES, 3, INPUTS), pixels(3, 2, 3)
    ),
    "two groups": lambda: Product(
        real(SAMPLES, 4, OUTPUTS), real(SAMPLES, 6, 2 * INPUTS), pixels(3, 4, 6), 2
    ),
}
LIKES = [(MATRIX, (OUTPUTS, INPUTS)), (KERNEL, (OUTPUTS, INPUTS, 3))]
SUMS = [
    pytest.param([forms[name] for name in names], shape, id=" + ".join(names))
    for forms, shape in LIKES
    for count in (1, 2, 3)
    for names in itertools.combinations_with_replacement(forms, count)
]


def written_out(form: PerSample, shape: tuple[int, ...]) -> Tensor:
    """g, from its definition."""
    g = torch.zeros(SAMPLES, *shape, dtype=torch.float64)
    if isinstance(form, Dense):
        return form.g.reshape(g.shape)
    if isinstance(form, Lookup):
        for k, p in itertools.product(*map(range, form.ids.shape)):
            if form.ids[k, p] >= 0:
                g[k, form.ids[k, p]] += form.grad[k, p]
        return g
    assert isinstance(form, Product)
    positions = form.left.shape[1]
    rows = torch.arange(positions)[None] if form.rows is None else form.rows
    inputs, outputs = (t.shape[2] // form.groups for t in (form.right, form.left))
    table = g.view(SAMPLES, form.groups, outputs, inputs, len(rows))
    for t, p, group in itertools.product(range(len(rows)), range(positions), range(form.groups)):
        if rows[t, p] >= 0:
            left = form.left[:, p].unflatten(1, (form.groups, outputs))[:, group]
            right = form.right[:, int(rows[t, p])].unflatten(1, (form.groups, inputs))[:, group]
            table[:, group, :, :, t] += left[:, :, None] * right[:, None]
    return g


@pytest.mark.parametrize("at_once", [1 << 24, 1])
@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize(("makes", "shape"), SUMS)
def test_totals_of_sums(
    makes: list, shape: tuple[int, ...], square: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradient_forms, "CHUNK", at_once)
    forms = [make() for make in makes]
    g = sum(written_out(form, shape) for form in forms)
    like = torch.empty(shape, dtype=torch.float64)
    total = total_of(forms, like, square, False)
    torch.testing.assert_close(total, (g.square() if square else g.abs()).sum(0))
    assert total.is_contiguous()


@pytest.mark.parametrize(("makes", "shape"), [sum for sum in SUMS if len(sum.values[0]) == 1])
def test_samples_and_multiples_of_a_form(makes: list, shape: tuple[int, ...]) -> None:
    (form,) = (make() for make in makes)
    g, like = written_out(form, shape), torch.empty(shape, dtype=torch.float64)
    assert form.samples == SAMPLES
    torch.testing.assert_close(form.dense(0, SAMPLES, like), g)
    torch.testing.assert_close(form.dense(1, 2, like), g[1:2])
    torch.testing.assert_close(form.scaled(-2.5).dense(0, SAMPLES, like), -2.5 * g)
