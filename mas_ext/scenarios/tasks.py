"""Scenarios: which tasks are learned, in which order, and on which data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset


class Tensors(Dataset[tuple[Tensor, Tensor]]):
    """Data in memory, which can be had sample by sample or, much faster, whole batches at once.

    ``x``: inputs (N, ...). ``y``: labels (N,), of any integer type, kept as int64. ``transform``:
    is given inputs (n, ...) whenever they are read and returns as many, of whatever shape; None
    leaves them as they are. Raises ValueError if the labels are none, or not as many as inputs.
    """

    def __init__(
        self, x: Tensor, y: Tensor, transform: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        if y.ndim != 1 or y.is_floating_point() or y.is_complex():
            raise ValueError(f"y must be integers (N,), got {y.dtype} of shape {tuple(y.shape)}")
        if x.ndim == 0 or len(x) != len(y):
            raise ValueError(
                f"x must have an input for each of the {len(y)} labels, got shape {tuple(x.shape)}"
            )
        self.x, self.y, self.transform = x, y.long(), transform

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x = self.x[i].unsqueeze(0)
        return (x if self.transform is None else self.transform(x))[0], self.y[i]

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The samples ``index``, (n,) int64: inputs (n, ...) and labels (n,)."""
        x = self.x[index]
        return x if self.transform is None else self.transform(x), self.y[index]

    def subset(self, index: Tensor) -> Tensors:
        """The samples ``index``, (n,) int64 or (N,) bool, as data of their own."""
        return Tensors(self.x[index], self.y[index], self.transform)

    def transformed(self, transform: Callable[[Tensor], Tensor]) -> Tensors:
        """The same samples, in the same memory, seen through one more transform."""
        first = self.transform
        both = transform if first is None else lambda x: transform(first(x))
        return Tensors(self.x, self.y, both)


def labels(dataset: Dataset[Any]) -> Tensor:
    """The labels of all samples, (N,) int64, without reading the inputs where that can be avoided.

    It can for `Tensors`, TensorDataset, Subset and what has ``targets`` as torchvision's have.
    """
    if isinstance(dataset, Tensors):
        return dataset.y
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[1].long()
    if isinstance(dataset, Subset):
        return labels(dataset.dataset)[torch.as_tensor(dataset.indices)]
    if hasattr(dataset, "targets") and getattr(dataset, "target_transform", None) is None:
        return torch.as_tensor(dataset.targets).long()
    count = len(dataset)  # type: ignore[arg-type]
    return torch.tensor([int(dataset[i][1]) for i in range(count)], dtype=torch.int64)


@dataclass(frozen=True)
class Task:
    """One learning unit: data to train and to test on, and the classes that are told apart in it."""

    name: str
    train: Dataset[Any]
    test: Dataset[Any]
    classes: tuple[int, ...]  # the labels as the data sets give them, sorted

    def positions(self, labels: Tensor) -> Tensor:
        """Where each of the labels, (N,), is in ``classes``: what a head is trained on, (N,) int64.

        Raises ValueError naming a label that is not among them.
        """
        classes = torch.tensor(self.classes, device=labels.device)
        positions = torch.searchsorted(classes, labels).clamp(max=len(classes) - 1)
        foreign = labels[classes[positions] != labels]
        if len(foreign):
            raise ValueError(
                f"labels must be among the classes {_some(self.classes)} of task {self.name!r}, "
                f"got {foreign[0].item()}"
            )
        return positions


