"""Streams of tasks whose boundaries nobody tells, with sharp and with gradual changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.experiment import Experiment, Page, Results
from experiments.learned import DATA_SETS, scenario_of
from experiments.regression import ARMS, Regression
from experiments.tables import number, percent, titled
from mas_ext import FusedMASPenalty, TaskFree
from mas_ext.comparison.cells import Cell, Found
from mas_ext.comparison.charts import COLOURS, canvas, legend
from mas_ext.comparison.options import Config
from mas_ext.scenarios import Tensors

# Inputs and targets.
Pair = tuple[Tensor, Tensor]

# By kind of change, the share of a visit's steps in which two tasks are mixed.
CHANGES = {"sharp": 0.0, "gradual": 0.5}
METHODS = ("fine-tuning", "told", "task-free")
# How importance is merged, with the latest anchor: each as arguments of the penalty.
MERGES: dict[str, dict[str, Any]] = {
    "sum": {"merge": "sum"},
    "average": {"merge": "sum"},
    "decay 0.5": {"merge": "decay", "gamma": 0.5},
}
# Three tasks again and again, then a new one.
RECURRING = (*(0, 1, 2) * 4, 3)
# Streams whose results hardly differ between seeds, and the most seeds of each.
FEWER_SEEDS = {"permuted-mnist": 2, "arms": 2}
# Samples of a task, without labels, that importance is measured on where boundaries are told.
TOLD_SAMPLES = 1000


class Problem(NamedTuple):
    """Tasks by their data, to train and to test on, and how they are learned.

    losses: (output, targets) -> one for each sample. score: (output, targets) -> 1 is best.
    """

    learn: Sequence[Pair]
    test: Sequence[Pair]
    model: nn.Module
    losses: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], float]
    batch_size: int
    lr: float


class ArmOutputs(nn.Module):
    """Torques of the arm that the inputs end with, of two outputs per arm: (N, inputs + arms) -> (N, 2)."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.inputs = inputs
        self.body = nn.Sequential(
            *(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()),
            nn.Linear(hidden, 2 * len(ARMS)),
        )

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.body(x[:, : self.inputs]).view(len(x), len(ARMS), 2)
        return (outputs * x[:, self.inputs :, None]).sum(1)


def arms() -> Problem:
    """Inverse dynamics of five arms, of which the network is told, but not that they change."""

    def data(samples: int) -> list[Pair]:
        found = enumerate(Regression().data_of(samples))
        return [(torch.cat([x, _one_hot(k, len(x))], 1), y) for k, (x, y) in found]

    return Problem(
        *(data(2000), data(500)),
        ArmOutputs(8, 64),
        losses=lambda output, y: (output - y).square().mean(1),
        score=lambda output, y: 1 - float((output - y).square().mean() / y.var(0).mean()),
        batch_size=100,
        lr=2e-3,
    )


def _one_hot(k: int, samples: int) -> Tensor:
    return torch.eye(len(ARMS))[k].expand(samples, -1)


