"""Settings: what optimizers and schedules are made of them, and what a checkpoint remembers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mas_ext.training.settings import Settings


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("sgd", torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0}),
        ("adam", torch.optim.Adam, {"betas": (0.9, 0.999)}),
        ("adamw", torch.optim.AdamW, {"weight_decay": 0.01}),
    ],
)
def test_optimizers(name: str, kind: type, options: dict[str, Any]) -> None:
    optimizer = Settings(optimizer=name, lr=0.3).make_optimizer([nn.Parameter(torch.zeros(1))])
    assert type(optimizer) is kind
    (group,) = optimizer.param_groups
    assert {key: group[key] for key in ("lr", *options)} == {"lr": 0.3, **options}


def test_schedules() -> None:
    def rates(schedule: Any) -> list[float]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0)
        made = Settings(schedule=schedule).make_schedule(optimizer, 4)
        assert made is not None
        found = []
        for _ in range(4):
            optimizer.step()
            made.step()
            found.append(optimizer.param_groups[0]["lr"])
        return found

    half = 0.5**0.5 / 2
    assert rates("cosine") == pytest.approx([0.5 + half, 0.5, 0.5 - half, 0])
    assert rates("linear") == pytest.approx([0.75, 0.5, 0.25, 0])
    own = torch.optim.lr_scheduler.StepLR
    assert rates(lambda o, steps: own(o, steps // 2)) == pytest.approx([1, 0.1, 0.1, 0.01])
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0)
    assert Settings().make_schedule(optimizer, 4) is None
    assert Settings(schedule="linear").make_schedule(optimizer, 0) is None


def test_an_optimizer_of_ones_own() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    made = Settings(optimizer=torch.optim.RMSprop, lr=0.2).make_optimizer([parameter])
    assert isinstance(made, torch.optim.RMSprop)
    assert made.param_groups[0]["params"] == [parameter]
    assert made.defaults["lr"] == 0.2


def test_epochs_are_one_number_or_one_a_task() -> None:
    assert Settings(epochs=2).epochs_of(3) == [2, 2, 2]
    assert Settings(epochs=(0, 4)).epochs_of(2) == [0, 4]
    assert Settings(epochs=2).described()["epochs"] == [2]


def test_workers_and_nothing_else_may_differ_when_a_run_goes_on() -> None:
    assert Settings(workers=2).described() == Settings().described()
    assert Settings().described().keys() | {"workers"} == Settings.__dataclass_fields__.keys()
