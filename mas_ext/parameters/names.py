"""Which parameters are consolidated, by which name, and how to find them again without a walk."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mas_ext._arguments import check_factor
from mas_ext.kernels.dtypes import DTYPES
from mas_ext.parameters.restoring import restoring

if TYPE_CHECKING:  # torch may be built without it
    from torch.distributed.tensor import DTensor

# Modules that wrap another one without being part of the model's own names.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Modules that run their child `module` on several devices.
PARALLEL = (nn.parallel.DistributedDataParallel, nn.DataParallel)
_MISSING = torch.empty(0, device="meta")

Layout = tuple[torch.dtype, torch.device, torch.Size, tuple[int, ...]]
# A module as a child: its parent's dictionary of children, its key there, and itself.
_Child = tuple[dict[str, nn.Module | None], str, nn.Module]


class StandIn(nn.Parameter):
    """Zeros in some shape, in the memory of one number: in place of a parameter that has no numbers of its own.

    For gradients alone: what is written into one element is written into all.
    """


class _Place(NamedTuple):
    """Where a parameter hangs: its module's dictionary, its key there, and the modules on the way."""

    parameter: nn.Parameter
    owner: dict[str, nn.Parameter | None]
    key: str
    path: tuple[_Child, ...]


def _walk(
    module: nn.Module, prefix: str = "", path: tuple[_Child, ...] = ()
) -> Iterator[tuple[str, _Place]]:
    for key, parameter in module._parameters.items():
        if parameter is not None:
            yield prefix + key, _Place(parameter, module._parameters, key, path)
    for key, child in module._modules.items():
        if child is not None:
            inner = prefix if is_hidden(module, key) else f"{prefix}{key}."
            yield from _walk(child, inner, (*path, (module._modules, key, child)))


def bare_model(model: nn.Module) -> nn.Module:
    """The model inside what runs it in parallel or compiles it."""
    wrapper: Any = model
    if isinstance(model, PARALLEL):
        return bare_model(wrapper.module)
    return bare_model(wrapper._orig_mod) if hasattr(model, "_orig_mod") else model


def is_hidden(module: nn.Module, key: str) -> bool:
    """Whether a child's key is no part of the bare model's names."""
    return key in _WRAPPERS or (key == "module" and isinstance(module, PARALLEL))


class ModelView:
    """A model and the places of its parameters by name: one walk, handed down for the length of a call.

    Names are those of the bare model: wrappers by torch.compile, DDP, DataParallel, FSDP and activation
    checkpointing leave no trace. A tied parameter counts once, under its first name, and is excluded by any.

    Args:
        model: any module.
        exclude: fnmatch patterns on whole names, of parameters to leave out.
    """

    def __init__(self, model: nn.Module, exclude: Sequence[str] = ()) -> None:
        self.model = model
        first: dict[int, tuple[str, _Place]] = {}
        excluded = set()
        for name, place in _walk(model):
            first.setdefault(id(place.parameter), (name, place))
            if any(fnmatchcase(name, pattern) for pattern in exclude):
                excluded.add(id(place.parameter))
        self.places = {name: place for key, (name, place) in first.items() if key not in excluded}
        # By first name, excluded or not.
        self.found = {name: place.parameter for name, place in first.values()}
        self._names = {key: name for key, (name, _) in first.items()}

    def name_of(self, parameter: Tensor | None) -> str | None:
        """The name of a parameter when this view was made, also of an excluded one; None if there was none."""
        return self._names.get(id(parameter))

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters by name, as they are now: whole ones while FSDP has gathered them."""
        # A scripted module's dictionary has no get().
        present = {n: place for n, place in self.places.items() if place.key in place.owner}
        found = {name: place.owner[place.key] for name, place in present.items()}
        return {name: p for name, p in found.items() if p is not None}


def named_parameters(model: nn.Module, exclude: Sequence[str] = ()) -> dict[str, nn.Parameter]:
    """The model's parameters by name, each once, without the excluded ones; arguments as ModelView's."""
    return ModelView(model, exclude).parameters()


@contextmanager
def frozen(parameters: Iterable[Tensor]) -> Iterator[None]:
    """While it lasts, the parameters require no gradient."""
    trained = [p for p in parameters if p.requires_grad]

    def restore() -> None:
        for p in trained:
            p.requires_grad_(True)

    with restoring(restore):
        for p in trained:
            p.requires_grad_(False)
        yield


def parts_of_equal_size(theta: Mapping[str, Tensor], count: int) -> list[set[str]]:
    """The names in at most this many runs, of about as many elements each."""
    total = max(1, sum(t.numel() for t in theta.values()))
    parts: dict[int, set[str]] = {}
    begun = 0
    for name, t in theta.items():
        parts.setdefault((begun + t.numel() // 2) * count // total, set()).add(name)
        begun += t.numel()
    return [*parts.values()]


def check_patterns(model: nn.Module, exclude: Sequence[str]) -> None:
    """Raise a ValueError for a pattern that matches no parameter of the model, a TypeError for no model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    if isinstance(exclude, str):
        raise TypeError(f"exclude: got the string {exclude!r}, expected a sequence of patterns")
    if not isinstance(exclude, (Sequence, Set)) or not all(isinstance(e, str) for e in exclude):
        raise TypeError(f"exclude: got {exclude!r}, expected a sequence of patterns")
    _refuse_unmatched("exclude", exclude, [name for name, _ in _walk(model)])