def classes(scenario: str, data: str | None, seed: int, samples: int) -> Problem:
    """Tasks with the same outputs: of two classes each, or of all with their pixels in another order."""
    config = Config.read({"scenario": scenario, "tasks": 5, "methods": ["finetune"]})
    learn: list[Pair] = []
    test: list[Pair] = []
    tasks = scenario_of(config, data, seed).tasks
    for task in tasks:
        for part, drawn, count in ((task.train, learn, samples), (task.test, test, None)):
            assert isinstance(part, Tensors)
            x, y = part.batch(torch.randperm(len(part))[:count])
            drawn.append((x.flatten(1), y - min(task.classes)))
    inputs, outputs = learn[0][0].shape[1], len(tasks[0].classes)
    layers = (nn.Linear(inputs, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU())
    return Problem(
        learn,
        test,
        model=nn.Sequential(*layers, nn.Linear(100, outputs)),
        losses=partial(F.cross_entropy, reduction="none"),
        score=lambda output, y: float((output.argmax(1) == y).double().mean()),
        batch_size=128,
        lr=1e-3,
    )


class Stream(NamedTuple):
    """Tasks by name, steps of a visit to one of them, and the lam that was chosen for such tasks elsewhere."""

    name: str
    steps: int
    lam: float


@dataclass(frozen=True)
class TaskFreeStreams(Experiment):
    """Score over all tasks after a stream: without a penalty, with boundaries told, and without.

    recurring: steps of a visit in the stream that returns to its tasks; 0 for no such stream. lams: its lam.
    samples: of a task of classes, to train on.
    """

    title: ClassVar[str] = "Streams without tasks"
    # lam: of experiments 1, 3 and 12.
    streams: tuple[Stream, ...] = (
        Stream("split-mnist", 250, 1.0),
        Stream("permuted-mnist", 250, 0.01),
        Stream("arms", 800, 100.0),
    )
    recurring: int = 150
    samples: int = 10_000
    lams: tuple[float, ...] = (1e-2, 1e-1)
    seeds: int = 4

    def quick(self) -> TaskFreeStreams:
        """The digits of scikit-learn and the arms, few steps, one seed."""
        few = (Stream("split-digits", 150, 1.0), Stream("arms", 300, 100.0))
        return replace(self, streams=few, recurring=0, samples=200, seeds=1)

    def data_sets(self) -> tuple[str, ...]:
        return tuple({name: None for each in self.streams for name in DATA_SETS.get(each.name, ())})

    def protocol(self) -> dict[str, Any]:
        kept = ("streams", "recurring", "samples")
        return {"changes": CHANGES, **{name: getattr(self, name) for name in kept}}

    def plan(self, results: Results) -> Iterator[Cell]:
        """Every stream with one seed, then with two, ...; the recurring one with one."""
        for seed in range(self.seeds):
            for stream in self.streams:
                if seed < FEWER_SEEDS.get(stream.name, self.seeds):
                    for change in CHANGES:
                        for method in METHODS:
                            yield self.cell(stream.name, change, method, seed, stream.lam)
        for lam in self.lams if self.recurring else ():
            for merge in MERGES:
                yield self.cell("recurring", "sharp", "task-free", 0, lam, merge)

    def cell(
        self, stream: str, change: str, method: str, seed: int, lam: float, merge: str = "sum"
    ) -> Cell:
        """A stream that is learned once."""
        given = {"stream": stream, "change": change, "method": method, "merge": merge}
        return {**given, "lam": None if method == METHODS[0] else lam, "seed": seed}

    def measure(self, cell: Cell) -> Found:
        with torch.random.fork_rng([]):
            torch.manual_seed(cell["seed"])
            return self.learn(self.problem(cell["stream"], cell["seed"]), cell)

    def problem(self, stream: str, seed: int) -> Problem:
        """The tasks of a stream."""
        if stream == "arms":
            return arms()
        scenario = "permuted-mnist" if stream == "recurring" else stream
        return classes(scenario, self.data, seed, self.samples)

    def learn(self, problem: Problem, cell: Cell) -> Found:
        """Learn a stream; the scores of all tasks at its end, and where the penalty was consolidated."""
        visits = RECURRING if cell["stream"] == "recurring" else range(len(problem.learn))
        steps = {each.name: each.steps for each in self.streams}.get(cell["stream"], self.recurring)
        mixed = CHANGES[cell["change"]]
        lam, average = cell["lam"] or 0.0, cell["merge"] == "average"
        penalty = FusedMASPenalty(problem.model, lam=lam, **MERGES[cell["merge"]])
        optimizer = torch.optim.Adam(problem.model.parameters(), lr=problem.lr)
        penalty.attach(optimizer, mode="proximal")
        watcher = TaskFree(penalty)
        # Where a task is still alone.
        ends = {round((v + 1 - mixed / 2) * steps): task for v, task in enumerate(visits[:-1])}
        means: list[float] = []
        for step, (x, y) in enumerate(stream_of(problem, visits, steps, mixed), 1):
            optimizer.zero_grad()
            losses = problem.losses(problem.model(x), y)
            losses.mean().backward()
            optimizer.step()
            means.append(float(losses.detach().mean()))
            if cell["method"] == "task-free" and watcher.step(losses, x) and average:
                penalty.lam = lam / penalty.num_tasks
            if cell["method"] == "told" and step in ends:
                penalty.consolidate(problem.learn[ends[step]][0][:TOLD_SAMPLES].split(100))
        known = sorted(set(visits))
        found = {
            "scores": [_score(problem, *problem.test[k]) for k in known],
            "plateaus": [[each.step, each.learned] for each in watcher.plateaus],
        }
        if cell["method"] == "task-free" and cell["seed"] == 0:
            size = watcher.window // 2
            found["loss"] = [float(f"{sum(part) / size:.3g}") for part in _parts(means, size)]
        return found

    def show(self, results: Results) -> Page:
        """Scores by stream and change; where consolidations came; merges on the recurring stream."""
        rows = []
        for stream in self.streams:
            for change in CHANGES:
                means = [self._means(results, stream.name, change, name) for name in METHODS]
                _, told, free = means
                behind = [told[seed] - free[seed] for seed in told if seed in free]
                if not behind:
                    continue
                shown = (percent([*each.values()]) for each in means)
                where = self._found(results, stream.name, change, "task-free")
                count = sum(len(each["plateaus"]) for each in where.values()) / len(where)
                rows.append(
                    {
                        "stream": stream.name,
                        "change": change,
                        **{f"{name}, %": each for name, each in zip(METHODS, shown, strict=True)},
                        "told - task-free": percent(behind),
                        "consolidations": f"{count:.1f}",
                        "lam": number(stream.lam),
                        "seeds": str(len(behind)),
                    }
                )
        text = [titled(rows)] if rows else []
        merged = []
        for merge in MERGES:
            found = {
                lam: self._means(results, "recurring", "sharp", "task-free", merge=merge, lam=lam)
                for lam in self.lams
            }
            if all(found.values()):
                scores = {
                    f"lam {lam:g}, %": percent([*each.values()]) for lam, each in found.items()
                }
                merged.append({"merge": merge, **scores})
        if merged:
            text += ["**Three tasks four times each, then a new one**", titled(merged)]
        text += [results.place(), "![the loss of the streams](task-free.svg)"]
        return Page("\n\n".join(text), {"task-free.svg": self._picture(results)})

    def _found(
        self, results: Results, stream: str, change: str, method: str, **values: Any
    ) -> dict[int, Found]:
        """What was found, by seed."""
        given = {"merge": "sum", **values}
        return results.by_seed(stream=stream, change=change, method=method, **given)

    def _means(
        self, results: Results, stream: str, change: str, method: str, **values: Any
    ) -> dict[int, float]:
        """By seed, the mean score over the tasks."""
        found = self._found(results, stream, change, method, **values)
        return {seed: sum(each["scores"]) / len(each["scores"]) for seed, each in found.items()}

    def _picture(self, results: Results) -> Any:
        """A panel per stream and change: the loss with the first seed, boundaries, and consolidations."""
        cells = [(stream, change) for stream in self.streams for change in CHANGES]
        figure, panels = canvas(len(cells), 2, 1.9)
        for panel, ((name, steps, _), change) in zip(panels, cells, strict=True):
            found = self._found(results, name, change, "task-free").get(0)
            if found is None:
                continue
            loss, mixed = found["loss"], CHANGES[change] * steps / 2
            size = 5 * steps / len(loss)
            panel.plot(
                [(i + 0.5) * size for i in range(len(loss))], loss, label="loss", linewidth=1
            )
            for v in range(1, 5):
                around = (v * steps - mixed - 2, v * steps + mixed + 2)
                panel.axvspan(*around, color="grey", alpha=0.3, linewidth=0)
            for i, (step, _) in enumerate(found["plateaus"]):
                how = {"color": COLOURS[1], "linewidth": 1.2}
                panel.axvline(step, label="consolidated" if not i else None, **how)
            panel.set_yscale("log")
            panel.set_title(f"{name}, {change}", fontsize="medium")
        legend(figure, panels[0])
        figure.supxlabel("step (grey: the change that nobody told)", fontsize="medium")
        figure.supylabel("loss", fontsize="medium")
        return figure


def stream_of(problem: Problem, visits: Sequence[int], steps: int, mixed: float) -> Iterator[Pair]:
    """Batches of a stream, so many steps a visit, a share of which are mixed with the visit before or after."""
    drawn = [_draws(len(x)) for x, _ in problem.learn]
    size, last = problem.batch_size, len(visits) - 1
    for step in range(len(visits) * steps):
        position = step / steps
        near = round(position)
        first = second = visits[int(position)]
        share = 0.0
        if mixed and 0 < near <= last and abs(position - near) < mixed / 2:
            first, second = visits[near - 1], visits[near]
            share = (position - near) / mixed + 0.5
        new = int((torch.rand(size) < share).sum())
        parts = []
        for task, count in ((first, size - new), (second, new)):
            index = [next(drawn[task]) for _ in range(count)]
            parts.append((problem.learn[task][0][index], problem.learn[task][1][index]))
        x, y = zip(*parts, strict=True)
        yield torch.cat(x), torch.cat(y)


def _draws(samples: int) -> Iterator[int]:
    """Each sample once in random order, again and again."""
    while True:
        yield from torch.randperm(samples).tolist()


def _parts(values: Sequence[float], size: int) -> list[Sequence[float]]:
    return [values[i : i + size] for i in range(0, len(values) - size + 1, size)]


@torch.no_grad()
def _score(problem: Problem, x: Tensor, y: Tensor) -> float:
    return problem.score(problem.model(x), y)
