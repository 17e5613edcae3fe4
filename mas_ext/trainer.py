"""Trainer: learns the tasks of a scenario one after another by a method, and tests after each of them."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from mas_ext._arguments import hint
from mas_ext.failures import DAMAGED
from mas_ext.methods import Method, create
from mas_ext.models import MultiHead
from mas_ext.scenarios import Scenario
from mas_ext.state import files
from mas_ext.training.run import Epoch, Learning, Result
from mas_ext.training.settings import Settings

# Called with an Epoch at its end, and at the end of a task with the Result so far.
Callback = Callable[[Epoch | Result], object]


class Trainer:
    """Learns tasks one after another.

        result = Trainer(models.mlp(scenario.shape), "mas", epochs=4).fit(scenario)

    Args:
        model: a MultiHead; heads that a task needs are added when its turn comes.
        method: a Method, or the name of one with its defaults.
        lam: of a method that is given by name; None for its default, "auto" for a choice before every task
            after the first, from that task's data alone, at one and a half times its training's cost.
        device: None for the model's.
        checkpoint: a file, written after every epoch, after every task and when Ctrl-C stops the training.
            Where it exists, fit goes on from it, to the same bits (but for random augmentation in worker
            processes).
        callbacks: called with an Epoch after every epoch, and with the Result so far after every task, before
            the checkpoint is written: a run that was killed in between reports it again. ScalarCallback is one.
        settings: those of Settings.

    Raises:
        ValueError: an argument that can't be used.
        TypeError: an argument that does not exist.
    """

    def __init__(
        self,
        model: MultiHead,
        method: Method | str = "mas",
        *,
        lam: float | str | None = None,
        device: torch.device | str | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        callbacks: Sequence[Callback] = (),
        **settings: Any,
    ) -> None:
        if not isinstance(model, MultiHead):
            raise ValueError(
                f"model: got {type(model).__name__}, expected a MultiHead; mas_ext.models.with_heads makes one"
            )
        if not isinstance(method, (Method, str)):
            raise ValueError(f"method: got {method!r}, expected a Method or the name of one")
        known = [field.name for field in fields(Settings)]
        for name in settings:
            if name not in known:
                raise TypeError(f"settings: got {name!r}, {hint(name, known)}")
        self.model = model
        if lam is not None and not isinstance(method, str):
            raise ValueError(
                f"lam: got {lam!r} beside a {type(method).__name__} that has its own, expected none"
            )
        given = {} if lam is None else {"lam": lam}
        self.method = create(method, **given) if isinstance(method, str) else method
        self.settings = Settings(**settings)
        parameter = next(model.parameters(), torch.empty(0))
        self.device = torch.device(device) if device is not None else parameter.device
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        if self.checkpoint is not None and not self.checkpoint.parent.is_dir():
            raise ValueError(f"checkpoint: got {checkpoint}, expected a folder that exists")
        self.callbacks = tuple(callbacks)

    def fit(self, scenario: Scenario) -> Result:
        """Learn the tasks in turn, from the start or from where the checkpoint was written.

        Raises:
            ValueError: a scenario that does not fit the settings or the model's heads; a damaged checkpoint, or
                that of another run.
            Diverged: the loss or the importance of a task is not finite any more; a FloatingPointError.
            Vanished: a task whose importance is at the level of rounding, under merge "consistent".
            KeyboardInterrupt: Ctrl-C; the checkpoint, where there is one, holds the last step.
        """
        with _reproducible(self.settings, self.device), _ctrl_c(self.checkpoint) as stop:
            run = Learning(self.model, self.method, self.settings, scenario, self.device)
            if self.checkpoint is not None and self.checkpoint.exists():
                try:
                    run.load_state_dict(files.unpack(files.load(self.checkpoint)))
                except DAMAGED as error:
                    told = str(error) if isinstance(error, ValueError) else repr(error)
                    raise ValueError(
                        f"checkpoint: got {self.checkpoint} with what this run can't go on from ({told}), "
                        "expected what it saved"
                    ) from error
            while run.at.task < len(scenario.tasks):
                if not run.inside:
                    run.begin_task(stopped=stop.is_set)
                while run.epochs_left():
                    for _ in run.steps():
                        if stop.is_set():
                            self._save(run)
                            raise KeyboardInterrupt
                    self._tell(run, run.end_epoch())
                run.end_task()
                self._tell(run, run.found)
                if stop.is_set():
                    raise KeyboardInterrupt
        return run.found

    def _tell(self, run: Learning, news: Epoch | Result) -> None:
        for callback in self.callbacks:
            callback(news)
        self._save(run)

    def _save(self, run: Learning) -> None:
        if self.checkpoint is not None:
            files.save(files.pack(run.state_dict()), self.checkpoint)


@contextmanager
def _reproducible(settings: Settings, device: torch.device) -> Iterator[None]:
    """Random numbers from the seed, and the caller's as they were before."""
    before = torch.get_deterministic_debug_mode()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        try:
            torch.set_deterministic_debug_mode("error" if settings.deterministic else before)
            yield
        finally:
            torch.set_deterministic_debug_mode(before)


@contextmanager
def _ctrl_c(checkpoint: Path | None) -> Iterator[threading.Event]:
    """Ctrl-C sets the event, so that the step can end and be saved; pressed again it stops at once."""
    stop = threading.Event()

    def pressed(signum: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    # Signals are for the main thread alone, and without a checkpoint there is nothing to wait for.
    if checkpoint is None or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.signal(signal.SIGINT, pressed)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
