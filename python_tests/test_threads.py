"""Threads that use one model and its penalty at the same time, each in its turn."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from mas_ext import FusedMASPenalty, estimate_importance
from mas_ext.state.quadratic import Consolidation

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


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def renamed(penalty: FusedMASPenalty) -> None:
    penalty.rename("2.0.bias", "other")


CHANGES: dict[str, Callable[[FusedMASPenalty], Any]] = {
    "lam": lambda p: setattr(p, "lam", 7.0),
    "weight": lambda p: p.set_weight(0, 5.0),
    "drop": lambda p: p.drop(0),
    "rename": renamed,
    "observe": lambda p: p.observe(2 * X),
    "follow": lambda p: p(),
    "load": lambda p: p.load_state_dict(p.state_dict()),
    "adapt": lambda p: p.adapt([3 * X]),
}


@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_from_another_thread_while_a_task_is_merged_is_not_lost(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits, and is made of what is held then."""
    penalty = FusedMASPenalty(network(), store="per_task", importance="batch")
    twin = FusedMASPenalty(network(), store="per_task", importance="batch")
    real, threads = Consolidation.add_task, list[threading.Thread]()

    def add_task(self: Consolidation, *args: Any) -> None:
        if not threads and len(self.memory.entries) == 2:
            threads.append(threading.Thread(target=CHANGES[name], args=(penalty,)))
            threads[0].start()
            threads[0].join(0.2)
        real(self, *args)

    for each in (penalty, twin):
        for k in (1, 2, 3):
            if k == 3:
                each.model[2] = nn.Sequential(each.model[2])  # type: ignore[index,operator]
            with monkeypatch.context() as patch:
                if each is penalty:
                    patch.setattr(Consolidation, "add_task", add_task)
                each.consolidate([k * X])
        for thread in threads if each is penalty else []:
            thread.join()
    CHANGES[name](twin)
    assert len(threads) == 1
    state, right = penalty.state_dict(), twin.state_dict()
    assert state.keys() == right.keys()
    for key, t in right.items():
        torch.testing.assert_close(state[key], t)
    (group,) = penalty._state.memory.groups
    assert group.state.alpha.tolist() == penalty.alpha.tolist()
