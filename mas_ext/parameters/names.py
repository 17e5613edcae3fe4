"""Which parameters are consolidated, by which name, and how to find them again without a walk."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

if TYPE_CHECKING:  # torch may be built without it
    from torch.distributed.tensor import DTensor

# Modules that wrap another one without being part of the model's own names.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Modules that run their child `module` on several devices.
PARALLEL = (nn.parallel.DistributedDataParallel, nn.DataParallel)
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_MISSING = torch.empty(0, device="meta")

Layout = tuple[torch.dtype, torch.device, torch.Size, tuple[int, ...]]
Path = tuple[tuple[dict[str, nn.Module | None], str, nn.Module], ...]


class _Slot(NamedTuple):
    """Where a parameter hangs: its module's dictionary, and the module's own place in its parents."""

    parameter: nn.Parameter
    owner: dict[str, nn.Parameter | None]
    key: str
    path: Path


def _walk(module: nn.Module, prefix: str, path: Path) -> Iterator[tuple[str, _Slot]]:
    for key, parameter in module._parameters.items():
        if parameter is not None:
            yield prefix + key, _Slot(parameter, module._parameters, key, path)
    for key, child in module._modules.items():
        if child is not None:
            hidden = key in _WRAPPERS or (key == "module" and isinstance(module, PARALLEL))
            inner = prefix if hidden else f"{prefix}{key}."
            yield from _walk(child, inner, (*path, (module._modules, key, child)))


def _slots(model: nn.Module, exclude: Sequence[str] = ()) -> dict[str, _Slot]:
    found: dict[int, tuple[str, _Slot]] = {}
    excluded = set()
    for name, slot in _walk(model, "", ()):
        found.setdefault(id(slot.parameter), (name, slot))
        if any(fnmatchcase(name, pattern) for pattern in exclude):
            excluded.add(id(slot.parameter))
    return {name: slot for key, (name, slot) in found.items() if key not in excluded}


def named_parameters(model: nn.Module, exclude: Sequence[str] = ()) -> dict[str, nn.Parameter]:
    """The model's parameters by name, each once, without the excluded ones.

    Names are those of the bare model: wrappers by torch.compile, DDP, DataParallel, FSDP and activation
    checkpointing leave no trace. A tied parameter counts once, under its first name, and is excluded by any.

    Args:
        model: any module.
        exclude: fnmatch patterns on whole names.
    """
    return {name: slot.parameter for name, slot in _slots(model, exclude).items()}


def check_patterns(model: nn.Module, exclude: Sequence[str]) -> None:
    """Raise a ValueError for a pattern that matches no parameter of the model, a TypeError for no model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    if isinstance(exclude, str):
        raise TypeError(f"exclude: got the string {exclude!r}, expected a sequence of patterns")
    names = [name for name, _ in _walk(model, "", ())]
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"exclude: got {pattern!r}, which matches no parameter; the names are "
                f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
            )


def is_sharded(t: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor, spread over ranks."""
    tensors = sys.modules.get("torch.distributed.tensor")  # without it there are none
    return tensors is not None and isinstance(t, tensors.DTensor)


def check_whole(name: str, parameter: Tensor) -> None:
    """Raise a TypeError that names the parameter if it is spread over ranks."""
    if is_sharded(parameter):
        raise TypeError(
            f"parameter {name!r}: got a DTensor, expected a tensor that is whole on every rank, as under "
            "DistributedDataParallel, or a penalty of the module that fully_shard was applied to"
        )


def check_supported(name: str, parameter: Tensor) -> None:
    """Raise an error that names the parameter unless it is a dense floating-point tensor with data."""
    if is_lazy(parameter):
        raise TypeError(f"parameter {name!r}: got a lazy parameter, expected one with data")
    check_whole(name, parameter)
    if parameter.layout != torch.strided or parameter.is_quantized:
        raise TypeError(
            f"parameter {name!r}: got layout {parameter.layout}, expected a dense tensor"
        )
    if parameter.dtype not in _DTYPES:
        raise TypeError(
            f"parameter {name!r}: got {parameter.dtype}, expected float32, float64, bfloat16 or "
            "float16"
        )
    if parameter.device.type == "meta":
        raise TypeError(f"parameter {name!r}: got a meta tensor, expected one with data")
    if torch.empty_like(parameter, device="meta").stride() != parameter.stride():
        raise ValueError(
            f"parameter {name!r}: got strides {parameter.stride()} for shape "
            f"{tuple(parameter.shape)}, expected dense memory without overlap; make it contiguous"
        )


def layouts(tensors: Iterable[Tensor]) -> list[Layout]:
    """dtype, device, shape and strides of each tensor: what the flat state depends on."""
    return [(t.dtype, t.device, t.shape, t.stride()) for t in tensors]


class Binding:
    """Finds named parameters of a model again, on every step, in microseconds.

    A parameter is looked up in the dictionary of the module that owns it. `intact` tells whether those
    modules still hang where they hung, so that a replaced head is noticed.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        """Look the names up; one that the model lacks is found as an empty tensor ever after."""
        slots = _slots(model)
        self._places = [
            (slots[name].owner, slots[name].key) if name in slots else ({}, "") for name in names
        ]
        path = {
            (id(place[0]), place[1]): place
            for name in names
            if name in slots
            for place in slots[name].path
        }
        self._path = list(path.values())
        self._model, self._class = model, type(model)

    def intact(self) -> bool:
        """Whether every module on the way to a parameter is still the one that was bound."""
        # fully_shard gives modules another class. A list, not a generator: this runs on every step, and it
        # is twice as fast.
        return type(self._model) is self._class and all(
            [modules.get(key) is module for modules, key, module in self._path]  # noqa: C419
        )

    def parameters(self) -> list[Tensor]:
        """The parameters as they are now, in the order of the names."""
        found = [owner.get(key) for owner, key in self._places]
        return [_MISSING if p is None else p for p in found]
