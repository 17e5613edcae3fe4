"""Elastic Weight Consolidation, and its form with one running penalty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mas_ext.importance import FisherSum
from mas_ext.importance.fisher import Labels
from mas_ext.methods.quadratic import Estimated
from mas_ext.optim.hooks import Mode


class Fisher(Estimated):
    """A quadratic method whose importance is the diagonal of the Fisher information, by estimate_fisher."""

    def __init__(
        self,
        lam: float,
        labels: Labels,
        mode: Mode = "gradient",
        max_samples: int | None = None,
        **penalty: Any,
    ) -> None:
        """labels: see estimate_fisher; else see Estimated."""
        super().__init__(lam, mode, max_samples, **penalty)
        self.labels = labels

    def options(self) -> dict[str, Any]:
        """See Method.options."""
        return {**super().options(), "labels": self.labels}

    def estimator(self, exclude: Sequence[str]) -> FisherSum:
        """See Estimated.estimator."""
        return FisherSum(self.labels, self.forward, exclude)


class EWC(Fisher):
    """Cross entropy + lam/2 sum_t sum_i F_t,i (theta_i - theta*_t,i)^2 (Kirkpatrick et al. 2017, equation 3).

    F_t is the diagonal of the Fisher information of task t at theta*_t, where its training ended: every task
    has an anchor of its own.

    Args:
        lam: the paper's lambda.
        labels: "true", "predicted", "sampled" or "all", see estimate_fisher. The paper leaves it open; "true"
            is the empirical Fisher that most implementations take.
        mode: "gradient" or "proximal", see FusedMASPenalty.attach.
        max_samples: the Fisher information from this many samples of a task, None for all.
    """

    def __init__(
        self,
        lam: float = 400.0,
        labels: Labels = "true",
        mode: Mode = "gradient",
        max_samples: int | None = None,
    ) -> None:
        """See the class."""
        super().__init__(lam / 2, labels, mode, max_samples, merge="sum")


class OnlineEWC(Fisher):
    """Cross entropy + lam/2 sum_i gamma F*_t-1,i (theta_i - theta*_t-1,i)^2, F*_t = gamma F*_t-1 + F_t.

    One anchor, where the last task ended, and one Fisher information that fades: online EWC (Schwarz et al.
    2018), with gamma in the penalty, too, as there. F_t is not normalised.

    Args:
        lam: the paper's lambda.
        gamma: share of the old Fisher information that is kept at each new task, from 0 to 1, all of it.
        labels: "true", "predicted", "sampled" or "all", see estimate_fisher.
        mode: "gradient" or "proximal", see FusedMASPenalty.attach.
        max_samples: the Fisher information from this many samples of a task, None for all.
    """

    def __init__(
        self,
        lam: float = 400.0,
        gamma: float = 1.0,
        labels: Labels = "true",
        mode: Mode = "gradient",
        max_samples: int | None = None,
    ) -> None:
        """See the class."""
        super().__init__(gamma * lam / 2, labels, mode, max_samples, merge="decay", gamma=gamma)
