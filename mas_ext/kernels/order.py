"""Tensors that lie in memory in another order than those beside them: kernels get copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from mas_ext.kernels import backends

_R = TypeVar("_R")


def in_order(
    first: Sequence[Tensor],
    read: Sequence[Sequence[Tensor]],
    written: Sequence[Sequence[Tensor]],
    call: Callable[..., _R],
) -> _R:
    """call(*read, *written), with copies of tensors whose strides are not those of the first ones."""
    try:
        result = call(*read, *written)
    except backends._C.OtherStrides:
        strides = [t.stride() for t in first]
        copies = [aligned(tensors, strides) for tensors in written]
        result = call(*(aligned(tensors, strides) for tensors in read), *copies)
        for tensors, own in zip(written, copies, strict=True):
            copy_back(tensors, own)
    return result


def aligned(tensors: Sequence[Tensor], strides: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """The tensors, or copies with these strides of those that have others."""
    return [
        t
        if t.stride() == stride
        else torch.empty_strided(t.shape, stride, dtype=t.dtype, device=t.device).copy_(t)
        for t, stride in zip(tensors, strides, strict=True)
    ]


def copy_back(tensors: Sequence[Tensor], written: Sequence[Tensor]) -> None:
    """Into the tensors what was written to copies of them."""
    for t, new in zip(tensors, written, strict=True):
        if new is not t:
            t.copy_(new)
