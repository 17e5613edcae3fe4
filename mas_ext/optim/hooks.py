"""The penalty in the steps of any optimizer: its gradient before a step, or its proximal step after it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from mas_ext.optim.step_size import STEP_SIZES, Step, StepSizes, check_numbers, constant
from mas_ext.state.buffers import Group
from mas_ext.state.low_rank import UpdateGroup
from mas_ext.state.sharded_updates import ShardedUpdates

Mode = Literal["gradient", "proximal"]


class Penalty(Protocol):
    """What optimizers need of a penalty."""

    def add_grad_to(self, only: Collection[int], times: Tensor | None = None) -> None:
        """Add the penalty's gradient, times a factor, into .grad of the parameters with these ids."""

    def updates(self) -> Iterator[UpdateGroup | ShardedUpdates]:
        """The low-rank updates that are held, of the adapters that are active now."""

    def proximal_(
        self,
        parameters: Sequence[Tensor],
        eta: float | Tensor,
        second_moment: Mapping[int, Tensor] | None = None,
        correction: float = 1.0,
        eps: float = 0.0,
    ) -> None:
        """Move the parameters towards their anchor."""

    def bound(self) -> list[tuple[Group, list[Tensor]]]:
        """Each group of the state with its parameters as they are now."""


def check_mode(mode: str, name: str = "mode") -> None:
    """Raise a ValueError for what is no mode, in an argument of this name."""
    if mode not in ("gradient", "proximal"):
        raise ValueError(f"{name}: got {mode!r}, expected 'gradient' or 'proximal'")


class Handle:
    """Ends what `attach` began."""

    def __init__(self, remove: Callable[[], None]) -> None:
        """remove: what ends it; called once."""
        self._remove: Callable[[], None] | None = remove

    def remove(self) -> None:
        """The penalty is no longer applied."""
        if self._remove is not None:
            self._remove()
            self._remove = None


class _Hook:
    """What an optimizer calls before or after its step, and for which penalty."""

    def __init__(self, penalty: Penalty) -> None:
        self.penalty = penalty


class _CheckNumbers(_Hook):
    """Before a step that a proximal one follows: what failed after it would leave it without that."""

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        _check_numbers(optimizer)
        if type(optimizer) is torch.optim.SGD:  # that of Adam takes a wait for the GPU
            check_step_sizes(optimizer, STEP_SIZES[torch.optim.SGD])


def _check_numbers(optimizer: torch.optim.Optimizer) -> None:
    if type(optimizer) in STEP_SIZES:  # what numbers mean to another one is not known
        for group in optimizer.param_groups:
            check_numbers(group)


