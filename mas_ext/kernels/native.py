"""The compiled kernels behind the functions of reference.py: every tensor is checked before its address
goes down, so that no caller can make the extension touch memory that is not its own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch  # before _C: one OpenMP runtime, torch's, then serves both
from torch import Tensor

from mas_ext.kernels.reference import compute_dtype
from mas_ext.kernels.warning import warn

try:
    import mas_ext._C as _C  # not "from mas_ext": its error would speak of a circular import
except ImportError as error:
    _C = None  # type: ignore[assignment]
    WHY_NOT: str | None = f"the compiled extension is missing ({error})"
else:
    WHY_NOT = None

Backend = Literal["auto", "native", "reference"]

# uint8: the codes of reference.decode, for omega alone.
_OMEGA_DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.uint8: 4}
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_ANCHOR_RULES = {"mean": 0, "move": 1, "keep": 2}
_NO_GRADIENT, _WRITE, _ADD = 0, 1, 2

_REQUIRED = os.environ.get("MAS_EXT_REQUIRE_NATIVE", "")
if _REQUIRED not in ("", "0", "1"):
    raise ValueError(f"MAS_EXT_REQUIRE_NATIVE: got {_REQUIRED!r}, expected '0' or '1'")
if WHY_NOT is not None and _REQUIRED == "1":
    raise ImportError(f"MAS_EXT_REQUIRE_NATIVE is 1, but {WHY_NOT}")
_announced = False


def why_not(device: torch.device) -> str | None:
    """Why the compiled kernels can't serve a device, or None where they can."""
    if WHY_NOT is not None:
        return WHY_NOT
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"there are no compiled kernels for {device.type} devices"
    if torch.version.hip is not None or not hasattr(_C, "cuda"):
        return "the extension was built without CUDA kernels (no nvcc was found)"
    return None


def instruction_set() -> str | None:
    """The instruction set that the CPU kernels chose, None without compiled kernels."""
    return None if WHY_NOT else _C.instruction_set()


def serves(device: torch.device, backend: Backend) -> bool:
    """Whether the compiled kernels do the work on a device.

    "auto": where they can, else plain PyTorch, with one warning a process; "native": a RuntimeError where
    they can't; "reference": never.
    """
    if backend == "reference":
        return False
    reason = why_not(device)
    if reason is not None and backend == "native":
        raise RuntimeError(f'backend: got "native", but {reason}')
    if reason is not None:
        _announce_fallback(reason)
    return reason is None


def _announce_fallback(reason: str) -> None:
    global _announced
    if not _announced:
        _announced = True
        warn(
            f"mas_ext uses plain PyTorch, slower and with more memory: {reason}; `mas-ext info` "
            "tells more",
            RuntimeWarning,
        )


def _device_kernels(device: torch.device) -> tuple[Any, int, AbstractContextManager[Any]]:
    """The device's kernels, their last argument, and the context in which they are launched."""
    if device.type == "cpu":
        return _C.cpu, torch.get_num_threads(), nullcontext()
    stream = torch.cuda.current_stream(device).cuda_stream
    return _C.cuda, stream, torch.cuda.device(device)


class _Signature(NamedTuple):
    """What the layout of a list of tensors is known by."""

    tensors: list[tuple[torch.dtype, torch.device, torch.Size, tuple[int, ...]]]
    offsets: Sequence[int]


class _Checked(NamedTuple):
    """A list of tensors that has been checked once, and what was learned."""

    signature: _Signature
    layout: Any
    end: int
    dtype: torch.dtype
    device: torch.device


_recent: list[_Checked] = []
_MOST_RECENT = 16


def _signature(tensors: Sequence[Tensor], offsets: Sequence[int]) -> _Signature:
    return _Signature([(t.dtype, t.device, t.shape, t.stride()) for t in tensors], offsets)


def _checked(name: str, tensors: Sequence[Tensor], offsets: Sequence[int]) -> _Checked:
    signature = _signature(tensors, offsets)
    for known in _recent:
        if known.signature == signature:
            return known
    known = _check(name, tensors, signature)
    _recent.insert(0, known)
    del _recent[_MOST_RECENT:]
    return known


def _check(name: str, tensors: Sequence[Tensor], signature: _Signature) -> _Checked:
    if not tensors:
        raise ValueError(f"{name}: got an empty list, expected at least one tensor")
    offsets = signature.offsets
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
    layout = _C.Layout([t.numel() for t in tensors], list(offsets))
    kept = _Signature(signature.tensors, list(offsets))
    return _Checked(kept, layout, end, dtype, device)


