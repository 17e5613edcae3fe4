"""The samples of one task, or of several mixed, batch by batch in a given order."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from mas_ext.scenarios import Task, Tensors, labels


@dataclass(frozen=True)
class TaskSamples:
    """Some samples of a task's data.

    Attributes:
        index: positions in the data set, (n,) int64.
        first: the output of the task's first class among those that are trained.
    """

    task: Task
    dataset: Dataset[Any]
    index: Tensor
    first: int = 0

    def targets(self, y: Tensor) -> Tensor:
        """Labels as positions among the outputs; targets that are no labels as they are."""
        return self.first + self.task.positions(y) if self.task.classes else y


def split_batches(order: Tensor, size: int) -> list[Tensor]:
    """The samples `order`, (N,), in batches of `size`; a single one that is left over joins the last."""
    found = list(order.split(size)) if len(order) else []
    if len(found) > 1 and len(found[-1]) == 1 < size:
        found[-2:] = [torch.cat(found[-2:])]
    return found


def _collated(samples: list[tuple[Any, Any]]) -> Any:
    """The samples as a batch; a ValueError for inputs or targets that differ in shape."""
    for name, column in zip(("inputs", "targets"), zip(*samples, strict=True), strict=True):
        first, *others = (torch.as_tensor(each).shape for each in column)
        for shape in others:
            if shape != first:
                raise ValueError(
                    f"{name}: got shapes {tuple(first)} and {tuple(shape)} in one batch, expected equal ones; "
                    "pad sequences of different lengths (torch.nn.utils.rnn.pad_sequence)"
                )
    return default_collate(samples)


class Stream(Dataset[tuple[Tensor, Tensor]]):
    """The samples of several tasks one after another, with targets as the task loss takes them.

    workers: processes that read data sets that are not in memory. device: of the batches.
    """

    def __init__(
        self,
        parts: Sequence[TaskSamples],
        workers: int = 0,
        device: torch.device | None = None,
    ) -> None:
        self.parts, self.workers, self.device = parts, workers, device
        # Of each sample: the number of its part, and its position in the data set of that.
        counts = torch.tensor([len(part.index) for part in parts])
        self._number = torch.arange(len(parts)).repeat_interleave(counts)
        self._index = torch.cat([part.index for part in parts])

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        part = self.parts[int(self._number[i])]
        x, y = part.dataset[int(self._index[i])]
        return x, part.targets(torch.as_tensor(y)[None])[0]

    @functools.cached_property
    def labels(self) -> Tensor:
        """The labels of all samples as targets, (N,)."""
        return torch.cat([p.targets(labels(p.dataset)[p.index]) for p in self.parts])

    def batches(self, indices: Sequence[Tensor], seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The samples of each index, (n,) int64: x (n, ...), y (n, ...); seed: of the workers."""
        read: Iterable[Any] = map(self._batch, indices)
        if not all(isinstance(part.dataset, Tensors) for part in self.parts):
            # A generator of its own: what is drawn outside does not depend on where the reading began.
            read = DataLoader(
                self,
                batch_sampler=[index.tolist() for index in indices],
                num_workers=self.workers,
                generator=torch.Generator().manual_seed(seed),
                collate_fn=_collated,
            )
        for x, y in read:
            yield x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)

    def _batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        number, xs, ys = self._number[index], [], []
        for k in number.unique().tolist():
            part = self.parts[k]
            assert isinstance(part.dataset, Tensors)
            x, y = part.dataset.batch(self._index[index[number == k]])
            xs.append(x)
            ys.append(part.targets(y))
        return torch.cat(xs), torch.cat(ys)
