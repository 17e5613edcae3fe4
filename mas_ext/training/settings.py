"""How tasks are trained: the hyperparameters of a Trainer, checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler

from mas_ext._arguments import check_choice, check_count, check_positive, check_share, resolve
from mas_ext.methods.method import SETTINGS, Setting, TaskLoss, is_cross_entropy

# (output, target) -> one number per sample, (n,), or their mean, 0-dim; larger is better.
Score = Callable[[Tensor, Tensor], Tensor]
MakeOptimizer = Callable[[Iterable[nn.Parameter], float], Optimizer]
MakeSchedule = Callable[[Optimizer, int], LRScheduler]

OPTIMIZERS: dict[str, MakeOptimizer] = {
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr, momentum=0.9),
    "adam": lambda parameters, lr: torch.optim.Adam(parameters, lr),
    "adamw": lambda parameters, lr: torch.optim.AdamW(parameters, lr),
}
SCHEDULES: dict[str, MakeSchedule] = {
    "cosine": lambda optimizer, steps: CosineAnnealingLR(optimizer, steps),
    "linear": lambda optimizer, steps: LinearLR(optimizer, 1.0, 0.0, steps),
}
LOSSES: dict[str, TaskLoss] = {
    "cross-entropy": F.cross_entropy,
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "smooth-l1": F.smooth_l1_loss,
    "bce": F.binary_cross_entropy_with_logits,
}
AMP_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# The share of the training data that lam is chosen on where `validation` says nothing.
CHOOSING_SHARE = 0.1


def is_right(output: Tensor, target: Tensor) -> Tensor:
    """Whether the largest output is the label's, (n,)."""
    return output.argmax(1) == target


def hamming(output: Tensor, target: Tensor) -> Tensor:
    """Share of the decisions output > 0 that are right, (n,): 1 - Hamming loss; both (n, C), targets 0 or 1."""
    return ((output > 0) == (target > 0)).double().mean(1)


def exact_match(output: Tensor, target: Tensor) -> Tensor:
    """Whether all decisions output > 0 of a sample are right, (n,); both (n, C), targets 0 or 1."""
    return ((output > 0) == (target > 0)).all(1)


NAMED_SCORES: dict[str, Score] = {
    "accuracy": is_right,
    "hamming": hamming,
    "exact-match": exact_match,
}


# Between an output and a target of the same shape, which torch would broadcast to a common one.
ELEMENTWISE = (
    *(F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy_with_logits),
    *(nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCEWithLogitsLoss),
    *(hamming, exact_match),
)


def matched(function: TaskLoss) -> TaskLoss:
    """A loss or score; of ELEMENTWISE it is computed on targets of the outputs' shape alone.

    A target (n,) is taken for that of outputs (n, 1), and integers and booleans become numbers.

    Raises:
        ValueError: when it is called with targets of another shape.
    """
    kind = getattr(function, "func", function)
    if kind not in ELEMENTWISE and type(kind) not in ELEMENTWISE:
        return function

    def compute(output: Tensor, target: Tensor) -> Tensor:
        if target.shape == output.shape[:1] and output.shape[1:] == (1,):
            target = target[:, None]
        if target.shape != output.shape:
            raise ValueError(
                f"targets: got shape {tuple(target.shape)} for outputs {tuple(output.shape)}, expected the same"
            )
        return function(output, target if target.is_floating_point() else target.to(output))

    compute.__qualname__ = _name(function)
    return compute


