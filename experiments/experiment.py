"""What an experiment is: cells that are measured one by one, and what is shown of them."""

from __future__ import annotations

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from experiments.manifest import check_data
from mas_ext.comparison.cells import Cell, Found, fill
from mas_ext.comparison.charts import saved
from mas_ext.comparison.directory import defined, environment
from mas_ext.state.replacing import remove_leftovers, write

__all__ = ["Cell", "Experiment", "Found", "Page", "Results", "draw", "reproduce"]


class Page(NamedTuple):
    """Markdown, and figures of matplotlib by the file names under which it shows them."""

    text: str
    figures: Mapping[str, Any] = {}


class Results:
    """The store of an experiment's cells: a JSON file, which is replaced with every cell.

    protocol: what all cells have in common. machines: where they were measured, see `environment`.
    cells: a list of {cell, found, machine: its position, date, seconds}, in the order in which they came.
    """

    def __init__(self, path: Path, protocol: Mapping[str, Any]) -> None:
        """Read the file, if there is one.

        Raises:
            ValueError: it is no such file, or of another protocol.
        """
        self.path, self.protocol = path, json.loads(json.dumps(protocol))
        self.machines: list[dict[str, Any]] = []
        self.entries: list[dict[str, Any]] = []
        if path.exists():
            try:
                known = json.loads(path.read_bytes())
                there, self.machines, self.entries = (
                    known[key] for key in ("protocol", "machines", "cells")
                )
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}: got a damaged file ({error!r})") from error
            if there != self.protocol:
                raise ValueError(
                    f"{path}: got results of the protocol {there}, expected {self.protocol}; "
                    "move the file away to measure anew"
                )
        self._found = {_key(entry["cell"]): entry["found"] for entry in self.entries}

    def __contains__(self, cell: Cell) -> bool:
        return _key(cell) in self._found

    def __getitem__(self, cell: Cell) -> Found:
        found: Found = self._found[_key(cell)]
        return found

    def where(self, **values: Any) -> list[tuple[Cell, Found]]:
        """The cells that have these values, and what was found."""
        return [
            (entry["cell"], entry["found"])
            for entry in self.entries
            if all(name in entry["cell"] and entry["cell"][name] == values[name] for name in values)
        ]

    def by_seed(self, **values: Any) -> dict[int, Found]:
        """What was found of the cells that have these values, but for trainings that diverged."""
        where = self.where(**values)
        return {cell["seed"]: found for cell, found in where if "diverged" not in found}

    def add(self, cell: Cell, found: Found, seconds: float) -> None:
        """Keep what was found here and now, in `seconds`, and write the file."""
        here = environment()
        date = here.pop("started")[:10]
        if here not in self.machines:
            self.machines.append(here)
        entry = {"cell": cell, "found": defined(found)}
        made = {"machine": self.machines.index(here), "date": date, "seconds": round(seconds, 2)}
        self.entries.append({**entry, **made})
        self._found[_key(cell)] = entry["found"]
        parts = {"protocol": self.protocol, "machines": self.machines, "cells": self.entries}
        # One line per cell, so that a difference of two versions shows what came later.
        lines = ",\n".join(
            f'"{name}": '
            + (
                json.dumps(part)
                if isinstance(part, dict)
                else "[\n" + ",\n".join(map(json.dumps, part)) + "\n]"
            )
            for name, part in parts.items()
        )
        write(self.path, "{\n" + lines + "\n}\n")

    def place(self) -> str:
        """Machine, dates and duration, in words."""
        machines = [
            f"{each['gpu'] or each['cpu']}, {each['threads']} thread{'s'[: each['threads'] != 1]}, torch "
            f"{each['torch']}"
            for each in self.machines
        ]
        dates = sorted({entry["date"] for entry in self.entries})
        hours = sum(entry["seconds"] for entry in self.entries) / 3600
        when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
        where = "; ".join(dict.fromkeys(machines))
        return f"{where}; {when}; {hours:.2g} hours for {len(self.entries)} measurements."


def _key(cell: Cell) -> str:
    return json.dumps(cell, sort_keys=True)


@dataclass(frozen=True)
class Experiment(ABC):
    """A claim, measured. Subclasses are dataclasses whose fields say how much is measured.

    data: folder of the data sets, see mas_ext.scenarios.datasets.load_dataset.
    seeds: how often everything is measured.
    """

    title: ClassVar[str]
    data: str | None = None
    seeds: int = 10

    def data_sets(self) -> tuple[str, ...]:
        """The data that are read, by their names in data.toml."""
        return ()

    @abstractmethod
    def quick(self) -> Experiment:
        """A version of it that takes a minute or two."""

    @abstractmethod
    def protocol(self) -> dict[str, Any]:
        """What all cells have in common, as JSON: results of different protocols are not mixed."""

    @abstractmethod
    def plan(self, results: Results) -> Iterator[Cell]:
        """The cells to measure, in order: `results` has each by the time the next one is asked for."""

    @abstractmethod
    def measure(self, cell: Cell) -> Found:
        """Measure one cell, by nothing but the cell and the protocol."""

    @abstractmethod
    def show(self, results: Results) -> Page:
        """What was found so far; there is something."""


def reproduce(experiment: Experiment, name: str, out: Path) -> Page:
    """Measure what is missing in `out`/`name`.json, with progress on stderr, and show what was found.

    Figures are written beside the file. It can be stopped at any time: no cell is measured twice.

    Raises:
        ValueError: the file is damaged, or of another protocol; there is something to measure, and the data for
            it are not those of the manifest.
    """
    out.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out)
    results = Results(out / f"{name}.json", experiment.protocol())

    def missing() -> Iterator[Cell]:
        checked = False
        for cell in experiment.plan(results):
            if cell in results:
                continue
            if not checked:
                check_data(experiment.data_sets(), experiment.data)
                checked = True
            yield cell
            now = datetime.now(timezone.utc).isoformat(" ", "seconds")[:19]
            what = " ".join(f"{key} {value}" for key, value in cell.items() if value is not None)
            seconds = f"{results.entries[-1]['seconds']:.0f} s"
            print(f"{now} {name}, {what}: {seconds}", file=sys.stderr, flush=True)

    fill(results, missing(), experiment.measure)
    return draw(experiment, results, out)


def draw(experiment: Experiment, results: Results, folder: Path) -> Page:
    """What was found, with the figures written into a folder as SVG."""
    page = experiment.show(results)
    for name, figure in page.figures.items():
        (folder / name).write_bytes(saved(figure, "svg"))
    return page
