"""Where data decide the order of rows, as in routing to experts, no layout of samples holds for every batch.

Tensors that came about so carry a mark, and so does what is computed from them, until their rows are put back
among others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_MARK = "_mas_ext_astray"

_PICKING = {torch.masked_select, Tensor.masked_select, torch.take, Tensor.take}
_PICKING_ALONG = {torch.index_select, Tensor.index_select, torch.gather, Tensor.gather}
_PICKING |= {torch._pack_padded_sequence, torch.repeat_interleave, Tensor.repeat_interleave}
# Their result has the order of their first argument.
_PUTTING_BACK = {
    getattr(where, name + suffix)
    for where in (Tensor, torch)
    for name in ("index_add", "index_put", "index_copy", "scatter", "scatter_add", "masked_scatter")
    for suffix in ("", "_")
    if hasattr(where, name + suffix)
}


def astray(func: Callable[..., Any], values: Sequence[Any], samples: int) -> bool:
    """Whether the result of a function of these values has rows in an order that data decided."""
    if func in _PUTTING_BACK:
        return _marked(values[0])
    if func is Tensor.__getitem__ and _decides(values[1], samples):
        return True
    if func in _PICKING or (func in _PICKING_ALONG and values[1] == 0):
        return True
    return any(_marked(t) for t in _tensors(values))


def mark(result: Any) -> None:
    """Remember that the rows of a function's result are astray."""
    for t in _tensors([result]):
        setattr(t, _MARK, True)


def _marked(t: Any) -> bool:
    return hasattr(t, _MARK)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _decides(index: Any, samples: int) -> bool:
    """Whether an index picks rows by mask, or by any numbers but 0, 1, 2, ... for the samples."""
    items = index if isinstance(index, tuple) else (index,)
    for item in items:
        if isinstance(item, Tensor) and item.dim() and item.dtype in (torch.bool, torch.uint8):
            return True
    first = items[0] if items else None
    if isinstance(first, list):
        return True
    if not isinstance(first, Tensor) or first.dim() == 0:
        return False
    everyone = torch.arange(samples, device=first.device)
    return first.shape != everyone.shape or not torch.equal(first.long(), everyone)
