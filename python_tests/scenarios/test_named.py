"""Scenarios by name, on small files made here and on real ones where they are at hand."""

from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import SHARED, write_idx_folder, write_npz

from mas_ext.scenarios import Tensors
from mas_ext.scenarios import datasets as data
from mas_ext.scenarios import named as catalogue
from mas_ext.scenarios.transforms import Rotation


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the scenarios need, but few of each; digits of four classes."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("FashionMNIST", "MNIST"):
        raw = folder / name / "raw"
        write_idx_folder(raw)
        labels = raw / "train-labels-idx1-ubyte"
        labels.write_bytes(
            labels.read_bytes()[:-2] + bytes([0, 1])
        )  # as few as there are in testing
    for name in ("kmnist10k", "notmnist10k"):
        write_npz(folder / f"{name}.npz", 28, 28, classes=10)
    write_npz(folder / "cifar100_subset.npz", 32, 32, 3, classes=100)
    return folder


def whole(dataset: Tensors) -> torch.Tensor:
    return dataset.batch(torch.arange(len(dataset)))[0]


def standard(images: torch.Tensor) -> torch.Tensor:
    """Each channel with mean 0 and deviation 1, by NumPy in float64."""
    x = images.double().numpy()
    mean, deviation = (f(x, axis=(0, 2, 3), keepdims=True) for f in (np.mean, np.std))
    return torch.from_numpy((x - mean) / deviation).float()


@pytest.mark.parametrize(
    ("name", "tasks", "expected"),
    [
        ("split-mnist", 2, ["0/1", "2/3"]),
        ("split-fashion", 4, ["0", "1", "2", "3"]),
        ("split-cifar100", None, [f"{10 * t}-{10 * t + 9}" for t in range(10)]),
        ("permuted-mnist", None, [str(t) for t in range(10)]),
        ("rotated-mnist", None, [f"{18 * t}°" for t in range(10)]),
    ],
)
def test_tasks_by_name(folder: Path, name: str, tasks: int | None, expected: list[str]) -> None:
    scenario = catalogue.make_scenario(name, folder, tasks)
    assert scenario.name == name
    assert [task.name for task in scenario.tasks] == expected


def test_digits_need_no_folder() -> None:
    scenario = catalogue.make_scenario("split-digits")
    assert [task.name for task in scenario.tasks] == ["0/1", "2/3", "4/5", "6/7", "8/9"]
    assert scenario.shape == (1, 8, 8)


def test_permutations_are_by_the_seed_and_need_no_memory(folder: Path) -> None:
    plain = standard(data.load_dataset("mnist", folder)[0].x)
    mixed, again, other = (
        catalogue.make_scenario("permuted-mnist", folder, 3, seed=seed).tasks for seed in (1, 1, 2)
    )
    torch.testing.assert_close(whole(mixed[0].train), plain)
    for t in (1, 2):
        images = whole(mixed[t].train)
        assert not torch.equal(images, plain)
        torch.testing.assert_close(images.flatten(1).sort(1)[0], plain.flatten(1).sort(1)[0])
        assert torch.equal(images, whole(again[t].train))
        assert not torch.equal(images, whole(other[t].train))
        # The same for training and testing: the first four images have the same pixels in both.
        assert torch.equal(whole(mixed[t].test), images[:4])
    assert not torch.equal(whole(mixed[1].train), whole(mixed[2].train))
    assert len({task.train.x.data_ptr() for task in mixed}) == 1


def test_more_tasks_begin_with_the_same_permutations(folder: Path) -> None:
    few, many = (catalogue.make_scenario("permuted-mnist", folder, tasks).tasks for tasks in (3, 5))
    for one, same in zip(few, many, strict=False):
        assert torch.equal(whole(one.test), whole(same.test))


def test_angles_are_equal_steps(folder: Path) -> None:
    train, test = data.load_dataset("mnist", folder)
    scenario = catalogue.rotated(train, test, tasks=4, degrees=90)
    for task, angle in zip(scenario.tasks, (0, 22.5, 45, 67.5), strict=True):
        assert torch.equal(whole(task.train), Rotation(angle)(train.x))
        assert torch.equal(whole(task.test), Rotation(angle)(test.x))


def test_data_sets_of_one_shape(folder: Path) -> None:
    scenario = catalogue.make_scenario("recognition", folder)
    assert [task.name for task in scenario.tasks] == [
        *("mnist", "fashion-mnist", "kmnist", "notmnist"),
        *("cifar100 0-24", "cifar100 25-49", "cifar100 50-74", "cifar100 75-99"),
    ]
    assert scenario.shape == (3, 32, 32)
    assert [len(task.classes) for task in scenario.tasks] == [4, 4, 10, 10, 25, 25, 25, 25]
    plain = standard(data.load_dataset("kmnist", folder)[0].x)[:, 0]
    for channel in range(3):
        torch.testing.assert_close(whole(scenario.tasks[2].train)[:, channel, 2:30, 2:30], plain)
    objects = torch.cat([whole(task.train) for task in scenario.tasks[4:]])
    labels = torch.cat([task.train.y for task in scenario.tasks[4:]])
    kept = data.load_dataset("cifar100", folder)[0]
    torch.testing.assert_close(objects[labels == 31], standard(kept.x)[kept.y == 31])


def test_tasks_in_a_given_or_random_order(folder: Path) -> None:
    def names(**given) -> list[str]:
        return [
            task.name for task in catalogue.make_scenario("split-mnist", folder, 4, **given).tasks
        ]

    assert names(order=[3, 1, 0, 2]) == ["3", "1", "0", "2"]
    assert names(order="random", seed=1) == names(order="random", seed=1)
    orders = {tuple(names(order="random", seed=seed)) for seed in range(60)}
    assert len(orders) > 18  # of 24; on average 22
    assert all(sorted(order) == ["0", "1", "2", "3"] for order in orders)


def test_what_cannot_be_built(folder: Path) -> None:
    with pytest.raises(ValueError, match="scenario: got 'split_mnist', did you mean 'split-mnist'"):
        catalogue.make_scenario("split_mnist", folder)
    for name in ("permuted-mnist", "rotated-mnist"):
        with pytest.raises(ValueError, match="tasks: got 0, expected a whole number from 1 up"):
            catalogue.make_scenario(name, folder, 0)
    for tasks in (-1, 4, 7):
        with pytest.raises(
            ValueError, match=r"tasks: got .*, expected 4 and a number of groups that divides"
        ):
            catalogue.make_scenario("recognition", folder, tasks)
    with pytest.raises(ValueError, match=r"order: got .*, expected each of 0 to 1 once"):
        catalogue.make_scenario("split-mnist", folder, 2, order=[1, 1])
    with pytest.raises(FileNotFoundError, match="mnist is not in"):
        catalogue.make_scenario("recognition", folder / "empty")


# Real files, where they are at hand. Defined conditionally, so that no test is ever skipped.

if (SHARED / "cifar100_subset.npz").is_file() and (SHARED / "MNIST").is_dir():

    def test_real_data_sets() -> None:
        scenario = catalogue.make_scenario("recognition", SHARED)
        sizes = [(len(task.train), len(task.test)) for task in scenario.tasks]
        assert sizes == [(60000, 10000)] * 2 + [(8000, 2000)] * 2 + [(4000, 1000)] * 4
        assert [len(task.classes) for task in scenario.tasks] == [10] * 4 + [25] * 4
        for task in scenario.tasks:
            x, y = task.train.batch(torch.arange(64))
            assert x.shape == (64, 3, 32, 32)
            assert -3 < x.min() < 0 < x.max() < 5
            assert task.positions(y).max() < len(task.classes)
