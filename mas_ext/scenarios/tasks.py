"""Scenarios: which tasks are learned, in which order, and on which data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset


class Tensors(Dataset[tuple[Tensor, Tensor]]):
    """Data in memory, read sample by sample or, much faster, in whole batches.

    Args:
        x: inputs (N, ...).
        y: labels (N,), of any integer type, kept as int64, or targets (N, ...) of any real type.
        transform: maps inputs (n, ...) to as many of any shape, whenever they are read; None: as they are.

    Raises:
        ValueError: y that is complex or 0-dim, or not as many as inputs.
    """

    def __init__(
        self, x: Tensor, y: Tensor, transform: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        if y.ndim == 0 or y.is_complex():
            raise ValueError(
                f"y: got {y.dtype} of shape {tuple(y.shape)}, expected labels (N,) or targets (N, ...)"
            )
        if x.ndim == 0 or len(x) != len(y):
            raise ValueError(
                f"x: got shape {tuple(x.shape)}, expected an input for each of the {len(y)} targets"
            )
        self.x, self.y, self.transform = x, y.long() if _are_labels(y) else y, transform

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x = self.x[i].unsqueeze(0)
        return (x if self.transform is None else self.transform(x))[0], self.y[i]

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The samples `index`, (n,) int64: inputs (n, ...) and labels (n,) or targets (n, ...)."""
        x = self.x[index]
        return x if self.transform is None else self.transform(x), self.y[index]

    def subset(self, index: Tensor) -> Tensors:
        """The samples `index`, (n,) int64 or (N,) bool, as a data set."""
        return Tensors(self.x[index], self.y[index], self.transform)

    def transformed(self, transform: Callable[[Tensor], Tensor]) -> Tensors:
        """These samples, in the same memory, seen through one more transform."""
        first = self.transform
        both = transform if first is None else lambda x: transform(first(x))
        return Tensors(self.x, self.y, both)


def targets(dataset: Dataset[Any]) -> Tensor:
    """What all samples have as targets, (N, ...), in the type in which the data set has them.

    Inputs are not read for `Tensors`, TensorDataset, Subset and data sets with `targets`, as torchvision's.

    Raises:
        ValueError: targets that are no numbers, or differ in shape.
    """
    if isinstance(dataset, Tensors):
        return dataset.y
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[1]
    if isinstance(dataset, Subset):
        return targets(dataset.dataset)[torch.as_tensor(dataset.indices)]
    if hasattr(dataset, "targets") and getattr(dataset, "target_transform", None) is None:
        return torch.as_tensor(dataset.targets)
    found = [_target(dataset, i) for i in range(len(dataset))]  # type: ignore[arg-type]
    for target in found:
        if target.shape != found[0].shape:
            raise ValueError(
                f"targets: got shapes {tuple(found[0].shape)} and {tuple(target.shape)} in one data set, "
                "expected equal ones"
            )
    return torch.stack(found) if found else torch.empty(0, dtype=torch.int64)


def _target(dataset: Dataset[Any], i: int) -> Tensor:
    target = dataset[i][1]
    try:
        return torch.as_tensor(target)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"targets: got {type(target).__name__}, expected a number or a tensor"
        ) from error


def labels(dataset: Dataset[Any]) -> Tensor:
    """The labels of all samples, (N,) int64, read as `targets` reads them.

    Raises:
        ValueError: targets that are no integers (N,).
    """
    found = targets(dataset)
    if not _are_labels(found):
        raise ValueError(
            f"labels: got {found.dtype} of shape {tuple(found.shape)}, expected integers (N,)"
        )
    return found.long()


def _are_labels(y: Tensor) -> bool:
    return y.ndim == 1 and not y.is_floating_point() and not y.is_complex()


@dataclass(frozen=True)
class Task:
    """A learning unit: data to train and to test on, and the classes that it distinguishes.

    Attributes:
        classes: the labels in the data sets, sorted; none where targets are no labels, as in regression.
        outputs: of the task's head; None: one per class.
    """

    name: str
    train: Dataset[Any]
    test: Dataset[Any]
    classes: tuple[int, ...] = ()
    outputs: int | None = None

    def positions(self, labels: Tensor) -> Tensor:
        """The position of each label in `classes`, which a head is trained on: (N,) -> (N,) int64.

        Raises:
            ValueError: a label that is not among the classes; no integers (N,).
        """
        if not _are_labels(labels):
            raise ValueError(
                f"labels: got {labels.dtype} of shape {tuple(labels.shape)} in task {self.name!r}, expected "
                "integers (N,), as it has classes"
            )
        labels = labels.long()
        classes = torch.tensor(self.classes, device=labels.device)
        positions = torch.searchsorted(classes, labels).clamp(max=len(classes) - 1)
        foreign = labels[classes[positions] != labels]
        if len(foreign):
            raise ValueError(
                f"labels: got {foreign[0].item()}, expected one of the classes {_some(self.classes)} of task "
                f"{self.name!r}"
            )
        return positions


