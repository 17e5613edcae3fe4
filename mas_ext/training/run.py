"""A run of training, step by step: its model, method, optimizer and data, and its results so far."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mas_ext import metrics
from mas_ext.failures import Diverged
from mas_ext.methods.method import Method, Training, is_cross_entropy
from mas_ext.methods.quadratic import Quadratic
from mas_ext.models import MultiHead
from mas_ext.scenarios import Scenario, Task
from mas_ext.state import files as checkpoint
from mas_ext.state.merge_rules import separate_anchor
from mas_ext.training.checkpoints import load_optimizer, refuse_unlike
from mas_ext.training.lam import choose_lam
from mas_ext.training.samples import Stream, TaskSamples, split_batches
from mas_ext.training.settings import AMP_DTYPES, CHOOSING_SHARE, Settings

EVALUATION_BATCH = 512

# What names of options begin with, among the settings of a run.
_OPTION = "method's "


@dataclass
class Result:
    """Measurements of a run, float64, NaN where nothing was measured. T tasks; accuracies are mean scores.

    Attributes:
        accuracy: accuracy[t, k] on the test data of task k after training task t, (T, T); for k > t in the
            domain-incremental setting only, where the head is there already.
        validation: accuracy on validation data, (T, T).
        initial: accuracy on the test data before any training, (T,), in the domain-incremental setting.
        step_seconds: mean duration of a training step, by task, (T,).
        border_seconds: duration of the method's work when a task begins and ends, (T,).
        held_bytes: memory that the method keeps after each task, beside the model, (T,).
        lam: that was chosen for each task, (T,), as FusedMASPenalty takes it: half of what EWC calls so.
        confusion: after the last task, by task with classes: how many test samples of its i-th class have their
            largest output at j, (classes, outputs) int64; the outputs are those of its head or, in the
            class-incremental setting, of all heads side by side.
    """

    accuracy: Tensor
    validation: Tensor
    initial: Tensor
    step_seconds: Tensor
    border_seconds: Tensor
    held_bytes: Tensor
    lam: Tensor
    confusion: dict[int, Tensor] = field(default_factory=dict, kw_only=True)

    @classmethod
    def nothing(cls, tasks: int) -> Result:
        """The result before the first task."""
        square = ("accuracy", "validation")
        names = [each.name for each in fields(Result) if each.name != "confusion"]
        shapes = [(tasks, tasks) if name in square else (tasks,) for name in names]
        return cls(*(torch.full(shape, math.nan, dtype=torch.float64) for shape in shapes))

    @property
    def tasks(self) -> int:
        """The number of tasks that are over."""
        return int((~self.held_bytes.isnan()).sum())

    @property
    def average_accuracy(self) -> float:
        """Mean accuracy over all tasks after the last one: metrics.average_accuracy."""
        return metrics.average_accuracy(self.accuracy)

    @property
    def forgetting(self) -> float:
        """Best earlier accuracy minus the last one, mean over tasks: metrics.forgetting."""
        return metrics.forgetting(self.accuracy)


@dataclass(frozen=True)
class Epoch:
    """One epoch: how many epochs of its task are over, mean loss, accuracy on validation data or None."""

    task: int
    epoch: int
    loss: float
    validation: float | None


class Stepper(NamedTuple):
    """What makes a step of a loss: the optimizer, its schedule and the scaler of its gradients."""

    optimizer: Optimizer
    schedule: LRScheduler | None
    scaler: torch.amp.GradScaler


@dataclass
class Position:
    """The point that a run has reached: tasks, epochs of the present one and steps of that which are over.

    seconds, steps: of the present task. best, waited: its best validation accuracy, and epochs since then.
    """

    task: int = 0
    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    steps: int = 0
    best: float = -math.inf
    waited: int = 0


class Learning:
    """One run of a Trainer; its state can be taken and put back after any step.

    Raises:
        ValueError: scenario, settings and the model's heads do not fit together.
    """

    def __init__(
        self,
        model: MultiHead,
        method: Method,
        settings: Settings,
        scenario: Scenario,
        device: torch.device,
    ) -> None:
        self.model, self.method, self.settings, self.device = model, method, settings, device
        self.tasks = scenario.tasks
        self.epochs = settings.epochs_of(len(self.tasks))
        self.found = Result.nothing(len(self.tasks))
        self.at = Position()
        self._best_model: dict[str, Tensor] = {}
        self._loss_sum = torch.zeros((), device=device)
        widths = [task.outputs or len(task.classes) for task in self.tasks]
        labelled = all(task.classes for task in self.tasks)
        if settings.setting == "class" and not labelled:
            raise ValueError("setting: got 'class' with a task without classes, expected another")
        if settings.balanced and not labelled:
            raise ValueError("balanced: got True with a task without classes, expected False")
        if is_cross_entropy(settings.loss_function):
            for task in self.tasks:
                _refuse_numbers(task)
        self._score = settings.make_score(labelled)
        if settings.setting == "domain":
            if len(set(widths)) > 1:
                raise ValueError(
                    f"setting: got 'domain' with tasks of {widths} outputs, expected as many for all"
                )
            widths = widths[:1]
        have = model.outputs
        if have != widths[: len(have)]:
            raise ValueError(
                f"model: got heads with {have} outputs, expected {widths} from the first on"
            )
        self._widths = widths
        model.to(device)
        if settings.setting == "domain":
            self._add_heads(1)
            for k in range(len(self.tasks)):
                self.found.initial[k] = self._mean_score(k, "test")

    # -- a task, from top to bottom ----------------------------------------------------------------

    def begin_task(
        self, resumed: bool = False, stopped: Callable[[], bool] = lambda: False
    ) -> None:
        """Get everything ready for the next step of the present task, its lam, too, where it is to be chosen.

        Raises:
            KeyboardInterrupt: stopped() while lam was being chosen.
        """
        start = time.perf_counter()
        settings, task = self.settings, self.at.task
        self._add_heads(task + 1)
        tasks = range(task + 1) if self.method.joint else [task]
        self._stream = self._stream_of("training", tasks, self.method.joint)
        self._stepper = self._make_stepper(self._stream)
        self.training = Training(
            self.model,
            self.optimizer,
            task,
            settings.setting,
            self._head(task, self.method.joint),
            self._ordered,
            settings.make_optimizer,
            self._observing,
            resumed,
            settings.loss_function,
        )
        self.method.begin_task(self.training)
        if not resumed:
            automatic = isinstance(self.method, Quadratic) and self.method.automatic
            if automatic and task > 0 and self.epochs[task] > 0:
                self._choose_lam(stopped)
            self.found.border_seconds[task] = time.perf_counter() - start

    def check_loss(self) -> None:
        """Try the task loss and the score on a batch of the present task.

        Raises:
            ValueError: what can't be computed, or is no number, of a score nor one for each sample.
        """
        x, y = next(iter(self._ordered()))
        self.model.eval()
        output = self.training.logits(x)
        self._scores(output, y)
        _checked("task_loss", lambda: self.method.loss(self.training, x, y), output, y, [()])

    def _scores(self, output: Tensor, target: Tensor) -> Tensor:
        """One number per sample, (n,), or their mean, 0-dim."""
        shapes = [(), (len(target),)]
        # The default is of the task loss.
        name = "task_loss" if self.settings.score is None else "score"
        return _checked(name, lambda: self._score(output, target), output, target, shapes)

    @property
    def optimizer(self) -> Optimizer:
        """Of all parameters of the model; new for every task."""
        return self._stepper.optimizer

    @property
    def _observing(self) -> bool:
        """Whether importance is gathered in the present epoch."""
        epochs = self.epochs[self.at.task]
        last = min(self.settings.importance_epochs, epochs)
        return last > 0 and self.at.epoch >= epochs - last

    @property
    def inside(self) -> bool:
        """Whether the present task has begun."""
        return self.at.epoch > 0 or self.at.step > 0

    def epochs_left(self) -> bool:
        """Whether the task goes on."""
        patience = self.settings.patience
        stopped = patience is not None and self.at.waited >= patience
        return self.at.epoch < self.epochs[self.at.task] and not stopped

    def steps(self) -> Iterator[None]:
        """Take the steps of the epoch that are left, one at a time."""
        settings, at, training = self.settings, self.at, self.training
        training.observing = self._observing
        left = split_batches(self._order(self._stream, at.epoch), settings.batch_size)[at.step :]
        self.model.train()
        start, before = time.perf_counter(), at.step
        try:
            for x, y in self._stream.batches(left, settings.seed):
                loss = self._step(self._stepper, x, y)
                self.method.after_step(training, x, y)
                self._loss_sum += loss
                at.step += 1
                yield
        finally:
            at.seconds += time.perf_counter() - start
            at.steps += at.step - before

    def _make_stepper(self, stream: Stream) -> Stepper:
        """A new optimizer, and what goes with it, for the present task's epochs of these samples."""
        settings, task = self.settings, self.at.task
        optimizer = settings.make_optimizer(self.model.parameters())
        batches = split_batches(torch.arange(len(stream)), settings.batch_size)
        schedule = settings.make_schedule(optimizer, self.epochs[task] * len(batches))
        scaler = torch.amp.GradScaler(self.device.type, enabled=settings.amp == "float16")
        return Stepper(optimizer, schedule, scaler)

    def _step(self, stepper: Stepper, x: Tensor, y: Tensor) -> Tensor:
        """Take a step on a batch; returns its loss."""
        optimizer, schedule, scaler = stepper
        precision = AMP_DTYPES.get(self.settings.amp or "")
        optimizer.zero_grad()
        with torch.autocast(self.device.type, precision, enabled=precision is not None):
            loss = self.method.loss(self.training, x, y)
        scaler.scale(loss).backward()
        if self.settings.clip is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        scaler.step(optimizer)
        scaler.update()
        if schedule is not None:
            schedule.step()
        return loss.detach()

    def end_epoch(self) -> Epoch:
        """Measure the epoch, on the validation data, too.

        Raises:
            Diverged: the loss is not finite any more.
        """
        at = self.at
        loss = float(self._loss_sum) / at.step
        if not math.isfinite(loss):
            raise Diverged(
                f"loss: got {loss} in epoch {at.epoch} of task {at.task}, expected a finite one; a smaller lr "
                'or lam helps, or mode="proximal"'
            )
        validation = None
        if self.settings.validation:
            validation = self._mean_score(at.task, "validation")
            at.waited += 1
            if validation > at.best:
                at.best, at.waited = validation, 0
                if self.settings.patience is not None:
                    self._best_model = {n: t.clone() for n, t in self.model.state_dict().items()}
        at.epoch, at.step = at.epoch + 1, 0
        self._loss_sum.zero_()
        return Epoch(at.task, at.epoch, loss, validation)

    def end_task(self) -> None:
        """Have the method end the task, test the model, and go on to the next task.

        Raises:
            Diverged: a score is not finite.
        """
        start, task, found = time.perf_counter(), self.at.task, self.found
        if self._best_model:
            self.model.load_state_dict(self._best_model)
        self.method.end_task(self.training)
        found.border_seconds[task] += time.perf_counter() - start
        found.step_seconds[task] = self.at.seconds / max(self.at.steps, 1)
        held = checkpoint.pack(self.method.state_dict())
        del held["tree"]
        found.held_bytes[task] = sum(t.numel() * t.element_size() for t in held.values())
        for k in range(len(self.tasks) if self.settings.setting == "domain" else task + 1):
            found.accuracy[task, k] = self._score_after(k, "test", task + 1 == len(self.tasks))
            if self.settings.validation:
                found.validation[task, k] = self._score_after(k, "validation")
        self.at, self._best_model = Position(task + 1), {}

    # -- the choice of lam -------------------------------------------------------------------------

    def _choose_lam(self, stopped: Callable[[], bool]) -> None:
        """Set the lam of the method's penalty by the present task's training and validation data."""
        assert isinstance(self.method, Quadratic)
        penalty = self.method.penalty
        assert penalty is not None
        settings, task, head = self.settings, self.at.task, self._head(self.at.task)
        share = settings.validation or CHOOSING_SHARE
        stream = self._stream_of("training", [task], validation=share)
        held_out = self._stream_of("validation", [task], validation=share)
        # Measuring sixteen times on more than this would take longer than half a training.
        seen = self.epochs[task] * len(stream)
        few = split_batches(torch.arange(len(held_out))[: max(1, seen // 12)], EVALUATION_BATCH)
        old = () if settings.setting == "domain" else range(task)

        def learn() -> Generator[Optimizer, None, None]:
            stepper = self._make_stepper(stream)
            for epoch in range(self.epochs[task]):
                order = split_batches(self._order(stream, epoch), settings.batch_size)
                for x, y in stream.batches(order, settings.seed):
                    if stopped():
                        raise KeyboardInterrupt
                    self.model.train()
                    self._step(stepper, x, y)
                    yield stepper.optimizer

        @torch.no_grad()
        def measure() -> tuple[float, list[Tensor]]:
            self.model.eval()
            total, outputs = 0.0, [list[Tensor]() for _ in old]
            for x, y in held_out.batches(few, settings.seed):
                features = self.model.backbone(x)
                loss = self.training.task_loss(self.model.classify(features, head), y)
                total += len(y) * float(loss)
                for k, found in zip(old, outputs, strict=True):
                    found.append(self.model.classify(features, k))
            return total / sum(map(len, few)), [torch.cat(found) for found in outputs]

        chosen = self.found.lam[:task].tolist()
        lam = choose_lam(penalty, learn, measure, settings.keep, chosen)
        penalty.lam = self.found.lam[task] = lam

    # -- data and heads ----------------------------------------------------------------------------

    def _add_heads(self, tasks: int) -> None:
        for width in self._widths[len(self.model.heads) : tasks]:
            self.model.add_head(width)

    def _head(self, task: int, joint: bool = False) -> int | None:
        """The head that a task's logits come from; None for all of them."""
        if self.settings.setting == "domain":
            return 0
        return None if joint or self.settings.setting == "class" else task

    def _stream_of(
        self, kind: str, tasks: Iterable[int], joint: bool = False, validation: float | None = None
    ) -> Stream:
        """Samples of tasks for training, validation or testing, one task after another.

        joint: with targets for all heads side by side. validation: the share for that, None for that of the
        settings.
        """
        share = self.settings.validation if validation is None else validation
        parts = []
        for task in tasks:
            data, head = self.tasks[task], self._head(task, joint)
            dataset = data.test if kind == "test" else data.train
            count = len(dataset)  # type: ignore[arg-type]
            index = torch.arange(count)
            if kind != "test":
                index = torch.randperm(count, generator=_seeded(self.settings.seed, task))
                held_out = int(share * count)
                index = index[:held_out] if kind == "validation" else index[held_out:]
            if len(index) == 0:
                raise ValueError(
                    f"{kind} data of task {data.name!r}: got no samples, expected some"
                )
            first = sum(self._widths[:task]) if head is None else 0
            parts.append(TaskSamples(data, dataset, index, first))
        return Stream(parts, self.settings.workers, self.device)

    def _order(self, stream: Stream, epoch: int) -> Tensor:
        """The samples of an epoch of the present task, which depend on the seed and its number alone."""
        generator = _seeded(self.settings.seed, self.at.task, epoch)
        count = len(stream)
        if not self.settings.balanced:
            return torch.randperm(count, generator=generator)
        classes = stream.labels
        weights = 1.0 / classes.bincount()[classes]
        return torch.multinomial(weights, count, replacement=True, generator=generator)

    def _ordered(self, samples: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """The training data in order, see Training.batches."""
        order = torch.arange(len(self._stream))[:samples]
        indices = split_batches(order, self.settings.batch_size)
        return self._stream.batches(indices, self.settings.seed)

    @torch.no_grad()
    def _mean_score(self, task: int, kind: str, confusion: bool = False) -> float:
        """The mean over a task's samples; confusion: count the classes that they are taken for, too."""
        head, total = self._head(task), torch.zeros((), dtype=torch.float64, device=self.device)
        stream = self._stream_of(kind, [task])
        classes, counts = len(self.tasks[task].classes), self.found.confusion
        self.model.eval()
        for x, y in stream.batches(split_batches(torch.arange(len(stream)), EVALUATION_BATCH)):
            output = self.model(x, head)
            found = self._scores(output, y).double()
            total += found.sum() if found.dim() else found * len(y)
            if confusion and classes and output.dim() == 2:
                count = counts.setdefault(
                    task, torch.zeros(classes, output.shape[1], dtype=torch.int64)
                )
                pairs = (y - stream.parts[0].first) * output.shape[1] + output.argmax(1)
                count += pairs.cpu().bincount(minlength=count.numel()).view_as(count)
        return float(total) / len(stream)

    def _score_after(self, task: int, kind: str, confusion: bool = False) -> float:
        """_mean_score of a network that has learned the present task; Diverged where it is not finite."""
        score = self._mean_score(task, kind, confusion)
        if not math.isfinite(score):
            raise Diverged(
                f"score of task {self.tasks[task].name!r}: got {score} over its {kind} data after task "
                f"{self.tasks[self.at.task].name!r}, expected a finite number"
            )
        return score

    # -- stopping and going on ---------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that a later run needs to continue from here to the same bits."""
        at = self.at
        state = {
            "run": self._described(),
            "at": asdict(at),
            "found": asdict(self.found),
            "heads": len(self.model.heads),
            "model": self.model.state_dict(),
            "method": self.method.state_dict(),
            "best_model": self._best_model,
            "loss_sum": self._loss_sum,
            "random": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            state["random_cuda"] = torch.cuda.get_rng_state(self.device)
        if self.inside:
            optimizer, schedule, scaler = self._stepper
            state["optimizer"] = optimizer.state_dict()
            state["scaler"] = scaler.state_dict()
            state["schedule"] = schedule.state_dict() if schedule else None
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from where `state_dict` was taken.

        Raises:
            ValueError: it comes from another run; nothing has changed then.
        """
        run = {**state["run"]}
        options = {n.removeprefix(_OPTION): run[n] for n in run if n.startswith(_OPTION)}
        run.update({_OPTION + name: value for name, value in separate_anchor(options).items()})
        for name, own in self._described().items():
            if run.get(name) != own:
                raise ValueError(
                    f"checkpoint: got a run with {name} {run.get(name)}, expected {own}"
                )
        models = state["model"], self.model.state_dict()
        for name in models[0] | models[1]:
            got, own = (tuple(t[name].shape) if name in t else None for t in models)
            if got != own and not name.startswith("heads."):
                raise ValueError(f"checkpoint: got {name!r} of shape {got}, expected {own}")
        best, shapes = state["best_model"], {n: t.shape for n, t in state["model"].items()}
        if {n: t.shape for n, t in best.items()} not in ({}, shapes):
            raise ValueError("checkpoint: got a best_model that is not the model's, expected one")
        # Checkpoints of before have no lam.
        nothing = asdict(Result.nothing(len(self.tasks)))
        found, at = {**nothing, **state["found"]}, state["at"]
        confusion = found.pop("confusion")
        if not all(
            isinstance(t, Tensor) and (t.dtype, t.dim()) == (torch.int64, 2)
            for t in confusion.values()
        ):
            raise ValueError("checkpoint: got a confusion that is none, expected counts by task")
        refuse_unlike("found", found, {n: t for n, t in nothing.items() if n in found})
        refuse_unlike("at", at, asdict(Position()))
        refuse_unlike("loss_sum", state["loss_sum"], self._loss_sum)
        refuse_unlike("random", state["random"], torch.get_rng_state())
        counts = {name: number for name, number in at.items() if name not in ("seconds", "best")}
        if not (
            all(type(n) is int and n >= 0 for n in (state["heads"], *counts.values()))
            and at["task"] <= len(self.tasks)
            and at["epoch"] <= (*self.epochs, 0)[at["task"]]
            and state["heads"] <= len(self.tasks)
        ):
            raise ValueError(f"checkpoint: got a run at {at}, expected a place in it")
        self._add_heads(state["heads"])
        refuse_unlike("model", state["model"], self.model.state_dict())
        self.model.load_state_dict(state["model"])
        self.method.load_state_dict(state["method"], self.model)
        over = at["task"] == len(self.tasks)
        self.at, self.found = Position(**at), Result(**found, confusion=confusion if over else {})
        self._best_model = best
        self._loss_sum.copy_(state["loss_sum"])
        if self.inside:
            self.begin_task(resumed=True)
            optimizer, schedule, scaler = self._stepper
            load_optimizer(optimizer, state["optimizer"])
            refuse_unlike("scaler", state["scaler"], scaler.state_dict())
            scaler.load_state_dict(state["scaler"])
            if schedule is not None:
                if isinstance(self.settings.schedule, str):
                    refuse_unlike("schedule", state["schedule"], schedule.state_dict())
                schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["random"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random_cuda"], self.device)

    def _described(self) -> dict[str, Any]:
        """The values that two runs must share for one to be resumed by the other."""
        sizes = [[len(data) for data in (task.train, task.test)] for task in self.tasks]  # type: ignore[arg-type]
        found = {
            **self.settings.described(),
            "method": type(self.method).__name__,
            **{_OPTION + name: value for name, value in self.method.options().items()},
            "tasks": [[task.name, *map(int, task.classes)] for task in self.tasks],
            "numbers of samples": sizes,
        }
        return {name: _comparable(value) for name, value in found.items()}


def _refuse_numbers(task: Task) -> None:
    """Raise a ValueError for targets that a cross entropy would take for probabilities, and that are none."""
    if task.classes:
        return
    target = torch.as_tensor(task.train[0][1])
    single, several = target.ndim == 0, target.ndim == 1
    shares = target.is_floating_point() and bool(
        (target >= 0).all() & ((target.sum() - 1).abs() < 1e-3)
    )
    if (single and target.is_floating_point()) or (several and not shares):
        raise ValueError(
            f"task_loss: got the cross entropy for task {task.name!r} with targets {target.dtype} of shape "
            f"{tuple(target.shape)}, expected another, as 'mse' to regress or 'bce' for decisions of 0 or 1; "
            "labels are integers"
        )


def _checked(
    name: str,
    compute: Callable[[], Tensor],
    output: Tensor,
    target: Tensor,
    shapes: Sequence[tuple[int, ...]],
) -> Tensor:
    """What a user's function of an output and a target gives; a ValueError by its name for other shapes."""
    what = f"outputs {tuple(output.shape)} and targets {target.dtype} {tuple(target.shape)}"
    try:
        found = compute()
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ValueError(
            f"{name}: got {type(error).__name__} for {what} ({error}), expected a number"
        ) from error
    if not isinstance(found, Tensor) or tuple(found.shape) not in shapes:
        got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        expected = " or ".join(map(str, shapes))
        raise ValueError(f"{name}: got {got} for {what}, expected a tensor of shape {expected}")
    return found


def _comparable(value: Any) -> Any:
    """A setting or an option as a checkpoint has it, whether it was a list or a tuple."""
    if isinstance(value, Mapping):
        return {name: _comparable(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_comparable(each) for each in value]
    if isinstance(value, torch.dtype):
        return str(value)
    return "a callable" if callable(value) else value


def _seeded(*numbers: int) -> torch.Generator:
    """An independent generator for every seed, task and epoch."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]) >> 1)
