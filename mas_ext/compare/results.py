"""What a run found, read from its directory: of trainings that are finished, diverged or on their way."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mas_ext import metrics
from mas_ext.compare import directory as record
from mas_ext.compare import options as config
from mas_ext.compare.options import Config
from mas_ext.compare.sweep import Job
from mas_ext.compare.tables import Found
from mas_ext.state import files as checkpoint

Layers = dict[str, tuple[float, int]]  # by layer the sum of omega, and of how many parameters


# What of a result is read.
RESULTS = (
    "tasks",
    "average_accuracy",
    "forgetting",
    "backward_transfer",
    "forward_transfer",
    "intransigence",
    "step_seconds",
    "held_bytes",
)


class Choice(NamedTuple):
    """The lam that was chosen, None where all diverged; validation accuracy by lam, None where one did."""

    lam: float | None
    means: dict[float, float | None]


@dataclass(frozen=True)
class Learned:
    """What is known of a method and seed, NaN where it did not get to. T tasks.

    accuracy: see Result, (T, T). step_seconds, held_bytes: see Result, (T,).
    found: see `mas_ext.compare.tables.summary`, or diverged and why; None as long as it is not finished.
    layers: importance by layer; empty for a method without.
    """

    method: str
    seed: int
    accuracy: Tensor
    step_seconds: Tensor
    held_bytes: Tensor
    found: Found | None
    layers: Layers

    @property
    def diverged(self) -> str | None:
        """Why it did."""
        return None if self.found is None else self.found.get("diverged")

    @property
    def finished(self) -> bool:
        """Whether there is a result that counts."""
        return self.found is not None and self.diverged is None

    @property
    def tasks(self) -> int:
        """How many are over."""
        return int((~self.held_bytes.isnan()).sum())

    @property
    def average(self) -> Tensor:
        """1/t sum_{k<=t} accuracy[t, k]: over the tasks so far, (T,)."""
        return torch.stack([row[: t + 1].mean() for t, row in enumerate(self.accuracy)])


@dataclass(frozen=True)
class Findings:
    """All that a run found.

    comparison: what was compared. device: on which. starts: see record.environment, an entry each.
    grid: by method with several lam. tasks: their names, empty as long as none is known.
    learned: by method, in order of seeds.
    """

    comparison: Config
    device: str
    starts: list[dict[str, Any]]
    grid: dict[str, Choice]
    tasks: list[str]
    learned: dict[str, list[Learned]]

    def lam(self, method: str) -> float | None:
        """The one that was chosen, or the only one; None if there is none, or none yet."""
        if method in self.grid:
            return self.grid[method].lam
        lams = self.comparison.lams(method)
        return lams[0] if len(lams) == 1 else None


def read(folder: str | Path) -> Findings:
    """What is in the directory of a run, which may be unfinished.

    Raises:
        FileNotFoundError: it is no run.
        ValueError: a file in it is damaged.
    """
    folder = Path(folder)
    if not (folder / record.CONFIG).exists():
        raise FileNotFoundError(
            f"run: got {str(folder)!r}, where no run has begun; expected what --out of mas-ext run was"
        )
    values = config.load(folder / record.CONFIG)
    with _reading(folder / record.CONFIG):
        # The device need not be here: nothing is computed on it.
        comparison = config.read({**values, "device": "cpu"})
    with _reading(folder / record.ENVIRONMENT) as path:
        starts = [dict(start) for start in json.loads(path.read_bytes())]
    grid = {}
    if (folder / record.LAM).exists():
        with _reading(folder / record.LAM) as path:
            for name, tried in json.loads(path.read_bytes()).items():
                means = {each["lam"]: each["mean"] for each in tried["candidates"]}
                grid[name] = Choice(tried["chosen"], means)
    over, count = _over(folder / record.METRICS)
    learned = {
        name: [_learned(folder, name, n, count, over) for n in range(comparison.seeds)]
        for name in comparison.methods
    }
    for name in (name for name, choice in grid.items() if choice.lam is None):
        lost = {"diverged": "with every lam"}
        learned[name] = [replace(each, found=lost) for each in learned[name]]
    every = [each for seeds in learned.values() for each in seeds]
    names = [each.found["tasks"] for each in every if each.finished and each.found]
    device = str(values.get("device", comparison.device))
    return Findings(comparison, device, starts, grid, [*names, [""] * count][0], learned)


def _over(path: Path) -> tuple[dict[tuple[str, int, int], Any], int]:
    """The lines about tasks that are over, by method, seed and task, and how many tasks there are."""
    if not path.exists():
        return {}, 0
    with _reading(path):
        content = path.read_bytes()
        # Without a last line that was being written when the run was killed.
        whole = content[: content.rfind(b"\n") + 1].splitlines()
        lines = [line for line in map(json.loads, whole) if line["epoch"] is None]
        count = max((len(line["accuracy"]) for line in lines), default=0)
        final = (line for line in lines if line["purpose"] == "final")
        return {(line["method"], line["seed"], line["task"]): line for line in final}, count


def _learned(folder: Path, method: str, seed: int, count: int, over: Mapping[Any, Any]) -> Learned:
    nothing = {"accuracy": [None] * count, "step_seconds": None, "held_bytes": None}
    with _reading(folder / record.METRICS):
        lines = [over.get((method, seed, task), nothing) for task in range(count)]
        accuracy, seconds, held = (
            torch.from_numpy(np.array([line[key] for line in lines], dtype=float))
            for key in nothing
        )
        accuracy = accuracy.reshape(count, count)
    folder = folder / Job(method, seed, None).folder
    found, layers = None, {}
    if (folder / record.RESULT).exists():
        with _reading(folder / record.RESULT) as path:
            found = dict(json.loads(path.read_bytes()))
            if "diverged" not in found:
                found = {key: found[key] for key in RESULTS}
    if (folder / record.CHECKPOINT).exists():
        with _reading(folder / record.CHECKPOINT) as path:
            layers = importance(checkpoint.unpack(checkpoint.load(path))["method"])
    return Learned(method, seed, accuracy, seconds, held, found, layers)


@contextmanager
def _reading(path: Path) -> Iterator[Path]:
    """Whatever is wrong with the content of a file is told as that, with its name."""
    try:
        yield path
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        told = str(error) if str(path) in str(error) else f"{path}: got a damaged file ({error!r})"
        raise ValueError(told) from error


def importance(state: Mapping[str, Any]) -> Layers:
    """Sum of omega and number of parameters by layer, of a method's state; empty if it holds none.

    Of IMM it is what its tasks are merged by.
    """
    layers: Layers = {}
    for name, omega in state.get("merging", state).get("penalty", {}).items():
        kind, _, parameter = name.partition(".")
        if kind == "omega":
            layer = parameter.rpartition(".")[0]
            total, count = layers.get(layer, (0.0, 0))
            # A row a task where each is stored by itself.
            layers[layer] = (total + float(omega.double().sum()), count + omega[0].numel())
    return layers


def shares(learned: Sequence[Learned]) -> dict[str, tuple[float, float]]:
    """By layer its share of all importance, and its mean a parameter over that of all; means over seeds.

    Without the seeds in which nothing is important, and those that diverged.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for layers in (each.layers for each in learned if each.diverged is None):
        total, count = (sum(each[i] for each in layers.values()) for i in (0, 1))
        for name, (own, parameters) in layers.items() if total else ():
            found.setdefault(name, []).append((own / total, own / total * count / parameters))
    return {
        name: (sum(s for s, _ in each) / len(each), sum(m for _, m in each) / len(each))
        for name, each in found.items()
    }


def over_seeds(
    learned: Sequence[Learned], what: Callable[[Learned], Tensor]
) -> tuple[Tensor, Tensor]:
    """Mean and h of metrics.mean_interval over seeds, entry by entry, NaN where there is none.

    Seeds that are not there yet are left out; where one diverged before, there is no mean.
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
