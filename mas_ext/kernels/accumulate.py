"""Importance summed over gradients: omega += weight * abs(grad), 12 bytes per float32 parameter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mas_ext.kernels.backends import launch
from mas_ext.kernels.order import in_order
from mas_ext.kernels.registry import operator


@operator("(Tensor(a!)[] omega, Tensor[] grad, float weight, bool native) -> ()")
def accumulate_(
    omega: Sequence[Tensor], grad: Sequence[Tensor], weight: float, native: bool
) -> None:
    """omega += weight * abs(grad); omega is float64 for float64 gradients, else float32."""
    if not native:
        for total, g in zip(omega, grad, strict=True):
            factor = torch.tensor(weight, dtype=total.dtype, device=total.device)
            total += factor * g.to(total.dtype).abs()
        return
    in_order(omega, [grad], [], lambda g: launch("accumulate", omega, omega, g, weight))
    torch.autograd.graph.increment_version(omega)
