"""Where the samples of a batch lie in a tensor, whose rows may be more than the samples: windows, positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

LayoutKind = Literal["leading", "inner", "trailing", "none"]

# In the order in which they are tried.
LAYOUT_KINDS: tuple[LayoutKind, ...] = ("leading", "inner", "trailing", "none")


@dataclass(frozen=True)
class SampleLayout:
    """Where the samples are in a tensor, k rows each.

    "leading": dimension 0 is samples * k; "inner": dimension 1 is samples * k; "trailing": dimension 0 is
    k * samples; "none": the tensor is the same for all samples. `columns`: the size that dimension 1 had where
    "inner" was flattened to rows.
    """

    samples: int
    kind: LayoutKind
    columns: int = 0

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether samples can lie so in a tensor of this shape."""
        if self.kind == "none" or not shape:
            return False
        if self.kind != "inner":
            return shape[0] % self.samples == 0
        if len(shape) > 2:
            return shape[1] % self.samples == 0
        return self.columns > 0 and self.columns % self.samples == shape[0] % self.columns == 0

    def rows(self, shape: Sequence[int]) -> int:
        """k, for a tensor of this shape, which fits."""
        size = shape[0]
        if self.kind == "inner":
            size = shape[1] if len(shape) > 2 else self.columns
        return size // self.samples

    def by_sample(self, t: Tensor) -> Tensor:
        """(samples, k, *rest); for "inner" (samples, dimension 0, k, *rest)."""
        if self.kind == "inner":
            if t.dim() == 2:
                t = t.reshape(-1, self.columns, t.shape[1])
            t = t.reshape(t.shape[0], self.samples, t.shape[1] // self.samples, *t.shape[2:])
            return t.transpose(0, 1)
        k = t.shape[0] // self.samples
        if self.kind == "leading":
            return t.reshape(self.samples, k, *t.shape[1:])
        return t.reshape(k, self.samples, *t.shape[1:]).transpose(0, 1)

    def expand(self, numbers: Tensor, like: Tensor) -> Tensor:
        """A tensor of this shape with each sample's number in all of its rows."""
        places = torch.arange(like.numel(), device=like.device).view(like.shape)
        found = numbers.new_empty(like.numel())
        found[self.by_sample(places).reshape(self.samples, -1)] = numbers[:, None]
        return found.view(like.shape)

    def features(self, t: Tensor) -> Tensor:
        """(samples, positions, features) of a tensor (..., features)."""
        return self.by_sample(t).flatten(1, -2)

    def images(self, t: Tensor) -> Tensor:
        """(samples, all pixels of its images, channels) of a tensor (images, channels, *pixels)."""
        return self.by_sample(t.movedim(1, -1).flatten(1, -2)).flatten(1, 2)

    def varies(self, shape: Sequence[int], dims: int) -> bool:
        """Whether a parameter of this shape, broadcast to so many dimensions, varies with the sample."""
        return self._aligned(shape, dims)[1 if self.kind == "inner" else 0] != 1

    def sum_to(self, g: Tensor, shape: Sequence[int]) -> Tensor:
        """(samples, *shape): g summed over all that a parameter of this shape is broadcast along."""
        own, i = self._aligned(shape, g.dim()), 1 if self.kind == "inner" else 0
        g = self.by_sample(g)
        own = (1, *own[:i], 1, *own[i + 1 :])
        dims = [d for d in range(1, g.dim()) if own[d] == 1]
        dtype = torch.float64 if g.dtype == torch.float64 else torch.float32
        return g.sum(dims, dtype=dtype).reshape(self.samples, *shape)

    def _aligned(self, shape: Sequence[int], dims: int) -> tuple[int, ...]:
        flattened = self.kind == "inner" and dims == 2
        return (1,) * (dims + flattened - len(shape)) + tuple(shape)
