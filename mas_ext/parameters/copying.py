"""Copies of a model that run by themselves, also where a function took the place of its forward."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from types import CellType, FunctionType, MethodType
from typing import Any, TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def independent_copy(model: Model, shared: Iterable[nn.Parameter] = ()) -> Model:
    """A deep copy of the model, with these of the parameters in common.

    A module's own functions, as a forward that calls the one that it took the place of, run the copy's modules
    and not the model's, which copy.deepcopy leaves them to.
    """
    memo: dict[int, Any] = {id(p): p for p in shared}
    made = copy.deepcopy(model, memo)
    for module in made.modules():
        for key, value in module.__dict__.items():
            if isinstance(value, (FunctionType, MethodType)):
                module.__dict__[key] = _of_copies(value, memo)
    return made


def _of_copies(value: Any, memo: dict[int, Any]) -> Any:
    """A module, or a function of modules, with those in place of which there are copies."""
    if isinstance(value, nn.Module):
        return memo.get(id(value), value)
    if isinstance(value, MethodType):
        return MethodType(_of_copies(value.__func__, memo), _of_copies(value.__self__, memo))
    if not isinstance(value, FunctionType) or not value.__closure__ or id(value) in memo:
        return value
    memo[id(value)] = value  # it may call itself
    kept = [cell.cell_contents for cell in value.__closure__]
    found = [_of_copies(item, memo) for item in kept]
    if all(new is old or new == old for new, old in zip(found, kept, strict=True)):
        return value
    cells = tuple(CellType(item) for item in found)
    made = FunctionType(
        value.__code__, value.__globals__, value.__name__, value.__defaults__, cells
    )
    made.__kwdefaults__ = value.__kwdefaults__
    made.__dict__.update(value.__dict__)
    return made
