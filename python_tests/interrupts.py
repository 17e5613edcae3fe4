"""An error at any line of the library, as Ctrl-C raises one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from snapshots import equal

import mas_ext

T = TypeVar("T")

PACKAGE = str(Path(mas_ext.__file__).parent)


class Stop:
    """Raises at the line of the library, or of a part of it, with a number; counts them."""

    def __init__(self, at: int | None, error: type[BaseException], within: str = PACKAGE) -> None:
        self.at, self.error, self.lines, self.place = at, error, 0, ""
        self.within = within

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(self.within):
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                sys.settrace(None)
                self.place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                raise self.error
        return self

    def run(self, call: Callable[[], Any]) -> None:
        before = sys.gettrace()
        sys.settrace(self)
        try:
            call()
        finally:
            sys.settrace(before)


def all_or_nothing(
    make: Callable[[], T],
    call: Callable[[T], Any],
    held: Callable[[T], Any],
    within: str = PACKAGE,
    most: int = 1000,
) -> int:
    """Ctrl-C at every line of a call, or at so many: what is held then is what was, or will be; lines."""
    old, new, count = make(), make(), Stop(None, KeyboardInterrupt, within)
    before = held(old)
    count.run(lambda: call(new))
    after = held(new)
    assert not equal(before, after)
    for at in range(1, count.lines + 1, max(1, count.lines // most)):
        it, stop = make(), Stop(at, KeyboardInterrupt, within)
        with suppress(KeyboardInterrupt):
            stop.run(lambda it=it: call(it))  # type: ignore[misc]
        found = held(it)
        assert equal(found, before) or equal(found, after), f"{stop.place}: line {at}"
    return count.lines
