"""The steps of SGD, Adam and AdamW with the penalty inside, as a gradient before or a proximal step after.

Of float32 parameters SGD moves 28 bytes each with momentum and 20 without, AdamW 36, and 44 with amsgrad.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from mas_ext.kernels.backends import launch
from mas_ext.kernels.dtypes import compute_dtype
from mas_ext.kernels.flat_state import STATE, State
from mas_ext.kernels.order import in_order
from mas_ext.kernels.penalty import gradients
from mas_ext.kernels.proximal import approach
from mas_ext.kernels.registry import operator

_RULES = "float[] rules, int[] counts"
_AMP = "bool proximal, Tensor? scale, Tensor? overflow"


class SGDRule(NamedTuple):
    """What some tensors have in common in torch.optim.SGD.

    eta: the length of a proximal step. first: whether buffers are empty yet.
    """

    lr: float
    momentum: float
    dampening: float
    weight_decay: float
    eta: float
    nesterov: bool
    first: bool


class AdamWRule(NamedTuple):
    """What some tensors have in common in torch.optim.AdamW, or with l2 in place of weight_decay in Adam."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    l2: float


R = TypeVar("R", SGDRule, AdamWRule)


def flat_rules(rules: Iterable[Iterable[float]]) -> list[float]:
    """The numbers of rules, one after another, as the kernels take them."""
    return [float(x) for rule in rules for x in rule]


# -- in plain PyTorch ------------------------------------------------------------------------------


def _gradient(
    x: Tensor, i: int, grad: Tensor, state: State, proximal: bool, scale: Tensor | None
) -> Tensor:
    """The gradient of tensor i, unscaled, with the penalty's unless that comes after the step."""
    dtype = compute_dtype(x.dtype)
    g = grad.to(dtype) if scale is None else grad.to(dtype) * (1 / scale.double()).to(dtype)
    if proximal or state.offsets[i] < 0:
        return g
    (added,) = gradients([x], state._replace(offsets=[state.offsets[i]]))
    return g + added


def _approach(
    x: Tensor, i: int, state: State, proximal: bool, eta: float, divisor: Tensor | None = None
) -> Tensor:
    """Where the proximal step of tensor i leads from x, if there is one."""
    return approach(x, i, state, eta, divisor) if proximal and state.offsets[i] >= 0 else x


def _rule_of_each(kind: type[R], rules: Sequence[float], counts: Sequence[int]) -> Iterator[R]:
    """The rule of each tensor."""
    size = len(kind._fields)
    for i, count in enumerate(counts):
        yield from repeat(kind._make(rules[i * size : (i + 1) * size]), count)


def _put(t: Tensor, new: Tensor, overflow: Tensor | None) -> None:
    t.copy_(new if overflow is None else torch.where(overflow != 0, t.to(new.dtype), new))


# -- compiled --------------------------------------------------------------------------------------


def _launch(
    kernel: str,
    theta: Sequence[Tensor],
    grad: Sequence[Tensor],
    moments: Mapping[str, Sequence[Tensor]],
    *arguments: Any,
) -> None:
    def run(g: Sequence[Tensor], *written: Sequence[Tensor]) -> None:
        named = [*zip(moments, written, strict=True)]
        launch(kernel, theta, theta, g, named, *arguments)

    in_order(theta, [grad], [*moments.values()], run)
    for changed in (theta, *moments.values()):
        torch.autograd.graph.increment_version(changed)


# -- the steps -------------------------------------------------------------------------------------


