"""Networks: a backbone that all tasks share, and one head for each task, added when its turn comes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class MultiHead(nn.Module):
    """A backbone and its heads: x -> backbone -> (N, width) -> one linear head a task, (N, classes).

    Parameters are called ``backbone.*`` and ``heads.0.weight``, ``heads.0.bias``, ... It has no head
    until `add_head`.
    """

    def __init__(self, backbone: nn.Module, width: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.width = width
        self.heads = nn.ModuleList()

    def add_head(self, classes: int) -> None:
        """One more head, for ``classes`` classes, on the device and of the dtype of the backbone."""
        if classes < 1:
            raise ValueError(f"classes must be at least 1, got {classes}")
        weights = (p for p in self.backbone.parameters() if p.is_floating_point())
        like = next(weights, torch.empty(0))
        self.heads.append(nn.Linear(self.width, classes, device=like.device, dtype=like.dtype))

    def forward(self, x: Tensor, head: int | None = None) -> Tensor:
        """The logits of one head, or (None) of all of them side by side, in the order of the tasks."""
        if not self.heads:
            raise ValueError("the model has no head yet: call add_head first")
        features = self.backbone(x)
        if head is None:
            return torch.cat([each(features) for each in self.heads], dim=1)
        logits: Tensor = self.heads[head](features)
        return logits


def mlp(shape: Sequence[int], hidden: Sequence[int] = (400, 400)) -> MultiHead:
    """Linear layers of these widths with ReLU, for inputs of any shape, without a head."""
    widths = [math.prod(shape), *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, width in pairwise(widths):
        layers += [nn.Linear(before, width), nn.ReLU()]
    return MultiHead(nn.Sequential(*layers), widths[-1])
