"""What adapters have in common: a model's penalty, tried out early; data read once, each sample by one rank.

Texts that are packed into one row are samples of their own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, SubsetRandomSampler

from mas_ext._arguments import check_count, check_factor, check_positive
from mas_ext.importance import batches as batch_of
from mas_ext.penalty import FusedMASPenalty

# What tells where texts begin in a row that has several.
_OF_PACKING = ("position_ids", "seq_idx")


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
    with random_state_kept():
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


def remember(penalty: FusedMASPenalty, batches: Any, begun: bool, progress: bool) -> None:
    """Consolidate a penalty that holds nothing yet on what stands for what its model knows.

    begun: whether training has begun, and goes on. Random state is put back.
    """
    if batches is not None and not begun and penalty.num_tasks == 0:
        with random_state_kept():
            penalty.consolidate(batches, progress=progress)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Python's, NumPy's and torch's: data sets may draw from any."""
    own, numpys = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(own)
        np.random.set_state(numpys)


def replace_method(owner: Any, name: str, function: Callable[..., Any]) -> Callable[[], None]:
    """Have an object call a function in place of one of its methods; returns what ends it."""
    before = owner.__dict__.get(name)

    def undo() -> None:
        del owner.__dict__[name]
        if before is not None:
            owner.__dict__[name] = before

    owner.__dict__[name] = function
    return undo


def check_batches(batches: Any) -> None:
    """Raise a TypeError for a `batches` that is data, which would fail when the training is over."""
    if batches is not None and not callable(batches):
        raise TypeError(
            f"batches: got {type(batches).__name__}, expected a function that gives batches, such as "
            "lambda _: loader"
        )


def check_remember(
    data: Any, distillation: float, max_samples: int | None, temperature: float
) -> None:
    """Raise an error for arguments of the adapters that can't be used, or not together."""
    check_factor(distillation, "distillation")
    check_positive(temperature, "temperature")
    if max_samples is not None:
        check_count(max_samples, "max_samples")
    if data is True and not distillation:
        raise ValueError(
            "remember: got True without distillation, which alone needs no data, expected data, or a "
            "distillation above 0"
        )
    if not (data is True or data is None or hasattr(data, "__iter__") or hasattr(data, "__len__")):
        raise TypeError(
            f"remember: got {type(data).__name__}, expected a data set, batches, or True"
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

    Texts that its batches have in one row, without padding, get one each.

    Anything but a DataLoader of a map-style data set is left as it is, and taken to give each rank its own.
    """
    size = batch_size_of(loader)
    return loader if size is None else _loader(own_part(samples_of(loader)), loader, size)


def batch_size_of(loader: Any) -> int | None:
    """How many samples of a map-style data set a DataLoader puts into a batch; None for anything else."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    size: int | None = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    return size


def at_most(batches: Any, samples: int | None) -> Any:
    """The batches, with this rank's share of so many samples in all.

    Of a map-style data set these are drawn at random, the same ones on every call, of anything else the first
    ones.
    """
    if samples is None:
        return batches
    distributed = dist.is_available() and dist.is_initialized()
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    share = samples // ranks + (rank < samples % ranks)
    map_style = isinstance(batches, DataLoader) and not isinstance(batches.dataset, IterableDataset)
    if not map_style or batches.batch_size is None:
        return _first(batches, share)
    drawn = torch.randperm(len(batches.dataset), generator=torch.Generator().manual_seed(0))
    few = Subset(batches.dataset, sorted(drawn[:share].tolist()))
    return _loader(few, batches, batches.batch_size)


def _first(batches: Iterable[Any], samples: int) -> Iterator[Any]:
    for batch in batches if samples else ():
        size = batch_of.size(batch)
        yield batch if size <= samples else batch_of.plain(batch_of.between(batch, 0, samples))
        samples -= size
        if samples <= 0:
            return


def loader_like(data: Any, like: Any) -> Any:
    """A data set in a loader like another one; what is no data set as it is."""
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        return _loader(data, like, getattr(like, "batch_size", None) or 8)
    return data


def _loader(dataset: Any, like: DataLoader[Any], size: int) -> DataLoader[Any]:
    how = {**how_read(like), "collate_fn": partial(_collated, like.collate_fn)}
    return DataLoader(dataset, batch_size=size, **how)


def how_read(loader: DataLoader[Any]) -> dict[str, Any]:
    """The arguments of a DataLoader that say how samples are read and put together."""
    names = ["collate_fn", "num_workers", "worker_init_fn", "pin_memory", "timeout"]
    if loader.num_workers:
        names += ["multiprocessing_context", "prefetch_factor", "persistent_workers"]
    return {name: getattr(loader, name) for name in names}


def samples_of(loader: DataLoader[Any]) -> Any:
    """The map-style data set of a loader, or the part of it that a SubsetRandomSampler draws from."""
    sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
    if isinstance(sampler, SubsetRandomSampler):
        return Subset(loader.dataset, [*sampler.indices])
    return loader.dataset


def _collated(collate: Callable[[Any], Any], items: Any) -> Any:
    """A batch of a loader, with one text in each row."""
    return unpacked(collate(items))


def unpacked(batch: Any) -> Any:
    """A batch of texts that follow each other in one row, as packing puts them, with one in each row.

    Such a row has position_ids, which begin anew with every text, and no attention_mask; afterwards it is the
    other way round. Other batches are as they were.
    """
    if not isinstance(batch, Mapping) or "attention_mask" in batch:
        return batch
    places, ids = batch.get("position_ids"), batch.get("input_ids")
    if not isinstance(places, Tensor) or not isinstance(ids, Tensor) or ids.shape != places.shape:
        return batch
    if ids.dim() != 2 or len(ids) != 1:
        return batch
    starts = (places[0].diff() != 1).nonzero().flatten() + 1
    lengths = torch.tensor([0, *starts.tolist(), ids.shape[1]]).diff().tolist()

    def rows(t: Tensor, fill: int) -> Tensor:
        return pad_sequence(t[0].split(lengths), batch_first=True, padding_value=fill)

    found = {
        key: rows(t, -100 if key == "labels" else 0)
        for key, t in batch.items()
        if isinstance(t, Tensor) and t.shape == ids.shape and key not in _OF_PACKING
    }
    return {**found, "attention_mask": rows(torch.ones_like(ids), 0)}
