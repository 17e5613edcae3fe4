"""torch's SGD, Adam and AdamW with the penalty inside: a step is one pass over memory, whatever the groups.

What an attached penalty adds to a step of these is omega and anchor read once, 8 bytes per float32 parameter
instead of 20, and no gradient is written on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import compress
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from mas_ext.kernels import backends
from mas_ext.kernels.flat_state import State
from mas_ext.kernels.optim import AdamWRule, SGDRule, adamw_, flat_rules, sgd_
from mas_ext.optim.hooks import (
    Handle,
    Mode,
    Penalty,
    check_mode,
    check_step_sizes,
    take_proximal_steps,
)
from mas_ext.optim.step_size import (
    STEP_SIZES,
    Step,
    StepSizes,
    adam_steps,
    check_numbers,
    sgd_eta,
    sgd_steps,
)
from mas_ext.parameters.names import is_sharded
from mas_ext.state.buffers import Group
from mas_ext.state.low_rank import UpdateGroup
from mas_ext.state.sharded_updates import ShardedUpdates

# Options of torch's optimizers that these lack.
_REFUSED = ("foreach", "maximize", "differentiable")

# The group and offset of a parameter without a penalty.
_NOWHERE = (None, -1)

# What is kept of a parameter before its first step.
_NOTHING: dict[str, Any] = {}


@dataclass
class _Bucket:
    """Parameters of one device and dtype that one call steps, with the offsets of their state in its group.

    An offset of -1 is a parameter without a penalty; a bucket of only such parameters has no group.

    moments: the names of what the step keeps of each parameter; kept: all that the optimizer keeps of each;
    both empty where that is nothing. fresh: the places of parameters that have no moments yet. renewed:
    parameters whose gradient is another tensor in this step, with that one. rules: the numbers of the step,
    each for as many parameters as its count says.
    """

    moments: Sequence[str]
    group: Group | None = None
    parameters: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    kept: list[dict[str, Any]] = field(default_factory=list)
    fresh: list[int] = field(default_factory=list)
    renewed: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    rules: list[tuple[float, ...]] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def add(
        self,
        stepped: _Stepped,
        rule: tuple[float, ...],
        fresh: bool,
        places: Mapping[int, tuple[Group, int]],
    ) -> None:
        """Take parameters in that follow one rule."""
        parameters, before = stepped.parameters, len(self.parameters)
        self.parameters += parameters
        self.fresh += range(before, len(self.parameters)) if fresh else ()
        self.grads += stepped.grads
        self.kept += stepped.kept
        if stepped.other_grads:
            pairs = zip(parameters, stepped.grads, strict=True)
            self.renewed += [(p, g) for p, g in pairs if p.grad is not g]
        if places:
            found = [places.get(id(p), _NOWHERE) for p in parameters]
            self.offsets += [offset for _, offset in found]
            self.group = self.group or next((g for g, _ in found if g is not None), None)
        else:
            self.offsets += [-1] * len(parameters)
        self.rules.append(rule)
        self.counts.append(len(parameters))

    @property
    def state(self) -> State:
        """The kernels' argument."""
        if self.group is not None:
            return self.group.state._replace(offsets=self.offsets)
        device = self.parameters[0].device
        return State.empty(len(self.parameters), device, backends.serves(device, "auto"))


class _Stepped(NamedTuple):
    """Parameters with their gradients and with what the optimizer keeps of them, if the step keeps something.

    other_grads: whether there are gradients that are not the parameters' own .grad.
    """

    parameters: Sequence[Tensor]
    grads: Sequence[Tensor]
    kept: Sequence[dict[str, Any]]
    other_grads: bool

    def among(self, chosen: Sequence[bool]) -> _Stepped:
        """The parameters that are chosen, each by its truth value."""
        parameters = [*compress(self.parameters, chosen)]
        grads, kept = [*compress(self.grads, chosen)], [*compress(self.kept, chosen)]
        return _Stepped(parameters, grads, kept, self.other_grads)


class _Launch(NamedTuple):
    """A step of a bucket that is ready to be made, and what parameters get by it that have none before.

    beside: what the optimizer keeps of the parameters, by name.
    """

    kernel: Callable[[], None]
    bucket: _Bucket
    state: dict[Tensor, dict[str, Tensor]]
    beside: Mapping[str, Sequence[Any]]

    def check(self) -> None:
        """Raise a ValueError for tensors that the kernel would refuse, once other ones had made their step."""
        for name, tensors in {"grad": self.bucket.grads, **self.beside}.items():
            for p, t in zip(self.bucket.parameters, tensors, strict=True):
                expected = (torch.float32, p.device, ()) if name == "step" else _kind(p)
                if _kind(t) != expected:
                    raise ValueError(
                        f"{name}: got {_kind(t)} beside a parameter, expected {expected}"
                    )


