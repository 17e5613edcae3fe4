"""Threads that use one model and its penalty at the same time, each in its turn."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

from mas_ext import FusedMASPenalty, estimate_importance

X = torch.rand(8, 4, generator=torch.Generator().manual_seed(0))


def in_threads(calls: list[Any]) -> None:
    failed: list[BaseException] = []
    start = threading.Barrier(len(calls))

    def run(call: Any) -> None:
        start.wait()
        try:
            call()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


@pytest.mark.parametrize("method", ["exact", "batch"])
def test_tasks_from_several_threads_are_all_merged(method: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2))
    penalty, twin = (FusedMASPenalty(model, importance=method, anchor="own") for _ in range(2))
    buffers = [b.clone() for b in model.buffers()]
    tasks = [[X[k:]] for k in range(6)]
    in_threads([lambda x=x: penalty.consolidate(x) for x in tasks])
    for x in tasks:
        twin.consolidate(x)
    assert penalty.num_tasks == 6
    for name, w in twin.omega.items():
        torch.testing.assert_close(penalty.omega[name], w)
    assert all(module.training for module in model.modules())
    assert all(map(torch.equal, model.buffers(), buffers))


def test_samples_observed_by_several_threads_all_count() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    penalty, other = FusedMASPenalty(model), FusedMASPenalty(model)
    calls: list[Any] = [lambda x=x: penalty.observe(x[None]) for x in X]
    calls += [lambda: other.consolidate([X]), lambda: estimate_importance(model, [X])]
    in_threads(calls)
    assert penalty._pending.samples == 8
    penalty.consolidate()
    for name, w in other.omega.items():
        torch.testing.assert_close(penalty.omega[name], w)
    assert all(module.training for module in model.modules())
