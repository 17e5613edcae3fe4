"""Data in memory, tasks and scenarios, against plain loops over the samples."""

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from mas_ext.scenarios import Scenario, Task, Tensors, from_datasets, labels, split, targets


def numbered(y: list[int]) -> Tensors:
    """Images of 2 x 2 pixels, all of one colour: their number in the data set."""
    x = torch.arange(float(len(y))).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    return Tensors(x, torch.tensor(y, dtype=torch.int64))


class OneByOne(Dataset):
    """A data set as users write them: nothing but samples, with plain numbers as labels."""

    def __init__(self, y: list[int], target_transform=None) -> None:
        self.y, self.target_transform = y, target_transform

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        y = self.y[i] if self.target_transform is None else self.target_transform(self.y[i])
        return torch.full((1, 2, 2), float(i)), y


class Targets(OneByOne):
    """As torchvision's: labels before their transform."""

    @property
    def targets(self) -> list[int]:
        return self.y


# Data in memory


def test_samples_and_batches_are_the_same() -> None:
    x, y = torch.randn(5, 3), torch.tensor([4, 0, 2, 2, 1], dtype=torch.uint8)
    for transform, expected in ((None, x), (lambda x: 2 * x.flip(1), 2 * x.flip(1))):
        data = Tensors(x, y, transform)
        assert len(data) == 5
        index = torch.tensor([3, 0, 3])
        batch_x, batch_y = data.batch(index)
        assert torch.equal(batch_x, expected[index])
        assert batch_y.tolist() == [2, 4, 2]
        assert batch_y.dtype == torch.int64
        for i in (0, 4, -1):
            assert torch.equal(data[i][0], expected[i])
            assert data[i][1] == y[i]
        part = data.subset(y == 2)
        assert torch.equal(part.batch(torch.arange(2))[0], expected[2:4])
        loaded = torch.cat([x for x, _ in DataLoader(data, batch_size=2)])
        assert torch.equal(loaded, expected)


def test_a_transform_is_given_whole_batches_and_only_what_is_read() -> None:
    given = []

    def transform(x: torch.Tensor) -> torch.Tensor:
        given.append(tuple(x.shape))
        return x.sum(dim=1)

    data = Tensors(torch.ones(6, 2, 3), torch.zeros(6, dtype=torch.int64), transform)
    assert given == []
    x, _ = data.batch(torch.tensor([1, 5, 0, 2]))
    assert x.shape == (4, 3)
    data[3]
    assert given == [(4, 2, 3), (1, 2, 3)]


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (
            torch.ones(3, 2),
            torch.zeros(2, dtype=torch.int64),
            "x: got shape .*, expected an input for each of the 2 targets",
        ),
        (
            torch.tensor(1.0),
            torch.zeros(1, dtype=torch.int64),
            r"got shape \(\), expected an input for each of the 1 targets",
        ),
        (
            torch.ones(3, 2),
            torch.zeros(3, dtype=torch.complex64),
            r"y: got torch.complex64 of shape .*, expected labels \(N,\) or targets",
        ),
        (torch.ones(3, 2), torch.tensor(3), r"y: got torch.int64 of shape \(\)"),
    ],
)
def test_data_that_do_not_fit(x: torch.Tensor, y: torch.Tensor, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Tensors(x, y)


@pytest.mark.parametrize(
    "dataset",
    [
        numbered([5, 0, 3, 3]),
        TensorDataset(torch.ones(4, 2), torch.tensor([5, 0, 3, 3])),
        Subset(Targets([9, 3, 5, 0, 3]), [2, 3, 1, 4]),
        Targets([5, 0, 3, 3]),
        Targets([4, -1, 2, 2], target_transform=lambda y: y + 1),
        OneByOne([5, 0, 3, 3]),
    ],
    ids=["tensors", "tensor data set", "subset", "targets", "transformed targets", "one by one"],
)
def test_labels_of_any_data_set(dataset: Dataset) -> None:
    found = labels(dataset)
    assert found.dtype == torch.int64
    assert found.tolist() == [5, 0, 3, 3]
    assert [int(dataset[i][1]) for i in range(4)] == [5, 0, 3, 3]


def test_targets_that_are_no_labels() -> None:
    y = torch.randn(4, 2)
    data = Tensors(torch.ones(4, 3), y)
    assert torch.equal(data.batch(torch.tensor([2, 0]))[1], y[[2, 0]])
    assert torch.equal(data.subset(torch.tensor([1])).y, y[[1]])
    marks = torch.tensor([[0, 1], [1, 1], [0, 0], [1, 0]], dtype=torch.uint8)
    assert torch.equal(Tensors(torch.ones(4, 3), marks).batch(torch.tensor([1]))[1], marks[1:2])


class OneOfEach(Dataset):
    """Targets as a data set of one's own gives them, sample by sample."""

    def __init__(self, y: list[Any]) -> None:
        self.y = y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, Any]:
        return torch.ones(3), self.y[i]


