"""A penalty's state read from torch.distributed.checkpoint, written on any number of ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mas_ext.parameters.adapters import adapted_weights
from mas_ext.parameters.agreement import Agreement
from mas_ext.parameters.fsdp import optimizer_view
from mas_ext.parameters.names import is_sharded


class StateOwner(Protocol):
    """A FusedMASPenalty."""

    @property
    def model(self) -> nn.Module: ...

    def together(self, call: str) -> Agreement: ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any: ...


def load_distributed(
    penalty: StateOwner, checkpoint_id: str | os.PathLike[str], key: str = "penalty"
) -> None:
    """Read what `dcp.save({key: penalty.state_dict(), ...}, checkpoint_id=...)` wrote, on any number of ranks.

    dcp.load reads only into tensors that exist already, and a new penalty has none yet. All ranks call it
    together; each reads its own part.

    Args:
        penalty: a FusedMASPenalty of a model with the same parameters, sharded by fully_shard or whole.
        checkpoint_id: the checkpoint's directory.
        key: the key of the penalty's state in what was saved.

    Raises:
        KeyError: nothing with that key in the checkpoint, or a parameter that the model lacks.
        ValueError: wrong shapes, NaN, another merge rule, store or format.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with penalty.together("load_distributed") as agreement:
        reader = FileSystemReader(checkpoint_id)
        likes = _likes(penalty.model)
        state: dict[str, Any] = {}
        saved = reader.read_metadata().state_dict_metadata
        for name, entry in saved.items():
            if name.startswith(f"{key}."):
                state[name] = _empty(entry, *likes(name.removeprefix(f"{key}.")))
        if not state:
            raise KeyError(
                f"key: got {key!r}, expected one of {sorted({n.split('.')[0] for n in saved})}"
            )
        agreement.settle()
    load(state, storage_reader=reader)  # which has an agreement of its own
    penalty.load_state_dict({name.removeprefix(f"{key}."): t for name, t in state.items()})


def _likes(model: nn.Module) -> Callable[[str], tuple[Tensor | None, int]]:
    """From a tensor's key to the parameter that it lies as, and how many dimensions it has before that's."""
    theta: Mapping[str, Tensor] = optimizer_view(model).parameters()
    weights = {f"update.omega.{name}": w.weight for name, w in adapted_weights(model).items()}

    def like(key: str) -> tuple[Tensor | None, int]:
        return (weights[key], 0) if key in weights else (theta.get(key.partition(".")[2]), 1)

    return like


def _empty(entry: Any, like: Tensor | None, before: int) -> Tensor:
    """A tensor to read a saved one into: beside a parameter, and sharded as the parameter is."""
    from torch.distributed import tensor

    dtype, scalar = entry.properties.dtype, len(entry.size) == 0
    if like is None or not is_sharded(like) or scalar:
        return torch.empty(entry.size, dtype=dtype, device=None if like is None else like.device)
    places = [
        tensor.Shard(p.dim + before) if isinstance(p, tensor.Shard) else p for p in like.placements
    ]
    return tensor.empty(*entry.size, dtype=dtype, device_mesh=like.device_mesh, placements=places)
