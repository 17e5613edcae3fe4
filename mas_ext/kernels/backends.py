"""Which kernels serve a device: the compiled ones of mas_ext._C, or plain PyTorch and why."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch  # before _C: one OpenMP runtime, torch's, then serves both
from torch import Tensor

from mas_ext.kernels.warning import warn

try:
    import mas_ext._C as _compiled  # not "from mas_ext": its error would speak of a circular import
except ImportError as error:
    _C: Any = None
    WHY_NOT: str | None = f"the compiled extension is missing ({error})"
else:
    _C, WHY_NOT = _compiled, None

Backend = Literal["auto", "native", "reference"]

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
        return (
            "the extension was built without CUDA kernels (no nvcc was found, or MAS_EXT_CUDA=off)"
        )
    return None


def cuda_architectures() -> str | None:
    """What the CUDA kernels were built for, separated by spaces; None without them."""
    return getattr(_C, "cuda_architectures", None)


def instruction_set() -> str | None:
    """The instruction set that the CPU kernels chose, None without compiled kernels."""
    return None if WHY_NOT else str(_C.instruction_set())


def serves(device: torch.device, backend: Backend) -> bool:
    """Whether the compiled kernels do the work on a device.

    "auto": where they can, else plain PyTorch, with one warning per process; "native": a RuntimeError where
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


def launch(kernel: str, theta: Sequence[Tensor], *arguments: Any) -> None:
    """Run a compiled kernel where `theta` lies: on torch's number of CPU threads, or on the current stream.

    It reads and checks all that it is called with, tensors and lists of them.
    """
    kernels, where, context = _device_kernels(theta[0].device if theta else torch.device("cpu"))
    with context:
        getattr(kernels, kernel)(*arguments, where)


def layout_key(tensors: Sequence[Tensor]) -> bytes | None:
    """Equal for tensors of equal dtypes, devices, shapes and strides; None where the extension can't tell."""
    if _C is None or torch.compiler.is_compiling():
        return None
    key: bytes | None = _C.layout_key(tensors)
    return key


def scratch_for(theta: Sequence[Tensor]) -> Tensor:
    """Memory for a sum over these tensors: one float64 number for each chunk of them."""
    return torch.empty(_C.chunks(theta), dtype=torch.float64, device=theta[0].device)


def strips(weights: Sequence[Tensor]) -> int:
    """How many strips of rows the kernels cut these weights into."""
    return sum(-(-len(w) // _C.strip) for w in weights)