def forms(y: torch.Tensor) -> list[Dataset]:
    """The same targets in every kind of data set."""
    with_targets = OneOfEach(list(y))
    with_targets.targets = y.tolist()  # type: ignore[attr-defined]
    twice = OneOfEach([*y, *y])
    return [
        Tensors(torch.ones(len(y), 3), y),
        TensorDataset(torch.ones(len(y), 3), y),
        Subset(twice, range(len(y), 2 * len(y))),
        with_targets,
        OneOfEach(list(y)),
        OneOfEach([each.numpy() for each in y]),
        OneOfEach(y.tolist()),
    ]


KINDS = [
    (torch.tensor([4, 2, 4, 9]), (2, 4, 9), None),
    (torch.tensor([True, False, True, True]), (0, 1), None),
    (torch.tensor([0.5, 1.0, 2.0, 3.0]), (), 1),
    (torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64), (), 1),
    (torch.tensor([[0.5, 1.0], [2.0, 3.0]]), (), 2),
    (torch.tensor([[0.0, 1.0], [1.0, 1.0]]), (), 2),
    (torch.tensor([[0, 1, 1], [1, 0, 0]]), (), 3),
    (torch.tensor([[False, True], [True, True]]), (), 2),
]


@pytest.mark.parametrize(("y", "classes", "outputs"), KINDS)
def test_the_kind_of_a_task_is_told_by_its_targets(
    y: torch.Tensor, classes: tuple[int, ...], outputs: int | None
) -> None:
    """In whatever data set; a float is no class, and nothing is rounded."""
    for data in forms(y):
        (task,) = from_datasets([(data, data)]).tasks
        assert (task.classes, task.outputs) == (classes, outputs)
        torch.testing.assert_close(targets(data), y, check_dtype=False, rtol=0, atol=0)
        assert targets(data).is_floating_point() == y.is_floating_point()
        if classes:
            assert labels(data).tolist() == y.tolist()
        else:
            with pytest.raises(
                ValueError, match=r"labels: got torch\..*, expected integers \(N,\)"
            ):
                labels(data)
            with pytest.raises(ValueError, match="labels: got"):
                split(data, data, 1)


