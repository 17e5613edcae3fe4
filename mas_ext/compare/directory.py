"""The directory of a run: what is in it, and how it is written so that a run stopped at any moment can go on.

    config.toml         what is compared, all defaults written out; `mas-ext run --config` takes it
    environment.json    a list with an entry for each start: time, machine, versions, threads
    metrics.jsonl       a line for each epoch and each task, see below
    lam.json            by method that was tried with several lam: candidates (lam, validation_accuracy by seed,
                        their mean, null where one diverged) and chosen (null where all diverged)
    METHOD-seedN/
        accuracy.csv            accuracy[t, k], a row a task, empty where nothing was measured
        checkpoint.safetensors  that of the Trainer: the model, and the state of the method
        result.json             written last: what `mas_ext.compare.tables.summary` returns, or diverged and why
    choosing/           the same for the runs that lam was chosen with, without their checkpoints
    tensorboard/        events, where asked for
    table.md            what was printed at the end: a row a method
    report.html         where `mas-ext report` was asked for, with its pictures beside it, as PNGs

A line of metrics.jsonl has method, seed, lam, purpose ("final" or "choose"), task (from 0), and either epoch
(from 1), loss, validation and seconds, or, when the task is over, epoch null, accuracy (row of the matrix),
validation (the same), step_seconds, border_seconds and held_bytes. No line is there twice.

Accuracies are in [0, 1], times in seconds. What is not defined is null. A file is replaced as a whole or, the
lines, appended to.
"""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import uuid
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mas_ext.compare import options as config
from mas_ext.compare.options import Config
from mas_ext.info import info

CONFIG, ENVIRONMENT, METRICS, LAM = "config.toml", "environment.json", "metrics.jsonl", "lam.json"
ACCURACY, CHECKPOINT, RESULT = "accuracy.csv", "checkpoint.safetensors", "result.json"
TABLE, EVENTS = "table.md", "tensorboard"


def check(out: Path, comparison: Config, resume: bool) -> None:
    """Whether `out` is new or, for `resume`, has the same comparison in it.

    Raises:
        FileNotFoundError: there is nothing to resume.
        FileExistsError: it exists, and is not to be resumed.
        ValueError: what is there is another comparison.
    """
    if not resume:
        if (out / CONFIG).exists():
            raise FileExistsError(
                f"out: got {str(out)!r}, which is a run already; --resume goes on with it"
            )
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise FileExistsError(f"out: got {str(out)!r}, which exists; expected a new directory")
    elif found := config.differences(load_config(out), comparison):
        raise ValueError(f"resume: {str(out)!r} is another run: {'; '.join(found)}")


def load_config(out: Path) -> Config:
    """What is compared in this directory.

    Raises:
        FileNotFoundError: it is no run.
        ValueError: its file can't be used.
    """
    if not (out / CONFIG).exists():
        raise FileNotFoundError(
            f"out: got {str(out)!r}, where no run has begun; leave out --resume"
        )
    return config.read(config.load(out / CONFIG))


def begin(out: Path, comparison: Config) -> None:
    """Make the directory, complete from its first moment on, or note in it that the run goes on."""
    if out.exists() and (out / CONFIG).exists():
        starts = json.loads((out / ENVIRONMENT).read_text(encoding="utf-8"))
        write_json(out / ENVIRONMENT, [*starts, environment()])
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _temporary(out)
    unfinished.mkdir()
    write(unfinished / CONFIG, config.dump(comparison))
    write_json(unfinished / ENVIRONMENT, [environment()])
    unfinished.replace(out)


def environment() -> dict[str, Any]:
    """When and where this is, and with which versions."""
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


def write(path: Path, content: str | bytes) -> None:
    """Write a file, text as UTF-8; the one that was there before survives until the new one is complete."""
    temporary = _temporary(path)
    try:
        with open(temporary, "xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def clear(folder: Path) -> None:
    """Remove what was being written when a run was killed."""
    for temporary in folder.glob(".*." + 32 * "[0-9a-f]"):
        temporary.unlink()


def write_json(path: Path, content: Any) -> None:
    """Write this as JSON: tensors as lists, NaN and infinity as null."""
    write(path, json.dumps(defined(content), indent=1) + "\n")


def write_matrix(path: Path, matrix: Tensor) -> None:
    """Write a matrix as CSV, NaN as nothing; every number in full."""
    rows = (["" if math.isnan(x) else repr(x) for x in row] for row in matrix.tolist())
    write(path, "".join(",".join(row) + "\n" for row in rows))


def read_matrix(path: Path) -> Tensor:
    """What `write_matrix` wrote, float64."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = [[float(x) if x else math.nan for x in row] for row in csv.reader(file)]
    return torch.tensor(rows, dtype=torch.float64)


class Journal:
    """metrics.jsonl: lines are appended, but for those that are there already.

    A run that goes on repeats what came after its last checkpoint, to the same bits.
    """

    def __init__(self, path: Path) -> None:
        """Open the file, and cut off a last line that was being written when a run was killed."""
        self._file = open(path, "a+b")  # noqa: SIM115
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        self._file.truncate(whole)
        self._there = {_place(json.loads(line)) for line in content[:whole].splitlines()}

    def add(self, line: Mapping[str, Any]) -> bool:
        """Append the line; False if it is there already."""
        if _place(line) in self._there:
            return False
        self._there.add(_place(line))
        self._file.write(json.dumps(defined(line)).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        return True

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _place(line: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(line[key] for key in ("method", "seed", "lam", "purpose", "task", "epoch"))


def defined(content: Any) -> Any:
    """What JSON can have of this: tensors as lists, NaN and infinity as None."""
    if isinstance(content, Tensor):
        content = content.tolist()
    if isinstance(content, Mapping):
        return {key: defined(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [defined(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")
