"""The compiled kernel behind reference.per_sample_: as in native.py, everything is checked before an
address goes down.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mas_ext.kernels import native, reference
from mas_ext.kernels.reference import compute_dtype

# A small omega is no work for a whole machine: the batch is then split, and each part summed into a
# tensor of its own. Splits depend on shapes alone, so that the number of threads changes no bit.
_ELEMENTS_AT_ONCE = {"cpu": 1 << 18, "cuda": 1 << 22}
# Fewer in a part are not worth its tensor: samples on a CPU, samples times positions on a GPU.
_SAMPLES_A_SPLIT = 4
_POSITIONS_A_SPLIT = 256


class _Seen(NamedTuple):
    """A table of rows that was looked at, as it was then."""

    version: int
    address: int
    least: int
    greatest: int


_seen = WeakTensorKeyDictionary()


def _range(rows: Tensor) -> tuple[int, int]:
    """The least and the greatest row; remembered, because to look waits for the device."""
    if rows.numel() == 0:
        return 0, -1
    if rows.is_inference():  # has no version that would tell of a change
        least, greatest = rows.aminmax()
        return int(least), int(greatest)
    seen: _Seen | None = _seen.get(rows)
    if seen is None or (seen.version, seen.address) != (rows._version, rows.data_ptr()):
        least, greatest = rows.aminmax()
        seen = _Seen(rows._version, rows.data_ptr(), int(least), int(greatest))
        _seen[rows] = seen
    return seen.least, seen.greatest


def _check_operand(name: str, t: Tensor, columns: int, like: Tensor) -> None:
    if t.dtype != like.dtype or t.device != like.device or t.dim() != 3 or t.shape[2] != columns:
        raise ValueError(
            f"{name}: got {t.dtype} on {t.device} of shape {tuple(t.shape)}, expected {like.dtype} "
            f"on {like.device} of shape (samples, positions, {columns})"
        )
    if columns > 1 and t.stride(2) != 1:
        raise ValueError(
            f"{name}: got strides {t.stride()}, expected 1 in the last dimension (contiguous rows)"
        )


def _check(omega: Tensor, grad: Tensor, input: Tensor, rows: Tensor | None) -> None:
    if grad.dtype not in native.DTYPES:
        raise TypeError(f"grad: got {grad.dtype}, expected one of {[*map(str, native.DTYPES)]}")
    dtype = compute_dtype(grad.dtype)
    if (
        omega.dtype != dtype
        or omega.device != grad.device
        or omega.dim() != 4
        or not omega.is_contiguous()
    ):
        raise ValueError(
            f"omega: got {omega.dtype} on {omega.device} of shape {tuple(omega.shape)}, strides "
            f"{omega.stride()}, expected a contiguous (groups, outputs, taps, channels) tensor of "
            f"{dtype} on {grad.device}"
        )
    groups, outputs, taps, channels = omega.shape
    _check_operand("grad", grad, groups * outputs, grad)
    _check_operand("input", input, groups * channels, grad)
    batch, positions = grad.shape[:2]
    if input.shape[0] != batch:
        raise ValueError(f"input: got {input.shape[0]} samples, expected {batch} like grad")
    if rows is None:
        if taps != 1:
            raise ValueError(f"rows: got None for {taps} taps, expected a ({taps}, P) tensor")
        if input.shape[1] != positions:
            raise ValueError(
                f"input: got {input.shape[1]} positions, expected {positions} like grad"
            )
        return
    if (
        rows.dtype != torch.int32
        or rows.device != grad.device
        or rows.shape != (taps, positions)
        or not rows.is_contiguous()
    ):
        raise ValueError(
            f"rows: got {rows.dtype} on {rows.device} of shape {tuple(rows.shape)}, strides "
            f"{rows.stride()}, expected contiguous torch.int32 on {grad.device} of shape "
            f"({taps}, {positions})"
        )
    least, greatest = _range(rows)
    if least < -1 or greatest >= input.shape[1]:
        raise ValueError(
            f"rows: got numbers from {least} to {greatest}, expected -1 to {input.shape[1] - 1}, "
            "rows of input"
        )


def _splits(device: str, size: int, batch: int, positions: int) -> int:
    wanted = -(-_ELEMENTS_AT_ONCE[device] // size)
    if device == "cuda":
        return max(1, min(wanted, batch, batch * positions // _POSITIONS_A_SPLIT))
    return max(1, min(wanted, batch // _SAMPLES_A_SPLIT))


def per_sample_(
    omega: Tensor, grad: Tensor, input: Tensor, rows: Tensor | None, square: bool
) -> None:
    """As reference.per_sample_; the gradients of the samples never reach memory.

    A table of rows is looked at once: keep it, rather than a new one for each call.
    """
    _check(omega, grad, input, rows)
    batch, positions = grad.shape[:2]
    if 0 in (batch, positions, omega.numel()):
        return
    one_position = positions == 1 and rows is None
    if one_position and grad.device.type == "cuda":
        reference.per_sample_(omega, grad, input, rows, square)  # one product of matrices
        return
    splits = 1 if one_position else _splits(grad.device.type, omega.numel(), batch, positions)
    partial = omega.new_zeros(splits * omega.numel() if splits > 1 else 0)
    kernels, where, context = native._device_kernels(grad.device)
    with context:
        kernels.per_sample(
            omega.data_ptr(),
            grad.data_ptr(),
            input.data_ptr(),
            0 if rows is None else rows.data_ptr(),
            partial.data_ptr(),
            (*omega.shape, batch, positions),
            (*grad.stride()[:2], *input.stride()[:2]),
            native.DTYPES[grad.dtype],
            splits,
            square,
            where,
        )
