"""Elastic Weight Consolidation, and its forms with one running penalty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mas_ext.importance import FisherSum
from mas_ext.importance.fisher import FisherMethod, Labels
from mas_ext.methods.method import Training, is_cross_entropy
from mas_ext.methods.quadratic import Estimated, Lam, MeanOverOutputs, times
from mas_ext.optim.hooks import Mode


def refuse_labels(labels: Labels, training: Training) -> None:
    """Raise a ValueError for labels whose likelihood is that of classes where the task loss is another."""
    if labels != "normal" and not is_cross_entropy(training.task_loss):
        raise ValueError(
            f"labels: got {labels!r} with a task loss that is no cross entropy, expected 'normal'"
        )


class Fisher(Estimated):
    """A quadratic method whose importance is the diagonal of the Fisher information, by estimate_fisher."""

    labels: Labels

    def begin_task(self, training: Training) -> None:
        refuse_labels(self.labels, training)
        super().begin_task(training)

    def estimator(self, exclude: Sequence[str]) -> FisherSum:
        return FisherSum(self.labels, self.forward, exclude)


@dataclass(eq=False)
class EWC(Fisher):
    """Task loss + lam/2 sum_t sum_i F_t,i (theta_i - theta*_t,i)^2 (Kirkpatrick et al. 2017, equation 3).

    F_t is the diagonal of the Fisher information of task t at theta*_t, where its training ended: every task
    has its own anchor.

    Args:
        lam: the paper's lambda; "auto": chosen for every task after the first, see mas_ext.choose_lam.
        labels: "true", "predicted", "sampled", "all" or "reversed" for the cross entropy, "normal" for another
            task loss, see estimate_fisher. The paper leaves it open; "true" is the empirical Fisher
            information, as in most implementations.
        mode: as in FusedMASPenalty.attach; None is "proximal" for lam "auto" and "gradient" otherwise.
        max_samples: the Fisher information from this many samples of a task, None for all.
    """

    lam: Lam = 400.0
    labels: Labels = "true"
    mode: Mode | None = None
    max_samples: int | None = None

    def __post_init__(self) -> None:
        super().__init__(
            times(0.5, self.lam), self.mode, self.max_samples, merge="sum", anchor="own"
        )


@dataclass(eq=False)
class OnlineEWC(Fisher):
    """Task loss + `lam/2 sum_i gamma F*_t-1,i (theta_i - theta*_t-1,i)^2`, `F*_t = gamma F*_t-1 + F_t`.

    One anchor, where the last task ended, and one Fisher information that fades: online EWC (Schwarz et al.
    2018), with gamma in the penalty, too, as there. F_t is not normalised.

    Args:
        lam: the paper's lambda; "auto": chosen for every task after the first, see mas_ext.choose_lam.
        gamma: share of the old Fisher information that is kept at each new task, from 0 to 1.
        labels: see EWC.
        mode: as in FusedMASPenalty.attach; None is "proximal" for lam "auto" and "gradient" otherwise.
        max_samples: the Fisher information from this many samples of a task, None for all.
    """

    lam: Lam = 400.0
    gamma: float = 1.0
    labels: Labels = "true"
    mode: Mode | None = None
    max_samples: int | None = None

    def __post_init__(self) -> None:
        merging: dict[str, Any] = {"merge": "decay", "anchor": "latest", "gamma": self.gamma}
        super().__init__(times(self.gamma / 2, self.lam), self.mode, self.max_samples, **merging)


@dataclass(eq=False)
class EWCDR(MeanOverOutputs, Fisher):
    """Task loss + lam/2 sum_i W_i (theta_i - theta*_i)^2, W the tasks' mean F_t (Liu & Chang, CVPR 2026).

    F_t is the Fisher information of the true labels under the logits times -1, at the end of task t: it does
    not vanish where the network is sure of the labels. Tasks count by their outputs, and the anchor is where
    the last task ended, as in the authors' code. That differs in what is around: it takes F_t in training mode
    ("batch", but every batch counts the same), gives the first F_t of a new head its whole weight, and has the
    cross entropy of class-incremental tasks over the new classes alone.

    Args:
        lam: the paper's lambda; 10,000 in the authors' configuration for CIFAR-100; "auto": chosen for every
            task after the first, see mas_ext.choose_lam.
        importance: "exact", or "batch" (the authors'), the method of estimate_fisher.
        at_most: the largest F_t,i, 1e-4 in the authors' code; None for any.
        labels: "reversed"; with those of EWC, it is EWC with this mean and one anchor.
        mode: as in FusedMASPenalty.attach; None is "proximal" for lam "auto" and "gradient" otherwise.
        max_samples: the Fisher information from this many samples of a task, None for all.
    """

    lam: Lam = 10000.0
    importance: FisherMethod = "exact"
    at_most: float | None = 1e-4
    labels: Labels = "reversed"
    mode: Mode | None = None
    max_samples: int | None = None

    def __post_init__(self) -> None:
        lam = times(0.5, self.lam)
        super().__init__(lam, self.mode, self.max_samples, merge="sum", anchor="latest")
        # What can't be used is refused now.
        self.estimator(())

    def estimator(self, exclude: Sequence[str]) -> FisherSum:
        options: dict[str, Any] = {"method": self.importance, "at_most": self.at_most}
        return FisherSum(self.labels, self.forward, exclude, **options)
