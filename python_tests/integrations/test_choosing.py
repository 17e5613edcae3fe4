"""What a choice of lam in another trainer begins with: two parts of the data, and the optimizer anew."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.lr_scheduler import LinearLR, OneCycleLR
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler, TensorDataset

from mas_ext import FusedMASPenalty, optim
from mas_ext.integrations import choosing
from mas_ext.integrations.choosing import (
    beginning,
    check_one_process,
    check_optimizer,
    in_two,
)
from mas_ext.integrations.loading import once


@pytest.mark.parametrize(("count", "size", "few"), [(57, 8, 5), (57, 64, 5), (9, 3, 1), (2, 2, 1)])
def test_in_two(count: int, size: int, few: int) -> None:
    loader = DataLoader(TensorDataset(torch.arange(count)), size, collate_fn=lambda rows: rows)
    train, held_out = in_two(loader)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    rest = [int(x) for rows in held_out for (x,) in rows]
    assert rest == sorted(order[:few].tolist())
    seen = [[int(x) for (x,) in rows] for rows in train]
    whole = count - few >= size
    assert len(seen) == (max(1, (count - few) // size))
    assert all(len(rows) == (size if whole else count - few) for rows in seen)
    drawn = [x for rows in seen for x in rows]
    assert len({*drawn}) == len(drawn)
    assert {*drawn} <= {*range(count)} - {*rest}
    if len(drawn) > 8:
        assert drawn != [int(x) for rows in train for (x,) in rows]  # shuffled, each time anew


@pytest.mark.parametrize(
    "kind", [torch.optim.SGD, torch.optim.AdamW, optim.SGD, optim.Adam, optim.AdamW]
)
def test_beginning(kind: Any) -> None:
    """Its steps are those of the optimizer without its schedule; nothing of the optimizer changes."""
    p, q = (torch.nn.Parameter(torch.arange(4.0)) for _ in range(2))
    optimizer = kind([p], lr=0.5)
    schedule = LinearLR(optimizer, 1e-3, total_iters=10)
    calls: list[None] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(None))
    own, plain = beginning(optimizer), kind([q], lr=0.5)
    for step in range(3):
        p.grad = q.grad = torch.linspace(-1, 2, 4) * (step + 1)
        own.step()
        plain.step()
        assert torch.equal(p, q)
    assert type(own) is kind
    assert not optimizer.state
    assert not calls
    assert schedule.get_last_lr() == [pytest.approx(5e-4)]
    optimizer.step()
    assert calls == [None]


def test_beginning_of_one_cycle() -> None:
    """What the warm-up leads to, with the momentum that goes with it."""
    for kind, momentum in ((torch.optim.SGD, "momentum"), (torch.optim.AdamW, "betas")):
        p = torch.nn.Parameter(torch.ones(1))
        optimizer = kind([p], lr=1.0, **{momentum: 0.9 if momentum == "momentum" else (0.9, 0.99)})
        schedule = OneCycleLR(optimizer, max_lr=0.3, total_steps=10)
        seen = [dict(optimizer.param_groups[0])]
        own = beginning(optimizer).param_groups[0]
        assert optimizer.param_groups[0] == seen[0]
        for _ in range(9):
            optimizer.step()
            schedule.step()
            seen.append(dict(optimizer.param_groups[0]))
        top = max(seen, key=lambda group: group["lr"])
        assert (own["lr"], own[momentum]) == (
            pytest.approx(top["lr"]),
            pytest.approx(top[momentum]),
        )


def test_a_subset_that_a_sampler_draws_from() -> None:
    """The others may be other tasks' samples."""
    data, drawn = TensorDataset(torch.arange(100)), [*range(40, 70)]
    loader = DataLoader(data, 4, sampler=SubsetRandomSampler(drawn))
    train, held_out = in_two(loader)
    assert len(held_out.dataset) == 3
    seen = {int(x) for part in (train.dataset, held_out.dataset) for (x,) in part}
    assert seen == {*drawn}
    assert [int(x) for (batch,) in once(loader) for x in batch] == drawn


def started(worker: int) -> None:
    """What a worker begins with."""
    torch.utils.data.get_worker_info().dataset.dataset.started = True  # type: ignore[union-attr]


class NeedsAStart(Dataset[Tensor]):
    """Samples that only a worker that was started can read."""

    started = False

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Tensor:
        assert self.started
        return torch.tensor(index)


def test_workers_start_as_the_loader_says() -> None:
    loader = DataLoader(NeedsAStart(), 4, num_workers=1, worker_init_fn=started)
    train, held_out = in_two(loader)
    seen = sorted(int(x) for part in (train, held_out) for batch in part for x in batch)
    assert len({*seen}) == len(seen) == 2 + 16


def test_optimizers_without_known_step_sizes() -> None:
    model = torch.nn.Linear(2, 2)
    check_optimizer(torch.optim.SGD(model.parameters()), model)
    with pytest.raises(
        ValueError, match='lam: got "auto" with RMSprop, expected SGD, Adam or AdamW'
    ):
        check_optimizer(torch.optim.RMSprop(model.parameters()), model)


def test_not_on_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    check_one_process()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(
        ValueError, match='lam: got "auto" on 2 processes, expected a number or one'
    ):
        check_one_process()


class Noisy(Dataset[Tensor]):
    """Samples that are drawn anew each time, in three ways."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Tensor:
        return index + (torch.rand(3) + np.random.rand() + random.random()) / 3


@pytest.mark.parametrize(
    ("steps", "accumulated", "seen"), [(100, 1, 8), (30, 2, 5), (5, 1, 1), (200, 1, 13)]
)
def test_what_is_measured(
    monkeypatch: pytest.MonkeyPatch, steps: int, accumulated: int, seen: int
) -> None:
    """The first batches, a twelfth as many as are trained on, with what is drawn of them the same each time."""
    model, batches, trained = torch.nn.Linear(3, 2), list[Tensor](), list[Tensor]()
    penalty = FusedMASPenalty(model)
    penalty.consolidate([torch.randn(4, 3)])

    def loss(batch: Tensor) -> Tensor:
        (trained if torch.is_grad_enabled() else batches).append(batch)
        return model(batch).square().mean()

    def chosen(_: Any, learn: Any, measure: Any, keep: float, before: Any) -> float:
        assert before == [2.0]
        drawn = torch.get_rng_state(), random.getstate()
        first = measure()
        assert torch.equal(torch.get_rng_state(), drawn[0])
        assert random.getstate() == drawn[1]
        for draw in (random.random, np.random.rand, lambda: torch.rand(1)):
            draw()
        second = measure()
        together = float(loss(torch.cat(batches[:seen])).detach())
        assert first[0] == second[0] == pytest.approx(together)
        assert torch.equal(first[1][0], torch.cat([batch + 1 for batch in batches[:seen]]))
        assert len(batches) == 2 * seen
        trained.clear()
        assert len([*learn()]) == steps
        return keep

    monkeypatch.setattr(choosing, "choose_lam", chosen)
    train, held_out = (DataLoader(Noisy(), 5) for _ in range(2))
    lam = choosing.choose_in_loop(
        *(penalty, 0.3, [2.0], loss, lambda: torch.optim.SGD(model.parameters(), 1e-6)),
        *(train, held_out, steps, accumulated),
        old=lambda batch: [batch + 1],
    )
    assert lam == 0.3
    assert len(trained) == steps * accumulated
    assert all(int(batch[0, 0]) == 5 * (i % 13) for i, batch in enumerate(trained))