def _kind(t: Any) -> Any:
    """dtype, device and shape of a dense tensor; of anything else its type."""
    dense = isinstance(t, Tensor) and t.layout == torch.strided
    return (t.dtype, t.device, tuple(t.shape)) if dense else type(t)


class FusedOptimizer(torch.optim.Optimizer):
    """What the fused optimizers share: which parameters are stepped together, and the penalty among them."""

    _penalty: Penalty | None = None
    _mode: Mode = "gradient"
    _step_sizes: StepSizes

    def attach(self, penalty: Penalty, mode: Mode) -> Handle:
        """Apply the penalty in every step from now on; the modes are those of FusedMASPenalty.attach.

        Raises:
            RuntimeError: another penalty is attached, and its handle not removed.
            ValueError: an unknown mode, or a momentum of 1 in proximal mode.
        """
        check_mode(mode)
        if self._penalty is not None:
            raise RuntimeError(
                "optimizer: got one with a penalty attached, expected one without: remove() its handle first"
            )
        if mode == "proximal":
            check_step_sizes(self, self._step_sizes)
        self._penalty, self._mode = penalty, mode
        return Handle(self._detach)

    def _detach(self) -> None:
        self._penalty = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, with the penalty's gradient in it or its proximal step after it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        places = self._places()
        # All that can fail comes before the first parameter moves.
        for group in self.param_groups:
            _check_own_numbers(group)
        updates: list[UpdateGroup | ShardedUpdates] = []
        if self._penalty is not None and self._mode == "gradient":
            updates = [*self._penalty.updates()]
        factors = {id(p) for update in updates for p in update.trained()}
        launches = [self._prepared(bucket) for bucket in self._buckets(places, factors)]
        rest = [self._without_gradient(group, places) for group in self.param_groups]
        grads = {id(p): g for each in launches for p, g in each.bucket.renewed} if updates else {}
        for update in updates:
            update.add_grad_(grads, getattr(self, "grad_scale", None))
        if len(launches) > 1:  # what one kernel refuses has changed nothing
            for launch in launches:
                launch.check()
        for launch in launches:
            launch.kernel()
            self.state.update(launch.state)
            for p, grad in launch.bucket.renewed:
                p.grad = grad
        for steps in filter(None, rest):
            assert self._penalty is not None
            take_proximal_steps(self._penalty, self, steps)
        return loss

    def _without_gradient(
        self, group: dict[str, Any], places: Mapping[int, tuple[Group, int]]
    ) -> list[Step]:
        """The proximal steps of parameters that have no gradient, and so no step of another kind."""
        if self._mode != "proximal":
            return []
        rest = [p for p in group["params"] if p.grad is None and id(p) in places]
        return list(self._step_sizes({**group, "params": rest}, self.state)) if rest else []

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1:])
        except Exception:
            self.param_groups.pop()
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        for group in state["param_groups"]:  # may come from torch's own optimizer
            group["fused"] = True
        self._check(state["param_groups"])
        super().__setstate__(state)

    def _check(self, groups: Iterable[dict[str, Any]]) -> None:
        for group in groups:
            _check_own_numbers(group)
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
        """The group and offset of each parameter that the penalty pulls, by the parameter's id."""
        if self._penalty is None:
            return {}
        return {
            id(p): (g, offset)
            for g, theta in self._penalty.bound()
            for p, offset in zip(theta, g.state.offsets, strict=True)
            if p.requires_grad
        }

    def _buckets(
        self, places: Mapping[int, tuple[Group, int]], factors: Collection[int]
    ) -> Iterable[_Bucket]:
        """The parameters by the calls that step them, with their gradients.

        factors: ids of low-rank updates' factors. The kernels don't know the penalty of these, so that their
        gradients are copies, to which it is added.
        """
        buckets: dict[Any, _Bucket] = {}
        for group in self.param_groups:
            moments = self._moments(group)
            stepped = self._stepped(group["params"], moments, places, factors)
            # As a list much faster than as a generator, here and below.
            for sparse in compress(stepped.parameters, [g.is_sparse for g in stepped.grads]):
                raise RuntimeError(
                    f"parameters: got a sparse gradient of shape {tuple(sparse.shape)}, expected dense ones"
                )
            fresh = self._are_fresh(stepped.kept) if moments else [False] * len(stepped.parameters)
            kinds = [
                (p.get_device(), p.dtype, new)
                for p, new in zip(stepped.parameters, fresh, strict=True)
            ]
            for kind in dict.fromkeys(kinds):
                *place, new = kind
                alike = kinds.count(kind) == len(kinds)
                own = stepped if alike else stepped.among([k == kind for k in kinds])
                bucket = buckets.setdefault((*place, moments), _Bucket(moments))
                bucket.add(own, self._rule(group, new), new, places)
        return buckets.values()

    def _stepped(
        self,
        parameters: Sequence[Tensor],
        moments: Sequence[str],
        places: Mapping[int, tuple[Group, int]],
        factors: Collection[int],
    ) -> _Stepped:
        """The parameters of a group that are stepped."""
        grads = [p.grad for p in parameters]
        others = bool(factors) or any([g is None for g in grads])  # noqa: C419
        if others:
            stepped: list[tuple[Tensor, Tensor]] = []
            for p, grad in zip(parameters, grads, strict=True):
                pulled = self._mode == "gradient" and id(p) in places
                if grad is not None:
                    stepped.append((p, grad.clone() if id(p) in factors else grad))
                elif pulled or id(p) in factors:
                    stepped.append((p, torch.zeros_like(p)))
            parameters = [p for p, _ in stepped]
            grads = [grad for _, grad in stepped]
        kept = [self.state.get(p, _NOTHING) for p in parameters] if moments else ()
        return _Stepped(parameters, cast("list[Tensor]", grads), kept, others)

    def _amp(self, device: torch.device) -> Iterator[Tensor | None]:
        """What a GradScaler says: the gradients' scale, and whether they overflowed."""
        for key in ("grad_scale", "found_inf"):
            t = getattr(self, key, None)
            yield None if t is None else t.to(device, torch.float32)

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The names of what a step keeps of each of a group's parameters, beside how many there were."""
        raise NotImplementedError

    def _are_fresh(self, kept: Sequence[dict[str, Any]]) -> list[bool]:
        """Whether parameters have no moments yet, by what is kept of each."""
        return [not own for own in kept]

    def _rule(self, group: dict[str, Any], fresh: bool) -> tuple[float, ...]:
        """The numbers of a group's step; fresh: of parameters that have no moments yet."""
        raise NotImplementedError

    def _prepared(self, bucket: _Bucket) -> _Launch:
        """The step of a bucket, with everything checked and allocated that it needs."""
        raise NotImplementedError


