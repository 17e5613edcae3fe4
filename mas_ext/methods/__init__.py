"""Methods for learning tasks one after another, by name: one file each; methods of one's own are registered."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib.metadata import EntryPoint, entry_points
from numbers import Real
from typing import Any, get_args, get_type_hints

from mas_ext._arguments import fits, resolve
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

__all__ = [
    "MAS",
    "METHODS",
    "SETTINGS",
    "Method",
    "Setting",
    "Training",
    "create",
    "options",
    "register",
    "takes",
]

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

# Those that users registered.
_OWN: dict[str, Callable[..., Method]] = {}


def register(name: str, method: Callable[..., Method]) -> None:
    """Let `Trainer`, `mas_ext.compare` and a run's file know a method of one's own by a name.

        mas_ext.methods.register("mine", Mine)

    A package makes its methods known by itself with entry points, in pyproject.toml:

        [project.entry-points."mas_ext.methods"]
        mine = "package.module:Mine"

    and without a name they are "module:Mine" wherever a method's name goes.

    Args:
        name: of letters, digits, - and _. A name that was registered before is given anew.
        method: a subclass of Method, or a function that makes one; what it is called with are its options.

    Raises:
        ValueError: a name that is not of that form, or of a method that is here; a method that is no callable.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(f"name: got {name!r}, expected letters, digits, - and _")
    if name in METHODS:
        raise ValueError(f"name: got {name!r}, a method of mas_ext, expected another name")
    if not callable(method):
        raise ValueError(f"method: got {method!r}, expected a subclass of Method")
    _OWN[name] = method


@cache
def _installed() -> Mapping[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group="mas_ext.methods")}


def _find(name: str) -> Callable[..., Method]:
    """What makes the method called `name`, which may be "module:Class"."""
    known = METHODS if name in METHODS else {**METHODS, **_installed(), **_OWN}
    found = resolve("method", name, known)
    make: Callable[..., Method] = found.load() if isinstance(found, EntryPoint) else found
    return make


def create(name: str, /, **given: Any) -> Method:
    """The method called `name`, with options as its class takes them.

    Raises:
        ValueError: an unknown name, or one of what makes no Method; an option that the method does not have.
    """
    known = options(name)
    for option in given:
        if option not in known:
            expected = f"one of {', '.join(known)}" if known else "none"
            raise ValueError(f"{option}: method {name!r} has no such option, expected {expected}")
    make = _find(name)
    for option, value in given.items():
        kind = _kind(make, option)
        if not fits(value, kind):
            raise ValueError(f"{option}: got {value!r}, expected {_spelled(kind)}")
        if isinstance(value, Real) and float in (kind, *get_args(kind)):
            given[option] = float(value)
    method = make(**given)
    if not isinstance(method, Method):
        raise ValueError(f"method: got {type(method).__name__} from {name!r}, expected a Method")
    return method


def takes(name: str, option: str, value: Any) -> bool:
    """Whether the method called `name` has this option, and says that its type has this value.

    Raises:
        ValueError: an unknown name.
    """
    kind = _kind(_find(name), option) if option in options(name) else Any
    return kind is not Any and fits(value, kind)


def _kind(make: Callable[..., Method], option: str) -> Any:
    """The type of an option; Any where nothing says it."""
    try:
        return get_type_hints(make.func if isinstance(make, partial) else make).get(option, Any)
    except (NameError, TypeError):  # names of another place; an instance that can be called
        return Any


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
    parameters = inspect.signature(_find(name)).parameters
    return {option: parameters[option].default for option in sorted(parameters)}
