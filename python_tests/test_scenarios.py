"""Splitting into tasks, against a plain loop over the samples."""

import pytest
import torch

from mas_ext.data import Images
from mas_ext.scenarios import split


def numbered(y_train: list[int], y_test: list[int]) -> Images:
    """Images of 2 x 2 pixels, all of one colour: their number in the data set."""
    x_train, x_test = torch.arange(float(len(y_train))), torch.arange(float(len(y_test)))
    return Images(
        x_train.reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2),
        torch.tensor(y_train, dtype=torch.int64),
        x_test.reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2),
        torch.tensor(y_test, dtype=torch.int64),
    )


def test_split_by_hand() -> None:
    scenario = split(numbered([3, 0, 1, 2, 1, 3], [2, 1, 0, 3]), tasks=2)
    first, second = scenario.tasks
    assert first.classes == (0, 1)
    assert second.classes == (2, 3)
    assert first.name == "0/1"
    assert second.name == "2/3"
    assert first.x_train[:, 0, 0, 0].tolist() == [1, 2, 4]
    assert first.y_train.tolist() == [0, 1, 1]
    assert second.x_train[:, 0, 0, 0].tolist() == [0, 3, 5]
    assert second.y_train.tolist() == [1, 0, 1]
    assert first.x_test[:, 0, 0, 0].tolist() == [1, 2]
    assert first.y_test.tolist() == [1, 0]
    assert second.x_test[:, 0, 0, 0].tolist() == [0, 3]
    assert second.y_test.tolist() == [0, 1]
    assert scenario.in_features == 4


@pytest.mark.parametrize("tasks", [1, 2, 5, 10])
def test_every_sample_is_in_exactly_one_task(tasks: int) -> None:
    labels = torch.randint(10, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    images = numbered(labels, labels[:100] + list(range(10)))
    scenario = split(images, tasks)
    assert len(scenario.tasks) == tasks
    seen = []
    for task in scenario.tasks:
        for x, y in zip(task.x_train, task.y_train, strict=True):
            number = int(x[0, 0, 0])
            assert task.classes[int(y)] == labels[number]
            seen.append(number)
    assert sorted(seen) == list(range(200))
    assert sum(len(task.y_test) for task in scenario.tasks) == 110


def test_labels_need_not_be_consecutive() -> None:
    scenario = split(numbered([40, 7, 9, 100], [9, 7, 100, 40]), tasks=2)
    assert [task.classes for task in scenario.tasks] == [(7, 9), (40, 100)]
    assert scenario.tasks[1].y_train.tolist() == [0, 1]


@pytest.mark.parametrize("tasks", [0, -1, 3, 5])
def test_classes_that_cannot_be_shared_out(tasks: int) -> None:
    with pytest.raises(ValueError, match=f"number of classes, 4, got {tasks}$"):
        split(numbered([0, 1, 2, 3], [0, 1, 2, 3]), tasks)


def test_no_images_at_all() -> None:
    with pytest.raises(ValueError, match="number of classes, 0, got 5"):
        split(numbered([], []))


@pytest.mark.parametrize("y_test", [[0, 1, 2], [0, 1, 2, 3, 4]])
def test_test_labels_differ_from_training(y_test: list[int]) -> None:
    with pytest.raises(ValueError, match=r"expected test labels of the classes \[0, 1, 2, 3\]"):
        split(numbered([0, 1, 2, 3], y_test), tasks=2)
