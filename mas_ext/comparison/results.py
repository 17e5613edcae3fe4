"""What a run found so far, read from its directory: of trainings that are finished, diverged or going on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mas_ext import metrics
from mas_ext.comparison import directory as files
from mas_ext.comparison.cells import Found
from mas_ext.comparison.directory import Confused, Directory, check_shape, reading
from mas_ext.methods.quadratic import Lam
from mas_ext.state import files as checkpoint

Layers = dict[str, tuple[float, int]]  # by layer: sum of omega, number of parameters

# Scores in result.json, and their titles in tables.
SCORES = {
    "average_accuracy": "average accuracy, %",
    "forgetting": "forgetting, % points",
    "backward_transfer": "backward transfer, % points",
    "forward_transfer": "forward transfer, % points",
    "intransigence": "intransigence, % points",
}
# The number of seeds from which their mean is shown with its interval, and no longer they themselves.
FEWEST = 4

# What the files have at least.
_VALUES = {"scenario": str, "setting": str, "seeds": int, "methods": {None: {}}}
_TRIED = {"candidates": [{"lam": float, "mean": float | None}], "chosen": float | None}
_OVER = {
    "method": str,
    "seed": int,
    "task": int,
    "lam": float | str | None,
    "accuracy": [float | None],
    "step_seconds": float | None,
    "held_bytes": float | None,
}
_RESULT = {
    "tasks": [str],
    **dict.fromkeys(SCORES, float | None),
    "step_seconds": [float],
    "held_bytes": [float],
}
_MOST_SEEDS = 10_000  # each of which is looked for


class Choice(NamedTuple):
    """The lam that was chosen, None where all diverged; validation accuracy by lam, None where one did."""

    lam: float | None
    means: dict[float, float | None]


@dataclass(frozen=True)
class Learned:
    """What is known of a method and seed, NaN where it did not get to. T tasks.

    lam: with which, None for a method without lam, and as long as no task is over.
    folder: of its files. accuracy: see Result, (T, T). step_seconds, held_bytes: see Result, (T,).
    found: see `mas_ext.comparison.sweep.train`; None as long as it is not finished.
    """

    method: str
    seed: int
    lam: Lam | None
    folder: Path
    accuracy: Tensor
    step_seconds: Tensor
    held_bytes: Tensor
    found: Found | None

    @property
    def diverged(self) -> str | None:
        """Why it diverged, None where it did not."""
        return None if self.found is None else self.found.get("diverged")

    @property
    def tasks(self) -> int:
        """The number of tasks that are over."""
        return int((~self.held_bytes.isnan()).sum())

    @property
    def average(self) -> Tensor:
        """1/t sum_{k<=t} accuracy[t, k]: over the tasks so far, (T,)."""
        return torch.stack([row[: t + 1].mean() for t, row in enumerate(self.accuracy)])

    def confusion(self) -> list[Confused]:
        """The classes that test samples are taken for after the last task; empty where that was not measured.

        Raises:
            ValueError: the file is damaged.
        """
        if not (self.folder / files.CONFUSION).exists():
            return []
        with reading(self.folder / files.CONFUSION) as path:
            lines, tasks = files.read_confusion(path), range(len(self.accuracy))
            if any(line.task not in tasks or line.predicted_task not in tasks for line in lines):
                raise ValueError(f"{path}: got a task that is none of the {len(tasks)}")
            return lines

    def layers(self) -> Layers:
        """Importance by layer, read from the checkpoint; empty for a method without importance.

        Raises:
            ValueError: the checkpoint is damaged.
        """
        if not (self.folder / files.CHECKPOINT).exists():
            return {}
        with reading(self.folder / files.CHECKPOINT) as path:
            return importance_by_layer(checkpoint.unpack(checkpoint.load(path))["method"])


@dataclass(frozen=True)
class Findings:
    """All that a run found.

    folder: where. values: what was compared, by the keys of a configuration, and as a file has them.
    starts: see `directory.environment`, one entry each.
    grid: by method with several lam. tasks: their names, empty as long as none is known, and where they differ
        from seed to seed, as in a random order.
    learned: by method, in order of seeds.
    """

    folder: Path
    values: Mapping[str, Any]
    starts: list[dict[str, Any]]
    grid: dict[str, Choice]
    tasks: list[str]
    learned: dict[str, list[Learned]]

    @classmethod
    def read(cls, run: str | Path) -> Findings:
        """Read the directory of a run, which may be unfinished.

        Raises:
            FileNotFoundError: no run has begun there.
            ValueError: a file in it is damaged.
        """
        directory = Directory(run)
        folder = directory.path
        if not (folder / files.CONFIG).exists():
            raise FileNotFoundError(
                f"run: got {str(folder)!r}, where no run has begun; expected what --out of mas-ext run was"
            )
        # What trains need not be here: nothing is computed.
        values = directory.values()
        with reading(folder / files.CONFIG):
            check_shape(values, _VALUES)
            seeds, methods = range(values["seeds"]), list(values["methods"])
            if not methods or not 0 < values["seeds"] <= _MOST_SEEDS:
                raise ValueError(
                    f"{folder / files.CONFIG}: got {len(methods)} methods and {values['seeds']} seeds, "
                    f"expected some of both and at most {_MOST_SEEDS} seeds"
                )
        starts = files.read_json(folder / files.ENVIRONMENT, [{}])
        grid = {}
        if (folder / files.LAM).exists():
            for name, tried in files.read_json(folder / files.LAM, {None: _TRIED}).items():
                means = {each["lam"]: each["mean"] for each in tried["candidates"]}
                if name not in methods:
                    raise ValueError(
                        f"{folder / files.LAM}: got {name!r}, expected a method of {files.CONFIG}"
                    )
                grid[name] = Choice(tried["chosen"], means)
        over, count = _over(folder / files.METRICS)
        learned = {
            name: [_learned(directory, name, seed, count, over) for seed in seeds]
            for name in methods
        }
        for name in (name for name, choice in grid.items() if choice.lam is None):
            lost = {"diverged": "with every lam"}
            learned[name] = [replace(each, found=lost) for each in learned[name]]
        every = [each.found or {} for seeds in learned.values() for each in seeds]
        names = [found["tasks"] for found in every if "tasks" in found]
        same = [each[0] if len(set(each)) == 1 else "" for each in zip(*names, strict=False)]
        return cls(folder, values, starts, grid, same or [""] * count, learned)

    def __str__(self) -> str:
        """The table of a run that is finished."""
        return (self.folder / files.TABLE).read_text(encoding="utf-8")

    @property
    def seeds(self) -> int:
        """How many there are."""
        return int(self.values["seeds"])

    def lam(self, method: str) -> Lam | None:
        """The lam that was chosen, or the only one; None if there is none, or none yet."""
        if method in self.grid:
            return self.grid[method].lam
        known = (each.lam for each in self.learned[method])
        return next((lam for lam in known if lam is not None), None)

    def tasks_of(self, learned: Learned) -> list[str]:
        """The names of the tasks as they were learned, which may be in an order of their own."""
        return list((learned.found or {}).get("tasks", self.tasks))

    def finished(self, method: str) -> list[Found]:
        """What was found with the seeds that count."""
        found = [each.found for each in self.learned[method] if each.diverged is None]
        return [each for each in found if each is not None]

    def diverged(self, method: str) -> int:
        """The number of seeds that diverged."""
        return sum(each.diverged is not None for each in self.learned[method])

    def reasons(self) -> Iterator[tuple[str, str]]:
        """Methods, and why they diverged; each reason once."""
        for name, learned in self.learned.items():
            for reason in sorted({each.diverged for each in learned if each.diverged is not None}):
                yield name, reason


def _over(path: Path) -> tuple[dict[tuple[str, int, int], Any], int]:
    """The lines about tasks that are over, by method, seed and task, and the number of tasks."""
    with reading(path):
        lines = [line for line in files.read_lines(path)[0] if line["epoch"] is None]
        for line in lines:
            check_shape(line, _OVER)
        count = max((len(line["accuracy"]) for line in lines), default=0)
        final = (line for line in lines if line["purpose"] == "final")
        return {(line["method"], line["seed"], line["task"]): line for line in final}, count


def _learned(
    directory: Directory, method: str, seed: int, count: int, over: Mapping[Any, Any]
) -> Learned:
    nothing = {"accuracy": [None] * count, "step_seconds": None, "held_bytes": None}
    with reading(directory.path / files.METRICS):
        lines = [over.get((method, seed, task), nothing) for task in range(count)]
        lam = next((line["lam"] for line in lines if "lam" in line), None)
        accuracy, seconds, held = (
            torch.from_numpy(np.array([line[key] for line in lines], dtype=float))
            for key in nothing
        )
        accuracy = accuracy.reshape(count, count)
    cell, found = {"method": method, "seed": seed, "purpose": "final"}, None
    folder = directory.folder(cell)
    if cell in directory:
        with reading(folder / files.RESULT):
            found = directory[cell]
            check_shape(found, {"diverged": str} if "diverged" in found else _RESULT)
            if "diverged" not in found:
                lengths = {len(found[key]) for key in ("tasks", "step_seconds", "held_bytes")}
                # Without metrics.jsonl, as many as it says.
                if lengths != {count or max(1, *lengths)}:
                    raise ValueError(f"got {sorted(lengths)} tasks, expected {count or 'some'}")
    return Learned(method, seed, lam, folder, accuracy, seconds, held, found)


def importance_by_layer(state: Mapping[str, Any]) -> Layers:
    """Sum of omega and number of parameters by layer, of a method's state; empty without omega.

    Of IMM it is the omega that tasks are merged by.
    """
    layers: Layers = {}
    for name, omega in state.get("merging", state).get("penalty", {}).items():
        kind, _, parameter = name.partition(".")
        if kind == "omega":
            layer = parameter.rpartition(".")[0]
            total, count = layers.get(layer, (0.0, 0))
            # Row by row with store="per_task": one per task.
            layers[layer] = (total + float(omega.double().sum()), count + omega[0].numel())
    return layers


def shares(learned: Sequence[Learned]) -> dict[str, tuple[float, float]]:
    """By layer its share of all importance, and its mean per parameter over that of all; means over seeds.

    Seeds in which nothing is important, and those that diverged, are left out.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for layers in (each.layers() for each in learned if each.diverged is None):
        total, count = (sum(each[i] for each in layers.values()) for i in (0, 1))
        for name, (own, parameters) in layers.items() if total else ():
            found.setdefault(name, []).append((own / total, own / total * count / parameters))
    return {
        name: (sum(s for s, _ in each) / len(each), sum(m for _, m in each) / len(each))
        for name, each in found.items()
    }


