"""A model's state: remembered before it runs, put back bit for bit and object for object afterwards.

What modules keep (attributes, and the lists, dictionaries and objects in them) is compared by identity. Small
tensors that are no parameters are compared by value. Parameters and large tensors are copied only where a pass
writes them, just before it does: the first pass of a model is watched for that, and what it wrote is copied
from then on. A large tensor that a later pass is the first to write can't be put back, and is refused by name.
"""

from __future__ import annotations

import sys
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import chain
from operator import is_
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

# Bytes of small tensors in all, which are copied for every batch.
_SMALL = 2**20
# Longer lists and dictionaries of numbers or words are tables, not state.
_MOST_ITEMS = 4096
# How deep objects in objects are looked into; a model may refer to its trainer.
_DEPTH = 2
_ATOMS = frozenset(
    {
        *(bool, int, float, complex, str, bytes, type, type(None), type(...), range, slice),
        *(types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType),
        *(torch.dtype, torch.device, torch.Size, torch.Generator),
    }
)
_DICTS = frozenset({dict, OrderedDict})
# Objects of these are no state of a model: they may change by themselves, in threads.
_FOREIGN = (sys.stdlib_module_names | {"torch", "numpy"}) - {"types"}


class Habits:
    """What was seen of models that ran, so that it need not be looked for again. A copy starts anew."""

    def __init__(self) -> None:
        # Parameters and large tensors that passes write.
        self.written = WeakIdKeyDictionary()
        # Whether tensors were given other memory (t.data = ...).
        self.replaced = False
        # Models of which a pass was watched, and those whose eval mode was compared with their training mode.
        self.watched: WeakSet[nn.Module] = WeakSet()
        self.compared: WeakSet[nn.Module] = WeakSet()
        self._last: _Structure | None = None

    def structure(self, model: nn.Module) -> _Structure:
        """What hangs on a model now: as the last time, where it is still so."""
        if self._last is None or self._last.model is not model or self._last.changed():
            found = _Structure(model)
            # No memory that the user frees is held until the next time.
            self._last = found if found.is_light() else None
            return found
        return self._last

    def __deepcopy__(self, memo: dict[int, Any]) -> Habits:
        return Habits()

    def __reduce__(self) -> tuple[type[Habits], tuple[()]]:
        return Habits, ()


class _Contents(NamedTuple):
    """A container, and what is in it: keys and values of a dictionary, items of others.

    A loose one belongs to an object that is no module: of its changes, only those of tensors are put back.
    """

    container: Any
    keys: Sequence[Any] | None
    items: Sequence[Any]
    loose: bool

    def changed(self) -> bool:
        now, items = self.container, self.items
        if len(now) != len(items):
            return True
        if self.keys is None:
            return not all(map(is_, now, items))
        return not (all(map(is_, now.values(), items)) and all(map(is_, now, self.keys)))

    def put(self, items: Sequence[Any]) -> None:
        """Make these what is in it."""
        now = self.container
        if self.loose and not any(map(_holds_tensors, [*_values(now), *items])):
            return
        if isinstance(now, list):
            now[:] = items
        elif isinstance(now, deque):
            now.clear()
            now.extend(items)
        elif self.keys is None:
            now.clear()
            now.update(items)
        elif self.loose:
            before = dict(zip(self.keys, items, strict=True))
            for key in [*now]:
                if key not in before and _holds_tensors(now[key]):
                    del now[key]
            for key, item in before.items():
                if now.get(key) is not item and (
                    _holds_tensors(item) or _holds_tensors(now.get(key))
                ):
                    now[key] = item
        else:
            now.clear()
            now.update(zip(self.keys, items, strict=True))


def _values(container: Any) -> Iterable[Any]:
    return container.values() if isinstance(container, dict) else container


def _holds_tensors(value: Any, depth: int = 4) -> bool:
    if isinstance(value, Tensor):
        return True
    if type(value) in _ATOMS or depth == 0:
        return False
    if isinstance(value, (dict, list, tuple, deque, set)):
        items = [*_values(value)][:_MOST_ITEMS]
    else:
        items = [*getattr(value, "__dict__", {}).values()]
    return any(_holds_tensors(item, depth - 1) for item in items)