@dataclass(frozen=True)
class Scenario:
    """Tasks in the order in which they are learned, all with inputs of the same shape.

    Raises:
        ValueError: no task, or a first input that is no tensor or has another shape.
    """

    tasks: tuple[Task, ...]
    name: str = ""

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("tasks: got none, expected at least one")
        for task in self.tasks:
            for part, dataset in (("train", task.train), ("test", task.test)):
                x = dataset[0][0]
                if not isinstance(x, Tensor):
                    raise ValueError(
                        f"tasks: got {type(x).__name__} as input to {part} task {task.name!r}, expected a "
                        "tensor: give its data set a transform that makes one"
                    )
                if x.shape != self.shape:
                    raise ValueError(
                        f"tasks: got inputs of shape {tuple(x.shape)} to {part} task {task.name!r}, expected "
                        f"{self.shape} as in the first task"
                    )

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one input."""
        return tuple(self.tasks[0].train[0][0].shape)

    def reordered(self, order: Sequence[int]) -> Scenario:
        """These tasks with that at position `order[0]` first; a ValueError unless each is in it once."""
        if sorted(order) != list(range(len(self.tasks))):
            raise ValueError(
                f"order: got {list(order)}, expected each of 0 to {len(self.tasks) - 1} once"
            )
        return Scenario(tuple(self.tasks[t] for t in order), self.name)


def from_datasets(
    pairs: Sequence[tuple[Dataset[Any], Dataset[Any]]],
    names: Sequence[str] | None = None,
    name: str = "",
) -> Scenario:
    """One task for each pair of data sets, of the kind that its targets tell.

    | a sample's target | task | task loss, by name |
    |---|---|---|
    | an integer | its classes are those that occur | "cross-entropy", the default |
    | one float, or d of them, (d,) | regression, of 1 or d outputs | "mse", "l1", "smooth-l1" |
    | C integers or booleans (C,), all 0 or 1, C > 1 | multi-label, of C outputs | "bce" |

    Anything else is refused. Dense targets, one for every place of an image or a sequence, can be learned all
    the same: a Task made by hand, with `outputs` per place, a backbone that gives features as (N, H, W, width)
    and a task loss and score of one's own for outputs (N, H, W, outputs).

    Args:
        pairs: data to train and to test on.
        names: of the tasks; None numbers them from 0.
        name: of the scenario.

    Raises:
        ValueError: not as many names as pairs, no data, targets of another kind or of two, or test labels that
            do not occur in training.
    """
    names = [str(name) for name in (range(len(pairs)) if names is None else names)]
    if len(names) != len(pairs):
        raise ValueError(
            f"names: got {len(names)}, expected one for each of the {len(pairs)} tasks"
        )
    tasks = (_task(task, *pair) for task, pair in zip(names, pairs, strict=True))
    return Scenario(tuple(tasks), name)


def _task(name: str, train: Dataset[Any], test: Dataset[Any]) -> Task:
    """The task on these data."""
    if not len(train) or not len(test):  # type: ignore[arg-type]
        raise ValueError(
            f"pairs: got no samples to train or to test task {name!r} on, expected some"
        )
    first, tested = _target(train, 0), _target(test, 0)
    kinds = [
        f"{each.dtype} of shape {tuple(each.shape)}".removeprefix("torch.")
        for each in (first, tested)
    ]
    if first.shape != tested.shape or first.is_floating_point() != tested.is_floating_point():
        raise ValueError(
            f"pairs: got targets of two kinds in task {name!r}, {kinds[0]} to train and {kinds[1]} to test, "
            "expected one"
        )
    if first.ndim > 1 or first.is_complex() or first.numel() == 0:
        raise ValueError(
            f"pairs: got a target {kinds[0]} in task {name!r}, expected one label, or numbers of shape () or "
            "(outputs,); for one at every place, make a Task by hand, see from_datasets"
        )
    if first.is_floating_point():
        return Task(name, train, test, outputs=first.numel())
    if first.ndim == 0:
        return Task(name, train, test, _classes(name, labels(train), labels(test)))
    for part in (targets(train), targets(test)):
        if len(first) < 2 or bool(((part != 0) & (part != 1)).any()):
            raise ValueError(
                f"pairs: got targets {kinds[0]} in task {name!r}, with numbers up to {int(part.max())}, "
                "expected one label, several decisions of 0 or 1, or floats to regress on"
            )
    return Task(name, train, test, outputs=len(first))


def _classes(name: str, trained: Tensor, tested: Tensor) -> tuple[int, ...]:
    """The labels that occur in training."""
    classes = trained.unique().tolist()
    if foreign := set(tested.unique().tolist()) - set(classes):
        raise ValueError(
            f"pairs: got the test label {min(foreign)} in task {name!r}, expected one of those in training, "
            f"{_some(classes)}"
        )
    return tuple(classes)


def split(train: Dataset[Any], test: Dataset[Any], tasks: int = 5, name: str = "") -> Scenario:
    """Divide the classes into tasks of equal size, in the order of their labels.

    Tasks are named by their classes, as in "0/1", or "0-9" for more than four.

    Raises:
        ValueError: classes that cannot be divided evenly, or one without test samples.
    """
    to_train, to_test = labels(train), labels(test)
    classes = to_train.unique().tolist()
    if tasks < 1 or not classes or len(classes) % tasks:
        raise ValueError(
            f"tasks: got {tasks}, expected a divisor of the number of classes, {len(classes)}"
        )
    if to_test.unique().tolist() != classes:
        raise ValueError(
            f"test: got labels of the classes {_some(to_test.unique().tolist())}, expected "
            f"{_some(classes)} as in training"
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
