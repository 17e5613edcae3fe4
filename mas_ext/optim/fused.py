"""torch's SGD and AdamW with the penalty inside: a step is one pass over memory, for all parameters of a group.

What an attached penalty adds to a step of these is omega and anchor read once, 8 bytes per float32 parameter
instead of 20: `penalty.attach(optimizer, mode)` joins it to the step, and no gradient is written on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from mas_ext.kernels import backends
from mas_ext.kernels.flat_state import State
from mas_ext.kernels.optim import adamw_, sgd_
from mas_ext.optim.hooks import (
    STEPS,
    Handle,
    Mode,
    Pulling,
    Step,
    adam_steps,
    approach,
    check_mode,
    sgd_eta,
    sgd_steps,
)
from mas_ext.parameters.names import is_sharded
from mas_ext.state.buffers import Group

# What torch's optimizers can do besides, and these can't.
_REFUSED = ("foreach", "maximize", "differentiable")
# The place of a parameter that the penalty does not pull.
_NOWHERE: tuple[None, int] = (None, -1)


class Joining(Pulling, Protocol):
    """What of a penalty a fused optimizer needs."""

    def bound(self) -> list[tuple[Group, list[Tensor]]]:
        """The state with the parameters that it is of, as they are now."""


class _Call(NamedTuple):
    """Parameters of one device and dtype that are stepped together, with their part of the state."""

    parameters: list[Tensor]
    grads: list[Tensor]
    offsets: list[int]
    group: Group | None

    def state(self) -> State:
        """The kernels' argument for the state."""
        if self.group is not None:
            return self.group.state._replace(offsets=self.offsets)
        device = self.parameters[0].device
        return State.empty(len(self.parameters), device, backends.serves(device, "auto"))

    def lists(self, state: Mapping[Tensor, Mapping[str, Tensor]], key: str) -> list[Tensor]:
        """What the optimizer keeps of each parameter under this name."""
        return [state[p][key] for p in self.parameters]


