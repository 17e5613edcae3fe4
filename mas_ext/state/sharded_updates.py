"""The penalty of low-rank updates under fully_shard: the kernels for whole weights, on every rank's rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mas_ext.kernels.dtypes import compute_dtype
from mas_ext.parameters.adapters import AdaptedWeight
from mas_ext.parameters.fsdp import Sharding, local_parts
from mas_ext.parameters.sharded_adapters import by_rows
from mas_ext.state.low_rank import UpdateGroup


class ShardedUpdates(NamedTuple):
    """Held updates of sharded weights; all ranks compute with them together.

    adapted: the weights, at least one of which has an active adapter.
    bind: from weights with products of this rank's rows to groups for the kernels.
    """

    adapted: Mapping[str, AdaptedWeight]
    sharding: Sharding
    bind: Callable[[Mapping[str, AdaptedWeight]], Iterator[UpdateGroup]]

    def trained(self) -> list[Tensor]:
        """The factors that require a gradient."""
        return [p for w in self.adapted.values() for p in w.parameters() if p.requires_grad]

    def value(self) -> Tensor:
        """The penalty of this rank's rows; the gradients that backward gives factors are of all rows."""
        return self._value(lambda p: p.to_local())

    @torch.no_grad()
    def add_grad_(self, grads: Mapping[int, Tensor], times: Tensor | None = None) -> Tensor:
        """Add d penalty / d factor, times a number, to gradients of factors; returns that of this rank's rows.

        grads: the gradients, by the factors' ids, for the same factors on all ranks. times: the number, read on
        the device.
        """
        factors = (p for w in self.adapted.values() for p in w.parameters())
        pieces = {id(p): p.to_local().detach() for p in factors}  # type: ignore[attr-defined]
        wanted = [t.requires_grad_() for key, t in pieces.items() if key in grads]
        with torch.enable_grad():
            value = self._value(lambda p: pieces[id(p)])
            scaled = value if times is None else value * times.to(value.device)
        if wanted:
            found = torch.autograd.grad(scaled, wanted)
            targets = local_parts(grads[key] for key in pieces if key in grads)
            for grad, added in zip(targets, found, strict=True):
                grad += added
        return value.detach()

    def _value(self, piece: Callable[[Any], Tensor]) -> Tensor:
        def wide(p: Tensor) -> Tensor:
            # Gradients are summed over the ranks before they are rounded.
            t = piece(p)
            return t.to(compute_dtype(t.dtype))

        values = [group.value() for group in self.bind(by_rows(self.adapted, self.sharding, wide))]
        return sum(values[1:], values[0])
