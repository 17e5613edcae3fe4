"""Errors that callers tell apart.

Diverged and Vanished are how a training fails: what a comparison of trainings reports as its result. Any other
error is a mistake.
"""

from __future__ import annotations


class Diverged(FloatingPointError, ValueError):
    """A loss, parameter, output or importance that is not finite any more."""


class Vanished(ValueError):
    """Importance at the level of rounding, of an output that no parameter changes.

    Either training collapsed, for instance to units that are all zero, or the output has a constant norm.
    """


class IncompleteState(ValueError, KeyError):
    """A state, or a file of one, that lacks what it says that it has, or has more."""


# What comes of reading a file that is not as it was written; OverflowError of numbers beyond floats.
DAMAGED = (ValueError, LookupError, TypeError, AttributeError, RuntimeError, OverflowError)