class _Structure:
    """The containers and tensors that hang on a model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.contents: list[_Contents] = []
        self.empty: list[Any] = []
        # Dictionaries of parameters, which torch.func exchanges while a pass runs.
        self.parameter_dicts: set[int] = set()
        self.tensors: list[Tensor] = []
        self._look_at(model)
        self.parameters = [t for t in self.tensors if isinstance(t, nn.Parameter)]
        self._values = [_values(contents.container) for contents in self.contents]
        self._items = [*chain.from_iterable(self._values)]

    def is_light(self) -> bool:
        """Whether all tensors but parameters are small together."""
        return sum(t.nbytes for t in self.tensors if not isinstance(t, nn.Parameter)) < _SMALL

    def changed(self) -> bool:
        """Whether a container has other items than it had."""
        now = [*chain.from_iterable(self._values)]
        same = len(now) == len(self._items) and all(map(is_, now, self._items))
        return not same or any(self.empty)

    def changes(self) -> list[_Contents]:
        """The containers that have other items than they had."""
        return [each for each in self.contents if each.changed()] if self.changed() else []

    def _look_at(self, model: nn.Module) -> None:
        seen: set[int] = set()
        waiting: list[tuple[Any, int]] = [(model, 0)]
        while waiting:
            value, depth = waiting.pop()
            if id(value) in seen:
                continue
            seen.add(id(value))
            container = value
            if isinstance(value, Tensor):
                self.tensors.append(value)
                if not value.__dict__ or depth >= _DEPTH:
                    continue
                container, depth = value.__dict__, depth + 1  # of a quantised one: its scales
            elif isinstance(value, nn.Module):
                container = value.__dict__
                self.parameter_dicts.add(id(container.get("_parameters")))
                if isinstance(value, torch.jit.ScriptModule):
                    waiting += [(t, depth) for t in (*value.parameters(), *value.buffers())]
            elif not isinstance(value, (dict, list, tuple, deque, set)):
                foreign = type(value).__module__.partition(".")[0] in _FOREIGN
                if foreign or depth >= _DEPTH or not hasattr(value, "__dict__"):
                    continue
                container, depth = value.__dict__, depth + 1
            self._look_into(container, depth, waiting)

    def _look_into(self, container: Any, depth: int, waiting: list[tuple[Any, int]]) -> None:
        items = [*_values(container)]
        if not items:
            self.empty.append(container)
            return
        if len(items) > _MOST_ITEMS and type(items[0]) in _ATOMS:
            return
        if not isinstance(container, tuple):
            keys = [*container] if isinstance(container, dict) else None
            self.contents.append(_Contents(container, keys, items, depth > 0))
        for item in items:
            kind = type(item)
            if kind in _ATOMS:
                continue
            if kind in _DICTS and not item:  # most of what modules have
                self.empty.append(item)
            else:
                waiting.append((item, depth))


def tensors_of(model: nn.Module) -> list[Tensor]:
    """All tensors that hang on a model, in whatever its modules keep."""
    return _Structure(model).tensors


class ModelState:
    """What a model is now; `tensors` are those that hang on it.

    Args:
        model: any module.
        habits: what its passes were seen to write.
    """

    def __init__(self, model: nn.Module, habits: Habits) -> None:
        self._model, self._habits = model, habits
        self._structure = habits.structure(model)
        parameters = self._structure.parameters
        self._around = [_surroundings(p) for p in parameters]
        for p in parameters:
            p.grad = None  # so that no pass adds to it
        self.tensors = self._structure.tensors
        self._requires_grad = [t.requires_grad for t in self.tensors]
        self._small = _Values(_small(self._structure.tensors))
        written = [t for t in self.tensors if t in habits.written] if habits.written else []
        self._copies = {id(t): (t, _copy(t)) for t in written}
        # Tensors that are no parameters and were written: passes get copies instead.
        self._moved: dict[int, tuple[Tensor, Tensor]] = {}
        self._aliases = _aliases(self.tensors) if habits.replaced else []
        self._versions: list[int] = []

    @contextmanager
    def passing(self) -> Iterator[None]:
        """A pass, which starts from this state whatever passes before it left behind."""
        self.start_anew()
        with torch._C.DisableTorchFunction():
            self._versions = self._versions or [_version(t) for t in self.tensors]
        if self._model in self._habits.watched:
            yield
            return
        with self.watched():
            yield
        self._habits.watched.add(self._model)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """What is done to the model is seen, so that all of it can be put back."""
        with torch._C.DisableTorchFunction():
            self._aliases = self._aliases or _aliases(self.tensors)
        with _Watch(self._to_be_watched, self._written):
            yield

    def touched(self) -> bool:
        """Whether the model is another one than it was, as far as was watched."""
        return (
            self._structure.changed()
            or bool(self._copies)
            or bool(self._replaced())
            or bool(self._small.changed())
        )

    def _replaced(self) -> list[tuple[Tensor, Tensor]]:
        """Tensors that were given other memory, and aliases of what they had."""
        return [(t, alias) for t, alias, address in self._aliases if t.data_ptr() != address]

    def _to_be_watched(self) -> dict[int, list[Tensor]]:
        known: dict[int, list[Tensor]] = {}
        for t in self.tensors:
            if not self._small.has(t) and id(t) not in self._copies and _is_plain(t):
                known.setdefault(_memory(t), []).append(t)
        return known

    def _written(self, t: Tensor) -> None:
        self._copies[id(t)] = t, _copy(t)
        self._habits.written[t] = True

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back."""
        for container in self._filled():
            container.clear()
        for contents in self._structure.changes():
            contents.put(contents.items)
        for t, alias in self._replaced():
            t.data = alias
            self._habits.replaced = True
        self._small.restore()
        for t, before in self._copies.values():
            if not _same_bits(t, before):
                t.data.copy_(before)
        for p, around in zip(self._structure.parameters, self._around, strict=True):
            if not all(map(is_, _surroundings(p), around)):
                p.grad, p._backward_hooks, p._post_accumulate_grad_hooks = around
        for t, requires_grad in zip(self.tensors, self._requires_grad, strict=True):
            if t.requires_grad != requires_grad:
                t.requires_grad_(requires_grad)

    def refuse_lost(self) -> None:
        """Raise a ValueError if a tensor was written that could not be put back."""
        for t, version in zip(self.tensors, self._versions, strict=False):
            if _version(t) != version and not self._small.has(t) and id(t) not in self._copies:
                self._habits.written[t] = True
                named = [*self._model.named_parameters(), *self._model.named_buffers()]
                name = next((name for name, other in named if other is t), "a tensor")
                raise ValueError(
                    f"model: a forward pass wrote {name} of shape {tuple(t.shape)} in place, as no pass before "
                    "did, and it can't be put back; expected a forward pass that leaves it"
                )

    def _filled(self) -> list[Any]:
        empty = self._structure.empty
        return [container for container in empty if container] if any(empty) else []

    def start_anew(self) -> None:
        """Undo what passes left behind, but for what their graphs may still need."""
        if self._versions:  # there was a pass
            with torch._C.DisableTorchFunction(), _disable_current_modes(), torch.no_grad():
                self._start_anew()

    def _start_anew(self) -> None:
        for container in self._filled():
            container.clear()
        written = {
            id(t)
            for t, version in zip(self.tensors, self._versions, strict=True)
            if _version(t) != version and not isinstance(t, nn.Parameter)
        }
        small = self._small.all() if written else self._small.changed()
        for t, before in [*small, *self._copies.values()]:
            parameter = isinstance(t, nn.Parameter)
            if id(t) in written or not (parameter or _same_bits(t, before)):
                self._moved[id(t)] = t, before
        # The graph of an earlier pass may still need what that pass wrote, so that it is left alone.
        fresh = {key: before.clone() for key, (_, before) in self._moved.items()}
        for contents in self._structure.contents if fresh else self._structure.changes():
            items = (
                [fresh.get(id(item), item) for item in contents.items] if fresh else contents.items
            )
            if id(contents.container) not in self._structure.parameter_dicts:
                contents.put(items)


