"""A parameter's per-sample gradients in the forms in which layers have them, never as B x P numbers.

Each form stands for numbers g of shape (samples, *parameter): dense(i, j) writes some samples out, total() is
sum_k abs(g_k), or sum_k g_k^2, in a contiguous float32 or float64 tensor of the parameter's shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Protocol

import torch
from torch import Tensor

from mas_ext.kernels.per_sample import per_sample_

# Numbers written out at once where a sample's gradient can't be avoided.
CHUNK = 1 << 24


class PerSample(Protocol):
    """The per-sample gradients of a parameter from one of its uses in a forward pass."""

    @property
    def samples(self) -> int:
        """How many samples there are."""

    def dense(self, start: int, stop: int, like: Tensor) -> Tensor:
        """g of the samples from start to stop, in the dtype and shape of `like`."""

    def total(self, like: Tensor, square: bool, native: bool) -> Tensor:
        """sum_k f(g_k), f = abs or square; contiguous, in the dtype and shape of `like`."""

    def may_be_nonzero(self, like: Tensor) -> bool:
        """False only where g is zero; where it is large, that is not always found out."""

    def joined(self, other: PerSample) -> PerSample | None:
        """The sum of both in the same form, or None where there is none."""


def magnitude(g: Tensor, square: bool) -> Tensor:
    """abs or square, elementwise."""
    return g.square() if square else g.abs()


def total_of(terms: Sequence[PerSample], like: Tensor, square: bool, native: bool) -> Tensor:
    """sum_k f(sum over terms of g_k): the uses of a parameter by one sample add up before the abs."""
    joined: list[PerSample] = []
    for kind in dict.fromkeys(map(type, terms)):
        first, *others = (term for term in terms if type(term) is kind)
        joined.append(first)
        for term in others:
            joint = joined[-1].joined(term)
            joined[-1:] = [joined[-1], term] if joint is None else [joint]
    if len(joined) == 1:
        return joined[0].total(like, square, native)
    total = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    step = max(1, CHUNK // max(1, total.numel()))
    for start in range(0, joined[0].samples, step):
        stop = min(start + step, joined[0].samples)
        g = reduce(torch.add, (term.dense(start, stop, total) for term in joined))
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
        return magnitude(self.dense(0, self.samples, like), square).sum(0)

    def may_be_nonzero(self, like: Tensor) -> bool:
        return bool(self.g.any())

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
        omega = torch.zeros(self._kernel_shape, dtype=like.dtype, device=like.device)
        self._run(omega, square, native)
        if omega.shape[2] > 1:
            omega = omega.transpose(2, 3).contiguous()
        return omega.view(like.shape)

    def _run(self, omega: Tensor, square: bool, native: bool) -> None:
        left, right = self.left, self.right
        if right.dtype != left.dtype or omega.dtype == torch.float64:
            left, right = left.to(omega.dtype), right.to(omega.dtype)
        left, right = (
            t if t.stride(2) == 1 else t.clone(memory_format=torch.contiguous_format)
            for t in (left, right)
        )
        per_sample_(omega, left, right, self.rows, square, native)

    def may_be_nonzero(self, like: Tensor) -> bool:
        if self.samples * like.numel() <= CHUNK:
            return bool(self.dense(0, self.samples, like).any())
        return bool(self.left.any()) and bool(self.right.any())

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
        rows, width = like.shape[0] + 1, like.shape[1]  # row 0 takes what doesn't count
        table = like.new_zeros((stop - start) * rows, width)
        key, g = self._by_sample(start, stop, rows, like.dtype)
        table[key] = g
        return table.view(stop - start, rows, width)[:, 1:]

    def total(self, like: Tensor, square: bool, native: bool) -> Tensor:
        rows = like.shape[0] + 1
        key, g = self._by_sample(0, self.samples, rows, like.dtype)
        row, added = _summed(key % rows, magnitude(g, square))
        total = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
        counted = row > 0
        total[row[counted] - 1] = added[counted]
        return total

    def _by_sample(
        self, start: int, stop: int, rows: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """The different sample * rows + id + 1, and the sums of their gradients."""
        sample = torch.arange(stop - start, device=self.ids.device)[:, None]
        key = (sample * rows + self.ids[start:stop] + 1).flatten()
        return _summed(key, self.grad[start:stop].flatten(0, 1).to(dtype))

    def may_be_nonzero(self, like: Tensor) -> bool:
        return bool(self.grad.any())

    def joined(self, other: PerSample) -> PerSample | None:
        if not isinstance(other, Lookup):
            return None
        return Lookup(torch.cat([self.ids, other.ids], 1), torch.cat([self.grad, other.grad], 1))


def _summed(key: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The different keys and the sums of their rows, in a fixed order: the same bits on every run."""
    key, order = key.sort(stable=True)
    different, counts = torch.unique_consecutive(key, return_counts=True)
    if key.numel() == 0:
        return different, rows
    return different, torch.segment_reduce(rows[order].contiguous(), "sum", lengths=counts)