def _check_own_numbers(group: Mapping[str, Any]) -> None:
    """Refuse numbers that are out of their range, or on a GPU."""
    for name, x in group.items():
        if isinstance(x, Tensor) and x.device.type != "cpu":
            raise TypeError(
                f"{name}: got a tensor on {x.device}, expected a number or a tensor on the CPU"
            )
        if isinstance(x, Tensor) and x.numel() != 1:
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected one number")
    check_numbers({n: float(x) if isinstance(x, Tensor) else x for n, x in group.items()})


class SGD(FusedOptimizer, torch.optim.SGD):
    """torch.optim.SGD with the penalty in its step, in one pass; same arguments, state and results to rounding.

        g += 2 alpha Omega (theta - A)                                    mode "gradient"
        b = momentum b + (1 - dampening) (g + weight_decay theta);   theta -= lr b
        theta += c / (1 + c) (A - theta), c = 2 eta scale W               mode "proximal"

    28 bytes per float32 parameter with momentum, 20 without a penalty. Gradients that a GradScaler scaled stay
    as they are. A parameter without .grad gets one in gradient mode, as by add_grad_.

    Args:
        params, momentum, dampening, weight_decay, nesterov: as torch's.
        lr: a number, or a tensor on the CPU.

    Raises:
        ValueError: foreach, maximize or differentiable, in a group of parameters; there or in a step, before
            anything changes, a number out of its range.
    """

    _step_sizes = staticmethod(sgd_steps)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
    ) -> None:
        numbers = {"lr": lr, "momentum": momentum, "dampening": dampening}
        _check_own_numbers({**numbers, "weight_decay": weight_decay})
        super().__init__(params, lr, momentum, dampening, weight_decay, nesterov, fused=True)

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def _are_fresh(self, kept: Sequence[dict[str, Any]]) -> list[bool]:
        return [own.get("momentum_buffer") is None for own in kept]

    def _rule(self, group: dict[str, Any], fresh: bool) -> SGDRule:
        return SGDRule(
            float(group["lr"]),
            float(group["momentum"]),
            float(group["dampening"]),
            float(group["weight_decay"]),
            float(sgd_eta(group)) if self._mode == "proximal" else 0.0,
            group["nesterov"],
            fresh,
        )

    def _prepared(self, bucket: _Bucket) -> _Launch:
        parameters = bucket.parameters
        scale, overflow = self._amp(parameters[0].device)
        if bucket.fresh and overflow is not None and bool(overflow):
            # A buffer holds nothing before a step that was made.
            return _Launch(lambda: None, _Bucket(()), {}, {})
        kept = bucket.kept
        for i in bucket.fresh:
            kept[i] = {**kept[i], "momentum_buffer": torch.empty_like(parameters[i])}
        new = {parameters[i]: kept[i] for i in bucket.fresh}
        beside = {key: [own[key] for own in kept] for key in bucket.moments}
        kernel = partial(
            sgd_,
            parameters,
            bucket.grads,
            beside.get("momentum_buffer", []),
            bucket.state,
            flat_rules(bucket.rules),
            bucket.counts,
            proximal=self._mode == "proximal",
            scale=scale,
            overflow=overflow,
        )
        return _Launch(kernel, bucket, new, beside)


