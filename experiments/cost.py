"""What a method holds, and how long a step takes, over many tasks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from experiments.experiment import Experiment, Page, Results
from experiments.learned import DATA_SETS, fewer, told, trained
from experiments.tables import table
from mas_ext.comparison.cells import Cell, Found
from mas_ext.comparison.charts import canvas, legend, look
from mas_ext.comparison.options import Config
from mas_ext.methods import METHODS, create
from mas_ext.scenarios import Scenario
from mas_ext.scenarios.named import make_scenario
from mas_ext.training.run import Epoch, Result

BASE = Config.read(
    {"scenario": "permuted-mnist", "hidden": [100, 100], "epochs": 3, "methods": ["mas"]}
)


@dataclass(frozen=True)
class Cost(Experiment):
    """Bytes held beside the model, and processor time of a step, by task.

    base: scenario and training. tasks: how many. samples: of a task, to train on; a fifth as many to test on.
    """

    title: ClassVar[str] = "Memory and time over many tasks"
    base: Config = BASE
    tasks: int = 50
    samples: int = 1000
    seeds: int = 1  # bytes are the same in all

    def quick(self) -> Cost:
        """The digits in five pairs, one seed."""
        base = replace(self.base, scenario="split-digits")
        return replace(self, base=base, tasks=5, samples=200, data=None)

    def data_sets(self) -> tuple[str, ...]:
        return DATA_SETS[str(self.base.scenario)]

    def protocol(self) -> dict[str, Any]:
        return {**told(self.base), "tasks": self.tasks, "samples": self.samples}

    def plan(self, results: Results) -> Iterator[Cell]:
        """Every method with one seed, then with two, ..."""
        for seed in range(self.seeds):
            for method in METHODS:
                yield {"method": method, "seed": seed}

    def measure(self, cell: Cell) -> Found:
        scenario = self.scenario(cell["seed"])
        seconds: list[list[float]] = [[] for _ in scenario.tasks]
        before = 0.0

        def follow(news: Epoch | Result) -> None:
            """Time an epoch: from one to the next of the same task there is nothing but steps."""
            nonlocal before
            now = time.process_time()
            if isinstance(news, Epoch):
                if news.epoch > 1:
                    samples = self.samples * (news.task + 1 if cell["method"] == "joint" else 1)
                    seconds[news.task].append(
                        (now - before) * self.base.settings.batch_size / samples
                    )
                before = time.process_time()

        method = create(cell["method"])
        found = trained(self.base, scenario, method, cell["seed"], callbacks=[follow])
        return {
            "held_bytes": found["held_bytes"],
            "step_seconds": [min(each) for each in seconds],
            "border_seconds": found["border_seconds"],
        }

    def scenario(self, seed: int) -> Scenario:
        """The tasks, each with some of its samples."""
        whole = make_scenario(str(self.base.scenario), self.data, self.tasks, None, seed)
        return fewer(whole, self.samples, self.samples // 5, seed)

    def curves(self, results: Results, method: str) -> dict[str, torch.Tensor]:
        """MB held and ms per step by task, means over seeds; empty if nothing was measured."""
        found = results.by_seed(method=method).values()
        units = {"held_bytes": 1e-6, "step_seconds": 1e3}
        return {
            key: unit * torch.tensor([each[key] for each in found], dtype=torch.float64).mean(0)
            for key, unit in units.items()
            if found
        }

    def show(self, results: Results) -> Page:
        """A table of some tasks' bytes and of the median step in ten tasks each, and a picture of all."""
        at = [t for t in (1, 2, 10, 25, 50) if t < self.tasks] + [self.tasks]
        tens = [(t, min(t + 9, self.tasks)) for t in range(1, self.tasks + 1, 10)]
        rows = []
        figure, panels = canvas(2, 1, 3.2)
        for i, method in enumerate(METHODS):
            curves = self.curves(results, method)
            if curves:
                held, step = curves["held_bytes"], curves["step_seconds"]
                steps = [float(step[first - 1 : last].quantile(0.5)) for first, last in tens]
                cells = [f"{held[t - 1]:.2f}" for t in at] + [f"{ms:.1f}" for ms in steps]
                rows.append((f"`{method}`", *cells))
                x = torch.arange(1, self.tasks + 1)
                panels[0].plot(x, held, label=method, **{**look(i), "markevery": 0.2})
                panels[1].plot(x, step, **{**look(i), "markevery": 0.2})
        for panel, words in zip(panels, ("MB held beside the model", "ms a step"), strict=True):
            panel.set(yscale="log", xlabel="tasks", ylabel=words)
        legend(figure, panels[0])
        titles = ("method", *(f"MB, {t}" for t in at), *(f"ms a step, {a} to {b}" for a, b in tens))
        text = [table(titles, rows), results.place(), "![memory and time over tasks](cost.svg)"]
        return Page("\n\n".join(text), {"cost.svg": figure})