class Fused(torch.optim.Optimizer):
    """What the fused optimizers share: which parameters are stepped together, and the penalty among them."""

    _penalty: Joining | None = None
    _mode: Mode = "gradient"

    def join(self, penalty: Joining, mode: Mode) -> Handle:
        """Apply the penalty in every step from now on, see FusedMASPenalty.attach.

        Raises:
            RuntimeError: another penalty has been joined, and its handle not removed.
            ValueError: an unknown mode, or a momentum of 1 in proximal mode.
        """
        check_mode(mode)
        if self._penalty is not None:
            raise RuntimeError(
                "optimizer: got one with a penalty attached, expected one without: remove() its handle first"
            )
        if mode == "proximal":
            for group in self.param_groups:
                list(self._lengths(group))
        self._penalty, self._mode = penalty, mode
        return Handle(_Joined(self))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, with the penalty's gradient in it or its proximal step behind it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        places = self._places()
        for group in self.param_groups:
            for call in self._calls(group, places):
                self._apply(group, call)
            if self._penalty is not None and self._mode == "proximal":
                rest = [p for p in group["params"] if p.grad is None and id(p) in places]
                if rest:
                    approach(self._penalty, self, self._lengths({**group, "params": rest}))
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; what this optimizer can't do is refused."""
        super().add_param_group(param_group)
        self._check()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As torch's, for a state of torch's own optimizer, too."""
        super().__setstate__(state)
        for group in self.param_groups:
            group["fused"] = True
        self._check()

    def _check(self) -> None:
        for group in self.param_groups:
            if any(is_sharded(p) for p in group["params"]):
                raise TypeError(
                    "params: got a DTensor, as by fully_shard, expected parameters that are whole; use torch's "
                    "optimizer and attach the penalty to it"
                )
            for key in _REFUSED:
                if group.get(key):
                    raise ValueError(
                        f"{key}: got {group[key]}, expected {key} to be off: mas_ext.optim."
                        f"{type(self).__name__} makes one fused step that minimises"
                    )

    def _places(self) -> dict[int, tuple[Group, int]]:
        """Where the state of each parameter lies that the penalty pulls, by the parameter's id."""
        if self._penalty is None:
            return {}
        return {
            id(p): (g, offset)
            for g, theta in self._penalty.bound()
            for p, offset in zip(theta, g.state.offsets, strict=True)
            if p.requires_grad
        }

    def _calls(
        self, group: dict[str, Any], places: Mapping[int, tuple[Group, int]]
    ) -> Iterator[_Call]:
        calls: dict[Any, _Call] = {}
        gradient = self._mode == "gradient"
        for p in group["params"]:
            grad = p.grad
            held, offset = places.get(id(p), _NOWHERE)
            if grad is None:
                if held is None or not gradient:
                    continue
                grad = p.grad = torch.zeros_like(p)
            if grad.is_sparse:
                raise RuntimeError(
                    f"parameters: got a sparse gradient of shape {tuple(p.shape)}, expected dense ones"
                )
            key = (p.device, p.dtype, *self._kind(group, p))
            call = calls.get(key)
            if call is None:
                call = calls[key] = _Call([], [], [], held)
            elif call.group is None and held is not None:
                call = calls[key] = call._replace(group=held)
            call.parameters.append(p)
            call.grads.append(grad)
            call.offsets.append(offset)
        yield from calls.values()

    def _entering(self, device: torch.device) -> tuple[bool, Tensor | None, Tensor | None]:
        """Whether the penalty comes behind the step, and what a GradScaler says."""
        scale, overflow = (
            None if t is None else t.to(device, torch.float32)
            for t in (getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        )
        return self._mode == "proximal", scale, overflow

    def _kind(self, group: dict[str, Any], p: Tensor) -> tuple[Any, ...]:
        """What else parameters must have in common to be stepped together."""
        return ()

    def _apply(self, group: dict[str, Any], call: _Call) -> None:
        raise NotImplementedError

    def _lengths(self, group: dict[str, Any]) -> Iterator[Step]:
        raise NotImplementedError


class _Joined:
    """Ends what `join` began."""

    def __init__(self, optimizer: Fused) -> None:
        """optimizer: the one that was joined."""
        self._optimizer: Fused | None = optimizer

    def remove(self) -> None:
        """The penalty is no longer applied."""
        if self._optimizer is not None:
            self._optimizer._penalty = None
            self._optimizer = None


def _number(name: str, x: float | Tensor) -> float:
    if isinstance(x, Tensor) and x.device.type != "cpu":
        raise TypeError(
            f"{name}: got a tensor on {x.device}, expected a number or a tensor on the CPU"
        )
    return float(x)


class SGD(Fused, torch.optim.SGD):
    """torch.optim.SGD with the penalty in its step, in one pass; same arguments, state and results to rounding.

        g += 2 alpha Omega (theta - A)                                    mode "gradient"
        b = momentum b + (1 - dampening) (g + weight_decay theta);   theta -= lr b
        theta += c / (1 + c) (A - theta), c = 2 eta scale W               mode "proximal"

    28 bytes per float32 parameter with momentum, 20 without a penalty. Gradients that a GradScaler scaled stay
    as they are. A parameter without .grad gets one in gradient mode, as by add_grad_.

    Args:
        params: as torch's.
        lr: a number, or a tensor on the CPU.
        momentum: as torch's.
        dampening: as torch's.
        weight_decay: as torch's.
        nesterov: as torch's.

    Raises:
        ValueError: foreach, maximize or differentiable, in a group of parameters.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
    ) -> None:
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, fused=True)

    def _kind(self, group: dict[str, Any], p: Tensor) -> tuple[Any, ...]:
        # Its first step is another one.
        return (group["momentum"] != 0 and self.state[p].get("momentum_buffer") is None,)

    def _apply(self, group: dict[str, Any], call: _Call) -> None:
        parameters, state = call.parameters, self.state
        proximal, scale, overflow = self._entering(parameters[0].device)
        buffers: list[Tensor] = []
        first = False
        if group["momentum"]:
            (first,) = self._kind(group, parameters[0])
            if first and overflow is not None and bool(overflow):
                return  # a buffer holds nothing before a step that was made
            for p in parameters if first else ():
                state[p]["momentum_buffer"] = torch.empty_like(p)
            buffers = call.lists(state, "momentum_buffer")
        sgd_(
            parameters,
            call.grads,
            buffers,
            call.state(),
            _number("lr", group["lr"]),
            group["momentum"],
            group["dampening"],
            _number("weight_decay", group["weight_decay"]),
            float(sgd_eta(group)) if proximal else 0.0,
            group["nesterov"],
            first,
            proximal,
            scale,
            overflow,
        )

    def _lengths(self, group: dict[str, Any]) -> Iterator[Step]:
        return sgd_steps(group, self.state)


class AdamW(Fused, torch.optim.AdamW):
    """torch.optim.AdamW with the penalty in its step, in one pass; same arguments, state, results to rounding.

    The penalty's gradient is added to g (mode "gradient"), or each step ends with the proximal one of length
    lr / (sqrt(v_hat) + eps) (mode "proximal"); see FusedMASPenalty.attach. 36 bytes per float32 parameter, 28
    without a penalty, 8 more with amsgrad. Gradients that a GradScaler scaled stay as they are. A parameter
    without .grad gets one in gradient mode, as by add_grad_.

    Args:
        params: as torch's.
        lr: a number, or a tensor on the CPU.
        betas: as torch's.
        eps: as torch's.
        weight_decay: as torch's.
        amsgrad: as torch's.

    Raises:
        ValueError: foreach, maximize or differentiable, in a group of parameters.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, fused=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As torch's, for a state of torch's own optimizer, too, which may count steps on the CPU."""
        super().__setstate__(state)
        for p, own in self.state.items():
            if "step" in own:
                own["step"] = own["step"].to(p.device, torch.float32)

    def _apply(self, group: dict[str, Any], call: _Call) -> None:
        keys = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * group["amsgrad"]
        parameters, state = call.parameters, self.state
        for p in parameters:
            if len(state[p]) == 0:
                state[p]["step"] = torch.zeros((), device=p.device)
                state[p].update({key: torch.zeros_like(p) for key in keys})
        proximal, scale, overflow = self._entering(parameters[0].device)
        beta1, beta2 = group["betas"]
        moments = [call.lists(state, key) for key in keys]
        adamw_(
            parameters,
            call.grads,
            moments[0],
            moments[1],
            moments[2] if group["amsgrad"] else [],
            call.lists(state, "step"),
            call.state(),
            _number("lr", group["lr"]),
            float(beta1),
            float(beta2),
            group["eps"],
            group["weight_decay"],
            proximal,
            scale,
            overflow,
        )

    def _lengths(self, group: dict[str, Any]) -> Iterator[Step]:
        return adam_steps(group, self.state)


STEPS.update({SGD: sgd_steps, AdamW: adam_steps})
