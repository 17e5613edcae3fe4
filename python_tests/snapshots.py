"""All that a penalty and its model hold, copied, to be compared with what they hold later."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mas_ext import FusedMASPenalty

Snapshot = dict[str, Any]


def snapshot(penalty: FusedMASPenalty) -> Snapshot:
    """Entries, omega, anchors, observed sums, lam, the kernels' own factors, and the model's tensors."""
    state = penalty._state
    held: dict[str, Any] = {**state.tensors(), **penalty._pending.tensors()}
    held |= {f"model.{name}": t for name, t in penalty.model.state_dict(keep_vars=True).items()}
    held |= {f"grad.{n}": p.grad for n, p in penalty.model.named_parameters() if p.grad is not None}
    for k, group in enumerate(state.memory.groups):
        held[f"alpha.{k}"], held[f"remainder.{k}"] = group.state.alpha, group.state.remainder
        held[f"names.{k}"] = list(group.names)
    copied = {n: t.detach().clone() if isinstance(t, Tensor) else t for n, t in held.items()}
    modes = [module.training for module in penalty.model.modules()]
    return {**copied, "modes": modes, "entries": list(state.memory.entries), "lam": state.lam}


def equal(a: Any, b: Any) -> bool:
    """Whether two snapshots, or parts of them, are the same, bit by bit, NaN included."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(_bits(a), _bits(b))
    return bool(a == b)


def _bits(t: Tensor) -> Tensor:
    return t.contiguous().reshape(-1).view(torch.uint8)