def check_strength(names: Sequence[str], strength: Mapping[str, float]) -> dict[str, float]:
    """Factors by fnmatch pattern, once checked; a ValueError for a pattern that matches none of the names."""
    if not isinstance(strength, Mapping):
        raise TypeError(
            f"strength: got {type(strength).__name__}, expected a mapping from patterns to factors"
        )
    _refuse_unmatched("strength", strength, names)
    return {pattern: check_factor(f, f"strength of {pattern!r}") for pattern, f in strength.items()}


def strength_of(name: str, strength: Mapping[str, float]) -> float:
    """The factor of the last pattern that matches a parameter's name; 1 without one."""
    matching = [factor for pattern, factor in strength.items() if fnmatchcase(name, pattern)]
    return matching[-1] if matching else 1.0


def _refuse_unmatched(argument: str, patterns: Iterable[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"{argument}: got {pattern!r}, which matches no parameter; the names are "
                f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
            )


def is_sharded(t: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor, spread over ranks."""
    tensors = sys.modules.get("torch.distributed.tensor")  # without it there are none
    return tensors is not None and isinstance(t, tensors.DTensor)


def is_partitioned(t: Tensor) -> bool:
    """Whether DeepSpeed's ZeRO-3 has a tensor, of which a rank has some elements, or none, between passes."""
    return hasattr(t, "ds_id")


def check_whole(name: str, parameter: Tensor) -> None:
    """Raise a TypeError that names the parameter if it is spread over ranks."""
    if is_sharded(parameter):
        raise TypeError(
            f"parameter {name!r}: got a DTensor, expected a tensor that is whole on every rank, as under "
            "DistributedDataParallel, or a penalty of the module that fully_shard was applied to"
        )
    if is_partitioned(parameter):
        raise TypeError(
            f"parameter {name!r}: got one that DeepSpeed's ZeRO-3 has spread over ranks, expected a tensor "
            "that is whole on every rank, as with ZeRO-1 and 2, or fully_shard"
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
    if parameter.dtype not in DTYPES:
        raise TypeError(
            f"parameter {name!r}: got {parameter.dtype}, expected float32, float64, bfloat16 or "
            "float16"
        )
    if parameter.device.type == "meta":
        raise TypeError(
            f"parameter {name!r}: got a meta tensor, expected one with data, and not one that is loaded for "
            "each pass alone, as device_map offloads to the CPU or a disk"
        )
    contiguous = parameter.is_contiguous() or isinstance(parameter, StandIn)
    if not contiguous and torch.empty_like(parameter, device="meta").stride() != parameter.stride():
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
    modules still hang where they hung, so that a replaced head is noticed. A name that the model lacks is found
    as an empty tensor.

    bound: the parameters when this was made, in the order of the names. layout_key: of those that were found to
    lie in memory as the state does.
    """

    layout_key: bytes | None = None

    def __init__(self, view: ModelView, names: Sequence[str]) -> None:
        found = [view.places.get(name) for name in names]
        self._places = [({}, "") if place is None else (place.owner, place.key) for place in found]
        self.bound = [_MISSING if place is None else place.parameter for place in found]
        children = (child for place in found if place is not None for child in place.path)
        self._path = [
            *{(id(parent), key): (parent, key, c) for parent, key, c in children}.values()
        ]
        self._model, self._class = view.model, type(view.model)

    def owned(self) -> Iterator[tuple[dict[str, nn.Parameter | None], Tensor]]:
        """The dictionary of the module that owned each parameter when this was made, and the parameter."""
        return zip((owner for owner, _ in self._places), self.bound, strict=True)

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
