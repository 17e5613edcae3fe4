"""Batches of several tasks' samples, with labels as columns, the same from memory and sample by sample."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from mas_ext.scenarios import Task, Tensors
from mas_ext.training.samples import Stream, TaskSamples, split_batches

CLASSES = ((3, 10), (-7, 4, 100))
TAKEN = (torch.tensor([5, 0, 3]), torch.tensor([1, 6, 2, 0]))


def samples(task: int) -> tuple[Tensor, Tensor]:
    """Inputs that tell which task and sample they are, and labels in turn."""
    return torch.arange(7.0)[:, None] + 10 * task, torch.tensor(CLASSES[task] * 4)[:7]


def stream(*in_memory: bool) -> Stream:
    """Some samples of two tasks, whose labels count from 0 and from 2."""
    parts = []
    for task, memory in enumerate(in_memory):
        x, y = samples(task)
        data: Dataset = Tensors(x, y) if memory else TensorDataset(x, y)
        parts.append(
            TaskSamples(Task(str(task), data, data, CLASSES[task]), data, TAKEN[task], 2 * task)
        )
    return Stream(parts)


X = [5.0, 0.0, 3.0, 11.0, 16.0, 12.0, 10.0]
Y = [1, 0, 1, 3, 2, 4, 2]  # by hand: 3, -7, 4 and 100 are the columns 0 and 2 to 4, sorted


@pytest.mark.parametrize("in_memory", [(True, True), (False, False), (True, False)])
def test_samples_labels_and_batches(in_memory: tuple[bool, bool]) -> None:
    found = stream(*in_memory)
    assert len(found) == 7
    assert found.labels.tolist() == Y
    assert [(float(x), int(y)) for x, y in (found[i] for i in range(7))] == list(
        zip(X, Y, strict=True)
    )
    wanted = [torch.tensor([6, 2, 3]), torch.tensor([0])]
    batches = list(found.batches(wanted))
    assert len(batches) == 2
    for (x, y), part in zip(batches, wanted, strict=True):
        assert y.dtype == torch.int64
        assert sorted(zip(x[:, 0].tolist(), y.tolist(), strict=True)) == sorted(
            (X[i], Y[i]) for i in part.tolist()
        )
    assert list(found.batches([])) == []


@pytest.mark.parametrize(
    ("count", "size", "expected"),
    [
        (0, 4, []),
        (1, 4, [1]),
        (4, 4, [4]),
        (5, 4, [5]),
        (6, 4, [4, 2]),
        (9, 4, [4, 5]),
        (3, 1, [1, 1, 1]),
    ],
)
def test_no_sample_is_alone_in_the_last_batch(count: int, size: int, expected: list[int]) -> None:
    order = torch.arange(count).flip(0)
    parts = split_batches(order, size)
    assert [len(part) for part in parts] == expected
    assert [i for part in parts for i in part.tolist()] == order.tolist()


def test_reading_draws_no_random_numbers_outside() -> None:
    before = torch.get_rng_state()
    list(stream(False, False).batches([torch.arange(4)]))
    assert torch.equal(torch.get_rng_state(), before)


class Read(Dataset[Any]):
    """Which process reads."""

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return torch.tensor([os.getpid()]), 0


def test_workers_read() -> None:
    data = Read()
    part = TaskSamples(Task("0", data, data, (0,)), data, torch.arange(2))
    for workers in (0, 1):
        (batch,) = Stream([part], workers).batches([torch.arange(2)])
        assert bool((batch[0] == os.getpid()).all()) == (workers == 0)
