"""What a choice of lam in another trainer begins with: two parts of the data, and the optimizer anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import LinearLR, OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from mas_ext import optim
from mas_ext.integrations.choosing import beginning, check_one_process, in_two


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
    """What the warm-up leads to."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    OneCycleLR(optimizer, max_lr=0.3, total_steps=10, cycle_momentum=False)
    assert beginning(optimizer).param_groups[0]["lr"] == 0.3
    assert optimizer.param_groups[0]["lr"] < 0.1


def test_not_on_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    check_one_process()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(
        ValueError, match='lam: got "auto" on 2 processes, expected a number or one'
    ):
        check_one_process()
