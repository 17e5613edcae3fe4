"""Comparisons of methods: each learns the same scenario with the same seeds; what is found is kept."""

from __future__ import annotations

import importlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from mas_ext.compare import directory as record
from mas_ext.compare.options import Config, Purpose
from mas_ext.compare.progress import Progress
from mas_ext.compare.tables import Found, summary, table, task_line
from mas_ext.failures import Diverged, Vanished
from mas_ext.methods import Method, options
from mas_ext.scenarios import Scenario
from mas_ext.trainer import Trainer
from mas_ext.training.run import Epoch, Learning, Result


def run(
    comparison: Config, out: str | Path, *, resume: bool = False, tensorboard: bool = False
) -> str:
    """Compare the methods, with progress on stderr; `mas_ext.compare.directory` says what is written.

    Where a method has several lam to choose from, it learns everything with each of them and seeds of its own,
    and the one of the largest average accuracy on validation data is taken, of equal ones the first. A training
    that diverges or collapses is reported as diverged; a lam with which one did is not taken. Any other error
    ends the run.

    Args:
        comparison: what to do.
        out: a directory that is not there yet.
        resume: go on in one that is there; what is finished stays, the rest goes on from its last epoch, to the
            same bits where torch has as many threads.
        tensorboard: write events, too.

    Returns:
        The table that is in the directory as well.

    Raises:
        ValueError: something that can't be used, found before any training; a damaged checkpoint.
        FileExistsError: `out` exists, and is not to be resumed.
        FileNotFoundError: there is nothing to resume; data are missing.
        ModuleNotFoundError: a package for the data or for events is not installed.
        KeyboardInterrupt: Ctrl-C; what was learned is kept.
    """
    out = Path(out)
    record.check(out, comparison, resume)
    make_writer = _summary_writer() if tensorboard else None
    work = Comparison(comparison, out, make_writer)
    work.rehearse()
    record.begin(out, comparison)
    return work.do()


def _summary_writer() -> Callable[[str], Any]:
    try:
        module = importlib.import_module("torch.utils.tensorboard")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "tensorboard is not installed, run: pip install tensorboard", name=error.name
        ) from error
    make: Callable[[str], Any] = module.SummaryWriter
    return make


def learn(
    comparison: Config,
    scenario: Scenario,
    method: Method,
    seed: int,
    purpose: Purpose,
    **trainer: Any,
) -> Result:
    """The scenario learned once, as the comparison says; trainer: further arguments of Trainer.

    Raises:
        Diverged: the loss or the importance of a task is not finite any more.
        Vanished: a task's importance is at the level of rounding.
        ValueError: the checkpoint is damaged or that of another run.
    """
    network, settings = comparison.network(scenario, seed), comparison.training(seed, purpose)
    made = Trainer(network, method, device=comparison.device, **trainer, **vars(settings))
    return made.fit(scenario)


@dataclass(frozen=True)
class Job:
    """The scenario learned once."""

    method: str
    seed: int
    lam: float | None
    purpose: Purpose = "final"

    @property
    def folder(self) -> str:
        """Where it is in the run's directory."""
        if self.purpose == "choose":
            return f"choosing/{self.method}-lam{self.lam!r}-seed{self.seed}"
        return f"{self.method}-seed{self.seed}"

    def __str__(self) -> str:
        strength = f" lam {self.lam:g}" if self.purpose == "choose" else ""
        return f"{self.method}{strength} seed {self.seed}"


