"""What to say about a name that nobody knows, and where a warning points."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable


def hint(name: str, known: Iterable[str]) -> str:
    """The known name that looks most like this one, as a question, or all of them to choose from."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}"


def outer_stacklevel() -> int:
    """The stacklevel with which warnings.warn, called next, points at the first caller outside this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("mas_ext."):
        level, frame = level + 1, frame.f_back
    return level