class Adam(FusedOptimizer, torch.optim.Adam):
    """torch.optim.Adam with the penalty in its step, in one pass; same arguments, state, results to rounding.

    The penalty's gradient is added to g (mode "gradient"), or each step ends with the proximal one of length
    lr / (sqrt(v_hat) + eps) (mode "proximal"). 36 bytes per float32 parameter, 28 without a penalty, 8 more
    with amsgrad. Gradients that a GradScaler scaled stay as they are. A parameter without .grad gets one in
    gradient mode, as by add_grad_.

    Args:
        params, betas, eps, weight_decay, amsgrad: as torch's.
        lr: a number, or a tensor on the CPU.

    Raises:
        ValueError: foreach, maximize or differentiable, in a group of parameters; there or in a step, before
            anything changes, a number out of its range.
    """

    _step_sizes = staticmethod(adam_steps)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
    ) -> None:
        _check_own_numbers({"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, fused=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for p, own in self.state.items():  # torch's own may count steps on the CPU
            if "step" in own:
                own["step"] = own["step"].to(p.device, torch.float32)

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", *["max_exp_avg_sq"] * group["amsgrad"])

    def _rule(self, group: dict[str, Any], fresh: bool) -> AdamWRule:
        decay, decoupled = float(group["weight_decay"]), group["decoupled_weight_decay"]
        beta1, beta2 = group["betas"]
        return AdamWRule(
            float(group["lr"]),
            float(beta1),
            float(beta2),
            float(group["eps"]),
            decay if decoupled else 0.0,
            0.0 if decoupled else decay,
        )

    def _prepared(self, bucket: _Bucket) -> _Launch:
        parameters = bucket.parameters
        kept = bucket.kept
        for i in bucket.fresh:
            moments = {key: torch.zeros_like(parameters[i]) for key in bucket.moments}
            kept[i] = {"step": torch.zeros((), device=parameters[i].device), **moments}
        new = {parameters[i]: kept[i] for i in bucket.fresh}
        scale, overflow = self._amp(parameters[0].device)
        beside = {key: [own[key] for own in kept] for key in ("step", *bucket.moments)}
        kernel = partial(
            adamw_,
            parameters,
            bucket.grads,
            beside["exp_avg"],
            beside["exp_avg_sq"],
            beside.get("max_exp_avg_sq", []),
            beside["step"],
            bucket.state,
            flat_rules(bucket.rules),
            bucket.counts,
            proximal=self._mode == "proximal",
            scale=scale,
            overflow=overflow,
        )
        return _Launch(kernel, bucket, new, beside)


class AdamW(Adam, torch.optim.AdamW):
    """torch.optim.AdamW with the penalty in its step, in one pass; same arguments, state, results to rounding.

    As `Adam`, but for a weight decay that is not part of the gradient: theta is multiplied by
    1 - lr weight_decay.

    Args:
        params, betas, eps, weight_decay, amsgrad: as torch's.
        lr: a number, or a tensor on the CPU.

    Raises:
        ValueError: foreach, maximize or differentiable, in a group of parameters; there or in a step, before
            anything changes, a number out of its range.
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
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad)


STEP_SIZES.update({SGD: sgd_steps, Adam: adam_steps, AdamW: adam_steps})
