"""Scenarios by name, on data read from a folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mas_ext._arguments import check_count, resolve
from mas_ext.scenarios import datasets as data
from mas_ext.scenarios.tasks import Scenario, Task, Tensors, from_datasets, split
from mas_ext.scenarios.transforms import Canvas, Permutation, Rotation, Standardisation

Folder = str | Path | None


def make_scenario(
    name: str,
    folder: Folder = None,
    tasks: int | None = None,
    order: Sequence[int] | Literal["random"] | None = None,
    seed: int = 0,
) -> Scenario:
    """The scenario called `name`.

    Images are standardised: each channel has mean 0 and standard deviation 1 over the training images of a data
    set.

    Args:
        name: one of `SCENARIOS`, or "module:function" of a function of one's own that is called with `folder`,
            `tasks` and `seed` and returns a Scenario.
        folder: where its data are, as for `mas_ext.scenarios.datasets.load_dataset`.
        tasks: how many; None: as many as is usual.
        order: positions of the tasks in the order in which they are learned; "random": drawn by the seed.
        seed: of a random order, and of the permutations of permuted-mnist.

    Raises:
        ValueError: an unknown name, or a number or order of tasks that cannot be.
        FileNotFoundError: data that are not there.
    """
    entry = known_scenario(name)
    if not isinstance(entry, Recipe):
        entry = Recipe(entry, None)
    scenario = entry.make(folder, entry.tasks if tasks is None else tasks, seed)
    if not isinstance(scenario, Scenario):
        raise ValueError(
            f"scenario: got {type(scenario).__name__} from {name!r}, expected a Scenario"
        )
    scenario = replace(scenario, name=name)
    if order is None:
        return scenario
    if order == "random":
        order = torch.randperm(len(scenario.tasks), generator=_generator(seed)).tolist()
    return scenario.reordered(order)


def known_scenario(name: str) -> Any:
    """The Recipe of this name, or the function that "module:function" imports.

    Raises:
        ValueError: an unknown name.
    """
    if name in RENAMED:
        raise ValueError(f"scenario: got {name!r}, expected {RENAMED[name]!r}, its name by now")
    return resolve("scenario", name, SCENARIOS)


def permuted(train: Tensors, test: Tensors, tasks: int = 10, seed: int = 0) -> Scenario:
    """One data set with its pixels in a new random order in each task but the first (Goodfellow et al. 2013).

    Orders are drawn one after another: those of fewer tasks are the first of more.
    """
    check_count(tasks, "tasks")
    generator, pixels = _generator(seed), math.prod(train[0][0].shape[1:])
    orders = [torch.randperm(pixels, generator=generator) for _ in range(1, tasks)]
    mixed = [_seen_through(Permutation(order), train, test) for order in orders]
    return from_datasets([(train, test), *mixed])


def rotated(train: Tensors, test: Tensors, tasks: int = 10, degrees: float = 180.0) -> Scenario:
    """One data set rotated by t / tasks * degrees in task t = 0, 1, ...

    Lopez-Paz and Ranzato, Gradient Episodic Memory, NeurIPS 2017, draw each angle at random between
    this one and the next.
    """
    check_count(tasks, "tasks")
    angles = [t * degrees / tasks for t in range(tasks)]
    turned = [_seen_through(Rotation(angle), train, test) for angle in angles]
    return from_datasets(turned, names=[f"{angle:g}\N{DEGREE SIGN}" for angle in angles])


def recognition(folder: Folder = None, tasks: int = 8) -> Scenario:
    """MNIST, Fashion-MNIST, KMNIST, notMNIST, then groups of CIFAR-100's classes, all as (3, 32, 32).

    After the eight recognition tasks of Aljundi et al., Memory Aware Synapses, ECCV 2018, at a size that
    needs no GPU. Grey images are framed in black, their channel repeated.
    """
    names = ("mnist", "fashion-mnist", "kmnist", "notmnist")
    if tasks <= len(names) or 100 % (tasks - len(names)):
        raise ValueError(
            f"tasks: got {tasks}, expected {len(names)} and a number of groups that divides 100"
        )
    canvas = Canvas((3, 32, 32))
    single: list[Task] = []
    for name in names:
        pair = _seen_through(canvas, *data.load_dataset(name, folder))
        single += standardised(from_datasets([pair], [name])).tasks
    groups = standardised(split(*data.load_dataset("cifar100", folder), tasks - len(names))).tasks
    objects = [replace(group, name=f"cifar100 {group.name}") for group in groups]
    return Scenario((*single, *objects))


def standardised(scenario: Scenario) -> Scenario:
    """These tasks with images standardised by all their training images as they are stored."""
    stored = {id(part.x): part.x for task in scenario.tasks for part in [_in_memory(task.train)]}
    transform = Standardisation.of(list(stored.values()))
    tasks = []
    for task in scenario.tasks:
        train, test = _seen_through(transform, task.train, task.test)
        tasks.append(replace(task, train=train, test=test))
    return replace(scenario, tasks=tuple(tasks))


def _seen_through(
    transform: Callable[[Tensor], Tensor], train: Dataset[Any], test: Dataset[Any]
) -> tuple[Tensors, Tensors]:
    return _in_memory(train).transformed(transform), _in_memory(test).transformed(transform)


class Recipe(NamedTuple):
    """How a scenario is made from a folder, a number of tasks and a seed.

    tasks: how many are usual; None: as many as the maker takes by itself. lr: a learning rate at which
    fine-tuning forgets, so that there is something to compare; None: that of any training.
    """

    make: Callable[[Folder, Any, int], Scenario]
    tasks: int | None
    lr: float | None = None


def _split(dataset: str) -> Callable[[Folder, int, int], Scenario]:
    return lambda folder, tasks, seed: standardised(
        split(*data.load_dataset(dataset, folder), tasks)
    )


SCENARIOS = {
    "split-digits": Recipe(_split("digits"), 5, lr=1e-2),
    "split-mnist": Recipe(_split("mnist"), 5),
    "split-fashion": Recipe(_split("fashion-mnist"), 5),
    "split-cifar100": Recipe(_split("cifar100"), 10),
    "permuted-mnist": Recipe(
        lambda f, tasks, seed: standardised(permuted(*data.load_dataset("mnist", f), tasks, seed)),
        10,
    ),
    "rotated-mnist": Recipe(
        lambda f, tasks, seed: standardised(rotated(*data.load_dataset("mnist", f), tasks)), 10
    ),
    "recognition": Recipe(lambda f, tasks, seed: recognition(f, tasks), 8),
}
# What scenarios were called when files were written that are still read.
RENAMED = {"datasets": "recognition"}


def _in_memory(dataset: Dataset[Any]) -> Tensors:
    assert isinstance(dataset, Tensors)  # all that `data.load_dataset` gives is
    return dataset


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
