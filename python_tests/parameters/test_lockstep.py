"""Importance of models under fully_shard, unit by unit: equal to one process, and gathered as FSDP does."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from processes import mesh_of, run
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

from mas_ext import FusedMASPenalty, estimate_fisher, estimate_importance

close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(width), nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Plain(nn.Module):
    """Three units and the root, with positions."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Linear(6, 8)
        self.blocks = nn.ModuleList([Block(8) for _ in range(3)])
        self.end = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.start(x)
        for block in self.blocks:
            y = block(y)
        return self.end(y).mean(1)


class Difficult(Plain):
    """Tied weights, a unit used twice, one checkpointed, a derived weight, and uses without a rule."""

    def __init__(self) -> None:
        super().__init__()
        first, second, third = self.blocks
        third.up.weight = nn.Parameter(third.up.weight[:8].clone())
        third.down.weight = third.up.weight
        third.up.bias = nn.Parameter(torch.zeros(8))
        weight_norm(second.down)
        first.odd = nn.Parameter(torch.randn(8, 8))
        self.end_odd = nn.Parameter(torch.randn(3))
        self.unused = nn.Parameter(torch.randn(5))
        self.frozen = nn.Parameter(torch.randn(8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.blocks
        y = first(self.start(x)) * self.frozen
        y = checkpoint(second, y, use_reentrant=False)
        y = first(third(y).tanh())
        y = torch.einsum("bpi,bpi->bpi", y, y)
        return torch.einsum("bi,i->bi", self.end(y).mean(1), self.end_odd)


class Hooked(Plain):
    """The user's hooks are part of the model, also where a unit is gathered."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].register_forward_pre_hook(lambda module, args: (args[0].sin(),))
        self.blocks[1].register_forward_hook(lambda module, args, output: output.tanh())


class OfTwo(Plain):
    """Takes no single sample."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks[0](self.start(x))
        if len(x) == 1:
            raise ValueError("at least two samples")
        for block in self.blocks[1:]:
            y = block(y)
        return self.end(y).mean(1)


def made(kind: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return kind().to(dtype)


def sharded(model: Any, mesh: DeviceMesh, **options: Any) -> Any:
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def whole(named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in named.items()}


def parts(ranks: int) -> list[list[tuple[Tensor, Tensor]]]:
    """Batches of every rank: uneven, and none on the last of four."""
    torch.manual_seed(1)
    x, y = torch.randn(11, 4, 6, dtype=torch.float64), torch.randint(0, 3, (11,))
    sizes = [8, 3] if ranks == 2 else [5, 4, 2, 0]
    own = zip(x.split(sizes), y.split(sizes), strict=True)
    return [[*zip(a.split(3), b.split(3), strict=True)] if len(a) else [] for a, b in own]


class Case(NamedTuple):
    kind: Callable[[], nn.Module]
    estimate: Callable[[nn.Module, Iterable[Any]], dict[str, Tensor]]


CASES = {
    "plain": Case(Plain, estimate_importance),
    "l1": Case(Plain, partial(estimate_importance, objective="l1")),
    "vector": Case(Plain, partial(estimate_importance, objective="vector")),
    "batch": Case(Plain, partial(estimate_importance, method="batch")),
    "local": Case(Plain, partial(estimate_importance, method="local")),
    "difficult": Case(Difficult, estimate_importance),
    "hooked": Case(Hooked, estimate_importance),
    "of two": Case(OfTwo, estimate_importance),
    "fisher": Case(Difficult, estimate_fisher),
    "fisher of all": Case(Plain, partial(estimate_fisher, labels="all")),
    "fisher of batches": Case(Plain, partial(estimate_fisher, method="batch")),
}


def gathers(act: Callable[[], object]) -> int:
    """How often all ranks' parts of something were gathered."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True
    ) as profile:
        act()
    return sum(e.name.startswith("c10d::") and "allgather" in e.name for e in profile.events())


def equal(mesh: DeviceMesh, rank: int, ranks: int) -> None:
    """Every estimator, from batches that lie on the ranks."""
    everything = parts(ranks)
    for name, case in CASES.items():
        expected = case.estimate(made(case.kind), [b for own in everything for b in own])
        found = case.estimate(sharded(made(case.kind), mesh), everything[rank])
        assert [*found] == [*expected]
        for key, value in whole(found).items():
            close(value, expected[key], msg=lambda m, at=(name, key): f"{at}: {m}")


def as_fsdp_gathers(mesh: DeviceMesh, rank: int, ranks: int) -> None:
    """A later batch gathers what a training step does; the user's gradients stay."""
    model = sharded(made(Plain), mesh)
    x = torch.randn(4, 4, 6, dtype=torch.float64)

    def step() -> None:
        model.zero_grad()
        model(x).sum().backward()

    step()
    before = [p.grad for p in model.parameters()]
    values = [g.to_local().clone() for g in before]
    ordinary = gathers(step)
    penalty = FusedMASPenalty(model)
    penalty.observe(x)
    one = gathers(lambda: penalty.observe(x))
    assert ordinary == (7 if mesh.size(-1) > 1 else 0)  # three units twice, and the root
    assert one == ordinary
    step()
    grads = [p.grad for p in model.parameters()]
    penalty.consolidate()
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    for g, value in zip(grads, values, strict=True):
        assert torch.equal(g.to_local(), value)
    sums = gathers(lambda: penalty.state_dict())
    assert sums == 0


def freed(mesh: DeviceMesh, rank: int, ranks: int) -> None:
    """What was observed is gone once it is consolidated, without a search for cycles."""
    penalty = FusedMASPenalty(sharded(made(Plain), mesh))
    gc.disable()
    penalty.observe(torch.randn(4, 4, 6, dtype=torch.float64))
    sums = [weakref.ref(t) for t in penalty._pending.sums.values()]
    penalty.consolidate()
    assert not any(found() is not None for found in sums)
    gc.enable()


def swept(mesh: DeviceMesh, rank: int, ranks: int) -> None:
    """Parts of the parameters one after another."""
    own = parts(ranks)[rank]
    model = sharded(made(Plain), mesh)
    at_once, in_parts = FusedMASPenalty(model), FusedMASPenalty(model)
    at_once.consolidate(own)
    in_parts.consolidate(own, sweeps=3)
    for name, value in whole(at_once.omega).items():
        close(whole(in_parts.omega)[name], value)


def rounded(mesh: DeviceMesh, rank: int, ranks: int) -> None:
    """Mixed precision policies: sums are reduced in their own dtype, whatever gradients are reduced in."""
    half = torch.bfloat16
    for dtype, policy, limit in (
        (torch.float32, MixedPrecisionPolicy(reduce_dtype=half), 1e-5),
        (half, MixedPrecisionPolicy(param_dtype=half, reduce_dtype=half), 1e-2),
    ):
        everything = [[(x.to(dtype), y) for x, y in own] for own in parts(ranks)]
        expected = estimate_importance(made(Plain, dtype), [b for own in everything for b in own])
        model = sharded(made(Plain, torch.float32), mesh, mp_policy=policy)
        for name, value in whole(estimate_importance(model, everything[rank])).items():
            assert value.dtype == torch.float32
            error = float((value - expected[name]).norm() / expected[name].norm())
            assert error < limit, (name, policy)


def failing(mesh: DeviceMesh, rank: int, ranks: int) -> None:
    """An error inside a pass of one rank is one on all, and afterwards all is well."""
    model = sharded(made(Plain), mesh)
    x = parts(ranks)[rank] or [(torch.randn(2, 4, 6, dtype=torch.float64), torch.zeros(2))]
    penalty = FusedMASPenalty(model, merge="consistent")
    penalty.consolidate(x)
    broken = [*x, (torch.randn(3, 4, 7, dtype=torch.float64), torch.zeros(3))]
    message = "mat1 and mat2" if rank == 1 else "rank 1 failed"
    with pytest.raises(RuntimeError, match=message):
        penalty.consolidate(broken if rank == 1 else x)
    penalty.observe(x[0])
    with pytest.raises(RuntimeError, match=message):
        penalty.observe(broken[-1] if rank == 1 else x[0])
    penalty.consolidate()
    assert penalty.num_tasks == 2
    with pytest.raises(ValueError, match="got no samples"):
        penalty.consolidate([])
    with pytest.raises(FloatingPointError, match="importance of 'start"):
        penalty.consolidate(importance={"start.bias": torch.full((8,), float("nan"))})
    with pytest.raises(ValueError, match=r"minimum -1\.0, expected values from 0 up"):
        penalty.consolidate(importance={"start.bias": torch.tensor([0.0] * 7 + [-1.0])})
    with pytest.raises(ValueError, match=r"got shape \(7,\), expected \(8,\)"):
        penalty.consolidate(importance={"start.bias": torch.ones(7)})
    penalty.check(x[0])


def everything(shape: tuple[int, ...], rank: int, ranks: int) -> int:
    mesh = mesh_of(shape)
    equal(mesh, rank, ranks)
    as_fsdp_gathers(mesh, rank, ranks)
    freed(mesh, rank, ranks)
    swept(mesh, rank, ranks)
    rounded(mesh, rank, ranks)
    failing(mesh, rank, ranks)
    return 0


@pytest.mark.parametrize("shape", [(2,), (4,), (2, 2)], ids=str)
def test_equal_to_one_process(shape: tuple[int, ...], tmp_path: Path) -> None:
    run(partial(everything, shape), math.prod(shape), tmp_path)