@pytest.mark.parametrize(
    ("trained", "tested", "message"),
    [
        (
            [[0, 3]],
            [[0, 1]],
            r"got targets int64 of shape \(2,\) in task 'it', with numbers up to 3",
        ),
        ([[0, 1]], [[0, -1]], r"got targets int64 of shape \(2,\) in task 'it', with"),
        ([[7]], [[7]], r"got targets int64 of shape \(1,\) in task 'it', with numbers up to 7"),
        ([[[0, 1]]], [[[0, 1]]], r"got a target int64 of shape \(1, 2\) in task 'it', .* by hand"),
        (
            [[[0.5]]],
            [[[0.5]]],
            r"got a target float32 of shape \(1, 1\) in task 'it', expected one",
        ),
        ([[]], [[]], r"got a target float32 of shape \(0,\)"),
        ([1j], [1j], r"got a target complex64 of shape \(\)"),
        ([0.5], [1], "got targets of two kinds in task 'it', float32 .* and int64"),
        (
            [[0.5]],
            [[0.5, 1.0]],
            r"two kinds .*, float32 of shape \(1,\) .* and float32 of shape \(2,\)",
        ),
        (["cat"], ["cat"], "targets: got str, expected a number or a tensor"),
        ([{"boxes": 1}], [{"boxes": 1}], "targets: got dict, expected a number or a tensor"),
        ([[0, 1], [0, 1, 1]], [[0, 1]], r"targets: got shapes \(2,\) and \(3,\) in one data set"),
    ],
)
def test_targets_that_make_no_task(trained: list[Any], tested: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_datasets([(OneOfEach(trained), OneOfEach(tested))], ["it"])


def test_floats_are_no_positions_of_classes() -> None:
    task = Task("animals", numbered([0]), numbered([0]), (0, 1))
    for wrong in (torch.tensor([0.0, 1.9]), torch.tensor([[0], [1]])):
        with pytest.raises(
            ValueError, match=r"labels: got torch.* in task 'animals', expected int"
        ):
            task.positions(wrong)
    assert task.positions(torch.tensor([True, False])).tolist() == [1, 0]


# Tasks and scenarios


def test_positions_count_the_classes_of_the_task() -> None:
    task = Task("animals", numbered([0]), numbered([0]), (3, 7, 40))
    assert task.positions(torch.tensor([40, 3, 7, 7])).tolist() == [2, 0, 1, 1]
    assert task.positions(torch.tensor([], dtype=torch.int64)).tolist() == []
    for label in (-1, 4, 41):
        with pytest.raises(
            ValueError,
            match=rf"labels: got {label}, expected one of the classes \[3, 7, 40\] of task 'animals'$",
        ):
            task.positions(torch.tensor([3, label, 7]))


def test_any_data_sets_are_tasks() -> None:
    pairs = [
        (OneByOne([7, 2, 7]), OneByOne([2])),
        (numbered([0, 1, 2]), Targets([1, 1])),
    ]
    scenario = from_datasets(pairs, names=["mine", "yours"], name="ours")
    assert scenario.name == "ours"
    assert [task.name for task in scenario.tasks] == ["mine", "yours"]
    assert [task.classes for task in scenario.tasks] == [(2, 7), (0, 1, 2)]
    assert [(task.train, task.test) for task in scenario.tasks] == pairs
    assert scenario.shape == (1, 2, 2)
    assert [task.name for task in from_datasets(pairs).tasks] == ["0", "1"]


def test_data_sets_that_are_no_tasks() -> None:
    good = (numbered([0, 1]), numbered([1]))
    years = from_datasets([good, good], names=[2010, 2020])  # type: ignore[list-item]
    assert [task.name for task in years.tasks] == ["2010", "2020"]
    with pytest.raises(ValueError, match="names: got 2, expected one for each of the 1 tasks"):
        from_datasets([good], names=["one", "two"])
    with pytest.raises(ValueError, match="tasks: got none, expected at least one"):
        from_datasets([])
    for pair in ((numbered([]), numbered([])), (numbered([0]), numbered([]))):
        with pytest.raises(
            ValueError, match="pairs: got no samples to train or to test task '1' on"
        ):
            from_datasets([good, pair])
    with pytest.raises(ValueError, match=r"got the test label 2 in task '0', expected .*\[0, 1\]$"):
        from_datasets([(numbered([0, 1]), numbered([1, 2]))])
    for pair in (
        (Tensors(torch.ones(1, 5), torch.tensor([0])), numbered([0])),
        (numbered([0]), Tensors(torch.ones(1, 5), torch.tensor([0]))),
    ):
        with pytest.raises(
            ValueError, match=r"got inputs of shape \(5,\) .*expected \(1, 2, 2\) as in the first"
        ):
            from_datasets([good, pair])


# Splitting


def test_split_by_hand() -> None:
    scenario = split(numbered([3, 0, 1, 2, 1, 3]), numbered([2, 1, 0, 3]), tasks=2, name="hand")
    first, second = scenario.tasks
    assert scenario.name == "hand"
    assert first.classes == (0, 1)
    assert second.classes == (2, 3)
    assert first.name == "0/1"
    assert second.name == "2/3"
    assert first.train.x[:, 0, 0, 0].tolist() == [1, 2, 4]
    assert first.train.y.tolist() == [0, 1, 1]
    assert second.train.x[:, 0, 0, 0].tolist() == [0, 3, 5]
    assert second.train.y.tolist() == [3, 2, 3]
    assert first.test.x[:, 0, 0, 0].tolist() == [1, 2]
    assert first.test.y.tolist() == [1, 0]
    assert second.test.x[:, 0, 0, 0].tolist() == [0, 3]
    assert second.test.y.tolist() == [2, 3]


@pytest.mark.parametrize("kind", [numbered, OneByOne])
@pytest.mark.parametrize("tasks", [1, 2, 5, 10])
def test_every_sample_is_in_exactly_one_task(tasks: int, kind) -> None:
    y = torch.randint(10, (200,)).tolist()
    scenario = split(kind(y), kind(list(range(10)) * 11), tasks)
    assert len(scenario.tasks) == tasks
    seen = []
    for task in scenario.tasks:
        for i in range(len(task.train)):
            x, label = task.train[i]
            number = int(x[0, 0, 0])
            assert label == y[number]
            assert label in task.classes
            seen.append(number)
    assert sorted(seen) == list(range(200))
    assert sum(len(task.test) for task in scenario.tasks) == 110


def test_labels_need_not_be_consecutive() -> None:
    scenario = split(numbered([40, 7, 9, 100]), numbered([9, 7, 100, 40]), tasks=2)
    assert [task.classes for task in scenario.tasks] == [(7, 9), (40, 100)]


def test_many_classes_have_a_short_name() -> None:
    classes = [*range(9), 40]
    names = [task.name for task in split(numbered(classes), numbered(classes), tasks=2).tasks]
    assert names == ["0-4", "5-40"]


@pytest.mark.parametrize("tasks", [0, -1, 3, 5])
def test_classes_that_cannot_be_shared_out(tasks: int) -> None:
    with pytest.raises(
        ValueError, match=f"tasks: got {tasks}, expected a divisor of the number of classes, 4$"
    ):
        split(numbered([0, 1, 2, 3]), numbered([0, 1, 2, 3]), tasks)


def test_no_images_at_all() -> None:
    with pytest.raises(
        ValueError, match="tasks: got 5, expected a divisor of the number of classes, 0"
    ):
        split(numbered([]), numbered([]))


@pytest.mark.parametrize("y_test", [[0, 1, 2], [0, 1, 2, 3, 4]])
def test_test_labels_differ_from_training(y_test: list[int]) -> None:
    with pytest.raises(
        ValueError, match=r"test: got labels of .*expected \[0, 1, 2, 3\] as in training"
    ):
        split(numbered([0, 1, 2, 3]), numbered(y_test), tasks=2)


def test_a_second_transform_follows_the_first() -> None:
    data = numbered([0, 0, 0]).transformed(lambda x: x + 1).transformed(lambda x: 10 * x)
    assert data.batch(torch.tensor([2, 1]))[0][:, 0, 0, 0].tolist() == [30, 20]
    assert data[0][0][0, 0, 0] == 10


def test_tasks_in_another_order() -> None:
    scenario = from_datasets([(numbered([t]), numbered([t])) for t in range(3)], name="three")
    turned = scenario.reordered([2, 0, 1])
    assert [task.classes for task in turned.tasks] == [(2,), (0,), (1,)]
    assert turned.name == "three"
    for order in ([0, 1], [0, 1, 1], [1, 2, 3], []):
        with pytest.raises(ValueError, match=r"order: got .*, expected each of 0 to 2 once"):
            scenario.reordered(order)


def test_inputs_that_are_no_tensors() -> None:
    pictures = [(bytes(4), 0)]
    with pytest.raises(
        ValueError, match="got bytes as input to test task 'one', expected a tensor"
    ):
        Scenario((Task("one", numbered([0]), pictures, (0,)),))