class _AddGradient(_Hook):
    def __call__(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if _inside_own_step(optimizer):
            return None
        _check_numbers(optimizer)

        def add() -> None:
            own = {id(p) for group in optimizer.param_groups for p in group["params"]}
            # What a GradScaler tells an optimizer with fused=True, whose gradients are still scaled.
            self.penalty.add_grad_to(own, getattr(optimizer, "grad_scale", None))

        # args[0] is the optimizer.
        closure = next((a for a in (*args[1:], *kwargs.values()) if callable(a)), None)
        if closure is None:
            add()
            return None

        def with_penalty() -> Any:
            # It computes the gradients anew, and would drop what was added before.
            loss = closure()
            add()
            return loss

        return (
            tuple(with_penalty if a is closure else a for a in args),
            {key: with_penalty if a is closure else a for key, a in kwargs.items()},
        )


class _ProximalStep(_Hook):
    def __init__(self, penalty: Penalty, step_sizes: StepSizes) -> None:
        super().__init__(penalty)
        self._step_sizes = step_sizes

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if _inside_own_step(optimizer):
            return
        for group in optimizer.param_groups:
            steps = self._step_sizes(group, optimizer.state)
            take_proximal_steps(self.penalty, optimizer, steps)


# The function around every step, which calls the hooks.
_AROUND_STEP = torch.optim.Optimizer.profile_hook_step(lambda: None).__code__


@_disable_dynamo
def _inside_own_step(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the step whose hooks run is part of another step of this optimizer, which has its own hooks.

    torch calls hooks around the step of every class: twice where a subclass calls super().step().
    """
    frame, steps = sys._getframe(1), 0
    while frame is not None:
        code = frame.f_code
        # Compiled, it is another function with this one's name in its own.
        around = (
            code.co_filename == _AROUND_STEP.co_filename and _AROUND_STEP.co_name in code.co_name
        )
        if around and frame.f_locals.get("self") is optimizer:
            steps += 1
        frame = frame.f_back  # type: ignore[assignment]
    return steps > 1


def take_proximal_steps(
    penalty: Penalty, optimizer: torch.optim.Optimizer, steps: Iterable[Step]
) -> None:
    """Take the proximal steps that go with an optimizer's step, unless that one was skipped."""
    # With fused=True this runs after a skipped step, too.
    found_inf = getattr(optimizer, "found_inf", None)
    for step in steps:
        eta = step.eta if found_inf is None else step.eta * (found_inf == 0).double()
        penalty.proximal_(*step._replace(eta=eta))


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that makes the steps, out of wrappers that hold it as `optimizer` or `_optimizer`.

    Fabric, Lightning and accelerate hand out such wrappers, whose own hooks are never called.

    Raises:
        TypeError: no torch optimizer, or one whose step calls no hooks.
    """
    found, wrappers = optimizer, []
    while found is not None:
        wrappers.append(found)
        own = getattr(found, "__dict__", {}) if callable(getattr(found, "zero_grad", None)) else {}
        held = (own.get(key) for key in ("optimizer", "_optimizer"))
        found = next((o for o in held if hasattr(o, "step") and o not in wrappers), None)
    inner = wrappers[-1] if wrappers else None
    if not isinstance(inner, torch.optim.Optimizer):
        hint = ": attach to its .optimizer" if hasattr(optimizer, "optimizer") else ""
        raise TypeError(
            f"optimizer: got {type(optimizer).__name__}, expected a torch.optim.Optimizer{hint}"
        )
    # A wrapper that holds the real one by another name lacks what torch's constructor gives.
    if not hasattr(inner, "_optimizer_step_pre_hooks") or not hasattr(type(inner).step, "hooked"):
        raise TypeError(
            f"optimizer: got {type(inner).__name__}, whose step calls no hooks, expected the "
            "torch.optim.Optimizer that it wraps"
        )
    return inner


def register_hook(
    penalty: Penalty, optimizer: torch.optim.Optimizer, mode: Mode, eta: float | None
) -> Handle:
    """Have an optimizer apply the penalty in every step; the modes are those of FusedMASPenalty.attach.

    Raises:
        TypeError: LBFGS, a schedule-free one in the proximal form, or one of unknown step size without eta.
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
        return Handle(optimizer.register_step_pre_hook(_AddGradient(penalty)).remove)
    if any("train_mode" in group for group in optimizer.param_groups):
        raise TypeError(
            f'optimizer: got the schedule-free {type(optimizer).__name__} with mode="proximal", expected '
            'mode="gradient": its parameters are means with iterates of its own, which nothing would pull back'
        )
    step_sizes = STEP_SIZES.get(type(optimizer)) if eta is None else constant(eta)
    if step_sizes is None:
        raise TypeError(
            f"optimizer: got {type(optimizer).__name__}, whose step length is unknown, expected SGD, Adam "
            'or AdamW; pass eta= for mode="proximal" or use mode="gradient"'
        )
    check_step_sizes(optimizer, step_sizes)
    before = optimizer.register_step_pre_hook(_CheckNumbers(penalty))
    after = optimizer.register_step_post_hook(_ProximalStep(penalty, step_sizes))

    def remove() -> None:
        before.remove()
        after.remove()

    return Handle(remove)


def check_step_sizes(optimizer: torch.optim.Optimizer, step_sizes: StepSizes) -> None:
    """Raise now what a group without a step size would raise in the first step."""
    for group in optimizer.param_groups:
        list(step_sizes(group, optimizer.state))
