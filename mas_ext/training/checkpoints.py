"""Parts of a run's checkpoint that are not what the run could have saved: refused before it goes on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mas_ext.optim.step_size import STEP_SIZES, check_numbers


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load an optimizer's state; a ValueError for what SGD, Adam or AdamW can't have saved."""
    known = type(optimizer) in STEP_SIZES
    if known:
        own = optimizer.state_dict()["param_groups"]
        refuse_unlike("optimizer", state["param_groups"], own)
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups if known else ():
        check_numbers(group)
        moments = {"exp_avg", "exp_avg_sq"} if "betas" in group else {"momentum_buffer"}
        for p in group["params"]:
            like = dict.fromkeys(moments, p.detach())
            if "betas" in group:
                like["step"] = torch.zeros(())
            kept = {name: t for name, t in optimizer.state.get(p, {}).items() if t is not None}
            if kept:
                refuse_unlike("optimizer", kept, like)
            if not kept.get("step", 0) >= 0:
                raise ValueError(
                    f"checkpoint, optimizer, step: got {float(kept['step'])}, expected a number from 0 up"
                )


def refuse_unlike(name: str, found: Any, own: Any) -> None:
    """Raise a ValueError for a part of a checkpoint that is built otherwise than the run's own.

    That is: other names or lengths, tensors of another dtype or shape, integers beyond 64 bits, or what is of
    another kind.
    """
    if isinstance(own, Tensor) and isinstance(found, Tensor):
        if (found.dtype, found.shape) == (own.dtype, own.shape):
            return
    elif isinstance(own, dict) and isinstance(found, dict):
        if found.keys() == own.keys():
            for key, value in own.items():
                refuse_unlike(f"{name}, {key}", found[key], value)
            return
    elif isinstance(own, (list, tuple)) and isinstance(found, (list, tuple)):
        if len(found) == len(own):
            for i, value in enumerate(own):
                refuse_unlike(f"{name}, {i}", found[i], value)
            return
    elif type(found) is type(own) or {type(found), type(own)} == {int, float}:
        in_64_bits = not isinstance(found, int) or -(2**63) < found < 2**63
        if in_64_bits:  # others may be no float, either
            return
    told = [
        f"{t.dtype} of shape {tuple(t.shape)}" if isinstance(t, Tensor) else repr(t)
        for t in (found, own)
    ]
    raise ValueError(
        f"checkpoint, {name}: got {told[0]:.200}, expected what is like {told[1]:.200}"
    )