class Comparison:
    """All jobs of a run, one after another."""

    def __init__(
        self, comparison: Config, out: Path, make_writer: Callable[[str], Any] | None
    ) -> None:
        """make_writer: a SummaryWriter for a folder; None for no events."""
        self.config, self.out, self._make_writer = comparison, out, make_writer
        self._scenario: tuple[int, Scenario] | None = None

    def rehearse(self) -> None:
        """Begin the first task with every method, on a sample a task: what can't be used is found out now."""
        scenario = self.scenario(0)
        share = self.config.training(0, "choose" if self.tried() else "final").validation
        for task in scenario.tasks:
            count = len(task.train)  # type: ignore[arg-type]
            if share and int(share * count) == 0:
                raise ValueError(
                    f"validation: got {share:g} of the {count} samples of task {task.name!r}, which is none, "
                    "expected a larger share"
                )
        tasks = [
            replace(task, train=Subset(task.train, [0]), test=Subset(task.test, [0]))
            for task in scenario.tasks
        ]
        settings = replace(self.config.settings, validation=0.0, patience=None)
        for name in self.config.methods:
            for lam in self.config.lams(name) or (None,):
                method, model = self.config.create(name, lam), self.config.network(scenario, 0)
                device = torch.device(self.config.device)
                try:
                    with torch.random.fork_rng([]):
                        few = Scenario(tuple(tasks))
                        Learning(model, method, settings, few, device).begin_task()
                except (TypeError, ValueError) as error:
                    raise ValueError(f"{name}: {error}") from error

    def do(self) -> str:
        """Choose lam where there is a choice, learn everything, and write the table."""
        seeds = range(self.config.seeds)
        choosing = [
            Job(method, len(seeds) + n, lam, "choose")
            for n in range(self.config.lam_seeds)
            for method in self.tried()
            for lam in self.config.lams(method)
        ]
        self._epochs = self.config.settings.epochs_of(len(self.scenario(0).tasks))
        record.clear(self.out)
        self._journal = record.Journal(self.out / record.METRICS)
        self._progress = Progress(
            self._epochs, len(choosing) + len(seeds) * len(self.config.methods)
        )
        try:
            without = [name for name in self.config.methods if "lam" not in options(name)]
            if self.config.lam and without:
                self._progress.say(f"no lam, so the list is not for them: {', '.join(without)}")
            grid = self.choose({job: self.learn(job) for job in choosing})
            # Joint training first: intransigence is measured against it.
            order = sorted(self.config.methods, key=lambda name: name != "joint")
            found: dict[str, list[Found]] = {name: [] for name in self.config.methods}
            for seed in seeds:
                for name in order:
                    job = Job(name, seed, self.lam(name, grid))
                    lost = name in grid and job.lam is None
                    found[name].append({"diverged": "with every lam"} if lost else self.learn(job))
        finally:
            self._progress.close()
            self._journal.close()
        text = table(found, grid)
        record.write(self.out / record.TABLE, text)
        return text

    def tried(self) -> list[str]:
        """The methods with several lam to choose from."""
        return [name for name in self.config.methods if len(self.config.lams(name)) > 1]

    def choose(self, found: Mapping[Job, Found]) -> dict[str, Any]:
        """The grid of lam and what was chosen, by method; written to the directory."""
        grid = {}
        for name in self.tried():
            candidates = []
            for lam in self.config.lams(name):
                by_seed = [
                    result.get("validation_accuracy", math.nan)
                    for job, result in found.items()
                    if (job.method, job.lam) == (name, lam)
                ]
                mean = sum(by_seed) / len(by_seed)
                candidates.append({"lam": lam, "validation_accuracy": by_seed, "mean": mean})
            usable = [each for each in candidates if not math.isnan(each["mean"])]
            best = max(usable, key=lambda each: each["mean"], default={"lam": None})
            grid[name] = {"candidates": candidates, "chosen": best["lam"]}
        if grid:
            record.write_json(self.out / record.LAM, grid)
        return grid

    def lam(self, name: str, grid: Mapping[str, Any]) -> float | None:
        """The lam that was chosen, or the only one; None if there is none."""
        if name in grid:
            chosen: float | None = grid[name]["chosen"]
            return chosen
        return next(iter(self.config.lams(name)), None)

    def learn(self, job: Job) -> Found:
        """Do a job, or what is left of it."""
        folder = self.out / job.folder
        self._progress.begin(str(job))
        if not (folder / record.RESULT).exists():
            folder.mkdir(parents=True, exist_ok=True)
            record.clear(folder)
            found = self._learn(job, folder)
            if "diverged" in found:
                self._progress.say(f"{job}: diverged, {found['diverged']}")
            record.write_json(folder / record.RESULT, {**vars(job), **found})
        if job.purpose == "choose":
            (folder / record.CHECKPOINT).unlink(missing_ok=True)
        self._progress.end()
        result: Found = json.loads((folder / record.RESULT).read_text(encoding="utf-8"))
        return result

    def _learn(self, job: Job, folder: Path) -> Found:
        scenario, path = self.scenario(job.seed), folder / record.CHECKPOINT
        method = self.config.create(job.method, job.lam)
        with self._events(job) as events:
            follow = [self._follow(job, folder, events)]
            try:
                result = learn(
                    self.config,
                    scenario,
                    method,
                    job.seed,
                    job.purpose,
                    checkpoint=path,
                    callbacks=follow,
                )
            except (Diverged, Vanished) as error:
                return {"diverged": str(error)}
        return summary(result, [task.name for task in scenario.tasks], self._joint(job))

    def _follow(self, job: Job, folder: Path, events: Any) -> Callable[[Epoch | Result], None]:
        """What is done after each epoch and each task of a job."""
        before = time.perf_counter()

        def follow(news: Epoch | Result) -> None:
            nonlocal before
            seconds, before = time.perf_counter() - before, time.perf_counter()
            if isinstance(news, Epoch):
                self._progress.epoch(news)
                line = {**vars(news), "seconds": seconds}
            else:
                line = task_line(news)
                task = line["task"]
                record.write_matrix(folder / record.ACCURACY, news.accuracy)
                self._progress.task(task, float(news.accuracy[task, : task + 1].mean()))
            if self._journal.add({**vars(job), **line}) and events is not None:
                write_events(events, line, self._epochs)

        return follow

    @contextmanager
    def _events(self, job: Job) -> Iterator[Any]:
        """Where a job's events go, None for nowhere."""
        if self._make_writer is None:
            yield None
            return
        writer = self._make_writer(str(self.out / record.EVENTS / job.folder))
        try:
            yield writer
        finally:
            writer.close()

    def _joint(self, job: Job) -> Tensor | None:
        """The accuracy of joint training with this job's seed on each task when it was new, (T,)."""
        if job.purpose == "choose" or job.method == "joint" or "joint" not in self.config.methods:
            return None
        folder = self.out / Job("joint", job.seed, None).folder
        if "diverged" in json.loads((folder / record.RESULT).read_text(encoding="utf-8")):
            return None
        return record.read_matrix(folder / record.ACCURACY).diagonal()

    def scenario(self, seed: int) -> Scenario:
        """The scenario, whose random parts are by the seed; the last one is kept."""
        if self._scenario is None or self._scenario[0] != seed:
            self._scenario = None
            self._scenario = (seed, self.config.make_scenario(seed))
        return self._scenario[1]


def write_events(events: Any, line: Mapping[str, Any], epochs: Sequence[int]) -> None:
    """Add what is in a line of metrics.jsonl to a SummaryWriter, by epochs since the first task."""
    task, epoch = line["task"], line["epoch"]
    if epoch is None:
        step = sum(epochs[: task + 1])
        row = line["accuracy"]
        events.add_scalar("accuracy/average", float(row[: task + 1].mean()), step)
        for k in (~row.isnan()).nonzero()[:, 0].tolist():
            events.add_scalar(f"accuracy/task {k}", float(row[k]), step)
    else:
        step = sum(epochs[:task]) + epoch
        events.add_scalar("loss", line["loss"], step)
        if line["validation"] is not None:
            events.add_scalar("validation", line["validation"], step)
    events.flush()
