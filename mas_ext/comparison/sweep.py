"""Sweeps: methods, seeds and lam on one scenario, with all that is found kept in a directory."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from mas_ext import metrics
from mas_ext.comparison import directory as files
from mas_ext.comparison.cells import Cell, Found, choose, chosen, fill
from mas_ext.comparison.directory import Directory, Journal
from mas_ext.comparison.options import Config
from mas_ext.comparison.progress import ProgressBar
from mas_ext.comparison.results import Findings
from mas_ext.comparison.tables import summary
from mas_ext.failures import Diverged, Vanished
from mas_ext.methods import Method, options
from mas_ext.methods.quadratic import Lam
from mas_ext.models import MultiHead
from mas_ext.scenarios import Scenario
from mas_ext.scenarios.datasets import import_extra
from mas_ext.state import files as checkpoint
from mas_ext.state.replacing import remove_leftovers, write
from mas_ext.trainer import Trainer
from mas_ext.training.run import Epoch, Learning, Result
from mas_ext.training.scalars import ScalarCallback, ScalarWriter, WandbWriter
from mas_ext.training.settings import Settings

# What makes a writer of the events of a cell, from the folder of the run and the cell's name.
MakeWriter = Callable[[Path, str], ScalarWriter]


def run(
    config: Config,
    out: str | Path,
    *,
    resume: bool = False,
    tensorboard: bool = False,
    wandb: bool = False,
) -> str:
    """Compare the methods, with progress on stderr; `mas_ext.comparison.directory` says what is written.

    A method with several lam to choose from learns everything with each of them, with seeds of their own, and
    takes the one with the largest average accuracy on validation data, of equal ones the first. A training that
    diverges or collapses is reported as diverged, and its lam is not taken. Any other error ends the run.

    out: a directory that does not exist yet. resume: go on in an existing one, from the last epoch that was
    over, to the same bits where torch has as many threads. tensorboard: write events, too. wandb: log to
    Weights & Biases, too, every training as a run of the project called as `out`.

    Returns:
        The table that is also in the directory.

    Raises:
        What `mas_ext.compare` raises, and ModuleNotFoundError where a package for events is not installed.
    """
    directory = Directory(out)
    directory.check(config, resume)
    writers = [make() for make, asked in ((_tensorboard, tensorboard), (_wandb, wandb)) if asked]
    make_scenario = functools.lru_cache(maxsize=1)(config.make_scenario)
    first = make_scenario(0)
    rehearse(config, first)
    choices = sum(len(config.lams(name)) for name in config.tried())
    trainings = config.lam_seeds * choices + config.seeds * len(config.methods)
    epochs = config.settings.epochs_of(len(first.tasks))
    with (
        directory.begun(config),
        closing(Journal(directory.path / files.METRICS)) as journal,
        closing(ProgressBar(epochs, trainings)) as progress,
    ):
        without = [name for name in config.methods if "lam" not in options(name)]
        if config.lam not in ((), "auto") and without:
            progress.say(f"no lam, so what was given is not for them: {', '.join(without)}")
        sweep = Sweep(config, directory, make_scenario, epochs, journal, progress, writers)
        fill(directory, sweep.shown(sweep.plan()), sweep.measure)
        text = summary(Findings.read(directory.path))
        write(directory.path / files.TABLE, text)
    return text


# One sample, as often as few losses have outputs: targets of another shape are not broadcast.
REPEATED = [0] * 7


def rehearse(config: Config, scenario: Scenario) -> None:
    """Begin the first task with every method, on a sample of each task, to find out now what can't be used.

    Raises:
        ValueError: an option that does not fit the network, the scenario or another option.
    """
    held_out = config.tried() or config.automatic
    share = config.training(0, "choose" if held_out else "final").validation
    for task in scenario.tasks:
        count = len(task.train)  # type: ignore[arg-type]
        if share and int(share * count) == 0:
            raise ValueError(
                f"validation: got {share:g} of the {count} samples of task {task.name!r}, which is none, "
                "expected a larger share"
            )
    few = Scenario(
        tuple(
            replace(task, train=Subset(task.train, REPEATED), test=Subset(task.test, REPEATED))
            for task in scenario.tasks
        )
    )
    one, other = ({*config.network(scenario, 0).parameters()} for _ in range(2))
    if any(parameter.requires_grad for parameter in one & other):
        raise ValueError(
            "model: got the same parameters twice, expected new ones from every call; copy.deepcopy of a "
            "pretrained network makes some"
        )
    settings = replace(config.settings, validation=0.0, patience=None)
    for name in config.methods:
        for lam in config.lams(name) or (None,):
            method, model = config.create(name, lam), config.network(scenario, 0)
            try:
                with torch.random.fork_rng([]):
                    run = Learning(model, method, settings, few, torch.device(config.device))
                    run.begin_task()
                    run.check_loss()
                    checkpoint.pack(run.state_dict())
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name}: {error}") from error


def _tensorboard() -> MakeWriter:
    tools: Any = import_extra("torch.utils.tensorboard", "tensorboard")
    return lambda out, name: tools.SummaryWriter(str(out / files.EVENTS / name))


def _wandb() -> MakeWriter:
    tools = import_extra("wandb", "wandb")
    return lambda out, name: WandbWriter(
        tools.init(project=out.resolve().name, name=name, dir=str(out))
    )


@dataclass(frozen=True)
class Sweep:
    """The trainings of a run, as cells of method, seed, lam and purpose ("choose" or "final").

    epochs: of each task. writers: what makes writers of events.
    """

    config: Config
    directory: Directory
    make_scenario: Callable[[int], Scenario]
    epochs: list[int]
    journal: Journal
    progress: ProgressBar
    writers: Sequence[MakeWriter]

    def plan(self) -> Iterator[Cell]:
        """All choices of lam, then all seeds, each with joint training first, which intransigence needs."""
        for method in self.config.tried():
            yield from self._choice(method)
        self._write_choices()
        for seed in range(self.config.seeds):
            for method in sorted(self.config.methods, key=lambda name: name != "joint"):
                lam = self._lam(method)
                if lam is not None or method not in self.config.tried():
                    yield {"method": method, "seed": seed, "lam": lam, "purpose": "final"}

    def shown(self, cells: Iterable[Cell]) -> Iterator[Cell]:
        """Pass the cells on, and move the progress bar with them."""
        for cell in cells:
            self.progress.begin(_title(cell))
            yield cell
            if cell["purpose"] == "choose":
                (self.directory.folder(cell) / files.CHECKPOINT).unlink(missing_ok=True)
            self.progress.end()

    def measure(self, cell: Cell) -> Found:
        """Train, or go on from the checkpoint."""
        folder, seed = self.directory.folder(cell), cell["seed"]
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        scenario, path = self.make_scenario(seed), folder / files.CHECKPOINT
        if len(scenario.tasks) != len(self.epochs):
            raise ValueError(
                f"scenario: got {len(scenario.tasks)} tasks with seed {seed}, expected {len(self.epochs)} as "
                "with seed 0"
            )
        name = str(folder.relative_to(self.directory.path))
        with ExitStack() as stack:
            writers = [
                stack.enter_context(closing(m(self.directory.path, name))) for m in self.writers
            ]
            found = train(
                self.config.network(scenario, seed),
                self.config.create(cell["method"], cell["lam"]),
                scenario,
                self.config.training(seed, cell["purpose"]),
                self._joint(cell),
                device=self.config.device,
                checkpoint=path,
                callbacks=[self._follow(cell, folder, writers)],
            )
        if "diverged" in found:
            self.progress.say(f"{_title(cell)}: diverged, {found['diverged']}")
        return found

    def _follow(
        self, cell: Cell, folder: Path, writers: Sequence[ScalarWriter]
    ) -> Callable[[Epoch | Result], None]:
        """What is done after each epoch and each task."""
        scalars = [ScalarCallback(writer, self.epochs) for writer in writers]
        before = time.perf_counter()

        def follow(news: Epoch | Result) -> None:
            nonlocal before
            seconds, before = time.perf_counter() - before, time.perf_counter()
            if isinstance(news, Epoch):
                self.progress.epoch(news)
                line = {**vars(news), "seconds": seconds}
            else:
                line = task_line(news)
                task = line["task"]
                files.write_matrix(folder / files.ACCURACY, news.accuracy)
                if news.confusion and cell["purpose"] == "final":
                    tasks = self.make_scenario(cell["seed"]).tasks
                    how = tasks, self.config.settings.setting
                    files.write_confusion(folder / files.CONFUSION, news.confusion, *how)
                self.progress.task(task, float(news.accuracy[task, : task + 1].mean()))
            if self.journal.add({**cell, **line}):
                for tell in scalars:
                    tell(news)

        return follow

    def _joint(self, cell: Cell) -> Tensor | None:
        """Accuracy of joint training with the cell's seed on each task when it was new, (T,)."""
        joint = {**cell, "method": "joint", "lam": None}
        if joint not in self.directory or "diverged" in self.directory[joint]:
            return None
        return files.read_matrix(self.directory.folder(joint) / files.ACCURACY).diagonal()

    def _choosing(self, method: str) -> list[Cell]:
        """The trainings that each lam of a method is tried in, but for the lam: one per seed."""
        first = self.config.seeds
        return [
            {"method": method, "seed": seed, "lam": None, "purpose": "choose"}
            for seed in range(first, first + self.config.lam_seeds)
        ]

    def _choice(self, method: str) -> Generator[Cell, None, float | None]:
        lams = [lam for lam in self.config.lams(method) if not isinstance(lam, str)]
        return choose(self.directory, self._choosing(method), lams)

    def _lam(self, method: str) -> Lam | None:
        """The lam that was chosen, or the only one; None if there is none."""
        if method in self.config.tried():
            return chosen(self.directory, self._choice(method))
        return next(iter(self.config.lams(method)), None)

    def _write_choices(self) -> None:
        grid = {}
        for method in self.config.tried():
            candidates = []
            for lam in self.config.lams(method):
                found = [self.directory[{**cell, "lam": lam}] for cell in self._choosing(method)]
                by_seed = [each.get("validation_accuracy", math.nan) for each in found]
                mean = sum(by_seed) / len(by_seed)
                candidates.append({"lam": lam, "validation_accuracy": by_seed, "mean": mean})
            grid[method] = {"candidates": candidates, "chosen": self._lam(method)}
        if grid:
            files.write_json(self.directory.path / files.LAM, grid)


