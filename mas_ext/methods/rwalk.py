"""Riemannian Walk: a running Fisher information, and what the path did for the loss over its length by that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mas_ext._arguments import check_count, check_positive
from mas_ext.importance import FisherSum
from mas_ext.importance.fisher import Labels
from mas_ext.methods.ewc import refuse_labels
from mas_ext.methods.method import Training
from mas_ext.methods.path import Integrated
from mas_ext.methods.quadratic import Lam
from mas_ext.models import MultiHead
from mas_ext.optim.hooks import Mode
from mas_ext.parameters.names import named_parameters


@dataclass(eq=False)
class RWalk(Integrated):
    """Task loss + lam sum_i (F_i / max F + s_i / max s) (theta_i - theta*_i)^2 (Chaudhry et al., ECCV 2018).

    A task's steps come in intervals. In the first step of each, the running Fisher information (EWC++) takes
    in that of the step's batch, per sample and after the step; at the interval's end the score grows by what
    the path did for the loss, over the distance that it went in the Fisher information's measure:

        F_i <- alpha F_now,i + (1 - alpha) F_i,   F_i = F_now,i at first
        s_new,i <- s_new,i + max(0, sum over the interval of -g_i dtheta_i / (1/2 F_i Dtheta_i^2 + eps))

    g and dtheta are those of SI, Dtheta is the change over the whole interval; the last one ends with the task.
    At a task's end s <- (s + s_new) / 2, s = s_new where the parameter is new, and theta* moves to theta.

    The paper leaves open how many samples F_now is of, and how F and s are brought into [0, 1]: here by the
    largest element of all parameters, so that 0 stays 0. The authors' code subtracts the smallest, too, sums
    squares of batches' mean gradients, leaves out the 1/2, and adds (s + s_new) / 2 to s.

    Args:
        lam: the paper's lambda, which it chooses for each data set; "auto": chosen for every task after the
            first, see mas_ext.choose_lam.
        alpha: share of F_now, above 0 and at most 1; 0.9 in the authors' code.
        interval: steps in an interval, the paper's Delta t; 10 in the authors' code.
        eps: the damping, > 0; 0.001 in the authors' code.
        labels: of F_now, those of EWC: "true" (the empirical Fisher information), ..., and "normal" for another
            task loss than the cross entropy, see estimate_fisher.
        mode: as in FusedMASPenalty.attach; None is "proximal" for lam "auto" and "gradient" otherwise.

    Raises:
        ValueError: an argument that can't be used.
    """

    lam: Lam = 1.0
    alpha: float = 0.9
    interval: int = 10
    eps: float = 1e-3
    labels: Labels = "true"
    mode: Mode | None = None

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha: got {self.alpha}, expected above 0 and at most 1")
        check_count(self.interval, "interval")
        check_positive(self.eps, "eps")
        super().__init__(self.lam, self.mode, merge="decay", anchor="latest", gamma=0.0)
        self._now = FisherSum(self.labels)
        self._step = 0
        self._fisher: dict[str, Tensor] = {}
        self._score: dict[str, Tensor] = {}
        self._new_score: dict[str, Tensor] = {}

    def begin_task(self, training: Training) -> None:
        refuse_labels(self.labels, training)
        super().begin_task(training)
        if not training.resumed:
            self._step = 0
            self._new_score = {name: torch.zeros_like(t) for name, t in self.path.total.items()}
            if training.task == 0:
                self._fisher, self._score = {}, {}
        self._now = FisherSum(
            self.labels,
            lambda model, batch: model(batch[0], training.head),
            training.own_parameters,
        )

    def after_step(self, training: Training, x: Tensor, y: Tensor) -> None:
        if self._step % self.interval == 0:
            self._now.add(training.model, (x, y))
            self._fisher = _averaged(self._fisher, self._now.into_mean(), self.alpha)
        self._step += 1
        if self._step % self.interval == 0:
            self._end_interval(training)

    def _end_interval(self, training: Training) -> None:
        theta = named_parameters(training.model, training.own_parameters)
        half = {name: f / 2 for name, f in self._fisher.items()}
        for name, score in self.path.importance(theta, self.eps, half).items():
            self._new_score[name] += score.clamp_(min=0)
        self.path.restart()

    def end_task(self, training: Training) -> None:
        if self._step % self.interval:
            self._end_interval(training)
        self._score = _averaged(self._score, self._new_score, 0.5)
        fisher, score = _normalised(self._fisher), _normalised(self._score)
        self.consolidate({name: s + fisher.get(name, 0) for name, s in score.items()})

    def state_dict(self) -> dict[str, Any]:
        own = {"fisher": self._fisher, "score": self._score, "new_score": self._new_score}
        return {**super().state_dict(), "step": self._step, **own}

    def load_state_dict(self, state: dict[str, Any], model: MultiHead) -> None:
        super().load_state_dict(state, model)
        theta = named_parameters(model)
        self._step = state["step"]
        self._fisher, self._score, self._new_score = (
            {name: t.to(theta[name].device) for name, t in state[key].items()}
            for key in ("fisher", "score", "new_score")
        )


def _averaged(
    old: Mapping[str, Tensor], new: Mapping[str, Tensor], share: float
) -> dict[str, Tensor]:
    """share new + (1 - share) old by name; what one of them lacks is the other's."""
    both = {n: share * t + (1 - share) * old[n] if n in old else t for n, t in new.items()}
    return {**old, **both}


def _normalised(importance: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Divided by the largest element of all; zeros stay zeros."""
    largest = max((float(t.max()) for t in importance.values() if t.numel()), default=0.0)
    return {name: t / largest if largest > 0 else t for name, t in importance.items()}
