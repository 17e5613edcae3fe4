"""Scenarios: which tasks are learned, in which order, and on which data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mas_ext.data import Images


@dataclass(frozen=True)
class Task:
    """One learning unit: inputs (N, ...), labels (N,) as positions in ``classes``."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: tuple[int, ...]  # the data set's own labels

    @property
    def name(self) -> str:
        """The classes, as in ``"0/1"``."""
        return "/".join(map(str, self.classes))


@dataclass(frozen=True)
class Scenario:
    """Tasks in the order in which they are learned, all with inputs of the same shape."""

    tasks: tuple[Task, ...]

    @property
    def in_features(self) -> int:
        """How many numbers one input has."""
        return self.tasks[0].x_train[0].numel()


def split(images: Images, tasks: int = 5) -> Scenario:
    """Share the classes out to ``tasks`` tasks of equal size, in the order of their labels.

    Task-incremental: every task counts its classes from 0 and is told apart by its head. Raises
    ValueError if the classes cannot be shared out evenly, or if one of them has no test image.
    """
    classes = images.y_train.unique().tolist()
    if tasks < 1 or not classes or len(classes) % tasks:
        raise ValueError(f"tasks must divide the number of classes, {len(classes)}, got {tasks}")
    if images.y_test.unique().tolist() != classes:
        raise ValueError(
            f"images: expected test labels of the classes {classes}, as in training, "
            f"got {images.y_test.unique().tolist()}"
        )
    size = len(classes) // tasks
    return Scenario(
        tuple(
            _select(images, classes[first : first + size]) for first in range(0, len(classes), size)
        )
    )


def _select(images: Images, classes: list[int]) -> Task:
    wanted = torch.tensor(classes)
    train, test = torch.isin(images.y_train, wanted), torch.isin(images.y_test, wanted)
    return Task(
        images.x_train[train],
        torch.searchsorted(wanted, images.y_train[train]),
        images.x_test[test],
        torch.searchsorted(wanted, images.y_test[test]),
        tuple(classes),
    )
