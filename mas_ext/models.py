"""Networks for the demo: a backbone that all tasks share and one head for each task."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from torch import Tensor, nn


class MLP(nn.Module):
    """Linear layers with ReLU, then the head of the task: x (N, ...) -> logits (N, classes).

    ``in_features``: numbers in one input, which may have any shape. ``hidden``: widths of the
    backbone's layers. ``classes``: number of classes of each task, in the order of the tasks.
    """

    def __init__(self, in_features: int, hidden: Sequence[int], classes: Iterable[int]) -> None:
        super().__init__()
        widths = [in_features, *hidden]
        self.backbone = nn.Sequential(nn.Flatten())
        for width_in, width_out in pairwise(widths):
            self.backbone.extend([nn.Linear(width_in, width_out), nn.ReLU()])
        self.heads = nn.ModuleList(nn.Linear(widths[-1], count) for count in classes)

    def forward(self, x: Tensor, task: int) -> Tensor:
        logits: Tensor = self.heads[task](self.backbone(x))
        return logits
