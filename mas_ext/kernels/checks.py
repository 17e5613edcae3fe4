"""Every tensor is checked before its address goes down to a compiled kernel, so that no caller can make one
touch memory that is not its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mas_ext.kernels import backends
from mas_ext.kernels.dtypes import DTYPES, OMEGA_DTYPES, compute_dtype
from mas_ext.kernels.flat_state import State


class Checked(NamedTuple):
    """The layouts of a list of tensors that were found sound, and what the kernels need to know of it."""

    layouts: list[tuple[torch.dtype, torch.device, torch.Size, tuple[int, ...]]]
    offsets: list[int]
    compiled: Any
    end: int
    dtype: torch.dtype
    device: torch.device


_recent: list[Checked] = []
_MOST_RECENT = 16


def check_tensors(name: str, tensors: Sequence[Tensor], offsets: Sequence[int]) -> Checked:
    """The first list of a call: dense tensors of one dtype and device, with an offset for each."""
    layouts = [(t.dtype, t.device, t.shape, t.stride()) for t in tensors]
    for known in _recent:
        if known.layouts == layouts and known.offsets == offsets:
            return known
    if not tensors:
        raise ValueError(f"{name}: got an empty list, expected at least one tensor")
    if len(offsets) != len(tensors):
        raise ValueError(f"offsets: got {len(offsets)}, expected {len(tensors)}, one per tensor")
    dtype, device = tensors[0].dtype, tensors[0].device
    if dtype not in DTYPES:
        raise TypeError(f"{name}[0]: got {dtype}, expected one of {[str(d) for d in DTYPES]}")
    end = 0
    for i, (t, offset) in enumerate(zip(tensors, offsets, strict=True)):
        if t.dtype != dtype or t.device != device:
            raise ValueError(
                f"{name}[{i}]: got {t.dtype} on {t.device}, expected {dtype} on {device} "
                f"like {name}[0]"
            )
        if torch.empty_like(t, device="meta").stride() != t.stride():
            raise ValueError(
                f"{name}[{i}]: got strides {t.stride()} for shape {tuple(t.shape)}, expected a "
                "dense tensor without overlap"
            )
        if offset < -1:
            raise ValueError(f"offsets[{i}]: got {offset}, expected a number from 0 up")
        end = max(end, offset + t.numel() if offset >= 0 else 0)
    compiled = backends._C.Layout([t.numel() for t in tensors], list(offsets))
    known = Checked(layouts, list(offsets), compiled, end, dtype, device)
    _recent.insert(0, known)
    del _recent[_MOST_RECENT:]
    return known


def check_like(
    name: str, tensors: Sequence[Tensor], known: Checked, dtype: torch.dtype
) -> Sequence[Tensor]:
    """The tensors, or copies of those whose strides are not those of the checked ones.

    Raises:
        ValueError: all but the strides does not agree.
    """
    got = [(t.dtype, t.device, t.shape, t.stride()) for t in tensors]
    if dtype == known.dtype and got == known.layouts:
        return tensors
    if len(got) != len(known.layouts):
        raise ValueError(f"{name}: got {len(got)} tensors, expected {len(known.layouts)}")
    for i, (g, (_, device, shape, _)) in enumerate(zip(got, known.layouts, strict=True)):
        if g[:3] != (dtype, device, shape):
            raise ValueError(
                f"{name}[{i}]: got {g[0]} on {g[1]} of shape {tuple(g[2])}, expected {dtype} on "
                f"{device} of shape {tuple(shape)}"
            )
    return aligned(tensors, [stride for _, _, _, stride in known.layouts])


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


def check_scalar(name: str, t: Tensor, device: torch.device, shape: tuple[int, ...] = ()) -> None:
    """A ValueError unless it is contiguous float64 of this shape on the device."""
    if t.dtype != torch.float64 or t.device != device or t.shape != shape or not t.is_contiguous():
        raise ValueError(
            f"{name}: got {t.dtype} on {t.device} of shape {tuple(t.shape)}, expected contiguous "
            f"float64 on {device} of shape {shape}"
        )


def check_state(known: Checked, state: State) -> Any:
    """The state of the checked tensors, all of which it holds, as the compiled kernels take it."""
    if -1 in known.offsets:
        at = known.offsets.index(-1)
        raise ValueError(f"offsets[{at}]: got -1, expected a number from 0 up")
    return check_partial_state(known, state)


def check_partial_state(known: Checked, state: State) -> Any:
    """The state of the checked tensors, some of which it may lack, as the compiled kernels take it."""
    rows = state.alpha.numel()
    wide = known.dtype == torch.float64
    check_scalar("alpha", state.alpha, known.device, (max(rows, 1),))
    check_scalar("remainder", state.remainder, known.device)
    omegas = [dtype for dtype in OMEGA_DTYPES if wide or dtype != torch.float64]
    for name, t, dtypes in (
        ("omega", state.omega, omegas),
        ("anchor", state.anchor, [compute_dtype(known.dtype)]),
    ):
        if (
            t.dtype not in dtypes
            or t.device != known.device
            or t.dim() != 2
            or t.shape[0] != rows
            or t.shape[1] < known.end
            or not t.is_contiguous()
        ):
            raise ValueError(
                f"{name}: got {t.dtype} on {t.device} of shape {tuple(t.shape)}, strides {t.stride()}, "
                f"expected a contiguous ({rows}, at least {known.end}) tensor on {known.device} of "
                f"{' or '.join(str(d) for d in dtypes)}"
            )
    if state.omega.shape != state.anchor.shape:
        raise ValueError(
            f"anchor: got shape {tuple(state.anchor.shape)}, expected {tuple(state.omega.shape)} like omega"
        )
    return backends._C.State(
        DTYPES[known.dtype],
        OMEGA_DTYPES[state.omega.dtype],
        state.omega.data_ptr(),
        state.anchor.data_ptr(),
        state.omega.shape[1],
        rows,
        state.alpha.data_ptr(),
        state.remainder.data_ptr(),
    )
