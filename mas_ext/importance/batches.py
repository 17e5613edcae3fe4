"""What a batch is: a tensor, or a tuple, list, mapping or dataclass that starts with one.

Samples are dimension 0 of its tensors. A sequence that is as long as the batch and has no tensors, or tensors
of other lengths, has one item for each sample and is cut into samples with it; anything else that is no tensor
is the same for all samples. This is decided once, on the whole batch: lengths may agree by chance with fewer
samples. (In a batch of two samples, a pair of numbers is taken for one number each.)
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections import UserDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import Dataset, IterableDataset


@dataclass(frozen=True, eq=False)
class Entry:
    """A sequence in a batch: one item for each sample, or the same for all of them."""

    value: Any
    per_sample: bool


# So that torch.load reads what is kept of batches with weights_only=True.
torch.serialization.add_safe_globals([Entry])


def _with_items(batch: Any, f: Callable[[Any], Any]) -> Any:
    """The batch with f applied to its items; itself where it has none.

    A dictionary or a dataclass keeps its type, as its items may be attributes, too. Other mappings become
    dictionaries: a copy may share their items, and would then change the caller's.
    """
    if hasattr(
        type(batch), "auto_batch_size_"
    ):  # a TensorDict, which knows how many samples it has
        return batch.apply(f, batch_size=[]).auto_batch_size_(1)
    if isinstance(batch, Mapping):
        items = {key: f(item) for key, item in batch.items()}
        if type(batch) is dict or not isinstance(batch, (dict, UserDict)):
            return items
        kept = copy.copy(batch)
        for key, item in items.items():
            kept[key] = item
        return kept
    if _is_dataclass(batch):
        kept = copy.copy(batch)
        for name, item in _fields(batch):
            object.__setattr__(kept, name, f(item))  # it may be frozen
        return kept
    if _is_named_tuple(batch):
        return type(batch)(*(f(item) for item in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(f(item) for item in batch)
    return batch


def _is_dataclass(batch: Any) -> bool:
    return dataclasses.is_dataclass(batch) and not isinstance(batch, type)


def _fields(batch: Any) -> list[tuple[str, Any]]:
    return [(f.name, getattr(batch, f.name, None)) for f in dataclasses.fields(batch)]


def _is_named_tuple(batch: Any) -> bool:
    return isinstance(batch, tuple) and hasattr(batch, "_fields")


def _is_array(batch: Any) -> bool:
    numpy = sys.modules.get("numpy")  # without it there are none
    return numpy is not None and isinstance(batch, numpy.ndarray)


def _is_sequence(batch: Any) -> bool:
    """Whether this may have one item for each sample."""
    if _is_array(batch):
        return bool(batch.ndim > 0)
    named = isinstance(batch, (str, bytes)) or _is_named_tuple(batch)
    return isinstance(batch, Sequence) and not named


def mapped(batch: Any, f: Callable[[Tensor], Tensor]) -> Any:
    """The batch with f applied to every tensor in it."""
    if isinstance(batch, Tensor):
        return f(batch)
    if isinstance(batch, Entry):
        return Entry(mapped(batch.value, f), batch.per_sample)
    return _with_items(batch, lambda item: mapped(item, f))


def tensors(batch: Any) -> list[Tensor]:
    """The tensors of a batch, in order."""
    found: list[Tensor] = []

    def note(t: Tensor) -> Tensor:
        found.append(t)
        return t

    mapped(batch, note)
    return found


def first(batch: Any) -> Any:
    """The input: the batch itself, or its first item."""
    if isinstance(batch, Mapping):
        return first(next(iter(batch.values()), None))
    if isinstance(batch, (tuple, list)):
        return first(batch[0] if batch else None)
    if isinstance(batch, Entry):
        return first(batch.value)
    if _is_dataclass(batch):
        return first(next((item for _, item in _fields(batch)), None))
    return batch


def size(batch: Any) -> int:
    """The number of samples: dimension 0 of every tensor in the batch.

    Raises:
        TypeError: a batch that starts with no tensor.
        ValueError: a tensor of another length.
    """
    return _told(batch)[1]


def refuse_no_batch(given: Any) -> None:
    """Raise an error for what is neither a batch nor batches: a data set (torch's or Hugging Face's), packed
    sequences.
    """
    if isinstance(given, PackedSequence):
        raise ValueError(
            "batches: got a PackedSequence, expected samples in dimension 0; pass padded tensors and "
            "lengths, and pack them in forward="
        )
    torchs = isinstance(given, Dataset) and not isinstance(given, IterableDataset)
    if torchs or type(given).__module__.startswith("datasets."):
        raise TypeError(
            f"batches: got the data set {type(given).__name__}, whose items are single samples, expected "
            "batches, as in DataLoader(dataset, batch_size=64)"
        )


def told(batch: Any) -> Any:
    """The batch with its sequences as entries, which know whether they have an item for each sample."""
    return _told(batch)[0]


def _told(batch: Any) -> tuple[Any, int]:
    refuse_no_batch(batch)
    start = first(batch)
    if not isinstance(start, Tensor) or start.dim() == 0:
        raise TypeError(
            f"batches: got a batch of {type(batch).__name__} starting with {type(start).__name__}, "
            "expected a tensor with samples in dimension 0, or a tuple, list, mapping or dataclass that "
            "starts with one"
        )
    samples = start.shape[0]
    _refuse_unpadded(batch, start)

    def tell(item: Any) -> Any:
        if isinstance(item, Tensor):
            _check_rows(item, start)
        refuse_no_batch(item)
        if isinstance(item, (Tensor, Entry)):
            return item
        if _is_sequence(item) and first(item) is not start:
            if _has_item_per_sample(item, samples):
                return Entry(item, True)
            if not any(_is_container(each) for each in item):
                return Entry(item, False)
        return _with_items(item, tell)

    return tell(batch), samples


def _refuse_unpadded(batch: Any, start: Tensor) -> None:
    """Raise a ValueError for a batch that starts with a list of sequences of different lengths."""
    item = batch
    while item is not start:
        if isinstance(item, list) and len(item) > 1 and all(isinstance(t, Tensor) for t in item):
            lengths = [t.shape[0] if t.dim() else 0 for t in item]
            if len({*lengths}) > 1 and len({tuple(t.shape[1:]) for t in item}) == 1:
                shown = ", ".join(map(str, lengths[:8])) + ", ..." * (len(lengths) > 8)
                raise ValueError(
                    f"batches: got a list of {len(item)} sequences of lengths {shown}, expected one tensor "
                    "with samples in dimension 0, as torch.nn.utils.rnn.pad_sequence(..., batch_first=True) "
                    "makes it, with their lengths behind it"
                )
        values = item.values() if isinstance(item, Mapping) else item
        values = (each for _, each in _fields(item)) if _is_dataclass(item) else values
        values = (item.value,) if isinstance(item, Entry) else values
        item = next(iter(values))


def time_first(shape: Sequence[int], samples: int, seen: int | None) -> str:
    """What to do where samples lie in dimension 1 of a batch's first tensor, of this shape; else "".

    seen: the number of samples that something else has.
    """
    if len(shape) < 2 or seen in (None, samples) or shape[1] != seen:
        return ""
    return (
        "; where dimension 0 is time, as of a recurrent layer without batch_first, give samples first, and "
        "forward=lambda model, batch: model(batch.transpose(0, 1))"
    )


def _check_rows(t: Tensor, start: Tensor) -> None:
    samples = start.shape[0]
    if t.is_nested or t.dim() == 0 or t.shape[0] != samples:
        got = "a nested tensor" if t.is_nested else f"a tensor of shape {tuple(t.shape)}"
        rows = None if t.is_nested or t.dim() == 0 else t.shape[0]
        raise ValueError(
            f"batches: got {got} in a batch of {samples} samples, expected samples in dimension 0 (or a list "
            f"with one item for each sample, after a first tensor){time_first(start.shape, samples, rows)}"
        )


def _is_container(item: Any) -> bool:
    nested = isinstance(item, (Tensor, Entry, Mapping)) or _is_dataclass(item)
    return nested or _is_named_tuple(item) or _is_sequence(item)


def _has_item_per_sample(sequence: Any, samples: int) -> bool:
    if len(sequence) != samples or any(isinstance(item, Entry) for item in sequence):
        return False
    inside = tensors(sequence)
    if not inside:
        return True
    # A list of tensors is a container of fields, unless its tensors are of other lengths.
    ragged = any(t.dim() == 0 or t.shape[0] != samples for t in inside)
    return ragged and len({type(item) for item in sequence}) == 1


def differ_in_tensors_alone(batch: Any) -> bool:
    """Whether samples of a batch, as `told` gives it, have nothing of their own but tensors."""
    if isinstance(batch, Entry):
        return not batch.per_sample
    found = True

    def look(item: Any) -> Any:
        nonlocal found
        found = found and (isinstance(item, Tensor) or differ_in_tensors_alone(item))
        return item

    _with_items(batch, look)
    return found


def between(batch: Any, start: int, stop: int) -> Any:
    """The samples from start to stop, with sequences as entries."""
    return _part(batch, lambda rows: rows[start:stop])


def at(batch: Any, index: Sequence[int]) -> Any:
    """The samples at these positions, in tensors of their own, with sequences as entries."""
    return mapped(_part(batch, lambda rows: _rows(rows, index)), _own)


def concatenated(parts: Sequence[Any]) -> Any:
    """The samples of batches of one structure, each as `told` gives it, one after another.

    Raises:
        ValueError: tensors that differ in more than the number of samples; another structure.
    """
    columns = [tensors(part) for part in parts]
    kinds = {tuple((t.shape[1:], t.dtype) for t in column) for column in columns}
    if len(kinds) > 1:
        some = sorted(str([(tuple(shape), dtype) for shape, dtype in kind]) for kind in kinds)[:2]
        raise ValueError(
            f"batch: got samples of {' and '.join(some)}, expected all of one shape and dtype"
        )
    rows = iter([torch.cat(column) for column in zip(*columns, strict=True)])
    sequences = iter([*zip(*map(_sequences, parts), strict=True)])

    def join(item: Any) -> Any:
        if isinstance(item, Tensor):
            return next(rows)
        if isinstance(item, Entry):
            values = next(sequences)
            return (
                Entry([x for each in values for x in each.value], True) if item.per_sample else item
            )
        return _with_items(item, join)

    return join(parts[0])


def _sequences(batch: Any) -> list[Entry]:
    """The entries of a batch, in order."""
    found: list[Entry] = []

    def look(item: Any) -> Any:
        if isinstance(item, Entry):
            found.append(item)
        return item if isinstance(item, (Tensor, Entry)) else _with_items(item, look)

    look(batch)
    return found


def _part(batch: Any, part: Callable[[Any], Any]) -> Any:
    """The batch with a part of the rows of its tensors, and of its sequences with one item per sample."""

    def cut(item: Any) -> Any:
        if isinstance(item, Tensor):
            return part(item)
        if isinstance(item, Entry):
            return Entry(part(item.value), True) if item.per_sample else item
        return _with_items(item, cut)

    return cut(told(batch))


def twice(sample: Any) -> Any:
    """The samples of a batch, as `told` gives it, and then the same again."""
    if isinstance(sample, Tensor):
        return torch.cat([sample, sample])
    if isinstance(sample, Entry):
        if not sample.per_sample:
            return sample
        return Entry(_rows(sample.value, [*range(len(sample.value))] * 2), True)
    return _with_items(sample, twice)


def _rows(rows: Any, index: Sequence[int]) -> Any:
    """A tensor's or a sequence's items at these positions."""
    if isinstance(rows, Tensor) or _is_array(rows):
        return rows[list(index)]
    picked = [rows[i] for i in index]
    return type(rows)(picked) if isinstance(rows, (list, tuple)) else picked


def plain(batch: Any) -> Any:
    """The batch as the user's functions know it, without entries."""
    if isinstance(batch, Entry):
        return plain(batch.value)
    if _is_array(batch):
        return batch.copy()
    return batch if isinstance(batch, Tensor) else _with_items(batch, plain)


