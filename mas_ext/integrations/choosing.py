"""lam by itself in other people's trainers: `mas_ext.choose_lam` with their loss, optimizer and data."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Subset

from mas_ext.importance import batches as batch_of
from mas_ext.integrations.loading import batch_size_of, how_read, random_state_kept, samples_of
from mas_ext.optim.hooks import Mode
from mas_ext.optim.step_size import STEP_SIZES
from mas_ext.parameters.adapters import adapted_weights
from mas_ext.penalty import FusedMASPenalty
from mas_ext.training.lam import choose_lam
from mas_ext.training.settings import CHOOSING_SHARE


def form(mode: Mode | None, automatic: bool, penalty: FusedMASPenalty) -> Mode:
    """A mode that was given, else "proximal" for a lam that was chosen, unless low-rank updates are held."""
    if mode is not None:
        return mode
    chosen = automatic and penalty.num_tasks > 0
    return "proximal" if chosen and next(penalty.updates(), None) is None else "gradient"


def check_one_process() -> None:
    """Raise a ValueError on several processes, whose choices would differ."""
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if ranks > 1:
        raise ValueError(f'lam: got "auto" on {ranks} processes, expected a number or one process')


def check_optimizer(optimizer: Optimizer, model: nn.Module) -> None:
    """Raise a ValueError for one whose step sizes are unknown, where other weights than LoRA's are held."""
    if type(optimizer) not in STEP_SIZES and not adapted_weights(model):
        raise ValueError(
            f'lam: got "auto" with {type(optimizer).__name__}, expected SGD, Adam or AdamW, whose step sizes '
            "are known"
        )


def choose_in_loop(
    penalty: FusedMASPenalty,
    keep: float,
    before: Sequence[float],
    loss: Callable[[Any], Tensor],
    begin: Callable[[], Optimizer],
    batches: Iterable[Any],
    held_out: Iterable[Any],
    steps: int,
    accumulated: int = 1,
    old: Callable[[Any], Sequence[Tensor]] = lambda batch: (),
) -> float:
    """The lam for a training that is about to begin, from its data alone: `mas_ext.choose_lam` in a plain loop.

    It is trained one and a half times, without a schedule, clipping or a GradScaler, and afterwards all is as
    before.

    Args:
        penalty: a consolidated one.
        keep: what matters, from 0, the new task alone, to 1, the old ones.
        before: what was chosen for earlier tasks, in order.
        loss: of the model on a batch, 0-dim.
        begin: gives a new optimizer at the beginning of a training.
        batches: to train on, an epoch each time they are gone through.
        held_out: batches that are not trained on, the same ones each time they are gone through; of these, a
            twelfth as many as are trained on are looked at.
        steps: how many the training has.
        accumulated: batches per step.
        old: of a batch, outputs for earlier tasks alone, (N, ...) each; none where tasks share all outputs.

    Raises:
        TypeError: what `old` gives is no list or tuple of tensors.
        ValueError: on several processes; what choose_lam raises.
    """
    check_one_process()

    def learn() -> Generator[Optimizer, None, None]:
        optimizer = begin()
        endless = (batch for _ in itertools.count() for batch in batches)
        for _ in range(steps):
            optimizer.zero_grad()
            for batch in itertools.islice(endless, accumulated):
                (loss(batch) / accumulated).backward()
            optimizer.step()
            yield optimizer

    @torch.no_grad()
    def measure() -> tuple[float, list[Tensor]]:
        penalty.model.eval()
        total, count, outputs = 0.0, 0, []
        with random_state_kept():
            # What is drawn of the data, such as crops, is the same each time.
            for seed in (torch.manual_seed, random.seed, np.random.seed):
                seed(0)
            for batch in itertools.islice(held_out, max(1, steps * accumulated // 12)):
                samples = batch_of.size(batch)
                total, count = total + samples * float(loss(batch)), count + samples
                outputs.append(_listed(old(batch)))
        return total / count, [torch.cat(parts) for parts in zip(*outputs, strict=True)]

    with random_state_kept():
        return choose_lam(penalty, learn, measure, keep, before)


def _listed(outputs: Any) -> Sequence[Tensor]:
    if isinstance(outputs, (list, tuple)) and all(isinstance(each, Tensor) for each in outputs):
        return outputs
    raise TypeError(
        f"old: got a function that gives a {type(outputs).__name__}, expected one that gives a list of "
        "tensors, one for each earlier task"
    )


def in_two(loader: Any) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Loaders like one of a data set: of nine tenths of its samples, shuffled, and of the others in order.

    Which ones is drawn at random, the same on every call. Whole batches are trained on, where there is one.

    Raises:
        ValueError: no loader of a data set that can be read in any order, in batches, or of a single sample.
    """
    size = batch_size_of(loader)
    samples: Any = () if size is None else samples_of(loader)
    if size is None or len(samples) < 2:
        got = type(getattr(loader, "dataset", loader)).__name__
        raise ValueError(
            f'lam: got "auto" and training data in a {got}, expected a DataLoader with a batch_size, of a data '
            "set of two samples or more that can be read in any order"
        )
    count = len(samples)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    few = max(1, int(CHOOSING_SHARE * count))
    train, held_out = (Subset(samples, part) for part in (order[few:], sorted(order[:few])))
    how = how_read(loader)
    return (
        DataLoader(train, size, shuffle=True, drop_last=count - few >= size, **how),
        DataLoader(held_out, size, **how),
    )


def beginning(optimizer: Optimizer) -> Optimizer:
    """A copy of an optimizer, for the same parameters, without hooks.

    Where it has a schedule, its learning rate is the schedule's base, a group's initial_lr. Where a schedule
    rises to a max_lr (OneCycleLR, CyclicLR), it is that one, with the momentum that goes with it.
    """
    own = copy.deepcopy(
        optimizer, {id(p): p for group in optimizer.param_groups for p in group["params"]}
    )
    for group in own.param_groups:
        group["lr"] = group.get("max_lr", group.get("initial_lr", group["lr"]))
        if "max_lr" in group and "base_momentum" in group:
            if "betas" in group:
                group["betas"] = (group["base_momentum"], *group["betas"][1:])
            else:
                group["momentum"] = group["base_momentum"]
    return own