@operator(
    f"(Tensor(a!)[] theta, Tensor[] grad, Tensor(b!)[] momentum_buffer, {STATE}, {_RULES}, {_AMP}) -> ()"
)
def sgd_(
    theta: Sequence[Tensor],
    grad: Sequence[Tensor],
    momentum_buffer: Sequence[Tensor],
    state: State,
    rules: Sequence[float],
    counts: Sequence[int],
    proximal: bool,
    scale: Tensor | None,
    overflow: Tensor | None,
) -> None:
    """One step of torch.optim.SGD with the penalty's gradient, or its proximal step of length eta after it.

    A tensor with an offset of -1 is stepped without the penalty. Without momentum there are no buffers.
    Gradients are `scale` times too large, and nothing happens where `overflow` is not 0: float32 scalars, or
    None.

    Args:
        rules: the numbers of an SGDRule, one rule after another.
        counts: for how many tensors each of them is.
    """
    if state.native:
        moments = {"momentum_buffer": momentum_buffer} if momentum_buffer else {}
        _launch("sgd", theta, grad, moments, state, rules, counts, proximal, scale, overflow)
        return
    each = _rule_of_each(SGDRule, rules, counts)
    for i, (x, g, rule) in enumerate(zip(theta, grad, each, strict=True)):
        dtype = compute_dtype(x.dtype)
        direction = _gradient(x, i, g, state, proximal, scale) + rule.weight_decay * x.to(dtype)
        if momentum_buffer:
            old = momentum_buffer[i].to(dtype)
            later = rule.momentum * old + (1 - rule.dampening) * direction
            buffer = direction if rule.first else later
            direction = direction + rule.momentum * buffer if rule.nesterov else buffer
            _put(momentum_buffer[i], buffer, overflow)
        moved = x.to(dtype) - rule.lr * direction
        _put(x, _approach(moved, i, state, proximal, rule.eta), overflow)


@operator(
    "(Tensor(a!)[] theta, Tensor[] grad, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, "
    f"Tensor(d!)[] max_exp_avg_sq, Tensor(e!)[] step, {STATE}, {_RULES}, {_AMP}) -> ()"
)
def adamw_(
    theta: Sequence[Tensor],
    grad: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    max_exp_avg_sq: Sequence[Tensor],
    step: Sequence[Tensor],
    state: State,
    rules: Sequence[float],
    counts: Sequence[int],
    proximal: bool,
    scale: Tensor | None,
    overflow: Tensor | None,
) -> None:
    """One step of torch.optim.AdamW with the penalty's gradient, or its proximal step after it, as sgd_.

    With `l2` in place of `weight_decay` it is a step of torch.optim.Adam: l2 theta is added to the gradient.
    The proximal step's length is lr / (sqrt(v_hat) + eps).

    Args:
        max_exp_avg_sq: empty without amsgrad.
        step: float32 scalars, which grow by 1.
        rules: the numbers of an AdamWRule, one rule after another.
        counts: for how many tensors each of them is.
    """
    if state.native:
        moments = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        if max_exp_avg_sq:
            moments["max_exp_avg_sq"] = max_exp_avg_sq
        _launch(
            "adamw", theta, grad, moments, step, state, rules, counts, proximal, scale, overflow
        )
        torch.autograd.graph.increment_version(step)
        return
    each = _rule_of_each(AdamWRule, rules, counts)
    for i, (x, g, rule) in enumerate(zip(theta, grad, each, strict=True)):
        dtype = compute_dtype(x.dtype)
        gradient = _gradient(x, i, g, state, proximal, scale)
        if rule.l2:
            gradient = gradient + rule.l2 * x.to(dtype)
        steps = step[i].double() + 1
        mean, square = exp_avg[i].to(dtype), exp_avg_sq[i].to(dtype)
        mean = mean + (1 - rule.beta1) * (gradient - mean)
        square = rule.beta2 * square + (1 - rule.beta2) * gradient * gradient
        for moment, new in ((exp_avg[i], mean), (exp_avg_sq[i], square)):
            _put(moment, new, overflow)
        if max_exp_avg_sq:
            square = torch.maximum(max_exp_avg_sq[i].to(dtype), square)
            _put(max_exp_avg_sq[i], square, overflow)
        divisor = (square * (1 / (1 - rule.beta2**steps)).to(dtype)).sqrt() + rule.eps
        rate = (rule.lr / (1 - rule.beta1**steps)).to(dtype)
        moved = x.to(dtype) * (1 - rule.lr * rule.weight_decay) - rate * mean / divisor
        _put(x, _approach(moved, i, state, proximal, rule.lr, divisor), overflow)
        _put(step[i], step[i] + 1, overflow)
