"""What values from JSON or TOML must look like, for files that may not be as they were written."""

from __future__ import annotations

import math
from typing import Any

from mas_ext._arguments import as_float


def check_shape(value: Any, shape: Any) -> None:
    """Raise a ValueError unless a value from JSON or TOML has this shape.

    shape: str or int for these, float for a finite number, None for null; a tuple for one of its shapes; a list
        for a list of its shape; a dictionary for one with its keys, or with any for the key None.
    """
    if not _fits(value, shape):
        raise ValueError(f"got {str(value)[:80]}, expected what a run writes")


def _fits(value: Any, shape: Any) -> bool:
    if isinstance(shape, tuple):
        return any(_fits(value, each) for each in shape)
    if isinstance(shape, list):
        return isinstance(value, list) and all(_fits(each, shape[0]) for each in value)
    if isinstance(shape, dict):
        keys = value if None in shape else shape
        return isinstance(value, dict) and all(
            key in value and _fits(value[key], shape.get(key, shape.get(None))) for key in keys
        )
    if shape is float:
        return type(value) in (int, float) and math.isfinite(as_float(value))
    return value is None if shape is None else type(value) is shape