Place = tuple[int, int | None]  # the number of a task, and a class of it


def confusion_shares(findings: Findings) -> tuple[list[Place], dict[str, Tensor]]:
    """By method, of each class the share of its test samples in % that is taken for each; mean over its seeds.

    Returns:
        The classes in the order of rows and columns, by task, and the shares (classes, classes): NaN where a
        class has no samples, and for those of two tasks that are never side by side.
    """
    seeds = {
        m: [lines for s in of if (lines := s.confusion())] for m, of in findings.learned.items()
    }
    lines = [line for of in seeds.values() for each in of for line in each]
    places: list[Place] = sorted(
        {(line.task, line.true) for line in lines}
        | {(line.predicted_task, line.predicted) for line in lines},
        key=lambda place: (place[0], place[1] is None, place[1] or 0),
    )
    number = {place: i for i, place in enumerate(places)}
    tasks = torch.tensor([task for task, _ in places])
    apart = (tasks[:, None] != tasks) & (findings.values["setting"] != "class")
    found = {}
    for method, of in seeds.items():
        counts = torch.zeros(len(of), len(places), len(places), dtype=torch.float64)
        for matrix, each in zip(counts, of, strict=True):
            for task, true, other, predicted, samples in each:
                matrix[number[task, true], number[other, predicted]] += samples
        if of:
            mean = (100 * counts / counts.sum(2, keepdim=True)).nanmean(0)
            found[method] = mean.masked_fill(apart, math.nan)
    return places, found


def over_seeds(
    learned: Sequence[Learned], what: Callable[[Learned], Tensor]
) -> tuple[Tensor, Tensor]:
    """Mean and h of metrics.mean_interval over seeds, entry by entry, NaN where there is none.

    Seeds that have not got there yet are left out; where one diverged before, there is no mean.
    """
    each = torch.stack([what(one) for one in learned])
    mean, half = torch.full((2, *each.shape[1:]), math.nan, dtype=torch.float64)
    coming = [one.diverged is None for one in learned]
    for place in product(*map(range, each.shape[1:])):
        values = [
            float(t[place])
            for t, later in zip(each, coming, strict=True)
            if not (later and t[place].isnan())
        ]
        if values and not any(map(math.isnan, values)):
            mean[place], half[place] = metrics.mean_interval(values)
    return mean, half