def _title(cell: Cell) -> str:
    strength = f" lam {cell['lam']:g}" if cell["purpose"] == "choose" else ""
    return f"{cell['method']}{strength} seed {cell['seed']}"


def train(
    model: MultiHead,
    method: Method,
    scenario: Scenario,
    settings: Settings,
    joint: Tensor | None = None,
    **trainer: Any,
) -> Found:
    """Learn a scenario of T tasks once.

    Args:
        joint: accuracy of joint training on each task when it was new, (T,); None without joint training.
        trainer: further arguments of Trainer.

    Returns:
        tasks (their names); average_accuracy, forgetting, backward_transfer, forward_transfer (None but in the
        domain-incremental setting) and intransigence (None without `joint`), see `mas_ext.metrics`;
        validation_accuracy (average accuracy on validation data, None without them); chosen_lam (by task, of
        lam "auto"; None for another); step_seconds, border_seconds, held_bytes and accuracy, see Result. Or
        diverged, and why.
    """
    try:
        result = Trainer(model, method, **trainer, **vars(settings)).fit(scenario)
    except (Diverged, Vanished) as error:
        return {"diverged": str(error)}
    accuracy, validation = result.accuracy, result.validation
    known_before = not result.initial.isnan().any()
    return {
        "tasks": [task.name for task in scenario.tasks],
        "average_accuracy": result.average_accuracy,
        "forgetting": result.forgetting,
        "backward_transfer": metrics.backward_transfer(accuracy),
        "forward_transfer": (
            metrics.forward_transfer(accuracy, result.initial) if known_before else None
        ),
        "intransigence": None if joint is None else metrics.intransigence(accuracy, joint),
        "validation_accuracy": (
            None if validation.diagonal().isnan().any() else metrics.average_accuracy(validation)
        ),
        "chosen_lam": None if result.lam.isnan().all() else result.lam,
        "step_seconds": result.step_seconds,
        "border_seconds": result.border_seconds,
        "held_bytes": result.held_bytes,
        "accuracy": accuracy,
    }


def task_line(result: Result) -> dict[str, Any]:
    """The line of metrics.jsonl about the last task that is over."""
    task = result.tasks - 1
    measured = ("accuracy", "validation", "step_seconds", "border_seconds", "held_bytes")
    return {"task": task, "epoch": None, **{key: getattr(result, key)[task] for key in measured}}