@dataclass(frozen=True)
class Scenario:
    """Tasks in the order in which they are learned, all with inputs of the same shape.

    Raises ValueError if there is no task, or if an input is no tensor or has another shape.
    """

    tasks: tuple[Task, ...]
    name: str = ""

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("tasks must be at least one, got none")
        for task in self.tasks:
            for part, dataset in (("train", task.train), ("test", task.test)):
                x = dataset[0][0]
                if not isinstance(x, Tensor):
                    raise ValueError(
                        f"tasks must have tensors as inputs, got {type(x).__name__} to {part} task "
                        f"{task.name!r}: give its data set a transform that makes them"
                    )
                if x.shape != self.shape:
                    raise ValueError(
                        f"tasks must all have inputs of shape {self.shape} as the first has, "
                        f"got {tuple(x.shape)} to {part} task {task.name!r}"
                    )

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one input."""
        return tuple(self.tasks[0].train[0][0].shape)

    def reordered(self, order: Sequence[int]) -> Scenario:
        """The same tasks, that at position ``order[0]`` first; ValueError unless each is in it once."""
        if sorted(order) != list(range(len(self.tasks))):
            raise ValueError(
                f"order must have each of 0 to {len(self.tasks) - 1} once, got {list(order)}"
            )
        return Scenario(tuple(self.tasks[t] for t in order), self.name)


def from_datasets(
    pairs: Sequence[tuple[Dataset[Any], Dataset[Any]]],
    names: Sequence[str] | None = None,
    name: str = "",
) -> Scenario:
    """One task for each pair of data sets, to train and to test on, with the classes found in it.

    ``names``: of the tasks; None numbers them from 0. Raises ValueError if there are not as many
    names as pairs, or if data are empty or have test labels that do not occur in training.
    """
    names = [str(t) for t in range(len(pairs))] if names is None else names
    if len(names) != len(pairs):
        raise ValueError(f"names must be one for each of the {len(pairs)} tasks, got {len(names)}")
    tasks = []
    for task, (train, test) in zip(names, pairs, strict=True):
        classes, tested = labels(train).unique().tolist(), labels(test).unique().tolist()
        if not classes or not tested:
            raise ValueError(f"pairs: task {task!r} must have samples to train and to test on")
        if not set(tested) <= set(classes):
            raise ValueError(
                f"pairs: test labels of task {task!r} must be among those in training, "
                f"{_some(classes)}, got {min(set(tested) - set(classes))}"
            )
        tasks.append(Task(task, train, test, tuple(classes)))
    return Scenario(tuple(tasks), name)


def split(train: Dataset[Any], test: Dataset[Any], tasks: int = 5, name: str = "") -> Scenario:
    """Share the classes out to ``tasks`` tasks of equal size, in the order of their labels.

    Tasks are named by their classes, as in ``"0/1"``, or more than four as in ``"0-9"``. Raises
    ValueError if the classes cannot be shared out evenly, or if one of them has no test sample.
    """
    to_train, to_test = labels(train), labels(test)
    classes = to_train.unique().tolist()
    if tasks < 1 or not classes or len(classes) % tasks:
        raise ValueError(f"tasks must divide the number of classes, {len(classes)}, got {tasks}")
    if to_test.unique().tolist() != classes:
        raise ValueError(
            f"test must have labels of the classes {_some(classes)}, as in training, "
            f"got {_some(to_test.unique().tolist())}"
        )
    size = len(classes) // tasks
    made = []
    for first in range(0, len(classes), size):
        group = tuple(classes[first : first + size])
        parts = _of(train, to_train, group), _of(test, to_test, group)
        title = "/".join(map(str, group)) if size <= 4 else f"{group[0]}-{group[-1]}"
        made.append(Task(title, *parts, classes=group))
    return Scenario(tuple(made), name)


def _of(dataset: Dataset[Any], labels: Tensor, classes: tuple[int, ...]) -> Dataset[Any]:
    """The samples of these classes."""
    index = torch.isin(labels, torch.tensor(classes)).nonzero()[:, 0]
    return (
        dataset.subset(index) if isinstance(dataset, Tensors) else Subset(dataset, index.tolist())
    )


def _some(classes: Sequence[int]) -> str:
    """At most eight of them, for a message."""
    shown = ", ".join(map(str, classes[:8]))
    return f"[{shown}]" if len(classes) <= 8 else f"[{shown}, ... {classes[-1]}]"
