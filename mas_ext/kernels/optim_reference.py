"""Optimizers' steps with the penalty in them, in plain PyTorch: the specification of their kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mas_ext.kernels import reference
from mas_ext.kernels.reference import compute_dtype


class _Part(NamedTuple):
    """What of a penalty enters an optimizer's step: omega is None without one, an offset -1 where not held."""

    offsets: Sequence[int]
    omega: Tensor | None
    anchor: Tensor | None
    alpha: Tensor | None
    proximal: bool

    def gradient(self, i: int, x: Tensor, grad: Tensor, scale: Tensor | None) -> Tensor:
        """The gradient of tensor i, unscaled, with the penalty's."""
        dtype = compute_dtype(x.dtype)
        g = grad.to(dtype) if scale is None else grad.to(dtype) * (1 / scale.double()).to(dtype)
        if self.proximal or self.omega is None or self.offsets[i] < 0:
            return g
        assert self.anchor is not None
        assert self.alpha is not None
        (added,) = reference._gradients(
            [x], self.offsets[i : i + 1], self.omega, self.anchor, self.alpha, 1.0
        )
        return g + added

    def approach(self, i: int, x: Tensor, eta: float, divisor: Tensor | None = None) -> Tensor:
        """Where the proximal step leads from x."""
        if not self.proximal or self.omega is None or self.offsets[i] < 0:
            return x
        assert self.anchor is not None
        assert self.alpha is not None
        return reference._approach(
            x, self.offsets[i], self.omega, self.anchor, self.alpha, eta, divisor
        )


def _put(t: Tensor, new: Tensor, overflow: Tensor | None) -> None:
    t.copy_(new if overflow is None else torch.where(overflow != 0, t.to(new.dtype), new))


def sgd_(
    theta: Sequence[Tensor],
    grad: Sequence[Tensor],
    momentum_buffer: Sequence[Tensor],
    offsets: Sequence[int],
    omega: Tensor | None,
    anchor: Tensor | None,
    alpha: Tensor | None,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    eta: float,
    nesterov: bool,
    first: bool,
    proximal: bool,
    scale: Tensor | None,
    overflow: Tensor | None,
) -> None:
    """One step of torch.optim.SGD with the penalty's gradient, or its proximal step of length eta behind it.

    An offset of -1 is a tensor that the penalty does not hold; omega is None without a penalty. Without
    momentum there are no buffers; `first`: they are empty yet. Gradients are `scale` times too large, and
    nothing happens where `overflow` is not 0: float32 scalars, or None.
    """
    held = _Part(offsets, omega, anchor, alpha, proximal)
    for i, (x, g) in enumerate(zip(theta, grad, strict=True)):
        dtype = compute_dtype(x.dtype)
        direction = held.gradient(i, x, g, scale) + weight_decay * x.to(dtype)
        if momentum:
            old = momentum_buffer[i].to(dtype)
            buffer = direction if first else momentum * old + (1 - dampening) * direction
            direction = direction + momentum * buffer if nesterov else buffer
            _put(momentum_buffer[i], buffer, overflow)
        _put(x, held.approach(i, x.to(dtype) - lr * direction, eta), overflow)


def adamw_(
    theta: Sequence[Tensor],
    grad: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    max_exp_avg_sq: Sequence[Tensor],
    step: Sequence[Tensor],
    offsets: Sequence[int],
    omega: Tensor | None,
    anchor: Tensor | None,
    alpha: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    proximal: bool,
    scale: Tensor | None,
    overflow: Tensor | None,
) -> None:
    """One step of torch.optim.AdamW with the penalty's gradient, or its proximal step behind it, as sgd_.

    `step`: float32 scalars, which grow by 1. max_exp_avg_sq is empty without amsgrad. The proximal step's
    length is lr / (sqrt(v_hat) + eps).
    """
    held = _Part(offsets, omega, anchor, alpha, proximal)
    for i, (x, g) in enumerate(zip(theta, grad, strict=True)):
        dtype = compute_dtype(x.dtype)
        gradient = held.gradient(i, x, g, scale)
        steps = step[i].double() + 1
        mean, square = exp_avg[i].to(dtype), exp_avg_sq[i].to(dtype)
        mean = mean + (1 - beta1) * (gradient - mean)
        square = beta2 * square + (1 - beta2) * gradient * gradient
        for moment, new in ((exp_avg[i], mean), (exp_avg_sq[i], square)):
            _put(moment, new, overflow)
        if max_exp_avg_sq:
            square = torch.maximum(max_exp_avg_sq[i].to(dtype), square)
            _put(max_exp_avg_sq[i], square, overflow)
        divisor = (square * (1 / (1 - beta2**steps)).to(dtype)).sqrt() + eps
        rate = (lr / (1 - beta1**steps)).to(dtype)
        moved = x.to(dtype) * (1 - lr * weight_decay) - rate * mean / divisor
        _put(x, held.approach(i, moved, lr, divisor), overflow)
        _put(step[i], step[i] + 1, overflow)