def _check_like(name: str, tensors: Sequence[Tensor], known: _Checked, dtype: torch.dtype) -> bool:
    """Whether the tensors have the known list's strides; an error unless all else agrees."""
    expected = known.signature.tensors
    got = [(t.dtype, t.device, t.shape, t.stride()) for t in tensors]
    if dtype == known.dtype and got == expected:
        return True
    if len(got) != len(expected):
        raise ValueError(f"{name}: got {len(got)} tensors, expected {len(expected)}")
    same_strides = True
    for i, (g, e) in enumerate(zip(got, expected, strict=True)):
        if g[0] != dtype or g[1] != e[1] or g[2] != e[2]:
            raise ValueError(
                f"{name}[{i}]: got {g[0]} on {g[1]} of shape {tuple(g[2])}, expected {dtype} on "
                f"{e[1]} of shape {tuple(e[2])}"
            )
        same_strides = same_strides and g[3] == e[3]
    return same_strides


def _like(tensors: Sequence[Tensor], like: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Copies of the tensors with the strides of others."""
    return [torch.empty_like(x, dtype=dtype).copy_(t) for t, x in zip(tensors, like, strict=True)]


def _check_flat(name: str, t: Tensor, rows: int, known: _Checked, dtypes: Sequence[Any]) -> None:
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


def _check_float64(name: str, t: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if t.dtype != torch.float64 or t.device != device or t.shape != shape or not t.is_contiguous():
        raise ValueError(
            f"{name}: got {t.dtype} on {t.device} of shape {tuple(t.shape)}, expected contiguous "
            f"float64 on {device} of shape {shape}"
        )


def _state(known: _Checked, omega: Tensor, anchor: Tensor, alpha: Tensor, remainder: Tensor) -> Any:
    if -1 in known.signature.offsets:
        at = known.signature.offsets.index(-1)
        raise ValueError(f"offsets[{at}]: got -1, expected a number from 0 up")
    return _partial_state(known, omega, anchor, alpha, remainder)


def _partial_state(
    known: _Checked, omega: Tensor, anchor: Tensor, alpha: Tensor, remainder: Tensor
) -> Any:
    """The state of a list of which it holds some tensors only: the others' offsets are -1."""
    rows = alpha.numel()
    wide = known.dtype == torch.float64
    omegas = _OMEGA_DTYPES | ({torch.float64: 1} if wide else {})
    _check_float64("alpha", alpha, (max(rows, 1),), known.device)
    _check_float64("remainder", remainder, (), known.device)
    _check_flat("omega", omega, rows, known, [*omegas])
    _check_flat("anchor", anchor, rows, known, [compute_dtype(known.dtype)])
    if omega.shape != anchor.shape:
        raise ValueError(
            f"anchor: got shape {tuple(anchor.shape)}, expected {tuple(omega.shape)} like omega"
        )
    return _C.State(
        DTYPES[known.dtype],
        omegas[omega.dtype],
        omega.data_ptr(),
        anchor.data_ptr(),
        omega.shape[1],
        rows,
        alpha.data_ptr(),
        remainder.data_ptr(),
    )


def _penalty(
    theta: Sequence[Tensor],
    grad: Sequence[Tensor],
    gradient: int,
    offsets: Sequence[int],
    omega: Tensor,
    anchor: Tensor,
    alpha: Tensor,
    remainder: Tensor,
    grad_output: Tensor | None,
    known: _Checked,
) -> Tensor:
    state = _state(known, omega, anchor, alpha, remainder)
    value = torch.empty((), dtype=compute_dtype(known.dtype), device=known.device)
    partial = torch.empty(known.layout.chunks, dtype=torch.float64, device=known.device)
    kernels, where, context = _device_kernels(known.device)
    with context:
        kernels.penalty(
            known.layout,
            state,
            [t.data_ptr() for t in theta],
            [t.data_ptr() for t in grad],
            gradient,
            0 if grad_output is None else grad_output.data_ptr(),
            partial.data_ptr(),
            value.data_ptr(),
            DTYPES[value.dtype],
            where,
        )
    return value


def penalty(
    theta: Sequence[Tensor],
    offsets: Sequence[int],
    omega: Tensor,
    anchor: Tensor,
    alpha: Tensor,
    remainder: Tensor,
) -> Tensor:
    """As reference.penalty; reads 12 bytes per float32 parameter."""
    known = _checked("theta", theta, offsets)
    return _penalty(theta, [], _NO_GRADIENT, offsets, omega, anchor, alpha, remainder, None, known)


def penalty_with_grad(
    theta: Sequence[Tensor],
    offsets: Sequence[int],
    omega: Tensor,
    anchor: Tensor,
    alpha: Tensor,
    remainder: Tensor,
    grad_output: Tensor,
) -> tuple[Tensor, list[Tensor]]:
    """As reference.penalty_with_grad; moves 16 bytes per float32 parameter."""
    known = _checked("theta", theta, offsets)
    upstream = grad_output.double()
    _check_float64("grad_output", upstream, (), known.device)
    grad = [torch.empty_like(t) for t in theta]
    value = _penalty(theta, grad, _WRITE, offsets, omega, anchor, alpha, remainder, upstream, known)
    return value, grad


def add_grad_(
    theta: Sequence[Tensor],
    grad: Sequence[Tensor],
    offsets: Sequence[int],
    omega: Tensor,
    anchor: Tensor,
    alpha: Tensor,
    remainder: Tensor,
) -> Tensor:
    """As reference.add_grad_; moves 20 bytes per float32 parameter."""
    known = _checked("theta", theta, offsets)
    if _check_like("grad", grad, known, known.dtype):
        return _penalty(theta, grad, _ADD, offsets, omega, anchor, alpha, remainder, None, known)
    aligned = _like(grad, theta, known.dtype)
    value = _penalty(theta, aligned, _ADD, offsets, omega, anchor, alpha, remainder, None, known)
    for g, a in zip(grad, aligned, strict=True):
        g.copy_(a)
    return value


def proximal_(
    theta: Sequence[Tensor],
    offsets: Sequence[int],
    omega: Tensor,
    anchor: Tensor,
    alpha: Tensor,
    second_moment: Sequence[Tensor],
    eta: float,
    correction: float,
    eps: float,
) -> None:
    """As reference.proximal_; moves 16 bytes per float32 parameter, 20 with a second moment."""
    known = _checked("theta", theta, offsets)
    state = _state(known, omega, anchor, alpha, alpha[:1].view(()))
    moments = second_moment
    if moments and not _check_like("second_moment", moments, known, known.dtype):
        moments = _like(moments, theta, known.dtype)
    kernels, where, context = _device_kernels(known.device)
    with context:
        kernels.proximal(
            known.layout,
            state,
            [t.data_ptr() for t in theta],
            [t.data_ptr() for t in moments],
            eta,
            correction,
            eps,
            where,
        )


def accumulate_(omega: Sequence[Tensor], grad: Sequence[Tensor], weight: float) -> None:
    """As reference.accumulate_; moves 12 bytes per float32 parameter."""
    known = _checked("omega", omega, [0] * len(omega))
    dtype = grad[0].dtype if grad else known.dtype
    if dtype not in DTYPES or compute_dtype(dtype) != known.dtype:
        raise ValueError(f"grad[0]: got {dtype}, expected one that adds up in {known.dtype}")
    if not _check_like("grad", grad, known, dtype):
        grad = _like(grad, omega, dtype)
    kernels, where, context = _device_kernels(known.device)
    with context:
        kernels.accumulate(
            known.layout,
            [t.data_ptr() for t in omega],
            [t.data_ptr() for t in grad],
            DTYPES[dtype],
            weight,
            where,
        )


def merge_(
    omega: Tensor,
    anchor: Tensor,
    theta: Sequence[Tensor],
    importance: Sequence[Tensor],
    offsets: Sequence[int],
    keep: float,
    gain: float,
    anchor_rule: str,
    entry: int,
) -> Tensor:
    """As reference.merge_, in one pass over memory."""
    known = _checked("theta", theta, offsets)
    if anchor_rule not in _ANCHOR_RULES:
        raise ValueError(f"anchor_rule: got {anchor_rule!r}, expected one of {[*_ANCHOR_RULES]}")
    one = torch.ones(1, dtype=torch.float64, device=known.device)
    state = _state(known, omega, anchor, one, one[0])
    if not _check_like("importance", importance, known, compute_dtype(known.dtype)):
        importance = _like(importance, theta, compute_dtype(known.dtype))
    remainder = torch.empty(len(theta), dtype=torch.float64, device=known.device)
    partial = torch.empty(known.layout.chunks, dtype=torch.float64, device=known.device)
    kernels, where, context = _device_kernels(known.device)
    with context:
        kernels.merge(
            known.layout,
            state,
            [t.data_ptr() for t in theta],
            [t.data_ptr() for t in importance],
            keep,
            gain,
            _ANCHOR_RULES[anchor_rule],
            entry,
            partial.data_ptr(),
            remainder.data_ptr(),
            where,
        )
    return remainder
