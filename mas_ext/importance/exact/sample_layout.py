"""Where the samples of a batch lie in a tensor, whose rows may be more than the samples: windows, positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mas_ext.kernels.dtypes import compute_dtype

LayoutKind = Literal["leading", "inner", "trailing", "table"]
# In a tensor of owners: a row whose owner is not known, and one of several samples.
UNKNOWN, MIXED = -1, -2


@dataclass(frozen=True, eq=False)
class SampleLayout:
    """Where the samples are in a tensor, k rows each.

    "leading": dimension 0 is samples * k; "inner": dimension 1 is samples * k; "trailing": dimension 0 is
    k * samples; "table": the rows, `depth` dimensions flattened, are listed by sample in `table`, integers of
    shape (samples, k), where -1 stands for zeros.
    """

    samples: int
    kind: LayoutKind
    table: Tensor | None = None
    depth: int = 1

    def by_sample(self, t: Tensor) -> Tensor:
        """(samples, k, *rest); for "inner" (samples, dimension 0, k, *rest)."""
        if self.table is not None:
            rows = t.flatten(0, self.depth - 1)
            zeros = rows.new_zeros(1, *rows.shape[1:])
            return torch.cat([rows, zeros])[self.table]
        if self.kind == "inner":
            t = t.reshape(t.shape[0], self.samples, t.shape[1] // self.samples, *t.shape[2:])
            return t.transpose(0, 1)
        k = t.shape[0] // self.samples
        if self.kind == "leading":
            return t.reshape(self.samples, k, *t.shape[1:])
        return t.reshape(k, self.samples, *t.shape[1:]).transpose(0, 1)

    def features(self, t: Tensor) -> Tensor:
        """(samples, positions, features) of a tensor (..., features)."""
        if self.kind == "leading":
            return t.reshape(self.samples, t.shape[:-1].numel() // self.samples, t.shape[-1])
        return self.by_sample(t).flatten(1, -2)

    def images(self, t: Tensor) -> Tensor:
        """(samples, all pixels of its images, channels) of a tensor (images, channels, *pixels)."""
        return self.by_sample(t.movedim(1, -1).flatten(1, -2)).flatten(1, 2)

    def images_each(self, images: int) -> int:
        """How many of so many images in a batch a sample has."""
        return images // self.samples if self.table is None else self.table.shape[1]

    def varies(self, shape: Sequence[int], dims: int) -> bool:
        """Whether a tensor of this shape, broadcast to so many dimensions, varies with the sample."""
        own = _aligned(shape, dims)
        if self.table is not None:
            return any(size != 1 for size in own[: self.depth])
        return own[1 if self.kind == "inner" else 0] != 1

    def fits(self, samples: int, shape: Sequence[int]) -> bool:
        """Whether so many samples can lie in a tensor of this shape as these do in theirs."""
        return self.table is None and shape[1 if self.kind == "inner" else 0] % samples == 0

    def sum_to(self, g: Tensor, shape: Sequence[int]) -> Tensor:
        """(samples, *shape): g summed over all along which a tensor of this shape is broadcast to g."""
        dtype = compute_dtype(g.dtype)
        if self.kind == "leading" and g.dim() == 2 and g.shape == (self.samples, *shape):
            return g.to(dtype)
        own = _aligned(shape, g.dim())
        own = (own[0], 1, *own[2:]) if self.kind == "inner" else (1, *own[self.depth :])
        g = self.by_sample(g)
        dims = [d for d, size in enumerate(own, 1) if size == 1]
        return g.sum(dims, dtype=dtype).view(self.samples, *shape)


def _aligned(shape: Sequence[int], dims: int) -> tuple[int, ...]:
    return (1,) * (dims - len(shape)) + tuple(shape)


def find_layout(samples: int, owners: Tensor, by_row: bool) -> SampleLayout | None:
    """The layout of a tensor whose rows have these owners, a sample's number each; None if there is none.

    owners: the tensor's shape, but for its last dimension if it has several; UNKNOWN fits everything. by_row:
    whether rows may be listed one by one, and not only by dimension 0.
    """
    unknown = owners == UNKNOWN
    number = torch.arange(samples, device=owners.device)

    def fits(expected: Tensor, dim: int) -> bool:
        shape = [1] * owners.dim()
        shape[dim] = -1
        return bool(((owners == expected.view(shape)) | unknown).all())

    rows = owners.shape[0]
    if rows % samples == 0:
        if fits(number.repeat_interleave(rows // samples), 0):
            return SampleLayout(samples, "leading")
        if fits(number.repeat(rows // samples), 0):
            return SampleLayout(samples, "trailing")
    columns = owners.shape[1] if owners.dim() > 1 else 1
    if columns % samples == 0 and fits(number.repeat_interleave(columns // samples), 1):
        return SampleLayout(samples, "inner")
    if not by_row and owners.dim() > 1:
        of_row = owners.flatten(1).amax(1)
        if not fits(of_row, 0):
            return None
        owners, unknown = of_row, of_row == UNKNOWN
    if bool((owners == MIXED).any()):
        return None
    return SampleLayout(samples, "table", _listed(samples, owners.flatten()), owners.dim())


def _listed(samples: int, owners: Tensor) -> Tensor:
    """The rows of each sample, (samples, most rows of one), and -1 behind them."""
    order = owners.sort(stable=True).indices[int((owners == UNKNOWN).sum()) :]
    counts = torch.bincount(owners[order], minlength=samples)
    sample = owners[order]
    place = torch.arange(len(order), device=owners.device) - (counts.cumsum(0) - counts)[sample]
    table = owners.new_full((samples, max(1, int(counts.max()))), -1)
    table[sample, place] = order
    return table
