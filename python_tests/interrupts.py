"""An error at any line of the library, as Ctrl-C raises one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import mas_ext

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
