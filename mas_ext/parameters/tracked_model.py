"""The model of a penalty, and its parameters, found on every step."""

from __future__ import annotations

import copy
import operator
import threading
import weakref
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from mas_ext.kernels import backends
from mas_ext.parameters.adapters import AdaptedWeight, adapted_weights, measured
from mas_ext.parameters.fsdp import (
    ShardedBinding,
    Sharding,
    local_parts,
    optimizer_view,
    prepare_passes,
)
from mas_ext.parameters.names import Binding, Layout, ModelView, layouts
from mas_ext.parameters.sharded_adapters import as_sharded


class ParameterGroup(Protocol):
    """Parameters by name, their layouts when the group was made, and where they were found."""

    binding: Binding | None

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def layout(self) -> Sequence[Layout]: ...


G = TypeVar("G", bound=ParameterGroup)


_locks: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


def alone(model: nn.Module) -> AbstractContextManager[Any]:
    """Have other threads that would run the model, or change what a penalty holds of it, wait until the end."""
    # Of a dictionary, setdefault is one step for all threads; and of the lock itself so are taking it and
    # giving it back, which an interruption of a generator would tear apart.
    lock: AbstractContextManager[Any] = _locks.setdefault(model, threading.RLock())
    return lock


class TrackedModel:
    """A strong reference to a model: copied together with it this refers to the copy, alone to the same one.

    Args:
        model: any module.
        exclude: fnmatch patterns on the names of parameters that don't count.
    """

    def __init__(self, model: nn.Module, exclude: Sequence[str]) -> None:
        self._model, self._exclude = model, tuple(exclude)
        self._memo: dict[int, Any] | None = None
        # Parameters by the name that each was last seen under.
        self._seen: dict[str, weakref.ref[Tensor]] = {}
        # Factors of adapted weights by the weight's name, as they were last seen.
        self._factors: dict[str, list[weakref.ref[Tensor]]] = {}
        self.sharding = Sharding.of(model, optimizer_view(model, exclude).parameters())

    @property
    def model(self) -> nn.Module:
        """The model."""
        if self._memo is not None:  # of the deep copy that made this, complete only after it
            memo, self._memo = self._memo, None
            self._model = memo.get(id(self._model), self._model)
            seen = {name: found() for name, found in self._seen.items()}
            self._seen = {
                n: weakref.ref(memo.get(id(p), p)) for n, p in seen.items() if p is not None
            }
        return self._model

    def remember(self, view: ModelView) -> None:
        """Know the parameters of a view again under other names, and those that are gone if they come back."""
        gone = {
            n: seen for n, seen in self._seen.items() if view.name_of(seen()) not in view.places
        }
        self._seen = gone | {name: weakref.ref(p) for name, (p, *_) in view.places.items()}

    def forget(self, name: str) -> None:
        """Not know again the parameter that had this name."""
        self._seen.pop(name, None)

    def moved(self, known: Collection[str], view: ModelView) -> dict[str, str]:
        """The present names, also excluded ones, of parameters whose known names the view lacks."""
        before = {
            n: seen() for n, seen in self._seen.items() if n in known and n not in view.places
        }
        found = ((name, view.name_of(p)) for name, p in before.items())
        return {name: now for name, now in found if now is not None}

    def replaced(self, groups: Sequence[ParameterGroup], view: ModelView) -> list[str]:
        """The names of bound parameters whose module is another one now, with other values in what both have.

        A wider layer that took over the old rows, or a copy of a module, is as good as the old one; and so is a
        module whose own parameters were exchanged, as load_state_dict(assign=True) does.
        """
        found = []
        for group in groups:
            if group.binding is not None:
                for name, (owner, old) in zip(group.names, group.binding.owned(), strict=True):
                    place = view.places.get(name)
                    if place is not None and place.owner is not owner:
                        pair = self.local([old, place.parameter])
                        if place.parameter is not old and not _same_where_both(*pair):
                            found.append(name)
        return found

    def adapted(self) -> dict[str, AdaptedWeight]:
        """The weights that adapters update, but for the excluded ones."""
        found = adapted_weights(self.model)
        if found and self._exclude:
            view = ModelView(self.model, self._exclude)
            found = {
                name: weight
                for name, weight in found.items()
                if all(
                    view.name_of(p) in view.places for p in (weight.weight, *weight.parameters())
                )
            }
        return found if self.sharding is None or not found else as_sharded(self.model, found)

    def measured(
        self, adapted: Mapping[str, AdaptedWeight]
    ) -> AbstractContextManager[dict[str, nn.Parameter]]:
        """While it lasts, gradients are of the adapted weights, and not of the factors."""
        if self.sharding is not None:
            self.view(())  # while these are found as adapted weights
            prepare_passes(self.model)  # with the factors as what is trained
        return measured(adapted)

    def remember_factors(self, adapted: Mapping[str, AdaptedWeight]) -> None:
        """Know the adapters' factors again."""
        for name, weight in adapted.items():
            if weight.products:
                self._factors[name] = [weakref.ref(p) for p in weight.parameters()]

    def other_factors(
        self, adapted: Mapping[str, AdaptedWeight], held: Collection[str]
    ) -> dict[str, str]:
        """The present names, by those under which they are held, of adapted weights that changed.

        These have other factors than when they were last seen, or another name with the same ones.
        """
        now = {id(w.parameters()[0]): name for name, w in adapted.items() if w.products}
        found = {}
        for name in held:
            before = [ref() for ref in self._factors.get(name, [])]
            if name not in adapted:
                new = now.get(id(before[0])) if before and before[0] is not None else None
                if new is not None and new not in held:
                    found[name] = new
            elif adapted[name].products:
                factors = adapted[name].parameters()
                same = len(factors) == len(before) and all(map(operator.is_, factors, before))
                if not same:
                    found[name] = name
        return found

    def view(self, consolidated: Collection[str]) -> ModelView:
        """The parameters as the optimizer knows them, after taking over how they are sharded now.

        Raises:
            TypeError: fully_shard after this was made, or parameters that are sharded in another way.
            ValueError: a consolidated parameter that is sharded otherwise than before.
        """
        view = optimizer_view(self.model, self._exclude)
        theta = view.parameters()
        if self.sharding is not None:
            weights = {name: w.weight for name, w in self.adapted().items()}
            self.sharding.follow({**weights, **theta}, consolidated)
        elif self.was_sharded_since(view):
            raise TypeError(
                "model: got fully_shard after the penalty was made, expected before; a new penalty takes the "
                "old one's state_dict()"
            )
        return view

    def was_sharded_since(self, view: ModelView) -> bool:
        """Whether fully_shard came after this was made."""
        return self.sharding is None and Sharding.of(self.model, view.parameters()) is not None

    def local(self, tensors: list[Tensor]) -> list[Tensor]:
        """This rank's parts of parameters, or of tensors like them."""
        return tensors if self.sharding is None else local_parts(tensors)

    def own_parameters(self, view: ModelView) -> dict[str, Tensor]:
        """This rank's parts of the parameters by name."""
        theta: dict[str, Tensor] = {**view.parameters()}
        if self.sharding is not None:
            own = local_parts(theta.values())
            theta = {name: t.detach() for name, t in zip(theta, own, strict=True)}
        return theta

    def join(self, name: str, own: Tensor) -> Tensor:
        """The tensor like a parameter, from this rank's part of it."""
        return own if self.sharding is None else self.sharding.join(name, own)

    def bind(self, groups: Sequence[ParameterGroup], view: ModelView) -> None:
        """Have `find` look these groups' parameters up where they hang in the view."""
        binding = Binding if self.sharding is None else ShardedBinding
        for group in groups:
            group.binding = binding(view, group.names)
        self.remember(view)

    def find(self, groups: Sequence[G]) -> list[tuple[G, list[Tensor]]] | None:
        """The groups with their parameters as they are now; None where these or their layouts are others."""
        if any([group.binding is None for group in groups]):  # noqa: C419 (of a copy)
            view = optimizer_view(self.model, self._exclude)
            if self.moved([name for group in groups for name in group.names], view):
                return None
            self.bind(groups, view)
        found = []
        for group in groups:
            binding = group.binding
            assert binding is not None
            theta = binding.parameters()
            same = all([p is q for p, q in zip(theta, binding.bound, strict=True)])  # noqa: C419
            if not same or not binding.intact():
                return None
            own = self.local(theta)
            key = backends.layout_key(own)  # in a tenth of the time
            if key is None or key != binding.layout_key:
                if layouts(own) != group.layout:
                    return None
                if key is not None:
                    binding.layout_key = key
            found.append((group, theta))
        return found

    def __getstate__(self) -> dict[str, Any]:
        model = self.model  # what is seen is the copy's from here on
        own = {id(p) for p in model.parameters()}
        seen = {name: found() for name, found in self._seen.items()}
        kept = {name: p for name, p in seen.items() if id(p) in own}
        return {**self.__dict__, "_memo": None, "_seen": kept, "_factors": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        seen = {name: weakref.ref(p) for name, p in state.pop("_seen").items()}
        self.__dict__.update(state, _seen=seen)

    def __deepcopy__(self, memo: dict[int, Any]) -> TrackedModel:
        copied = copy.copy(self)
        copied._memo = memo
        return copied


def _same_where_both(old: Tensor, new: Tensor) -> bool:
    """Whether two parameters agree, but for rounding and a step of training, in the elements that both have."""
    if old.dim() != new.dim() or old.is_meta or new.is_meta:
        return False
    both = tuple(slice(min(sizes)) for sizes in zip(old.shape, new.shape, strict=True))
    here, there = (t.detach()[both].to(new.device, torch.float64) for t in (old, new))
    return bool((here - there).norm() <= 0.5 * here.norm())
