"""What a batch is: a tensor, or a tuple, list or mapping of tensors whose first item is the input."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def mapped(batch: Any, f: Callable[[Tensor], Tensor]) -> Any:
    """The batch with f applied to every tensor in it; of mappings only a UserDict keeps its type."""
    if isinstance(batch, Tensor):
        return f(batch)
    if isinstance(batch, Mapping):
        items = {key: mapped(item, f) for key, item in batch.items()}
        if not isinstance(batch, UserDict):
            return items
        # A tokenizer's batch has its items as attributes, too. Other mappings may share their items with a
        # copy, which would then change the caller's.
        kept = copy.copy(batch)
        kept.update(items)
        return kept
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(mapped(item, f) for item in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(mapped(item, f) for item in batch)
    return batch


def first(batch: Any) -> Any:
    """The input: the batch itself, or its first item."""
    if isinstance(batch, Mapping):
        return first(next(iter(batch.values()), None))
    if isinstance(batch, (tuple, list)):
        return first(batch[0] if batch else None)
    return batch


def size(batch: Any) -> int:
    """The number of samples: dimension 0 of every tensor in the batch."""
    start = first(batch)
    if not isinstance(start, Tensor) or start.dim() == 0:
        raise TypeError(
            f"batches: got a batch of {type(batch).__name__} starting with {type(start).__name__}, "
            "expected a tensor with samples in dimension 0, or a tuple, list or mapping that starts "
            "with one"
        )
    samples = start.shape[0]

    def check(t: Tensor) -> Tensor:
        if t.dim() == 0 or t.shape[0] != samples:
            raise ValueError(
                f"batches: got a tensor of shape {tuple(t.shape)} in a batch of {samples} samples, "
                "expected samples in dimension 0"
            )
        return t

    mapped(batch, check)
    return samples


def between(batch: Any, start: int, stop: int) -> Any:
    """The samples from start to stop."""
    return mapped(batch, lambda t: t[start:stop])


def copied(batch: Any) -> Any:
    """The batch with tensors of its own, which a model may change in place."""

    def copy_of(t: Tensor) -> Tensor:
        own = t.detach().clone()
        return own.requires_grad_() if t.requires_grad else own

    return mapped(batch, copy_of)


def to(batch: Any, device: torch.device) -> Any:
    """The batch on another device."""
    return mapped(batch, lambda t: t.to(device, non_blocking=True))
