"""The model that a penalty holds, found again after copying, and its parameters, found on every step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch._compile import _disable_dynamo

from mas_ext.consolidation import Consolidation
from mas_ext.memory import Group
from mas_ext.parameters import Binding, layouts, named_parameters

Bound = list[tuple[Group, list[Tensor]]]


class HeldModel:
    """A strong reference to a model: copied together with it this holds the copy, alone the same one."""

    def __init__(self, model: nn.Module, exclude: Sequence[str]) -> None:
        """exclude: fnmatch patterns on the names of parameters that don't count."""
        self._find: Callable[[], nn.Module] = _Always(model)
        self._exclude = tuple(exclude)
        self._bindings: list[Binding] = []

    @property
    def model(self) -> nn.Module:
        """The model."""
        return self._find()

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that count, by name, as they are now."""
        return named_parameters(self.model, self._exclude)

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
        state.fit(self.parameters())
        self.bind(state)

    def bind(self, state: Consolidation) -> None:
        """Look up the parameters of the state's groups, which are new ones."""
        self._bindings = [Binding(self.model, g.names) for g in state.memory.groups]

    def _lookup(self, state: Consolidation) -> Bound | None:
        groups = state.memory.groups
        if len(self._bindings) != len(groups):
            self.bind(state)
        bound = []
        for group, binding in zip(groups, self._bindings, strict=True):
            theta = binding.parameters()
            if not binding.intact() or layouts(theta) != group.layout:
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
