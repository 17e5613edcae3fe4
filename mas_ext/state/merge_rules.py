"""The merge rules: how tasks are put together, and the factor alpha_t that each task's importance gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch

from mas_ext.kernels.backends import Backend
from mas_ext.kernels.dtypes import OMEGA_DTYPES

Merge = Literal["consistent", "sum", "latest", "decay"]
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

    alpha per task, with S_t = sum_i Omega_t,i and weights w_t: "consistent": alpha_t S_t / w_t equal for
    all t and sum_t alpha_t = lam sum_t w_t (alpha_sum "tasks") or lam ("lam"), the consistency extension
    of MAS; "sum": lam w_t; "latest" (Aljundi et al. 2018, section 4): W <- max(0, W + Omega_t) with one anchor;
    "decay" (online EWC, Schwarz et al. 2018): W <- gamma W + Omega_t with one anchor.
    """

    merge: Merge = "consistent"
    store: Store = "merged"
    alpha_sum: AlphaSum = "tasks"
    gamma: float = 1.0
    omega_dtype: torch.dtype = torch.float32
    backend: Backend = "auto"
    state_device: StateDevice = None

    def __post_init__(self) -> None:
        _check_choice("merge", self.merge, get_args(Merge))
        _check_choice("store", self.store, get_args(Store))
        _check_choice("alpha_sum", self.alpha_sum, get_args(AlphaSum))
        _check_choice("backend", self.backend, get_args(Backend))
        _check_choice("state_device", self.state_device, (None, "cpu"))
        _check_choice("omega_dtype", self.omega_dtype, OMEGA_DTYPES)
        check_share(self.gamma, "gamma")
        if self.store == "per_task" and not self.own_anchors:
            raise ValueError(
                f'store: got "per_task" with merge={self.merge!r}, expected "merged": that rule has '
                "one anchor"
            )

    @property
    def own_anchors(self) -> bool:
        """Whether each task keeps its own anchor."""
        return self.merge in ("consistent", "sum")

    def scale(self, lam: float, entries: Sequence[TaskEntry]) -> float:
        """What the stored quadratic is multiplied by."""
        if self.merge != "consistent" or not entries:
            return lam
        tasks = sum(e.weight for e in entries) if self.alpha_sum == "tasks" else 1.0
        inverse = sum(e.weight / e.total for e in entries)
        return lam * tasks / inverse if inverse > 0 else 0.0

    def gain(self, entry: TaskEntry) -> float:
        """The factor of Omega_t in W."""
        return entry.weight / entry.total if self.merge == "consistent" else entry.weight

    def alpha(self, lam: float, entries: Sequence[TaskEntry]) -> list[float]:
        """alpha_t of every entry: the factor of Omega_t in the penalty."""
        faded = self.gamma if self.merge == "decay" else 1.0
        scale = self.scale(lam, entries)
        return [
            scale * self.gain(entry) * faded**age
            for age, entry in zip(range(len(entries) - 1, -1, -1), entries, strict=True)
        ]


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}")


def check_share(share: float, name: str) -> None:
    """Raise a ValueError for an argument of this name that is not from 0 to 1."""
    if not 0 <= _number(share) <= 1:
        raise ValueError(f"{name}: got {share!r}, expected a number from 0 to 1")


def check_factor(factor: Any, name: str) -> float:
    """An argument of this name as a float; a ValueError unless it is finite and at least 0."""
    number = _number(factor)
    if not 0 <= number < float("inf"):
        raise ValueError(f"{name}: got {factor!r}, expected a finite number from 0 up")
    return number


def _number(x: Any) -> float:
    """x as a float; NaN for what is none."""
    try:
        return float(x)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return float("nan")
