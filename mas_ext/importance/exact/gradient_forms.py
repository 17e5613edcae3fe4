"""A parameter's per-sample gradients in the forms in which layers have them, never as B x P numbers.

Each form stands for numbers g of shape (samples, *parameter): dense(i, j) writes some samples out, total() is
sum_k abs(g_k), or sum_k g_k^2, in a contiguous float32 or float64 tensor of the parameter's shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Protocol

import torch
from torch import Tensor

from mas_ext.kernels.dtypes import compute_dtype
from mas_ext.kernels.per_sample import per_sample_

# Numbers written out at once where a sample's gradient can't be avoided.
CHUNK = 1 << 24
# Numbers up to which a CPU's caches hold what is written out, and one product for each sample takes less time
# than the kernel that joins product and sum.
_SMALL = 1 << 21


class PerSample(Protocol):
    """The per-sample gradients of a parameter from one of its uses in a forward pass."""

    @property
    def samples(self) -> int:
        """How many samples there are."""

    def dense(self, start: int, stop: int, like: Tensor) -> Tensor:
        """g of the samples from start to stop, in the dtype and shape of `like`."""

    def total(self, like: Tensor, square: bool, native: bool) -> Tensor:
        """sum_k f(g_k), f = abs or square; contiguous, in the dtype and shape of `like`."""

    def scaled(self, factor: float) -> PerSample:
        """factor * g."""

    def joined(self, other: PerSample) -> PerSample | None:
        """The sum of both in the same form, or None where there is none."""


def magnitude(g: Tensor, square: bool) -> Tensor:
    """abs or square, elementwise."""
    return g.square() if square else g.abs()


def like_total(p: Tensor) -> Tensor:
    """A tensor of the dtype and shape of a parameter's total, whose numbers are none."""
    dtype = compute_dtype(p.dtype)
    return p if p.dtype == dtype else torch.empty((), dtype=dtype, device=p.device).expand(p.shape)


def joined(terms: Sequence[PerSample]) -> list[PerSample]:
    """Terms with the same sum, one of each form where these can be added."""
    found: list[PerSample] = []
    for kind in dict.fromkeys(map(type, terms)):
        first, *others = (term for term in terms if type(term) is kind)
        found.append(first)
        for term in others:
            joint = found[-1].joined(term)
            found[-1:] = [found[-1], term] if joint is None else [joint]
    return found


