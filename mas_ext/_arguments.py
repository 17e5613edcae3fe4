"""Names that users give: what they mean, and what to say about an unknown one."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Mapping
from typing import Any


def hint(name: str, known: Iterable[str]) -> str:
    """The known name that looks most like this one, as a question, or all of them to choose from."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}"


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
            f"{argument}: got {name!r}, expected a function that can be imported ({error})"
        ) from error
    if not callable(found):
        raise ValueError(f"{argument}: got {name!r}, {type(found).__name__}, expected a function")
    return found
