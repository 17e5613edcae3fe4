"""Things that are changed for a while, and put back whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def restoring(restore: Callable[[], None]) -> Iterator[None]:
    """Call `restore` at the end, and once more where an interruption kept it from its end: it may run twice."""
    done = False
    try:
        try:
            yield
        finally:
            restore()
            done = True
    finally:
        if not done:
            restore()
