"""Names and numbers that users give: what they mean, and what is said of those that can't be used."""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin


def hint(name: str, known: Iterable[str]) -> str:
    """The known name that looks most like this one, as a question, or all of them to choose from."""
    known = [each for each in known if each]
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"choose from {', '.join(known)}" if known else "and there is none to choose from"


def resolve(argument: str, name: str, known: Mapping[str, Any]) -> Any:
    """What is known by this name, or the function that "module:function" imports.

    Raises:
        ValueError: of the argument, which is neither.
    """
    if name in known:
        return known[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise ValueError(f"{argument}: got {name!r}, {hint(name, known)} (or module:function)")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{argument}: got {name!r}, expected what can be imported ({error})"
        ) from error
    if not callable(found):
        raise ValueError(f"{argument}: got {name!r}, {type(found).__name__}, expected a function")
    return found


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raise a ValueError for an argument of this name that is none of the choices, by value and type."""
    choices = list(choices)
    # The type goes first: an array would be compared element by element.
    if not any(type(value) is type(each) and value == each for each in choices):
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}")


def check_share(share: float, name: str) -> None:
    """Raise a ValueError for an argument of this name that is not from 0 to 1."""
    if not 0 <= as_float(share) <= 1:
        raise ValueError(f"{name}: got {share!r}, expected a number from 0 to 1")


def check_factor(factor: Any, name: str) -> float:
    """An argument of this name as a float; a ValueError unless it is finite and at least 0."""
    found = as_float(factor)
    if not 0 <= found < float("inf"):
        raise ValueError(f"{name}: got {factor!r}, expected a finite number from 0 up")
    return found


def check_positive(factor: Any, name: str) -> float:
    """An argument of this name as a float; a ValueError unless it is finite and above 0."""
    found = as_float(factor)
    if not 0 < found < float("inf"):
        raise ValueError(f"{name}: got {factor!r}, expected a finite number above 0")
    return found


def check_count(count: Any, name: str, least: int = 1) -> None:
    """Raise a ValueError for an argument of this name that is no whole number of 64 bits from `least` up."""
    if (
        not isinstance(count, Integral)
        or isinstance(count, bool)
        or not least <= int(count) < 2**63
    ):
        raise ValueError(
            f"{name}: got {count!r}, expected a whole number from {least} up, below 2**63"
        )


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind: NumPy's numbers are numbers, truth values are none, floats are finite.

    kind: a type as in annotations; or, of what JSON or TOML have, a list of one kind for a list of that, and a
        dictionary for one with its keys, or with any for the key None.
    """
    if isinstance(kind, dict):
        keys = value if None in kind else kind
        return isinstance(value, dict) and all(
            key in value and fits(value[key], kind.get(key, kind.get(None))) for key in keys
        )
    origin, inner = (list, kind) if isinstance(kind, list) else (get_origin(kind), get_args(kind))
    if origin in (Union, UnionType):
        return any(fits(value, each) for each in inner)
    if origin is Literal:  # which of its words, who takes them tells
        return type(value) in {type(each) for each in inner}
    if origin in (Sequence, list):
        kinds = list if origin is list else (list, tuple)
        return isinstance(value, kinds) and all(fits(each, inner[0]) for each in value)
    if origin is Callable:
        return callable(value)
    if kind is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, Real) and math.isfinite(as_float(value))
    return kind is Any or not isinstance(kind, type) or isinstance(value, kind)


def as_float(x: Any) -> float:
    """x as a float; NaN for what is none, as words and truth values."""
    if isinstance(x, (str, bytes, bool)):
        return float("nan")
    try:
        return float(x)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return float("nan")