@dataclass(frozen=True)
class Settings:
    """How tasks are trained.

    Args:
        setting: "task" (one head per task, and the task is known at test time), "domain" (one head for all
            tasks) or "class" (one head per task, all side by side at test time).
        optimizer: "sgd" (momentum 0.9), "adam" or "adamw", or a callable (parameters, lr) -> Optimizer; every
            task has a new one.
        lr: learning rate, > 0.
        epochs: for every task, or one number per task; 0 for a task that was learned before.
        batch_size: samples in a step; one that is left over joins the last step, as BatchNorm can't learn from
            it.
        schedule: None, "cosine" or "linear" (both down to 0 within each task), or a callable (optimizer, steps)
            -> LRScheduler, stepped after every step.
        clip: largest L2 norm of the gradient of the loss, without the penalty; None for any.
        amp: None, "bfloat16" or "float16" (with a GradScaler): the dtype of autocast.
        validation: share of the training data kept for validation, in [0, 1).
        patience: stop a task after this many epochs without a better validation score, and go back to the
            weights of the best; None for never.
        importance_epochs: gather importance online in this many last epochs instead of after the last.
        balanced: draw samples with replacement, all classes equally often.
        seed: of the order of samples, of new heads and of dropout.
        deterministic: torch.use_deterministic_algorithms while training.
        workers: processes that read data sets that are not in memory.
        task_loss: (output, target) -> 0-dim, the mean over a batch; or a name: "cross-entropy", "mse", "l1",
            "smooth-l1", "bce" (several decisions of 0 or 1, output > 0 is 1), or "module:function" of what can
            be imported. Targets are positions of labels among the outputs, (n,), or, of tasks without classes,
            what the data have. Torch's losses between numbers take targets (n,) for outputs (n, 1), and no
            others that differ from the outputs in shape.
        score: (output, target) -> one number per sample, (n,), or their mean, 0-dim; larger is better; or a
            name: "accuracy" (whether the largest output is the label's), "hamming" (share of the decisions of
            0 or 1 that are right), "exact-match" (whether all of them are) or "module:function". Its mean is
            what Result calls accuracy. None: "accuracy"; for any other loss than the cross entropy, minus the
            loss.
        keep: for methods with lam "auto", what matters: from 0, the new task alone, to 1, the old ones. See
            mas_ext.choose_lam.

    Raises:
        ValueError: a value that can't be used.
    """

    setting: Setting = "task"
    optimizer: str | MakeOptimizer = "adam"
    lr: float = 1e-3
    epochs: int | Sequence[int] = 4
    batch_size: int = 128
    schedule: str | MakeSchedule | None = None
    clip: float | None = None
    amp: str | None = None
    validation: float = 0.0
    patience: int | None = None
    importance_epochs: int = 0
    balanced: bool = False
    seed: int = 0
    deterministic: bool = False
    workers: int = 0
    task_loss: str | TaskLoss = F.cross_entropy
    score: str | Score | None = None
    keep: float = 0.5

    def __post_init__(self) -> None:
        check_choice("setting", self.setting, SETTINGS)
        check_choice("amp", self.amp, (None, *AMP_DTYPES))
        for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            value = getattr(self, name)
            by_name = isinstance(value, str) and value in known
            if not by_name and not callable(value) and (name, value) != ("schedule", None):
                expected = f"one of {', '.join(known)} or a callable"
                raise ValueError(f"{name}: got {value!r}, expected {expected}")
        for name, function in (("task_loss", self.loss_function), ("score", self.score_function)):
            if not callable(function) and (name, function) != ("score", None):
                raise ValueError(f"{name}: got {function!r}, expected a callable (output, target)")
        counts = {"batch_size": 1, "importance_epochs": 0, "seed": 0, "workers": 0}
        for name, least in counts.items():
            value = getattr(self, name)
            if type(value) is not int or not least <= value < 2**62:
                raise ValueError(f"{name}: got {value!r}, expected an integer of at least {least}")
        for name in ("balanced", "deterministic"):
            check_choice(name, getattr(self, name), (True, False))
        check_positive(self.lr, "lr")
        if self.clip is not None and str(self.clip) != "inf":
            check_positive(self.clip, "clip")
        check_share(self.keep, "keep")
        check_share(self.validation, "validation")
        if self.validation == 1:
            raise ValueError(f"validation: got {self.validation}, expected less than 1")
        epochs = self.epochs if isinstance(self.epochs, Sequence) else [self.epochs]
        if not epochs or not all(type(n) is int and n >= 0 for n in epochs):
            raise ValueError(
                f"epochs: got {self.epochs!r}, expected integers of at least 0 for every task"
            )
        if self.patience is None:
            return
        check_count(self.patience, "patience")
        if not self.validation:
            raise ValueError(
                f"patience: got {self.patience} with validation={self.validation}, expected some validation "
                "data"
            )
        if self.importance_epochs:
            raise ValueError(
                f"importance_epochs: got {self.importance_epochs} with patience, expected 0: which "
                "epochs are the last is not known before they are over"
            )

    @property
    def loss_function(self) -> TaskLoss:
        """The task loss, also where it was given by its name."""
        loss = self.task_loss
        return matched(resolve("task_loss", loss, LOSSES) if isinstance(loss, str) else loss)

    @property
    def score_function(self) -> Score | None:
        """The score, also where it was given by its name."""
        score = self.score
        score = resolve("score", score, NAMED_SCORES) if isinstance(score, str) else score
        return None if score is None else matched(score)

    def epochs_of(self, tasks: int) -> list[int]:
        """The number of epochs of each task."""
        if isinstance(self.epochs, int):
            return [self.epochs] * tasks
        if len(self.epochs) != tasks:
            raise ValueError(
                f"epochs: got {len(self.epochs)} numbers, expected one for each of {tasks} tasks"
            )
        return [*self.epochs]

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """A new optimizer for these parameters."""
        make = self.optimizer if callable(self.optimizer) else OPTIMIZERS[self.optimizer]
        return make(parameters, self.lr)

    def make_schedule(self, optimizer: Optimizer, steps: int) -> LRScheduler | None:
        """A new learning-rate schedule for a task of so many steps."""
        if self.schedule is None or steps == 0:
            return None
        make = self.schedule if callable(self.schedule) else SCHEDULES[self.schedule]
        return make(optimizer, steps)

    def make_score(self, labelled: bool) -> Score:
        """The score, or the default one; labelled: whether targets are labels."""
        score, loss = self.score_function, self.loss_function
        if score is not None:
            return score
        if labelled and is_cross_entropy(loss):
            return is_right
        return lambda output, target: -loss(output, target)

    def described(self) -> dict[str, Any]:
        """The values that two runs must share for one to be resumed by the other."""
        found = {
            name: getattr(self, name) for name in self.__dataclass_fields__ if name != "workers"
        }
        # None by default, as checkpoints that have none of these are read.
        loss, score = self.loss_function, self.score_function
        found["task_loss"] = None if loss is F.cross_entropy else _name(loss)
        found["score"] = None if score is None else _name(score)
        found["keep"] = None if self.keep == Settings.keep else self.keep
        found["epochs"] = [self.epochs] if isinstance(self.epochs, int) else [*self.epochs]
        return found


def _name(function: Callable[..., Any]) -> str:
    """The qualified name of a function, or of a callable's class."""
    return str(getattr(function, "__qualname__", type(function).__qualname__))