class _Values:
    """Copies of tensors, joined by dtype and device: a single comparison tells whether one changed."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._ids = {id(t) for t in tensors}
        groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for t in tensors:
            groups.setdefault((t.dtype, t.device), []).append(t)
        with torch.no_grad():
            self._groups = [(group, _joined(group)) for group in groups.values()]

    def has(self, t: Tensor) -> bool:
        return id(t) in self._ids

    def all(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each tensor, and what it was."""
        for group, before in self._groups:
            for t, part in zip(group, before.split([t.numel() for t in group]), strict=True):
                yield t, part.view(t.shape)

    def changed(self) -> list[tuple[Tensor, Tensor]]:
        """Each tensor that changed, and what it was."""
        if all(_same_bits(_joined(group), before) for group, before in self._groups):
            return []
        return [(t, before) for t, before in self.all() if not _same_bits(t, before)]

    def restore(self) -> None:
        for t, before in self.changed():
            t.data.copy_(before)


class _Watch(TorchDispatchMode):
    """Tells of known memory before it is written.

    Args:
        find: gives the tensors to look after by the address of their memory.
        written: called once with each that is about to be written.
    """

    supports_higher_order_operators = True

    def __init__(
        self, find: Callable[[], dict[int, list[Tensor]]], written: Callable[[Tensor], None]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._find, self._written = find, written
        self._known: dict[int, list[Tensor]] | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: to import the compiler, which would be told to leave this alone, takes seconds."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        names, written, statistics = _arguments(func)
        if written or statistics:
            given = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
            with torch._C.DisableTorchFunction():
                for name in written + (statistics if given.get("training", True) else []):
                    self._look_at(given.get(name))
        with torch._C.DisableTorchFunction():  # none of the model's functions
            return func(*args, **(kwargs or {}))

    def _look_at(self, value: Any) -> None:
        if isinstance(value, (list, tuple)):
            for item in value:
                self._look_at(item)
        elif isinstance(value, Tensor) and _is_plain(value):
            if self._known is None:
                self._known = self._find()
            for t in self._known.pop(_memory(value), ()):
                self._written(t)


@cache
def _arguments(func: Any) -> tuple[list[str], list[str], list[str]]:
    """The names of an operator's arguments, of those that it writes, and of a BatchNorm's statistics.

    Schemas are silent on what a BatchNorm writes.
    """
    schema = getattr(func, "_schema", None)
    arguments = [] if schema is None else schema.arguments
    names = [a.name for a in arguments]
    written = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    normalises = schema is not None and "batch_norm" in schema.name
    statistics = [name for name in names if normalises and name.startswith("running_")]
    return names, written, [name for name in statistics if name not in written]


def _is_plain(t: Tensor) -> bool:
    """Whether a tensor has memory of its own kind, with values in it."""
    usual = type(t) in (Tensor, nn.Parameter) and t.layout == torch.strided
    return usual and t.device.type != "meta" and not t.is_quantized


def _small(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Tensors that are no parameters, from the smallest up, as many as are copied for every batch."""
    found, left = [], _SMALL
    others = [t for t in tensors if not t.requires_grad and _is_plain(t)]
    for t in sorted(others, key=lambda t: t.nbytes):
        left -= t.nbytes
        if left < 0:
            break
        found.append(t)
    return found


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def _copy(t: Tensor) -> Tensor:
    return t.detach().clone()


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether tensors are equal, NaN to itself and 0 not to -0."""
    flat = (t.detach().flatten().contiguous().view(torch.uint8) for t in (one, other))
    return torch.equal(*flat)


def _memory(t: Tensor) -> int:
    address: int = t.untyped_storage()._cdata
    return address


def _aliases(tensors: Iterable[Tensor]) -> list[tuple[Tensor, Tensor, int]]:
    return [(t, t.detach(), t.data_ptr()) for t in tensors if _is_plain(t)]


def _version(t: Tensor) -> int:
    return -1 if is_lazy(t) or t.is_inference() else t._version


def _surroundings(p: Tensor) -> tuple[Any, Any, Any]:
    return p.grad, p._backward_hooks, getattr(p, "_post_accumulate_grad_hooks", None)
