"""The penalty inside an optimizer's step: as a gradient before it, or as a proximal step after it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

Mode = Literal["gradient", "proximal"]


class Pulling(Protocol):
    """What of a penalty the hooks need."""

    def add_grad_to(self, only: Collection[int], times: Tensor | None = None) -> None:
        """Add the penalty's gradient, times a factor, into .grad of the parameters with these ids."""

    def proximal_(
        self,
        parameters: Sequence[Tensor],
        eta: float | Tensor,
        second_moment: Mapping[int, Tensor] | None = None,
        correction: float = 1.0,
        eps: float = 0.0,
    ) -> None:
        """Move the parameters towards their anchor."""


def check_mode(mode: str, name: str = "mode") -> None:
    """A ValueError for what is no mode, of an argument of this name."""
    if mode not in ("gradient", "proximal"):
        raise ValueError(f"{name}: got {mode!r}, expected 'gradient' or 'proximal'")


class Handle:
    """Ends what `attach` began."""

    def __init__(self, hook: Any) -> None:
        """hook: what the optimizer gave back for its hook."""
        self._hook = hook

    def remove(self) -> None:
        """The penalty is no longer applied."""
        self._hook.remove()


class _Hook:
    """What an optimizer calls before or after its step, and for which penalty."""

    def __init__(self, penalty: Pulling, call: Callable[..., None]) -> None:
        self.penalty = penalty
        self._call = call

    def __call__(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._call(args, kwargs)


class Step(NamedTuple):
    """Parameters that share a step length: eta, or eta / (sqrt(v correction) + eps)."""

    parameters: list[Tensor]
    eta: float | Tensor
    second_moment: dict[int, Tensor] | None = None
    correction: float = 1.0
    eps: float = 0.0


def attach(
    penalty: Pulling, optimizer: torch.optim.Optimizer, mode: Mode, eta: float | None
) -> Handle:
    """Register the penalty with an optimizer.

    "gradient": before every step, 2 alpha Omega (theta - A) is added into .grad, as if the penalty were
    part of the loss. Clipping between backward() and step() does not clip it: there add_grad_ goes first.

    "proximal": after every step, theta <- theta + c / (1 + c) (A - theta) with c = 2 eta scale W, stable for
    every lam. eta is what the optimizer multiplies the gradient by: SGD lr (1 - dampening) / (1 - momentum),
    Nesterov too; Adam and AdamW lr / (sqrt(v_hat) + eps) from their state. A parameter that Adam has not
    stepped yet stays where it is.

    Under a GradScaler a skipped step applies nothing, and scaled gradients are met by the penalty's times the
    same scale. Optimizers with fused=True have both on the device, where they are read.

    Raises:
        TypeError: LBFGS, or an optimizer whose step length is unknown and no eta.
        ValueError: an unknown mode, a wrong eta, maximize=True, or a momentum of 1.
        RuntimeError: this penalty is attached to this optimizer already.
    """
    check_mode(mode)
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError(
            "optimizer: got LBFGS, which evaluates the loss inside its step; add penalty() to the loss "
            "in its closure instead"
        )
    if any(group.get("maximize") for group in optimizer.param_groups):
        raise ValueError("optimizer: got maximize=True, expected False: a penalty is minimised")
    hooks = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    if any(isinstance(h, _Hook) and h.penalty is penalty for kind in hooks for h in kind.values()):
        raise RuntimeError(
            "optimizer: got one that this penalty is attached to, expected another: attach once, or remove() "
            "the handle first"
        )
    if mode == "gradient":
        if eta is not None:
            raise ValueError(f'eta: got {eta} with mode="gradient", expected none')

        def before(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            _add_gradient(penalty, optimizer, args, kwargs)

        return Handle(optimizer.register_step_pre_hook(_Hook(penalty, before)))

    steps = _given(eta) if eta is not None else STEPS.get(type(optimizer))
    if steps is None:
        raise TypeError(
            f"optimizer: got {type(optimizer).__name__}, whose step length is unknown, expected SGD, Adam "
            'or AdamW; pass eta= for mode="proximal" or use mode="gradient"'
        )

    def after(*_: Any) -> None:
        for group in optimizer.param_groups:
            approach(penalty, optimizer, steps(group, optimizer.state))

    for group in optimizer.param_groups:
        list(
            steps(group, optimizer.state)
        )  # what is wrong with it shows here, not at the first step

    return Handle(optimizer.register_step_post_hook(_Hook(penalty, after)))


def approach(penalty: Pulling, optimizer: torch.optim.Optimizer, steps: Iterable[Step]) -> None:
    """The proximal steps that go with an optimizer's step, unless that one was skipped."""
    # With fused=True this runs after a skipped step, too.
    found_inf = getattr(optimizer, "found_inf", None)
    for step in steps:
        eta = step.eta if found_inf is None else step.eta * (found_inf == 0).double()
        penalty.proximal_(*step._replace(eta=eta))


def _add_gradient(
    penalty: Pulling,
    optimizer: torch.optim.Optimizer,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    # args[0] is the optimizer. The hook runs before the closure, which computes the gradients anew
    # and would drop what was added.
    if any(callable(a) for a in (*args[1:], kwargs.get("closure"))):
        raise RuntimeError(
            "closure: got one, expected none: with step(closure) add penalty() to the loss instead"
        )
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    # What a GradScaler tells an optimizer with fused=True, whose gradients are still scaled.
    penalty.add_grad_to(own, getattr(optimizer, "grad_scale", None))


State = Mapping[Tensor, Mapping[str, Any]]
Steps = Callable[[dict[str, Any], State], Iterator[Step]]


def _given(eta: float) -> Steps:
    if not 0 <= eta < float("inf"):
        raise ValueError(f"eta: got {eta}, expected a finite number from 0 up")

    def steps(group: dict[str, Any], state: State) -> Iterator[Step]:
        yield Step(group["params"], eta)

    return steps


def sgd_eta(group: dict[str, Any]) -> float | Tensor:
    """What SGD multiplies a gradient by in the long run."""
    momentum = group["momentum"]
    if momentum >= 1:
        raise ValueError(f"momentum: got {momentum}, expected less than 1")
    # Without momentum SGD ignores dampening.
    damped = 1 - group["dampening"] if momentum else 1.0
    eta: float | Tensor = group["lr"] * (damped / (1 - momentum))
    return eta


def sgd_steps(group: dict[str, Any], state: State) -> Iterator[Step]:
    """The step length of a group of SGD."""
    yield Step(group["params"], sgd_eta(group))


def adam_steps(group: dict[str, Any], state: State) -> Iterator[Step]:
    """The step lengths of a group of Adam or AdamW: one for all parameters with as many steps."""
    beta2 = float(group["betas"][1])
    key = "max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"
    stepped = [p for p in group["params"] if key in state.get(p, {})]
    by_step: dict[float, list[Tensor]] = {}
    for p, count in zip(stepped, _numbers([state[p]["step"] for p in stepped]), strict=True):
        by_step.setdefault(count, []).append(p)
    by_step.pop(0.0, None)  # the first step was skipped
    for step, parameters in by_step.items():
        yield Step(
            parameters,
            group["lr"],
            {id(p): state[p][key] for p in parameters},
            1 / (1 - beta2**step),
            group["eps"],
        )


def _numbers(scalars: Sequence[Tensor]) -> list[float]:
    """The numbers; from a GPU in one transfer instead of one for each."""
    if any(t.is_cuda for t in scalars):
        return [float(x) for x in torch.stack([*scalars]).tolist()]
    return [float(t) for t in scalars]


# By the optimizer's very type: a subclass may do anything in its step.
STEPS: dict[type, Steps] = {
    torch.optim.SGD: sgd_steps,
    torch.optim.Adam: adam_steps,
    torch.optim.AdamW: adam_steps,
}
