"""Step sizes: what an optimizer multiplies a gradient by, which is the length of its proximal step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mas_ext._arguments import as_float, check_factor


class Step(NamedTuple):
    """Parameters that share a step size: eta, or eta / (sqrt(v correction) + eps) with v by parameter's id."""

    parameters: list[Tensor]
    eta: float | Tensor
    second_moment: dict[int, Tensor] | None = None
    correction: float = 1.0
    eps: float = 0.0


# From a group of parameters and the optimizer's state.
StepSizes = Callable[[dict[str, Any], Mapping[Tensor, Mapping[str, Any]]], Iterator[Step]]


def check_numbers(group: Mapping[str, Any]) -> None:
    """Raise a ValueError for a number of SGD, Adam or AdamW in a group of parameters that is out of its range.

    A tensor, which is read on its device, may be anything.
    """
    for name in ("lr", "momentum", "weight_decay", "eps"):
        if not isinstance(group.get(name), Tensor):
            check_factor(group.get(name, 0.0), name)
    betas = group.get("betas", (0.0, 0.0))
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas: got {betas!r}, expected two numbers")
    for k, beta in enumerate(betas):
        if not isinstance(beta, Tensor) and not check_factor(beta, f"betas[{k}]") < 1:
            raise ValueError(f"betas[{k}]: got {beta!r}, expected a number below 1")
    dampening = group.get("dampening", 0.0)
    if not isinstance(dampening, (int, float)) or not math.isfinite(as_float(dampening)):
        raise ValueError(f"dampening: got {dampening!r}, expected a finite number")


def constant(eta: float) -> StepSizes:
    """The step size eta for all parameters; a ValueError unless it is finite and at least 0."""
    eta = check_factor(eta, "eta")
    return lambda group, state: iter([Step(group["params"], eta)])


def sgd_eta(group: dict[str, Any]) -> float | Tensor:
    """What SGD multiplies a gradient by in the long run: lr (1 - dampening) / (1 - momentum)."""
    momentum = group["momentum"]
    if momentum >= 1:
        raise ValueError(f"momentum: got {momentum}, expected less than 1")
    if group["dampening"] > 1:
        raise ValueError(f"dampening: got {group['dampening']}, expected at most 1")
    # Without momentum SGD ignores dampening.
    damped = 1 - group["dampening"] if momentum else 1.0
    eta: float | Tensor = group["lr"] * (damped / (1 - momentum))
    return eta


def sgd_steps(group: dict[str, Any], state: Mapping[Tensor, Mapping[str, Any]]) -> Iterator[Step]:
    """The step size of a group of SGD."""
    yield Step(group["params"], sgd_eta(group))


def adam_steps(group: dict[str, Any], state: Mapping[Tensor, Mapping[str, Any]]) -> Iterator[Step]:
    """The step sizes of a group of Adam or AdamW: one for all parameters that made as many steps.

    A parameter that has made none has no step size.
    """
    beta2 = float(group["betas"][1])
    key = "max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"
    stepped = [p for p in group["params"] if key in state.get(p, {})]
    by_count: dict[float, list[Tensor]] = {}
    for p, count in zip(stepped, _numbers([state[p]["step"] for p in stepped]), strict=True):
        by_count.setdefault(count, []).append(p)
    by_count.pop(0.0, None)  # the first step was skipped
    for count, parameters in by_count.items():
        moments = {id(p): state[p][key] for p in parameters}
        yield Step(parameters, group["lr"], moments, 1 / (1 - beta2**count), group["eps"])


def _numbers(scalars: Sequence[Tensor]) -> list[float]:
    """The numbers; from a GPU in one transfer instead of one for each."""
    if any(t.is_cuda for t in scalars):
        return [float(x) for x in torch.stack([*scalars]).tolist()]
    return [float(t) for t in scalars]


# By the optimizer's very type: a subclass may do anything in its step.
STEP_SIZES: dict[type, StepSizes] = {
    torch.optim.SGD: sgd_steps,
    torch.optim.Adam: adam_steps,
    torch.optim.AdamW: adam_steps,
}
