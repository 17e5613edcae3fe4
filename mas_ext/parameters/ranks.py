"""Ranks of torch.distributed that hold the same model and different data: importance summed over them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mas_ext.kernels.dtypes import compute_dtype
from mas_ext.parameters.agreement import Agreement
from mas_ext.parameters.fsdp import group_of
from mas_ext.parameters.names import ModelView, is_sharded
from mas_ext.parameters.restoring import restoring
from mas_ext.parameters.sketch import fingerprint

if TYPE_CHECKING:  # torch may be built without it
    from torch.distributed import ProcessGroup

Together = Literal["auto"]


class SampleSums(NamedTuple):
    """Importance summed over samples, by parameter name; how many samples; the sum of |objective| over them."""

    sums: dict[str, Tensor]
    samples: int
    objective_sum: float


def refuse_unused(model: nn.Module) -> None:
    """Raise a RuntimeError for DDP that would reduce gradients before the penalty has added its own."""
    if (
        isinstance(model, DistributedDataParallel)
        and model.find_unused_parameters
        and torch.is_grad_enabled()
    ):
        raise RuntimeError(
            "penalty: got a loss for DistributedDataParallel with find_unused_parameters=True, which takes "
            "parameters for unused that only the penalty depends on; use penalty.attach(optimizer) instead"
        )


class Ranks:
    """The ranks whose data count together.

    Args:
        process_group: a group; "auto": that of the model's DDP or fully_shard; None: each rank by itself.
    """

    def __init__(self, process_group: ProcessGroup | Together | None) -> None:
        known = process_group in ("auto", None) or (
            dist.is_available() and isinstance(process_group, dist.ProcessGroup)
        )
        if not known:
            raise ValueError(
                f"process_group: got {process_group!r}, expected 'auto', a process group or None"
            )
        self._process_group = process_group

    def group(self, model: nn.Module) -> ProcessGroup | None:
        """The process group of a model's data; None where this rank is by itself.

        Raises:
            ValueError: "auto" for a model without DDP or fully_shard on one of several ranks; or another group
                than the one that a model is sharded over.
        """
        shards = group_of(model)
        if shards is not None:
            self._check_holds_shards(shards)
            return shards
        if not isinstance(self._process_group, str):
            return self._process_group
        if not (dist.is_available() and dist.is_initialized()):
            return None
        for module in model.modules():
            if isinstance(module, DistributedDataParallel):
                return module.process_group
        if dist.get_world_size() > 1:
            raise ValueError(
                f"process_group: got 'auto' for a model without DistributedDataParallel on one of "
                f"{dist.get_world_size()} ranks, expected that wrapper as model, fully_shard, or "
                "process_group= the group whose ranks train this model together "
                "(torch.distributed.group.WORLD), or None for a model of this rank alone"
            )
        return None

    def _check_holds_shards(self, shards: ProcessGroup) -> None:
        own = self._process_group
        if isinstance(own, str):
            return
        expected = dist.get_process_group_ranks(shards)
        got = None if own is None else dist.get_process_group_ranks(own)
        if got is None or {*got} != {*expected}:
            raise ValueError(
                f"process_group: got {'None' if got is None else f'ranks {got}'} for a model that is "
                f"sharded over ranks {expected}, expected 'auto'"
            )

    def together(self, call: str, model: nn.Module) -> Agreement:
        """A call that the ranks make together."""
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        return Agreement(call, self.group(model), device)

    def sum(
        self,
        collect: Callable[[], SampleSums],
        model: nn.Module,
        theta: Mapping[str, Tensor],
        agreement: Agreement,
    ) -> SampleSums:
        """Sum what `collect` returns over the ranks: the same bits on every one of them.

        A rank may have no samples. Meanwhile the model has the first rank's buffers, as in DDP's passes: each
        rank has seen other batches.

        Args:
            collect: gathers this rank's importance.
            model: the model, with the same buffers on all ranks.
            theta: its parameters by name, which stand for importance 0 on a rank without samples.
            agreement: the call of all ranks that this is a part of.

        Raises:
            RuntimeError: another rank failed.
            ValueError: the ranks' parameters differ.
        """
        group = self.group(model)
        if group is None:
            return collect()
        with _first_rank_buffers(model, group, agreement):
            own = collect()
        sharded = group_of(model) is not None
        like = own.sums if own.samples and not sharded else theta
        reports = agreement.gather(_report(own, like))
        _refuse_different(reports)
        samples = sum(r.samples for r in reports)
        objective = math.fsum(r.objective_sum for r in reports)
        if sharded:  # the sums are shards of those over all ranks
            return SampleSums(own.sums, samples, objective)
        names = next(([*r.kinds] for r in reports if r.samples), [])
        mine = {n: own.sums[n] if own.samples else _zeros(theta[n]) for n in names}
        return SampleSums(_reduced(mine, group, agreement), samples, objective)

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self  # a process group can't be copied


@contextmanager
def _first_rank_buffers(
    model: nn.Module, group: ProcessGroup, agreement: Agreement
) -> Iterator[None]:
    """Replace this rank's running statistics and other buffers by the first rank's for a while."""
    kinds: dict[torch.device, list[Tensor]] = {}
    for buffer in model.buffers():
        kinds.setdefault(buffer.device, []).append(buffer)
    before = [(b, b.clone()) for b in model.buffers()]

    def restore() -> None:
        for b, own in before:
            b.copy_(own)

    with restoring(restore):
        for buffers in kinds.values():
            # As bytes, whatever the dtypes: in one message.
            flat = torch.cat([b.reshape(-1).view(torch.uint8) for b in buffers])
            with agreement.exchanging():
                dist.broadcast(flat, dist.get_global_rank(group, 0), group)
            parts = flat.split([b.numel() * b.itemsize for b in buffers])
            for b, part in zip(buffers, parts, strict=True):
                b.copy_(part.clone().view(b.dtype).view(b.shape))
        yield


class _Report(NamedTuple):
    """What a rank tells the others before the sums are added up."""

    samples: int
    objective_sum: float
    # Shape and dtype of the importance by name; without samples, of every parameter.
    kinds: dict[str, tuple[tuple[int, ...], torch.dtype]]


def _report(own: SampleSums, like: Mapping[str, Tensor]) -> _Report:
    kinds = {name: (tuple(t.shape), compute_dtype(t.dtype)) for name, t in like.items()}
    return _Report(own.samples, own.objective_sum, kinds)


def _zeros(p: Tensor) -> Tensor:
    return torch.zeros_like(p, dtype=compute_dtype(p.dtype), requires_grad=False)


def _refuse_different(reports: list[_Report]) -> None:
    """Raise the same error on every rank, or none."""
    first = next((rank for rank, report in enumerate(reports) if report.samples), 0)
    expected = reports[first].kinds
    for rank, report in enumerate(reports):
        different = expected.items() - report.kinds.items()
        if report.samples:
            different |= report.kinds.items() - expected.items()
        if different:
            raise ValueError(
                f"importance of {min(name for name, _ in different)!r}: got another shape or dtype, or "
                f"none, on rank {rank} than on rank {first}, expected the same model on every rank"
            )


def _reduced(
    sums: dict[str, Tensor], group: ProcessGroup, agreement: Agreement
) -> dict[str, Tensor]:
    """The sums over the ranks, in one reduction for each device and dtype."""
    kinds: dict[Any, list[str]] = {}
    for name, t in sums.items():
        kinds.setdefault((t.device, t.dtype), []).append(name)
    total: dict[str, Tensor] = {}
    for names in kinds.values():
        flat = torch.cat([sums[name].reshape(-1) for name in names])
        with agreement.exchanging():
            dist.all_reduce(flat, group=group)
        parts = flat.split([sums[name].numel() for name in names])
        total.update((n, p.view(sums[n].shape)) for n, p in zip(names, parts, strict=True))
    return {name: total[name] for name in sums}


def described_importance(importance: Mapping[str, Tensor] | None) -> dict[str, object]:
    """What tells importance that is given by name from other importance, for ranks that compare theirs."""
    found: dict[str, object] = {}
    for name, t in (importance or {}).items():
        if not isinstance(t, Tensor):
            found[f"importance of {name!r}"] = t
        elif is_sharded(t):  # each rank has another part of it
            found[f"importance of {name!r}"] = (t.dtype, tuple(t.shape), t.placements)
        else:
            found[f"importance of {name!r}"] = (t.dtype, tuple(t.shape), fingerprint(t))
    return found


def described_model(view: ModelView) -> dict[str, object]:
    """What parameters and buffers a model has, for ranks that compare theirs."""
    found: dict[str, object] = {
        f"parameter {name!r}": (p.dtype, tuple(p.shape), "trained" if p.requires_grad else "frozen")
        for name, p in view.found.items()
    }
    buffers = view.model.named_buffers()
    return found | {f"buffer {name!r}": (b.dtype, tuple(b.shape)) for name, b in buffers}
