"""The proximal step theta <- theta + c / (1 + c) (A - theta) with c = 2 eta W, stable for every strength.

It moves 16 bytes per float32 parameter, 20 with a second moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from mas_ext.kernels.backends import launch
from mas_ext.kernels.dtypes import compute_dtype, finite
from mas_ext.kernels.flat_state import STATE, State
from mas_ext.kernels.order import in_order
from mas_ext.kernels.registry import operator

LARGEST_PULL = 1e30


def approach(x: Tensor, i: int, state: State, eta: float, divisor: Tensor | None = None) -> Tensor:
    """x + c / (1 + c) (A - x) with c = 2 eta W / divisor, for x as tensor i in the dtype of its arithmetic."""
    alpha = state.alpha
    largest = alpha.max().clamp(min=0)
    share = torch.where(largest > 0, alpha / largest, torch.zeros_like(alpha))
    # An alpha that is NaN pulls nothing, as in the compiled kernel.
    strength = finite((2 * eta * largest).nan_to_num(0.0, torch.inf), x.dtype)
    weight, distance = torch.zeros_like(x), torch.zeros_like(x)
    for row, (omega, anchor) in enumerate(state.rows(i, x)):
        task = share[row].to(x.dtype) * omega
        weight = weight + task
        step = torch.where(weight > 0, task / weight, torch.zeros_like(weight))
        own = anchor - x
        distance = own if row == 0 else distance + step * (own - distance)
    if divisor is not None:
        strength = torch.where(strength > 0, strength / divisor, torch.zeros_like(divisor))
    product = strength * weight
    c = torch.where(product < LARGEST_PULL, product, torch.full_like(product, LARGEST_PULL))
    return x + c / (1 + c) * distance


@operator(
    f"(Tensor(a!)[] theta, Tensor[] second_moment, {STATE}, float eta, float correction, float eps) -> ()"
)
def proximal_(
    theta: Sequence[Tensor],
    second_moment: Sequence[Tensor],
    state: State,
    eta: float,
    correction: float,
    eps: float,
) -> None:
    """theta <- theta + c / (1 + c) (A - theta) with c = 2 eta W, clamped at 1e30.

    W = sum_t alpha_t Omega_t and A the W-weighted mean of the anchors. With `second_moment` (v, one
    tensor like each parameter, as Adam keeps it) the step length is eta / (sqrt(v correction) + eps).
    """
    for name, number in (("eta", eta), ("correction", correction), ("eps", eps)):
        if not 0 <= number < float("inf"):
            raise ValueError(f"{name}: got {number}, expected a finite number from 0 up")
    if state.native:
        step = partial(launch, "proximal", theta, theta)
        if second_moment:
            numbers = (state, eta, correction, eps)
            in_order(theta, [second_moment], [], lambda v: step(v, *numbers))
        else:
            step(None, state, eta, correction, eps)
        torch.autograd.graph.increment_version(theta)
        return
    for i, x in enumerate(theta):
        dtype, divisor = compute_dtype(x.dtype), None
        if second_moment:
            v = second_moment[i].to(dtype)
            factor = min(correction, torch.finfo(dtype).max)
            root = (v * torch.tensor(factor, dtype=dtype, device=v.device)).sqrt()
            divisor = root + torch.tensor(eps, dtype=dtype, device=v.device)
        x.copy_(approach(x.to(dtype), i, state, eta, divisor))
