"""The directory of a run: which files it has, and how they are written so that a run can go on after any stop.

    config.toml         what is compared, with all defaults; `mas-ext run --config` takes it
    environment.json    a list with one entry per start: time, machine, versions, threads
    metrics.jsonl       one line per epoch and per task, see below
    lam.json            by method with several lam to choose from: candidates (lam, validation_accuracy by seed,
                        their mean, null where one diverged) and chosen (null where all diverged)
    METHOD-seedN/       module.Class for module:Class
        accuracy.csv            accuracy[t, k], one row per task, empty where nothing was measured
        confusion.csv           after the last task, see below; only of tasks with classes
        checkpoint.safetensors  the Trainer's: the model and the state of the method
        result.json             written last: what `mas_ext.comparison.sweep.train` returns
    choosing/           the same for the trainings that lam was chosen by, without their checkpoints
    tensorboard/        events, where asked for; what Weights & Biases keeps is in wandb/
    table.md            what was printed at the end: one row per method
    report.html         from `mas-ext report`, with its pictures beside it, as PNGs

A line of metrics.jsonl has method, seed, lam, purpose ("final" or "choose"), task (from 0), and either epoch
(from 1), loss, validation and seconds, or, at the end of a task, epoch null, accuracy (row of the matrix),
validation (row of the matrix), step_seconds, border_seconds and held_bytes. No line occurs twice.

A line of confusion.csv tells how many test samples of a class are taken for another one, or for their own: task
(from 0), class, predicted task, predicted class and the count, which is above 0. The predicted task is another
one in the class-incremental setting alone; the predicted class of an output without a class is empty.

Accuracies are in [0, 1], times in seconds. What is not defined is null. Files are replaced as a whole, but for
lines, which are appended.
"""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mas_ext._arguments import fits
from mas_ext.comparison.cells import Cell, Found
from mas_ext.comparison.formats import csv_text
from mas_ext.comparison.options import Config, differences, read_toml
from mas_ext.failures import DAMAGED
from mas_ext.info import info
from mas_ext.methods import Setting
from mas_ext.scenarios import Task
from mas_ext.scenarios.named import RENAMED
from mas_ext.state.merge_rules import separate_anchor
from mas_ext.state.replacing import alone_in, remove_leftovers, write

CONFIG, ENVIRONMENT, METRICS, LAM = "config.toml", "environment.json", "metrics.jsonl", "lam.json"
ACCURACY, CHECKPOINT, RESULT = "accuracy.csv", "checkpoint.safetensors", "result.json"
CONFUSION = "confusion.csv"
TABLE, EVENTS = "table.md", "tensorboard"