def total_of(terms: Sequence[PerSample], like: Tensor, square: bool, native: bool) -> Tensor:
    """sum_k f(sum over terms of g_k): the uses of a parameter by one sample add up before the abs."""
    if len(terms) > 1:
        terms = joined(terms)
    if len(terms) == 1:
        return terms[0].total(like, square, native)
    products = [term for term in terms if isinstance(term, Product)]
    lookups = [term for term in terms if isinstance(term, Lookup)]
    if len(terms) == 2 and products and lookups and products[0].is_matrix:
        total = products[0].total(like, square, native)
        return lookups[0].add_to_product(total, products[0], square)
    total = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    step = max(1, CHUNK // max(1, total.numel()))
    for start in range(0, terms[0].samples, step):
        stop = min(start + step, terms[0].samples)
        g = reduce(torch.add, (term.dense(start, stop, total) for term in terms))
        total += magnitude(g, square).sum(0)
    return total


@dataclass(frozen=True)
class Dense:
    """g itself, shape (samples, *parameter): for biases and other small parameters."""

    g: Tensor

    @property
    def samples(self) -> int:
        return self.g.shape[0]

    def dense(self, start: int, stop: int, like: Tensor) -> Tensor:
        g = self.g[start:stop].to(like.dtype)
        return g.reshape(len(g), *like.shape)

    def total(self, like: Tensor, square: bool, native: bool) -> Tensor:
        return magnitude(self.g.to(like.dtype), square).sum(0).view(like.shape)

    def scaled(self, factor: float) -> PerSample:
        return Dense(self.g * factor)

    def joined(self, other: PerSample) -> PerSample | None:
        if not isinstance(other, Dense):
            return None
        return Dense(
            self.g.flatten(1) + other.g.flatten(1)
        )  # one may have been seen in another shape


@dataclass(frozen=True)
class Product:
    """g_k = left_k^T right_k, a sum over positions: weights of linear layers and convolutions.

    g_k[group, o, t, c] = sum_p left[k, p, (group, o)] right[k, rows[t, p], (group, c)], where -1 in rows
    stands for zeros, and the parameter has the order (group, o, c, t). left: (samples, positions,
    groups * outputs), right: (samples, any, groups * channels), rows: int32 (taps, positions); None: one
    tap, that sees row p at position p.
    """

    left: Tensor
    right: Tensor
    rows: Tensor | None = None
    groups: int = 1

    @property
    def samples(self) -> int:
        return self.left.shape[0]

    @property
    def is_matrix(self) -> bool:
        """Whether g_k is left_k^T right_k."""
        return self.rows is None and self.groups == 1

    @property
    def _kernel_shape(self) -> tuple[int, int, int, int]:
        outputs, channels = (t.shape[2] // self.groups for t in (self.left, self.right))
        return self.groups, outputs, 1 if self.rows is None else self.rows.shape[0], channels

    def dense(self, start: int, stop: int, like: Tensor) -> Tensor:
        groups, outputs, taps, channels = self._kernel_shape
        left, right = (t[start:stop].to(like.dtype) for t in (self.left, self.right))
        if self.rows is not None:
            zeros = right.new_zeros(right.shape[0], 1, right.shape[2])
            right = torch.cat([right, zeros], 1)[:, self.rows.flatten().long()]
        positions = left.shape[1]
        left = left.reshape(len(left), positions, groups, outputs).permute(0, 2, 3, 1)
        right = right.reshape(len(left), taps, positions, groups, channels).permute(0, 3, 2, 4, 1)
        right = right.reshape(*right.shape[:3], channels * taps)
        return torch.matmul(left, right).view(len(left), *like.shape)

    def total(self, like: Tensor, square: bool, native: bool) -> Tensor:
        if self.is_matrix and not self.left.is_cuda:
            left, right = self.left.to(like.dtype), self.right.to(like.dtype)
            if left.shape[1] == 1:  # |g^T x| = |g|^T |x|
                left, right = (magnitude(t[:, 0], square) for t in (left, right))
                return torch.mm(left.t(), right).view(like.shape)
            if self.samples * like.numel() <= _SMALL:
                g = torch.bmm(left.mT, right)
                return (g.square_() if square else g.abs_()).sum(0).view(like.shape)
        omega = torch.zeros(self._kernel_shape, dtype=like.dtype, device=like.device)
        self._run(omega, square, native)
        return omega.transpose(2, 3).contiguous().view(like.shape)

    def _run(self, omega: Tensor, square: bool, native: bool) -> None:
        left, right = self.left, self.right
        if right.dtype != left.dtype or omega.dtype == torch.float64:
            left, right = left.to(omega.dtype), right.to(omega.dtype)
        left, right = (
            t if t.stride(2) == 1 else t.clone(memory_format=torch.contiguous_format)
            for t in (left, right)
        )
        per_sample_(omega, left, right, self.rows, square, native)

    def scaled(self, factor: float) -> PerSample:
        return replace(self, left=self.left * factor)

    def joined(self, other: PerSample) -> PerSample | None:
        if not isinstance(other, Product) or self._kernel_shape != other._kernel_shape:
            return None
        left = torch.cat([self.left, other.left], 1)
        right = torch.cat([self.right, other.right], 1)
        if self.rows is None or other.rows is None:
            if self.rows is not other.rows:
                return None
            return Product(left, right, None, self.groups)
        behind = torch.where(other.rows < 0, other.rows, other.rows + self.right.shape[1])
        rows = torch.cat([self.rows, behind], 1)
        return Product(left, right, rows, self.groups)


@dataclass(frozen=True)
class Lookup:
    """Rows of a table: g_k[i] = sum of grad[k, p] over the positions p with ids[k, p] = i.

    ids: (samples, positions); grad: (samples, positions, width); positions with id -1 do not count.
    """

    ids: Tensor
    grad: Tensor

    @property
    def samples(self) -> int:
        return self.ids.shape[0]

    def dense(self, start: int, stop: int, like: Tensor) -> Tensor:
        samples, rows = stop - start, like.shape[0] + 1  # row 0 takes what doesn't count
        table = like.new_zeros(samples * rows, like.shape[1])
        ids, g = _summed(self.ids[start:stop], self.grad[start:stop].to(like.dtype))
        table[torch.arange(samples, device=ids.device)[:, None] * rows + ids + 1] = g
        return table.view(samples, rows, like.shape[1])[:, 1:]

    def total(self, like: Tensor, square: bool, native: bool) -> Tensor:
        ids, g = _summed(self.ids, self.grad.to(like.dtype))
        total: Tensor = g.new_zeros(like.shape)
        return _add_rows(total, ids, magnitude(g, square))

    def add_to_product(self, total: Tensor, product: Product, square: bool) -> Tensor:
        """sum_k f(product_k + g_k), given total = sum_k f(product_k): they differ in what is looked up."""
        ids, g = _summed(self.ids, self.grad.to(total.dtype))
        left, right = product.left.to(total.dtype), product.right.to(total.dtype)
        columns = ids.clamp(min=0)[:, None].expand(-1, left.shape[1], -1)
        own = torch.matmul(left.gather(2, columns).mT, right)
        return _add_rows(total, ids, magnitude(own + g, square) - magnitude(own, square))

    def scaled(self, factor: float) -> PerSample:
        return Lookup(self.ids, self.grad * factor)

    def joined(self, other: PerSample) -> PerSample | None:
        if not isinstance(other, Lookup):
            return None
        return Lookup(torch.cat([self.ids, other.ids], 1), torch.cat([self.grad, other.grad], 1))


def _add_rows(total: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
    """total[ids] += rows, which change; ids of -1 do not count. Sums have a fixed order."""
    rows = rows.masked_fill_(ids[..., None] < 0, 0)
    ids, rows = ids.flatten(), rows.flatten(0, 1)
    if rows.is_cuda:  # where index_add_ has no order for the same id
        (ids,), (rows,) = _summed(ids[None], rows[None])
    return total.index_add_(0, ids.clamp(min=0), rows)


def _summed(ids: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The different ids of each sample and the sums of their rows, -1 and zeros behind them.

    ids: (samples, positions), rows: (samples, positions, width), and so are the results, whose sizes do not
    depend on data. Sums have a fixed order: the same bits on every run.
    """
    samples, positions, width = rows.shape
    ids, order = ids.sort(dim=1, stable=True)
    place = (ids.diff(dim=1) != 0).cumsum(1)
    place = torch.cat([place.new_zeros(samples, min(1, positions)), place], 1)
    different = torch.full_like(ids, -1).scatter_(1, place, ids)
    place += torch.arange(samples, device=ids.device)[:, None] * positions
    rows = rows.flatten(0, 1)
    if rows.is_cuda:
        order += torch.arange(samples, device=ids.device)[:, None] * positions
        counts = torch.zeros_like(place).flatten()
        counts.scatter_add_(0, place.flatten(), torch.ones_like(counts))
        rows = rows[order.flatten()]
        sums = torch.segment_reduce(rows, "sum", lengths=counts, unsafe=True)
    else:
        inverse = torch.empty_like(place).scatter_(1, order, place)
        sums = torch.zeros_like(rows).index_add_(0, inverse.flatten(), rows)
    return different, sums.view(samples, positions, width)
