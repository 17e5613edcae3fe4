"""How tasks are put together: the factor alpha_t of each one's importance, and whose anchor counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, NamedTuple, get_args

import torch

from mas_ext._arguments import check_choice, check_share
from mas_ext.kernels.backends import Backend
from mas_ext.kernels.dtypes import OMEGA_DTYPES

Merge = Literal["sum", "consistent", "decay"]
Anchor = Literal["latest", "own"]
Store = Literal["merged", "per_task"]
AlphaSum = Literal["tasks", "lam"]
StateDevice = Literal["cpu"] | None


class TaskEntry(NamedTuple):
    """One consolidated task: S = sum_i Omega_i, and its weight."""

    total: float
    weight: float


@dataclass(frozen=True)
class MergeRule:
    """The constructor arguments of the penalty that concern the state.

    Raises:
        ValueError: what is not one of the choices.

    merge: alpha per task, with S_t = sum_i Omega_t,i and weights w_t. "sum": lam w_t. "consistent", the
        consistency extension of MAS: alpha_t S_t / w_t equal for all t and sum_t alpha_t = lam sum_t w_t
        (alpha_sum "tasks") or lam ("lam"). "decay" (online EWC, Schwarz et al. 2018): lam w_t gamma^age,
        the age being the number of tasks since.
    anchor: "latest" (Aljundi et al. 2018, section 4): all tasks' importances pull towards theta*_T, where the
        last task ended. "own" (EWC, Kirkpatrick et al. 2017): each one towards theta*_t.
    """

    merge: Merge = "sum"
    anchor: Anchor = "latest"
    store: Store = "merged"
    alpha_sum: AlphaSum = "tasks"
    gamma: float = 1.0
    omega_dtype: torch.dtype = torch.float32
    backend: Backend = "auto"
    state_device: StateDevice = None
    anchor_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        check_choice("merge", self.merge, get_args(Merge))
        check_choice("anchor", self.anchor, get_args(Anchor))
        check_choice("store", self.store, get_args(Store))
        check_choice("alpha_sum", self.alpha_sum, get_args(AlphaSum))
        check_choice("backend", self.backend, get_args(Backend))
        check_choice("state_device", self.state_device, (None, "cpu"))
        check_choice("omega_dtype", self.omega_dtype, OMEGA_DTYPES)
        check_choice("anchor_dtype", self.anchor_dtype, (None, torch.bfloat16, torch.float16))
        if self.anchor_dtype is not None and self.anchor != "latest":
            raise ValueError(
                f"anchor_dtype: got {self.anchor_dtype} with anchor {self.anchor!r}, expected None: a mean of "
                "parameters needs more bits than these have"
            )
        check_share(self.gamma, "gamma")

    @property
    def signed(self) -> bool:
        """Whether importance may be negative: W <- max(0, W + Omega_t) (Zenke et al. 2017)."""
        return (self.merge, self.anchor, self.store) == ("sum", "latest", "merged")

    @property
    def keep(self) -> float:
        """The share of W that is left when another task comes."""
        return self.gamma if self.merge == "decay" else 1.0

    def scale(self, lam: float, entries: Sequence[TaskEntry]) -> float:
        """What the stored quadratic is multiplied by."""
        if self.merge != "consistent" or not entries:
            return lam
        tasks = sum(e.weight for e in entries) if self.alpha_sum == "tasks" else 1.0
        inverse = sum(e.weight / e.total for e in entries)
        return lam * tasks / inverse if inverse > 0 else 0.0

    def gains(self, entries: Sequence[TaskEntry]) -> list[float]:
        """The factor of every Omega_t in W."""
        consistent = self.merge == "consistent"
        return [
            (entry.weight / entry.total if consistent else entry.weight) * self.keep**age
            for age, entry in zip(range(len(entries) - 1, -1, -1), entries, strict=True)
        ]

    def alpha(self, lam: float, entries: Sequence[TaskEntry]) -> list[float]:
        """alpha_t of every entry: the factor of Omega_t in the penalty."""
        scale = self.scale(lam, entries)
        return [scale * gain for gain in self.gains(entries)]

    def strengths(self, entries: Sequence[TaskEntry]) -> list[float]:
        """alpha_t of every entry over what it was when that was the last one, leaving gamma aside."""
        if self.merge != "consistent":
            return [1.0] * len(entries)
        by_tasks = self.alpha_sum == "tasks"
        tasks = accumulate(e.weight for e in entries) if by_tasks else [1.0] * len(entries)
        inverse = accumulate(e.weight / e.total for e in entries)
        scales = [n / h if h > 0 else 0.0 for n, h in zip(tasks, inverse, strict=True)]
        return [scales[-1] / first if first > 0 else 1.0 for first in scales]


def separate_anchor(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that have a merge, at any depth, with the anchor that it stood for where they have none.

    They were written when merge told both: "latest" was "sum" with the latest anchor, which "decay" had, too;
    "sum" and "consistent" had each task's own.
    """
    found = {
        name: separate_anchor(value) if isinstance(value, Mapping) else value
        for name, value in settings.items()
    }
    merge = found.get("merge")
    if merge is not None and "anchor" not in found:
        found["anchor"] = "own" if merge in ("sum", "consistent") else "latest"
        found["merge"] = "sum" if merge == "latest" else merge
    return found