class Directory:
    """The directory of one run, and the store of its cells {method, seed, lam, purpose}."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()

    def values(self) -> dict[str, Any]:
        """What is compared in this directory, by the keys of a configuration and the names of now.

        Raises:
            FileNotFoundError: no run has begun here.
            ValueError: its config.toml is no TOML.
        """
        if not (self.path / CONFIG).exists():
            raise FileNotFoundError(
                f"out: got {str(self.path)!r}, where no run has begun; leave out --resume"
            )
        values = read_toml(self.path / CONFIG)
        for old, new in RENAMED.items():
            if values.get("scenario") == old:
                values["scenario"] = new
        # Written without lam when each method had its own.
        return {"lam": [], **separate_anchor(values)}

    def config(self) -> Config:
        """What is compared in this directory, where all of it is known by names.

        Raises:
            FileNotFoundError: no run has begun here.
            ValueError: its config.toml can't be used.
        """
        values = self.values()
        try:
            return Config.read(values)
        except ValueError as error:
            raise ValueError(f"{self.path / CONFIG}: {error}") from error

    def check(self, config: Config, resume: bool) -> None:
        """Accept a new directory or, to resume, one with the same comparison in it.

        Raises:
            FileNotFoundError: there is nothing to resume.
            FileExistsError: it exists, and is not to be resumed.
            ValueError: another comparison is in it.
        """
        out = self.path
        if resume:
            if found := differences(self.values(), config.values()):
                raise ValueError(f"resume: {str(out)!r} is another run: {'; '.join(found)}")
        elif (out / CONFIG).exists():
            raise FileExistsError(
                f"out: got {str(out)!r}, which is a run already; --resume, in Python resume=True, goes on with "
                "it"
            )
        elif out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise FileExistsError(f"out: got {str(out)!r}, which exists; expected a new directory")

    @contextmanager
    def begun(self, config: Config) -> Iterator[None]:
        """Make the directory, complete from its first moment on, or note in it that the run goes on.

        Until the end no other process may work in it.

        Raises:
            FileExistsError: another process works in it, or has made it meanwhile.
            ValueError: its environment.json can't be read.
        """
        out = self.path
        if (out / CONFIG).exists():
            with alone_in(out):
                write_json(out / ENVIRONMENT, [*read_json(out / ENVIRONMENT, [{}]), environment()])
                remove_leftovers(out)
                yield
            return
        unfinished = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
        unfinished.mkdir(parents=True)
        with alone_in(unfinished):
            write(unfinished / CONFIG, config.toml())
            write_json(unfinished / ENVIRONMENT, [environment()])
            with suppress(OSError):  # an empty folder, which on Windows none can take the place of
                out.rmdir()
            try:
                unfinished.replace(out)
            except OSError as error:
                shutil.rmtree(unfinished)
                raise FileExistsError(
                    f"out: got {str(out)!r}, which exists by now; expected a new directory"
                ) from error
            yield

    def folder(self, cell: Cell) -> Path:
        """The folder of a cell."""
        method, seed = cell["method"].replace(":", "."), cell["seed"]
        if cell["purpose"] == "choose":
            return self.path / f"choosing/{method}-lam{cell['lam']!r}-seed{seed}"
        return self.path / f"{method}-seed{seed}"

    def __contains__(self, cell: Cell) -> bool:
        return (self.folder(cell) / RESULT).exists()

    def __getitem__(self, cell: Cell) -> Found:
        found: Found = read_json(self.folder(cell) / RESULT, {})
        return found

    def add(self, cell: Cell, found: Found, seconds: float) -> None:
        """Write result.json; durations are in metrics.jsonl."""
        write_json(self.folder(cell) / RESULT, {**cell, **found})


class Journal:
    """metrics.jsonl: lines are appended, unless they are there already.

    A run that goes on repeats what came after its last checkpoint, to the same bits.
    """

    def __init__(self, path: Path) -> None:
        """Open the file, and cut off a last line that was not finished when a run was killed."""
        lines, size = read_lines(path)
        with reading(path):
            self._known = {_position(line) for line in lines}
        self._file = open(path, "ab")  # noqa: SIM115
        self._file.truncate(size)

    def add(self, line: Mapping[str, Any]) -> bool:
        """Append the line; False if it is there already."""
        if _position(line) in self._known:
            return False
        self._known.add(_position(line))
        self._file.write(json.dumps(defined(line)).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        return True

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _position(line: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(line[key] for key in ("method", "seed", "lam", "purpose", "task", "epoch"))


def environment() -> dict[str, Any]:
    """Time, machine and versions."""
    cpu = platform.processor()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if "model name" in line), cpu)
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu or platform.machine(),
        "cores": os.cpu_count(),
        **info(),
    }


def write_json(path: Path, content: Any) -> None:
    """Write JSON: tensors as lists, NaN and infinity as null."""
    write(path, json.dumps(defined(content), indent=1) + "\n")


def read_json(path: Path, shape: Any) -> Any:
    """Read what `write_json` wrote; a ValueError that names the file unless it is JSON of this shape."""
    with reading(path):
        found = json.loads(path.read_bytes())
        check_shape(found, shape)
    return found


def read_lines(path: Path) -> tuple[list[Any], int]:
    """The whole lines of a file like metrics.jsonl, and how many bytes they are; none without a file."""
    with reading(path):
        content = path.read_bytes() if path.exists() else b""
        size = content.rfind(b"\n") + 1
        return [json.loads(line) for line in content[:size].splitlines()], size


@contextmanager
def reading(path: Path) -> Iterator[Path]:
    """Whatever is wrong with the content of a file is a ValueError that names it."""
    try:
        yield path
    except (*DAMAGED, csv.Error) as error:
        told = str(error) if str(path) in str(error) else f"{path}: got a damaged file ({error!r})"
        raise ValueError(told) from error


def check_shape(value: Any, shape: Any) -> None:
    """Raise a ValueError unless a value from JSON or TOML is of a shape, a kind as `fits` takes it."""
    if not fits(value, shape):
        raise ValueError(f"got {str(value)[:80]}, expected what a run writes")


def write_matrix(path: Path, matrix: Tensor) -> None:
    """Write a matrix as CSV, NaN as an empty field; every number in full."""
    rows = (["" if math.isnan(x) else repr(x) for x in row] for row in matrix.tolist())
    write(path, "".join(",".join(row) + "\n" for row in rows))


def read_matrix(path: Path) -> Tensor:
    """Read what `write_matrix` wrote, as float64."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = [[float(x) if x else math.nan for x in row] for row in csv.reader(file)]
    return torch.tensor(rows, dtype=torch.float64)


class Confused(NamedTuple):
    """How many test samples of a task's class were taken for a class; None for an output without one."""

    task: int
    true: int
    predicted_task: int
    predicted: int | None
    samples: int


def write_confusion(
    path: Path, confusion: Mapping[int, Tensor], tasks: Sequence[Task], setting: Setting
) -> None:
    """Write what Result.confusion has as CSV: one line per count above 0."""

    def outputs(task: int) -> list[tuple[int, int | str]]:
        classes = tasks[task].classes
        unused = (tasks[task].outputs or len(classes)) - len(classes)
        return [*((task, c) for c in classes), *((task, "") for _ in range(unused))]

    rows: list[Sequence[Any]] = [("task", "class", "predicted task", "predicted class", "count")]
    for task, counts in confusion.items():
        shown = range(len(tasks)) if setting == "class" else [task]
        columns = [each for t in shown for each in outputs(t)]
        for i, j in counts.nonzero().tolist():
            rows.append((task, tasks[task].classes[i], *columns[j], int(counts[i, j])))
    write(path, csv_text([[str(cell) for cell in row] for row in rows]))


def read_confusion(path: Path) -> list[Confused]:
    """Read what `write_confusion` wrote."""
    with open(path, encoding="utf-8", newline="") as file:
        _, *rows = csv.reader(file)
    return [
        Confused(
            int(task), int(true), int(other), int(predicted) if predicted else None, int(count)
        )
        for task, true, other, predicted, count in rows
    ]


def defined(content: Any) -> Any:
    """The content as JSON can have it: tensors as lists, NaN and infinity as None."""
    if isinstance(content, Tensor):
        content = content.tolist()
    if isinstance(content, Mapping):
        return {key: defined(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [defined(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