def copied(batch: Any) -> Any:
    """The batch as the user's functions know it, with tensors of its own, which a model may change in place."""
    return plain(mapped(batch, _own))


def _own(t: Tensor) -> Tensor:
    own = t.detach().clone()
    return own.requires_grad_() if t.requires_grad else own


def to(batch: Any, device: torch.device) -> Any:
    """The batch on another device."""
    return mapped(batch, lambda t: t.to(device, non_blocking=True))


class _Itself:
    """Compares by identity what has no value to compare by."""

    def __init__(self, item: Any) -> None:
        self.item = item  # held, so that no other object takes its address

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and other.item is self.item

    def __hash__(self) -> int:
        return id(self.item)


def constants(batch: Any) -> Hashable:
    """All of a batch that is no tensor: equal for two batches if a model that reads it does the same with both.

    Numbers, strings and arrays are compared by value and type, NaN being itself; other objects by their own
    equality, or by identity where they have none.
    """
    return (type(batch), tuple(_parts(batch)))


def _parts(batch: Any) -> Iterator[Hashable]:
    if isinstance(batch, Tensor):
        return
    if isinstance(batch, Entry):
        yield constants(batch.value)
    elif isinstance(batch, Mapping):
        for key, item in batch.items():
            yield key
            yield constants(item)
    elif _is_dataclass(batch):
        for _, item in _fields(batch):
            yield constants(item)
    elif isinstance(batch, (tuple, list)):
        for item in batch:
            yield constants(item)
    elif _is_array(batch):
        yield batch.shape
        yield str(batch.dtype)
        yield repr(batch.tolist()) if batch.dtype.hasobject else batch.tobytes()
    elif isinstance(batch, (float, complex)):
        yield repr(batch)
    elif isinstance(batch, Set):
        yield frozenset(constants(item) for item in batch)
    else:
        try:
            hash(batch)
        except TypeError:
            yield _Itself(batch)
        else:
            yield batch
