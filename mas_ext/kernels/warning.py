"""Warnings that point at the user's line, however deep in the library they arise."""

from __future__ import annotations

import os
import sys
import warnings

import torch

# Frames of torch lie between: a module's __call__, a decorator such as no_grad, an optimizer's hooks.
_LIBRARIES = tuple(
    os.path.join(os.path.dirname(file), "") for file in (os.path.dirname(__file__), torch.__file__)
)


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the innermost line on the call stack that is neither in mas_ext nor in torch."""
    # From Python 3.12 on, this is warnings.warn(..., skip_file_prefixes=_LIBRARIES).
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        frame = frame.f_back
    warnings.warn_explicit(
        message,
        category,
        frame.f_code.co_filename,
        frame.f_lineno,
        frame.f_globals.get("__name__"),
        frame.f_globals.setdefault("__warningregistry__", {}),
    )
