"""Methods for learning tasks one after another, by name: one file each."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mas_ext._arguments import hint
from mas_ext.methods.ebll import EBLL
from mas_ext.methods.ewc import EWC, EWCDR, OnlineEWC
from mas_ext.methods.finetune import Finetune
from mas_ext.methods.imm import MeanIMM, ModeIMM
from mas_ext.methods.joint import Joint
from mas_ext.methods.lwf import LwF
from mas_ext.methods.lwf_mas import LwFMAS
from mas_ext.methods.mas import MAS
from mas_ext.methods.method import SETTINGS, Method, Setting, Training
from mas_ext.methods.replay import ExperienceReplay
from mas_ext.methods.rwalk import RWalk
from mas_ext.methods.si import SI

__all__ = ["MAS", "METHODS", "SETTINGS", "Method", "Setting", "Training", "create", "options"]

METHODS: dict[str, Callable[..., Method]] = {
    "finetune": Finetune,
    "joint": Joint,
    "mas": MAS,
    "mas-own": partial(MAS, anchor="own"),
    "mas-batch": partial(MAS, importance="batch"),
    "mas-vector": partial(MAS, objective="vector"),
    "mas-alpha": partial(MAS, merge="consistent", anchor="own"),
    "mas-alpha-latest": partial(MAS, merge="consistent"),
    "local-mas": partial(MAS, importance="local"),
    "ewc": EWC,
    "online-ewc": OnlineEWC,
    "ewc-dr": EWCDR,
    "si": SI,
    "rwalk": RWalk,
    "imm-mean": MeanIMM,
    "imm-mode": ModeIMM,
    "lwf": LwF,
    "ebll": EBLL,
    "lwf-mas": LwFMAS,
    "replay": ExperienceReplay,
}


def create(name: str, /, **given: Any) -> Method:
    """The method called `name`, with options as its class takes them.

    Raises:
        ValueError: an unknown name, or an option that the method does not have.
    """
    known = options(name)
    for option in given:
        if option not in known:
            raise ValueError(
                f"{option}: method {name!r} has no such option, expected one of {', '.join(known) or 'none'}"
            )
    make = METHODS[name]
    kinds = get_type_hints(make.func if isinstance(make, partial) else make)
    for option, value in given.items():
        if not _fits(value, kinds[option]):
            raise ValueError(f"{option}: got {value!r}, expected {_spelled(kinds[option])}")
        if isinstance(value, Real) and float in (kinds[option], *get_args(kinds[option])):
            given[option] = float(value)
    return make(**given)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of an option's type, NumPy's included; a truth value is no number."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is Literal:  # which of its words, the method itself tells
        return type(value) in {type(each) for each in inner}
    if origin is Sequence:
        return isinstance(value, (list, tuple)) and all(_fits(each, inner[0]) for each in value)
    if origin is Callable:
        return callable(value)
    if kind in (int, float) and type(value) is not bool:
        if isinstance(value, Integral):
            return kind is int or abs(int(value)) <= sys.float_info.max
        return kind is float and isinstance(value, Real) and math.isfinite(value)
    return type(value) is kind


def _spelled(kind: Any) -> str:
    return (
        kind.__name__
        if isinstance(kind, type)
        else str(kind).replace("typing.", "").replace(" | ", " or ")
    )


def options(name: str) -> dict[str, Any]:
    """The options of the method called `name`, sorted, with their defaults.

    Raises:
        ValueError: an unknown name.
    """
    if name not in METHODS:
        raise ValueError(f"method: got {name!r}, {hint(name, METHODS)}")
    parameters = inspect.signature(METHODS[name]).parameters
    return {option: parameters[option].default for option in sorted(parameters)}
