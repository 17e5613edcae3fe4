"""Memory Aware Synapses, and its variants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mas_ext.importance import EstimatorName, ImportanceSum
from mas_ext.importance.objectives import Objective
from mas_ext.methods.quadratic import Estimated
from mas_ext.optim.hooks import Mode
from mas_ext.state.merge_rules import AlphaSum, Merge


class MAS(Estimated):
    """Cross entropy + lam sum_i W_i (theta_i - theta*_i)^2, W = sum_t Omega_t (Aljundi et al. 2018).

    Equation 3, with Omega_t,i = 1/N sum_k abs(d |F(x_k)|^2 / d theta_i) (equation 2), by the output of the
    task's own head. merge "consistent" (MAS-alpha): sum_t alpha_t Omega_t (theta - theta*_t)^2 instead, the
    alpha_t such that the tasks' total importances are equal, whatever their order.

    Args:
        lam: the paper's lambda, 1 in its experiments.
        importance: "exact", "batch" or "local" (l-MAS, section 4.2), see estimate_importance.
        objective: "l2", "l1", "vector" or a callable, see estimate_importance.
        merge: "latest" (the paper's), "consistent", "sum" or "decay", see FusedMASPenalty.
        alpha_sum: see FusedMASPenalty.
        mode: "gradient" or "proximal", see FusedMASPenalty.attach.
        max_samples: importance from this many samples of a task, None for all.
    """

    def __init__(
        self,
        lam: float = 1.0,
        importance: EstimatorName = "exact",
        objective: Objective = "l2",
        merge: Merge = "latest",
        alpha_sum: AlphaSum = "tasks",
        mode: Mode = "gradient",
        max_samples: int | None = None,
    ) -> None:
        """See the class."""
        super().__init__(lam, mode, max_samples, merge=merge, alpha_sum=alpha_sum)
        self.importance, self.objective = importance, objective

    def options(self) -> dict[str, Any]:
        """See Method.options."""
        own = {"importance": self.importance, "objective": self.objective}
        return {**super().options(), **own}

    def estimator(self, exclude: Sequence[str]) -> ImportanceSum:
        """See Estimated.estimator."""
        return ImportanceSum(self.importance, self.objective, self.forward, exclude)
