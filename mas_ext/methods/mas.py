"""Memory Aware Synapses, and its variants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mas_ext.importance import EstimatorName, ImportanceSum
from mas_ext.importance.objectives import Objective
from mas_ext.methods.quadratic import Estimated, Lam
from mas_ext.optim.hooks import Mode
from mas_ext.state.merge_rules import AlphaSum, Anchor, Merge


@dataclass(eq=False)
class MAS(Estimated):
    """Task loss + lam sum_i W_i (theta_i - theta*_i)^2, W = sum_t Omega_t (Aljundi et al. 2018, equation 3).

    Omega_t,i = 1/N sum_k abs(d |F(x_k)|^2 / d theta_i) (equation 2), with F the output of the task's own head,
    and theta* where the last task ended. Merge "consistent" with anchor "own" (MAS-alpha):
    sum_t alpha_t Omega_t (theta - theta*_t)^2 instead, where the alpha_t make the tasks' total importances
    equal, whatever their order.

    Args:
        lam: the paper's lambda, 1 in its experiments; "auto": chosen for every task after the first, see
            mas_ext.choose_lam.
        importance: "exact", "batch" or "local" (l-MAS, section 4.2), see estimate_importance.
        objective: "l2", "l1", "vector" or a callable, see estimate_importance.
        merge: "sum" (the paper's), "consistent" or "decay", see FusedMASPenalty.
        anchor: "latest" (the paper's) or "own", see FusedMASPenalty.
        alpha_sum: see FusedMASPenalty.
        mode: as in FusedMASPenalty.attach; None is "proximal" for lam "auto" and "gradient" otherwise.
        max_samples: importance from this many samples of a task, None for all.
    """

    lam: Lam = 1.0
    importance: EstimatorName = "exact"
    objective: Objective = "l2"
    merge: Merge = "sum"
    anchor: Anchor = "latest"
    alpha_sum: AlphaSum = "tasks"
    mode: Mode | None = None
    max_samples: int | None = None

    def __post_init__(self) -> None:
        merging = {"merge": self.merge, "anchor": self.anchor, "alpha_sum": self.alpha_sum}
        super().__init__(self.lam, self.mode, self.max_samples, **merging)

    def estimator(self, exclude: Sequence[str]) -> ImportanceSum:
        return ImportanceSum(self.importance, self.objective, self.forward, exclude)
