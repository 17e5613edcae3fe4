"""Importance summed over gradients: omega += weight * abs(grad), 12 bytes per float32 parameter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mas_ext.kernels.backends import launch
from mas_ext.kernels.checks import check_like, check_tensors
from mas_ext.kernels.dtypes import DTYPES, compute_dtype
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
    known = check_tensors("omega", omega, [0] * len(omega))
    dtype = grad[0].dtype if grad else known.dtype
    if dtype not in DTYPES or compute_dtype(dtype) != known.dtype:
        raise ValueError(f"grad[0]: got {dtype}, expected one that adds up in {known.dtype}")
    grad = check_like("grad", grad, known, dtype)
    launch("accumulate", known.device, known.compiled, omega, grad, dtype, weight)
