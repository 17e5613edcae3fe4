"""Penalties read from checkpoints of torch.distributed.checkpoint, written on any number of ranks."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from mas_ext.parameters.fsdp import present_parameters
from mas_ext.parameters.names import is_sharded
from mas_ext.penalty import FusedMASPenalty


def load_distributed(
    penalty: FusedMASPenalty, checkpoint_id: str | os.PathLike[str], key: str = "penalty"
) -> None:
    """Read what `dcp.save({key: penalty.state_dict(), ...}, checkpoint_id=...)` wrote, on any number of ranks.

    dcp.load reads only into tensors that are there, and a new penalty has none yet. To be called by all ranks
    together; each reads its own part.

    Args:
        penalty: of a model with the same parameters, sharded by fully_shard or whole.
        checkpoint_id: the checkpoint's directory.
        key: that of the penalty's state in what was saved.

    Raises:
        KeyError: nothing with that key in the checkpoint, or a parameter that the model lacks.
        ValueError: as FusedMASPenalty.load_state_dict.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = FileSystemReader(checkpoint_id)
    theta = present_parameters(penalty.model)
    state: dict[str, Any] = {}
    saved = reader.read_metadata().state_dict_metadata
    for name, entry in saved.items():
        if name.startswith(f"{key}."):
            like = theta.get(name.removeprefix(f"{key}.").partition(".")[2])
            state[name] = _empty(entry, like)
    if not state:
        raise KeyError(
            f"key: got {key!r}, expected one of {sorted({n.split('.')[0] for n in saved})}"
        )
    load(state, storage_reader=reader)
    penalty.load_state_dict({name.removeprefix(f"{key}."): t for name, t in state.items()})


def _empty(entry: Any, like: Tensor | None) -> Tensor:
    """Where a saved tensor fits: beside a parameter, rows first, and sharded as that is."""
    from torch.distributed import tensor

    dtype, rows = entry.properties.dtype, len(entry.size) > 0
    if like is None or not is_sharded(like) or not rows:
        return torch.empty(entry.size, dtype=dtype, device=None if like is None else like.device)
    places = [tensor.Shard(p.dim + 1) for p in like.placements if isinstance(p, tensor.Shard)]
    return tensor.empty(*entry.size, dtype=dtype, device_mesh=like.device_mesh, placements=places)
