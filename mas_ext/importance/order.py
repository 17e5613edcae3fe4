"""Where data decide the order of rows, as in routing to experts, no layout of samples holds for every batch.

Tensors that came about so carry a mark, and so does what is computed from them, until their rows are put back
among others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MARK = "_mas_ext_astray"

_PICKING = {torch.masked_select, Tensor.masked_select, torch.take, Tensor.take}
_PICKING_ALONG = {torch.index_select, Tensor.index_select, torch.gather, Tensor.gather}
_TAKING_ALONG = {torch.take_along_dim, Tensor.take_along_dim}
_PICKING |= {torch._pack_padded_sequence, torch.repeat_interleave, Tensor.repeat_interleave}
_JOINING = {torch.cat, torch.concat, torch.concatenate, torch.vstack, torch.row_stack}
# Their result has the order of their first argument.
_PUTTING_BACK = {
    getattr(where, name + suffix)
    for where in (Tensor, torch)
    for name in ("index_add", "index_put", "index_copy", "scatter", "scatter_add", "masked_scatter")
    for suffix in ("", "_")
    if hasattr(where, name + suffix)
}


def astray(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], samples: int
) -> bool:
    """Whether the result of a call has rows in an order that data decided."""
    values = [*args, *kwargs.values()]
    if func in _PUTTING_BACK:
        return _marked(args[0] if args else kwargs.get("input"))
    if func is Tensor.__getitem__ and _decides(args[1], samples):
        return True
    if (
        func is F.embedding
        and not isinstance(values[1], nn.Parameter)
        and _decides(values[0], samples)
    ):
        return True
    if func in _TAKING_ALONG and (args[2] if len(args) > 2 else kwargs.get("dim")) == 0:
        return True
    if func in _PICKING:
        return True
    if func in _PICKING_ALONG and _dimension(args, kwargs) == 0:
        return True
    if func in _JOINING and _dimension(args, kwargs) == 0 and _uneven(values, samples):
        return True
    return any(_marked(t) for t in _tensors(values))


def mark(result: Any) -> None:
    """Remember that the rows of a function's result are astray."""
    for t in _tensors([result]):
        setattr(t, _MARK, True)


def _dimension(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """The argument dim of picking and joining functions, counted from the front."""
    dim: int = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
    first = next(_tensors([*args, *kwargs.values()]), None)
    return dim + first.dim() if dim < 0 and first is not None else dim


def _uneven(parts: Iterable[Any], samples: int) -> bool:
    """Whether tensors differ in their number of rows, as those of samples of several lengths do.

    Not where samples may be in dimension 1, and rows are positions.
    """
    shapes = {t.shape for t in _tensors(parts) if t.dim()}
    inner = all(len(shape) > 2 and shape[1] % samples == 0 for shape in shapes)
    return not inner and len({shape[0] for shape in shapes}) > 1


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
    if isinstance(first, (list, np.ndarray)):
        return True
    if not isinstance(first, Tensor) or first.dim() == 0:
        return False
    # A row of numbers for each sample, or for all.
    if first.dim() > 1 and first.shape[0] in (1, samples):
        return False
    everyone = torch.arange(samples, device=first.device)
    return first.shape != everyone.shape or not torch.equal(first.long(), everyone)
