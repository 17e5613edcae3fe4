"""The model of a penalty, whole for the length of a call; its parameters, found on every step."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from mas_ext.parameters.fsdp import ShardedBinding, Sharding, local_parts, optimizer_view, whole
from mas_ext.parameters.names import Binding, Layout, ModelView, layouts


class ParameterGroup(Protocol):
    """Parameters by name, and their layouts when the group was made."""

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def layout(self) -> Sequence[Layout]: ...


G = TypeVar("G", bound=ParameterGroup)


@contextmanager
def whole_model(model: nn.Module, exclude: Sequence[str] = ()) -> Iterator[ModelView]:
    """The view of a model that is whole on every rank until the end; all ranks enter together."""
    view = optimizer_view(model, exclude)
    with whole(model):
        yield view


class TrackedModel:
    """A strong reference to a model: copied together with it this refers to the copy, alone to the same one.

    Args:
        model: any module.
        exclude: fnmatch patterns on the names of parameters that don't count.
    """

    def __init__(self, model: nn.Module, exclude: Sequence[str]) -> None:
        self._model, self._exclude = model, tuple(exclude)
        self._memo: dict[int, Any] | None = None
        self._bindings: list[Binding] = []
        self.sharding = Sharding.of(model, optimizer_view(model, exclude).parameters())

    @property
    def model(self) -> nn.Module:
        """The model."""
        if self._memo is not None:  # of the deep copy that made this, complete only after it
            self._model, self._memo = self._memo.get(id(self._model), self._model), None
        return self._model

    def view(self, consolidated: Collection[str]) -> ModelView:
        """The parameters as the optimizer knows them, after taking over how they are sharded now.

        Raises:
            TypeError: fully_shard after this was made, or parameters that are sharded in another way.
            ValueError: a consolidated parameter that is sharded otherwise than before.
        """
        view = optimizer_view(self.model, self._exclude)
        theta = view.parameters()
        if self.sharding is not None:
            self.sharding.follow(theta, consolidated)
        elif Sharding.of(self.model, theta) is not None:
            raise TypeError(
                "model: got fully_shard after the penalty was made, expected before; a new penalty takes the "
                "old one's state_dict()"
            )
        return view

    @contextmanager
    def whole(self, consolidated: Collection[str]) -> Iterator[ModelView]:
        """A view of the model with whole parameters on every rank until the end; all ranks enter together."""
        view = self.view(consolidated)
        with whole(self.model):
            yield view

    def local(self, tensors: list[Tensor]) -> list[Tensor]:
        """This rank's parts of parameters, or of tensors like them."""
        return tensors if self.sharding is None else local_parts(tensors)

    @torch.no_grad()
    def own_parameters(self, view: ModelView) -> dict[str, Tensor]:
        """This rank's parts of the parameters by name."""
        theta = view.parameters()
        return dict(zip(theta, self.local([*theta.values()]), strict=True))

    def join(self, name: str, own: Tensor) -> Tensor:
        """The tensor like a parameter, from this rank's part of it."""
        return own if self.sharding is None else self.sharding.join(name, own)

    def rename(self, old: str, new: str) -> None:
        """Let what is known of one parameter hold for another."""
        if self.sharding is not None:
            self.sharding.rename(old, new)

    def bind(self, groups: Sequence[ParameterGroup], view: ModelView) -> None:
        """Have `find` look these groups' parameters up where they hang in the view."""
        binding = Binding if self.sharding is None else ShardedBinding
        self._bindings = [binding(view, group.names) for group in groups]

    def find(self, groups: Sequence[G]) -> list[tuple[G, list[Tensor]]] | None:
        """The groups with their parameters as they are now; None where a layout is not that of its group."""
        if len(self._bindings) != len(groups):
            self.bind(groups, optimizer_view(self.model, self._exclude))
        found = []
        for group, binding in zip(groups, self._bindings, strict=True):
            theta = binding.parameters()
            if not binding.intact() or layouts(self.local(theta)) != group.layout:
                return None
            found.append((group, theta))
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": self.model, "_memo": None, "_bindings": []}

    def __deepcopy__(self, memo: dict[int, Any]) -> TrackedModel:
        copied = copy.copy(self)
        copied._memo = memo
        return copied
