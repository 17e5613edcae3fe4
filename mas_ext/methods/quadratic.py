"""Methods that keep important parameters near their old values: an importance, and the one penalty of all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mas_ext._arguments import check_count
from mas_ext.importance import ImportanceSum
from mas_ext.methods.method import Method, Training
from mas_ext.models import MultiHead
from mas_ext.optim.hooks import Mode
from mas_ext.penalty import FusedMASPenalty

# A strength, or "auto": the trainer chooses one for every task after the first.
Lam = float | Literal["auto"]


def is_automatic(lam: Any, name: str = "lam") -> bool:
    """Whether a strength is to be chosen; a ValueError of the argument for a word that is not "auto"."""
    if isinstance(lam, str) and lam != "auto":
        raise ValueError(f"{name}: got {lam!r}, expected a number or 'auto'")
    return isinstance(lam, str)


def times(factor: float, lam: Lam) -> Lam:
    """factor lam; a word as it is."""
    return lam if isinstance(lam, str) else factor * lam


class Quadratic(Method):
    """Task loss + lam sum_i W_i (theta_i - A_i)^2, the latter applied in the optimizer's step.

    Subclasses consolidate a task's importance into `penalty` when it ends, times `weight`. Arguments are those
    of FusedMASPenalty, and the mode of FusedMASPenalty.attach, None for "gradient".

    With lam "auto", penalty.lam is 1 until the trainer sets it, and mode None is "proximal", in which no lam
    diverges.
    """

    def __init__(self, lam: Lam, mode: Mode | None = None, **penalty: Any) -> None:
        # As wide as each parameter: float64 is for those of float64 alone. A trainer knows no other rank.
        width = {"omega_dtype": torch.float64, "process_group": None}
        self._arguments = {"lam": lam, **width, **penalty}
        self.automatic = is_automatic(lam)
        self.mode, self.weight = mode, 1.0
        self.penalty: FusedMASPenalty | None = None

    def build(self, model: nn.Module, exclude: Sequence[str]) -> FusedMASPenalty:
        """The penalty of a model, without the parameters that `exclude` matches."""
        return FusedMASPenalty(model, exclude=exclude, **self._given)

    @property
    def form(self) -> Mode:
        """The mode, whether it was given or not."""
        return self.mode or ("proximal" if self.automatic else "gradient")

    @property
    def _given(self) -> dict[str, Any]:
        """Arguments of the penalty."""
        return {**self._arguments, "lam": 1.0} if self.automatic else self._arguments

    def begin_task(self, training: Training) -> None:
        if self.penalty is None or (training.task == 0 and not training.resumed):
            self.penalty = self.build(training.model, training.own_parameters)
        if self.automatic or self.penalty.lam > 0:
            self.penalty.attach(training.optimizer, mode=self.form)

    def options(self) -> dict[str, Any]:
        return {**super().options(), "mode": self.form, **self._arguments}

    def state_dict(self) -> dict[str, Any]:
        if self.penalty is None:
            return {}
        return {"exclude": self.penalty.exclude, "penalty": dict(self.penalty.state_dict())}

    def load_state_dict(self, state: dict[str, Any], model: MultiHead) -> None:
        if "penalty" in state:
            self.penalty = self.build(model, state["exclude"])
            self.penalty.load_state_dict(state["penalty"])


class Estimated(Quadratic):
    """A quadratic method whose importance is a mean over samples of the task, taken at its end or online.

    max_samples: take the importance from this many samples at most, None for all.
    """

    def __init__(
        self, lam: Lam, mode: Mode | None = None, max_samples: int | None = None, **penalty: Any
    ) -> None:
        super().__init__(lam, mode, **penalty)
        if max_samples is not None:
            check_count(max_samples, "max_samples")
        self.max_samples = max_samples
        self._head: int | None = None

    def estimator(self, exclude: Sequence[str]) -> ImportanceSum:
        """The estimator of a task's importance, by `forward`, from batches (x, y)."""
        raise NotImplementedError

    def forward(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Outputs of the head in training, (N, outputs)."""
        output: Tensor = model(batch[0], self._head)
        return output

    def build(self, model: nn.Module, exclude: Sequence[str]) -> FusedMASPenalty:
        importance = self.estimator(exclude)
        return FusedMASPenalty(model, importance=importance, exclude=exclude, **self._given)

    def begin_task(self, training: Training) -> None:
        super().begin_task(training)
        self._head = training.head

    def options(self) -> dict[str, Any]:
        return {**super().options(), "max_samples": self.max_samples}

    def after_step(self, training: Training, x: Tensor, y: Tensor) -> None:
        if training.observing:
            assert self.penalty is not None
            self.penalty.observe((x, y))

    def end_task(self, training: Training) -> None:
        assert self.penalty is not None
        batches = None if training.observing else training.batches(self.max_samples)
        self.penalty.consolidate(batches, self.weight)


class MeanOverOutputs(Estimated):
    """An estimated method with W = sum_t c_t Omega_t / sum_t c_t, c_t the number of outputs of task t's head.

    Where each task has classes of its own, that is the running average by the number of classes
    W <- C_t-1 / C_t W + c_t / C_t Omega_t, C_t = c_1 + ... + c_t. In the domain-incremental setting all c_t are
    equal.
    """

    def end_task(self, training: Training) -> None:
        own_heads = training.setting != "domain"
        outputs = training.model.outputs if own_heads else [1] * (training.task + 1)
        self.weight = outputs[-1]
        super().end_task(training)
        assert self.penalty is not None
        if not self.automatic:
            self.penalty.lam = self._arguments["lam"] / sum(outputs)
