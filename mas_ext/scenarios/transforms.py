"""Transforms of image batches (N, C, H, W), applied when a batch is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class Permutation:
    """Pixel i of the result, counted row by row, is pixel `order[i]` of the image, in every channel."""

    order: Tensor  # (H * W,) int64

    def __call__(self, x: Tensor) -> Tensor:
        return x.flatten(2)[:, :, self.order.to(x.device)].view_as(x)


@dataclass(frozen=True)
class Rotation:
    """Rotation counter-clockwise about the centre, bilinear between pixels, black outside the image."""

    degrees: float

    def __call__(self, x: Tensor) -> Tensor:
        angle = math.radians(self.degrees)
        cos, sin = math.cos(angle), math.sin(angle)
        height, width = x.shape[2:]
        # Where in the image each pixel comes from, with coordinates from -1 to 1 along either side.
        source = x.new_tensor([[cos, -sin * height / width, 0], [sin * width / height, cos, 0]])
        grid = F.affine_grid(source.expand(len(x), 2, 3), list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, mode="bilinear", align_corners=False)


@dataclass(frozen=True)
class Canvas:
    """Images centred on a black one of another shape, a single channel repeated."""

    shape: tuple[int, int, int]  # (C, H, W)

    def __call__(self, x: Tensor) -> Tensor:
        channels, height, width = self.shape
        if x.shape[1] not in (1, channels) or x.shape[2] > height or x.shape[3] > width:
            raise ValueError(
                f"x: got images {tuple(x.shape[1:])}, expected ones that fit into {self.shape}"
            )
        down, right = height - x.shape[2], width - x.shape[3]
        padded = F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))
        return padded if x.shape[1] == channels else padded.repeat(1, channels, 1, 1)


@dataclass(frozen=True, eq=False)
class Standardisation:
    """Each channel minus its mean, divided by its standard deviation, both (C,)."""

    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, parts: Sequence[Tensor]) -> Standardisation:
        """The standardisation under which all these images, (N, C, H, W) each, have mean 0 and deviation 1."""
        pixels = sum(x[:, 0].numel() for x in parts)
        moments = [
            sum((x**power).sum((0, 2, 3), dtype=torch.float64) for x in parts) / pixels
            for power in (1, 2)
        ]
        mean, square = (torch.as_tensor(moment) for moment in moments)
        return cls(mean.float(), (square - mean**2).sqrt().float())

    def __call__(self, x: Tensor) -> Tensor:
        mean, deviation = (t.to(x.device)[:, None, None] for t in (self.mean, self.deviation))
        return (x - mean) / deviation
