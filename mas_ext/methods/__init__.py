"""Methods for learning tasks one after another, by name: one file each."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from mas_ext._hints import hint
from mas_ext.methods.ebll import EBLL
from mas_ext.methods.ewc import EWC, OnlineEWC
from mas_ext.methods.finetune import Finetune
from mas_ext.methods.imm import MeanIMM, ModeIMM
from mas_ext.methods.joint import Joint
from mas_ext.methods.lwf import LwF
from mas_ext.methods.mas import MAS
from mas_ext.methods.method import SETTINGS, Method, Setting, Training
from mas_ext.methods.si import SI

__all__ = ["MAS", "METHODS", "SETTINGS", "Method", "Setting", "Training", "create", "options"]

METHODS: dict[str, Callable[..., Method]] = {
    "finetune": Finetune,
    "joint": Joint,
    "mas": MAS,
    "mas-batch": partial(MAS, importance="batch"),
    "mas-vector": partial(MAS, objective="vector"),
    "mas-alpha": partial(MAS, merge="consistent"),
    "local-mas": partial(MAS, importance="local"),
    "ewc": EWC,
    "online-ewc": OnlineEWC,
    "si": SI,
    "imm-mean": MeanIMM,
    "imm-mode": ModeIMM,
    "lwf": LwF,
    "ebll": EBLL,
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
    return METHODS[name](**given)


def options(name: str) -> dict[str, Any]:
    """The options of the method called `name`, sorted, with their defaults.

    Raises:
        ValueError: an unknown name.
    """
    if name not in METHODS:
        raise ValueError(f"method: got {name!r}, {hint(name, METHODS)}")
    parameters = inspect.signature(METHODS[name]).parameters
    return {option: parameters[option].default for option in sorted(parameters)}
