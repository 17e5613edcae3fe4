"""Methods that hold important parameters near their old values: an importance, and the one penalty of all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mas_ext.importance import ImportanceSum
from mas_ext.methods.method import Method, Training
from mas_ext.models import MultiHead
from mas_ext.optim.hooks import Mode
from mas_ext.penalty import FusedMASPenalty


class Quadratic(Method):
    """Cross entropy + lam sum_i W_i (theta_i - A_i)^2, the latter applied in the optimizer's step.

    Subclasses consolidate a task's importance into `penalty` when it ends, times `weight`.
    """

    def __init__(self, lam: float, mode: Mode = "gradient", **penalty: Any) -> None:
        """lam, and further arguments of FusedMASPenalty; mode: see FusedMASPenalty.attach."""
        # As wide as each parameter: float64 is for those of float64 alone. A trainer knows no other rank.
        self._arguments = {"omega_dtype": torch.float64, "process_group": None, **penalty}
        self.lam, self.mode, self.weight = lam, mode, 1.0
        self.penalty: FusedMASPenalty | None = None

    def build(self, model: nn.Module, exclude: Sequence[str]) -> FusedMASPenalty:
        """The penalty of a model, without the parameters that `exclude` matches."""
        return FusedMASPenalty(model, lam=self.lam, exclude=exclude, **self._arguments)

    def begin_task(self, training: Training) -> None:
        """See Method.begin_task."""
        if self.penalty is None or (training.task == 0 and not training.resumed):
            self.penalty = self.build(training.model, training.own_parameters)
        if self.penalty.lam > 0:
            self.penalty.attach(training.optimizer, mode=self.mode)

    def options(self) -> dict[str, Any]:
        """See Method.options."""
        return {"lam": self.lam, "mode": self.mode, **self._arguments}

    def state_dict(self) -> dict[str, Any]:
        """See Method.state_dict."""
        if self.penalty is None:
            return {}
        return {"exclude": self.penalty.exclude, "penalty": dict(self.penalty.state_dict())}

    def load_state_dict(self, state: dict[str, Any], model: MultiHead) -> None:
        """See Method.load_state_dict."""
        if state:
            self.penalty = self.build(model, state["exclude"])
            self.penalty.load_state_dict(state["penalty"])


class Estimated(Quadratic):
    """A quadratic method whose importance is a mean over samples of the task, taken at its end or online."""

    def __init__(
        self, lam: float, mode: Mode = "gradient", max_samples: int | None = None, **penalty: Any
    ) -> None:
        """max_samples: take the importance from this many samples, None for all; else see Quadratic."""
        super().__init__(lam, mode, **penalty)
        self.max_samples = max_samples
        self._head: int | None = None

    def estimator(self, exclude: Sequence[str]) -> ImportanceSum:
        """What measures a task's importance, by `forward`, from batches (x, y)."""
        raise NotImplementedError

    def forward(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The output that counts: that of the present task's head, (N, classes)."""
        output: Tensor = model(batch[0], self._head)
        return output

    def build(self, model: nn.Module, exclude: Sequence[str]) -> FusedMASPenalty:
        """See Quadratic.build."""
        importance = self.estimator(exclude)
        return FusedMASPenalty(
            model, lam=self.lam, importance=importance, exclude=exclude, **self._arguments
        )

    def begin_task(self, training: Training) -> None:
        """See Method.begin_task."""
        super().begin_task(training)
        self._head = training.head

    def options(self) -> dict[str, Any]:
        """See Method.options."""
        return {**super().options(), "max_samples": self.max_samples}

    def after_step(self, training: Training, x: Tensor, y: Tensor) -> None:
        """See Method.after_step."""
        if training.observing:
            assert self.penalty is not None
            self.penalty.observe((x, y))

    def end_task(self, training: Training) -> None:
        """See Method.end_task."""
        assert self.penalty is not None
        observed = training.observing
        batches = None if observed else training.batches(self.max_samples)
        self.penalty.consolidate(batches, self.weight)
