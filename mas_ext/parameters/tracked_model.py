"""The model that a penalty holds, found again after copying, and its parameters, found on every step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from mas_ext.parameters.fsdp import ShardedBinding, Sharding, local, present_parameters
from mas_ext.parameters.names import Binding, layouts
from mas_ext.state.buffers import Group
from mas_ext.state.quadratic import Consolidation

Bound = list[tuple[Group, list[Tensor]]]


class HeldModel:
    """A strong reference to a model: copied together with it this holds the copy, alone the same one."""

    def __init__(self, model: nn.Module, exclude: Sequence[str]) -> None:
        """exclude: fnmatch patterns on the names of parameters that don't count."""
        self._find: Callable[[], nn.Module] = _Always(model)
        self._exclude = tuple(exclude)
        self._bindings: list[Binding] = []
        self.sharding = Sharding.of(model, self.parameters())

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self._find()

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that count, by name, as they are now."""
        return present_parameters(self.model, self._exclude)

    def local(self, tensors: list[Tensor]) -> list[Tensor]:
        """What of the parameters, or of tensors like them, this rank has."""
        return tensors if self.sharding is None else local(tensors)

    def follow(self, state: Consolidation) -> None:
        """Take over how the parameters are sharded now; those that the state knows must be as they were."""
        theta = self.parameters()
        if self.sharding is not None:
            self.sharding.follow(theta, state.memory.parts())
        elif Sharding.of(self.model, theta) is not None:
            raise TypeError(
                "model: got fully_shard after the penalty was made, expected before; a new penalty takes the "
                "old one's state_dict()"
            )

    @torch.no_grad()
    def own_parameters(self) -> dict[str, Tensor]:
        """What of the parameters this rank has, by name."""
        theta = self.parameters()
        return dict(zip(theta, self.local([*theta.values()]), strict=True))

    def join(self, name: str, own: Tensor) -> Tensor:
        """The tensor like a parameter of which this rank has a part."""
        return own if self.sharding is None else self.sharding.join(name, own)

    def rename(self, old: str, new: str) -> None:
        """What is remembered of one parameter counts for another."""
        if self.sharding is not None:
            self.sharding.rename(old, new)

    def bound(self, state: Consolidation) -> Bound:
        """The state's groups with their parameters as they are now; it follows what has changed."""
        bound = self._lookup(state)
        if bound is None:
            self.fit(state)
            bound = self._lookup(state)
            if bound is None:
                raise RuntimeError("the model's parameters change while the penalty is computed")
        return bound

    # Unlike torch.compiler.disable, this does not import the compiler with the package.
    @_disable_dynamo
    def fit(self, state: Consolidation) -> None:
        """Have the state follow the parameters."""
        self.follow(state)
        state.fit(self.own_parameters())
        self.bind(state)

    def bind(self, state: Consolidation) -> None:
        """Look up the parameters of the state's groups, which are new ones."""
        binding = Binding if self.sharding is None else ShardedBinding
        self._bindings = [binding(self.model, g.names) for g in state.memory.groups]

    def _lookup(self, state: Consolidation) -> Bound | None:
        groups = state.memory.groups
        if len(self._bindings) != len(groups):
            self.bind(state)
        bound = []
        for group, binding in zip(groups, self._bindings, strict=True):
            theta = binding.parameters()
            if not binding.intact() or layouts(self.local(theta)) != group.layout:
                return None
            bound.append((group, theta))
        return bound

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bindings": []}

    def __deepcopy__(self, memo: dict[int, Any]) -> HeldModel:
        copied = copy.copy(self)
        copied._find = _Copied(self.model, memo)
        return copied


class _Always:
    """Finds the model: always this one."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __call__(self) -> nn.Module:
        return self._model


class _Copied:
    """Finds the model's copy in a deep copy's memo, which is complete only after the copying."""

    def __init__(self, model: nn.Module, memo: dict[int, Any]) -> None:
        self._model, self._memo = model, memo

    def __call__(self) -> nn.Module:
        self._model, self._memo = self._memo.get(id(self._model), self._model), {}
        return self._model

    def __reduce__(self) -> tuple[Any, ...]:
        return _Always, (self(),)
