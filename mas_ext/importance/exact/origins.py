"""What the tensors of a forward pass are made of: data, or parameters and constants alone.

A tensor is *data* unless it is known to be something else. A parameter, a buffer, and whatever was seen to be
computed from those and from numbers alone is a *constant*; where a gradient reaches a parameter through it,
it is *derived*.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor


class Origin(NamedTuple):
    """What a tensor that is no data is made of.

    sources: the names of parameters. made: whether it was made of numbers, as zeros and arange are, or
    repeated, so that its sizes may be those of the batch.
    """

    sources: frozenset[str]
    made: bool = False


CONSTANT, MADE = Origin(frozenset()), Origin(frozenset(), made=True)


# Tensors that a pass met without knowing them: by storage, their versions.
Earlier = WeakKeyDictionary[torch.UntypedStorage, int]


class Origins:
    """Origins by storage, which views share; what is written into a storage later is found by its version.

    `earlier` holds what earlier passes met: a tensor that is still the same is not made of this batch.

    Args:
        constants: the tensors that the model keeps.
        theta: parameters by name, each a source.
    """

    def __init__(self, constants: Iterable[Tensor], theta: Mapping[str, Tensor]) -> None:
        self.earlier = Earlier()
        self._new = Earlier()
        self._known: WeakKeyDictionary[torch.UntypedStorage, tuple[Origin, int]] = (
            WeakKeyDictionary()
        )
        for t in constants:
            self._set(t, CONSTANT)
        for name, p in theta.items():
            self._set(p, Origin(frozenset((name,))))

    def _set(self, t: Tensor, origin: Origin) -> None:
        storage = _storage(t)
        if storage is not None:
            before = self._known.get(storage)
            if before is not None and before[0].sources:
                origin = Origin(before[0].sources | origin.sources)
            self._known[storage] = origin, _version(t)

    def note(self, t: Tensor, origin: Origin) -> None:
        """Take down the origin of a tensor, and of all in its storage: it has the sources of those, too."""
        storage = _storage(t)
        if storage is not None:
            self._known[storage] = origin, _version(t)

    def forget(self, t: Tensor) -> None:
        """Data was written into a tensor."""
        storage = _storage(t)
        if storage is not None:
            self._known.pop(storage, None)

    def look_back(self, t: Tensor) -> Origin | None:
        """CONSTANT for a tensor that an earlier pass met as it is now; others are remembered for later."""
        storage = _storage(t)
        if storage is None:
            return None
        if self.earlier.get(storage) == _version(t) and storage not in self._new:
            self._known[storage] = CONSTANT, _version(t)
            return CONSTANT
        self.earlier[storage] = self._new[storage] = _version(t)
        return None

    def of(self, t: Tensor) -> Origin | None:
        """The origin of a tensor; None: data."""
        storage = _storage(t)
        if storage is None:
            return None
        found = self._known.get(storage)
        return None if found is None or found[1] != _version(t) else found[0]


def _storage(t: Tensor) -> torch.UntypedStorage | None:
    try:
        return t.untyped_storage()
    except (NotImplementedError, RuntimeError, ValueError):  # sparse, lazy, and others without one
        return None


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """All tensors among the arguments of a function, those in lists too."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from tensors_in(value)
        elif isinstance(value, dict):
            yield from tensors_in(value.values())
