"""What adapters have in common: a model's penalty, tried out early; data read once, each sample by one rank."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset

from mas_ext.penalty import FusedMASPenalty


def penalty_of(
    model: nn.Module, before: FusedMASPenalty | None, ranks: int, options: Mapping[str, Any]
) -> FusedMASPenalty:
    """The penalty before if it is of this model, else a new one with these options and its state."""
    if before is not None and before.model is model:
        return before
    group = torch.distributed.group.WORLD if ranks > 1 else None
    penalty = FusedMASPenalty(model, **{"process_group": group, **options})
    if before is not None:
        penalty.load_state_dict(before.state_dict())
    return penalty


def try_importance(penalty: FusedMASPenalty, batches: Callable[[], Any]) -> None:
    """Have the penalty try importance on two samples before training begins; random state is put back.

    batches: gives what importance will be taken from. A stream, which reading would use up, is not tried.
    """
    with _random_state_kept():
        batch = _first_two(batches())
        if batch is not None:
            penalty.check(batch)


def _first_two(batches: Any) -> Any:
    """A batch of two samples at least, if there are; None where reading them would use them up."""
    if isinstance(batches, DataLoader):
        if isinstance(batches.dataset, IterableDataset) or batches.batch_sampler is None:
            return None
        few = Subset(batches.dataset, range(min(2, len(batches.dataset))))  # type: ignore[arg-type]
        batches = DataLoader(few, batch_size=2, collate_fn=batches.collate_fn)
    found = iter(batches)
    return None if found is batches else next(found, None)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Python's, NumPy's and torch's: data sets may draw from any."""
    own, numpys = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(own)
        np.random.set_state(numpys)


def check_batches(batches: Any) -> None:
    """Raise a TypeError for a `batches` that is data, which would fail when the training is over."""
    if batches is not None and not callable(batches):
        raise TypeError(
            f"batches: got {type(batches).__name__}, expected a function that gives batches, such as "
            "lambda _: loader"
        )


def own_part(dataset: Any) -> Any:
    """This rank's part of a map-style data set, every world-size-th sample; all of it in one process.

    A DistributedSampler would repeat samples, to give all ranks as many.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return dataset
    return Subset(dataset, range(dist.get_rank(), len(dataset), dist.get_world_size()))


def once(loader: Any) -> Any:
    """The samples of a DataLoader in their own order, this rank's part of them, in batches of the same size.

    Anything but a DataLoader of a map-style data set is left as it is, and taken to give each rank its own.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return loader
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    if size is None:
        return loader
    return DataLoader(
        own_part(loader.dataset),
        batch_size=size,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
    )
