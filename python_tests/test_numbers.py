"""Numbers at the edge of what a dtype holds, and beyond: right, or refused by name before anything changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from snapshots import equal, snapshot
from torch import Tensor, nn

from mas_ext import (
    Distillation,
    FusedMASPenalty,
    Replay,
    TaskFree,
    estimate_fisher,
    estimate_importance,
    optim,
)
from mas_ext.kernels.flat_state import State
from mas_ext.kernels.penalty import add_grad_
from mas_ext.kernels.proximal import proximal_
from mas_ext.state.merge_rules import Store
from mas_ext.training.settings import Settings

X = torch.rand(8, 4, generator=torch.Generator().manual_seed(0))
NAN, INF = float("nan"), float("inf")
both_backends = pytest.mark.parametrize("backend", ["native", "reference"])


def penalised(**options: Any) -> FusedMASPenalty:
    """After one task, half a unit away from the anchor."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    penalty = FusedMASPenalty(model, **{"anchor": "own", **options})
    penalty.consolidate([X])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.5)
    return penalty


def parameters(penalty: FusedMASPenalty) -> list[nn.Parameter]:
    return [*penalty.model.parameters()]


def importance(penalty: FusedMASPenalty, value: float, dtype: Any = None) -> dict[str, Tensor]:
    return {
        n: torch.full_like(p, value, dtype=dtype, requires_grad=False)
        for n, p in penalty.model.named_parameters()
    }


def spoil(penalty: FusedMASPenalty, name: str, value: float) -> None:
    with torch.no_grad():
        penalty.model.get_parameter(name).view(-1)[0] = value


def refused(penalty: FusedMASPenalty, call: Callable[[], Any], message: str) -> None:
    """The call raises, and the penalty and its model are what they were, and go on."""
    before = snapshot(penalty)
    with pytest.raises((ValueError, TypeError), match=message):
        call()
    assert equal(snapshot(penalty), before)


@both_backends
@pytest.mark.parametrize("eta", [NAN, INF, -INF, -1.0, "x", None])
@pytest.mark.parametrize("tasks", [0, 1])
def test_a_step_length_that_is_none(eta: Any, backend: Any, tasks: int) -> None:
    """Before the first task too, where nothing would be moved."""
    penalty = penalised(backend=backend)
    if not tasks:
        penalty = FusedMASPenalty(penalty.model, backend=backend)
    refused(penalty, lambda: penalty.proximal_(parameters(penalty), eta), "eta: got")


@both_backends
@pytest.mark.parametrize("eta", [NAN, -INF, -1.0])
def test_a_step_length_on_the_device_that_is_none_moves_nothing(eta: float, backend: Any) -> None:
    """A tensor is read by the kernel alone."""
    penalty = penalised(backend=backend)
    before = snapshot(penalty)
    penalty.proximal_(parameters(penalty), torch.tensor(eta))
    assert equal(snapshot(penalty), before)


@both_backends
@pytest.mark.parametrize("name", ["correction", "eps"])
@pytest.mark.parametrize("value", [NAN, INF, -1.0])
def test_adams_numbers_that_are_none(name: str, value: float, backend: Any) -> None:
    penalty = penalised(backend=backend)
    moments = {id(p): torch.ones_like(p) for p in parameters(penalty)}
    numbers: dict[str, Any] = {"correction": 1.0, "eps": 1e-8, name: value}
    call = lambda: penalty.proximal_(parameters(penalty), 0.1, moments, **numbers)  # noqa: E731
    refused(penalty, call, f"{name}: got")


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("where", ["0.weight", "0.bias", "1.weight", "1.bias"])
@pytest.mark.parametrize("merge", ["consistent", "sum", "decay"])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_parameter_that_importance_leaves_out(
    bad: float, where: str, merge: str, frozen: bool
) -> None:
    penalty = penalised(merge=merge)
    spoil(penalty, where, bad)
    penalty.model.get_parameter(where).requires_grad_(not frozen)
    given = importance(penalty, 1.0)
    del given[where]
    call = lambda: penalty.consolidate(importance=given)  # noqa: E731
    refused(penalty, call, f"parameter '{where}': got NaN or Inf")


def test_an_excluded_or_new_parameter_without_importance_may_be_anything() -> None:
    penalty = penalised(exclude=("1.bias",))
    penalty.model.register_parameter("new", nn.Parameter(torch.tensor([NAN])))
    spoil(penalty, "1.bias", NAN)
    given = {n: t for n, t in importance(penalty, 1.0).items() if n not in ("1.bias", "new")}
    penalty.consolidate(importance=given)
    assert penalty.num_tasks == 2
    assert "new" not in penalty.omega


@both_backends
@pytest.mark.parametrize("store", ["merged", "per_task"])
def test_a_widened_head_whose_new_rows_are_not_filled_yet(store: Store, backend: Any) -> None:
    """What holds nothing contributes nothing: 0 times NaN would be NaN."""
    penalty = penalised(store=store, backend=backend)
    right, head = penalty().item(), penalty.model.get_submodule("1")
    assert isinstance(head, nn.Linear)
    wide = nn.Linear(3, 4)
    with torch.no_grad():
        for p, old in zip(wide.parameters(), head.parameters(), strict=True):
            p.fill_(NAN)
            p[:2] = old
    penalty.model.add_module("1", wide)
    penalty.omega  # noqa: B018 (the state follows here)
    with torch.no_grad():
        for p in wide.parameters():
            p[2:] = 7.0
    assert penalty().item() == pytest.approx(right, rel=1e-6)


@both_backends
@pytest.mark.parametrize("omega_dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("merge", ["sum", "decay"])
@pytest.mark.parametrize("anchor", ["latest", "own"])
def test_omega_that_overflows(
    merge: str, anchor: str, omega_dtype: torch.dtype, backend: Any
) -> None:
    """In one task, and by the sum of tasks that are each in range."""
    penalty = penalised(merge=merge, anchor=anchor, omega_dtype=omega_dtype, backend=backend)
    largest = 1e35 if omega_dtype == torch.uint8 else 3e38
    fill = lambda value: importance(penalty, value, torch.float64)  # noqa: E731
    refused(penalty, lambda: penalty.consolidate(importance=fill(1e39)), "importance.*: got")
    one = {"1.bias": torch.full((2,), largest)}
    penalty.consolidate(importance=one)
    assert penalty.omega["1.bias"].isfinite().all()
    refused(penalty, lambda: penalty.consolidate(importance=one), "importance.*: got")
    penalty.consolidate(importance=fill(1.0))
    assert penalty.num_tasks == 3


def test_the_parameter_whose_omega_overflows_is_named() -> None:
    penalty = penalised(store="per_task")
    given = importance(penalty, 1.0, torch.float64) | {
        "1.weight": torch.full((2, 3), 1e300, dtype=torch.float64)
    }
    refused(penalty, lambda: penalty.consolidate(importance=given), "importance of '1.weight'")


def test_importance_whose_sum_overflows() -> None:
    penalty = penalised(omega_dtype=torch.float64)
    penalty.model.double()
    given = importance(penalty, 1e308, torch.float64)
    refused(penalty, lambda: penalty.consolidate(importance=given), "importance.*: got")


def test_importance_whose_inverse_overflows() -> None:
    model = nn.Linear(1, 1, bias=False)
    penalty = FusedMASPenalty(model, merge="consistent")
    given = {"weight": torch.full((1, 1), 1e-45)}
    refused(penalty, lambda: penalty.consolidate(importance=given), "importance: got a sum")


@pytest.mark.parametrize(
    "given",
    [
        torch.ones(2, 3, dtype=torch.complex64),
        torch.ones(2, 3).to_sparse(),
        torch.ones(2, 3, device="meta"),
        [[1.0] * 3] * 2,
        None,
    ],
    ids=["complex", "sparse", "meta", "list", "None"],
)
def test_importance_that_is_no_dense_real_tensor(given: Any) -> None:
    penalty = penalised()
    call = lambda: penalty.consolidate(importance={"1.weight": given})  # noqa: E731
    refused(penalty, call, r"importance of '1\.weight': got")


@pytest.mark.parametrize("store", ["merged", "per_task"])
@pytest.mark.parametrize("merge", ["consistent", "sum"])
def test_a_strength_near_the_largest_float(merge: str, store: Store) -> None:
    """The anchor pulls with all that a float can; and where a factor would be infinite, it is refused."""
    penalty = penalised(merge=merge, store=store)
    for p, a in zip(parameters(penalty), penalty.anchor.values(), strict=True):
        p.data.copy_(a)
    penalty.lam = 1e300
    assert penalty().item() == 0.0
    penalty.consolidate([X])
    penalty.proximal_(parameters(penalty), 1.0)
    assert all(p.isfinite().all() for p in parameters(penalty))
    if merge == "consistent":
        refused(penalty, lambda: setattr(penalty, "lam", 1.7e308), "lam: got 1.7e[+]308")
    if store == "per_task":
        refused(penalty, lambda: penalty.set_weight(0, 1.7e308), "lam: got")
    refused(penalty, lambda: penalty.consolidate([X], weight=1.7e308), "got")
    assert penalty.num_tasks == 2


@pytest.mark.parametrize("value", [NAN, INF, -1.0, "x", None, [1.0], 10**400, 1j])
@pytest.mark.parametrize("name", ["lam", "weight", "set_weight", "gamma"])
def test_what_is_no_strength_is_named(name: str, value: Any) -> None:
    penalty = penalised(store="per_task")
    calls: dict[str, Callable[[], Any]] = {
        "lam": lambda: setattr(penalty, "lam", value),
        "weight": lambda: penalty.consolidate([X], weight=value),
        "set_weight": lambda: penalty.set_weight(0, value),
        "gamma": lambda: FusedMASPenalty(penalty.model, merge="decay", gamma=value),
    }
    refused(penalty, calls[name], f"{name.removeprefix('set_')}: got")


@pytest.mark.parametrize("alpha", [NAN, INF, -INF, -1.0, 0.0, 1e308])
@pytest.mark.parametrize("rows", [1, 2])
def test_any_alpha_means_the_same_to_both_backends(alpha: float, rows: int) -> None:
    found = []
    for native in (True, False):
        omega, anchor = torch.zeros(rows, 64), torch.zeros(rows, 64)
        omega[:, :3], anchor[:, 0] = torch.tensor([0.0, 1.0, 2.0]), 1.0
        factors = torch.full((rows,), alpha, dtype=torch.float64)
        state = State([0], omega, anchor, factors, torch.zeros((), dtype=torch.float64), native)
        theta, grad = torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3)
        value = add_grad_([theta], [grad], state)
        proximal_([theta], [], state, 0.5, 1.0, 0.0)
        found.append([value.item(), *grad.tolist(), *theta.tolist()])
    assert str(found[0]) == str(found[1])


# What is no number from 0 up, no whole number, and no word, of any kind.
NO_NUMBER: list[Any] = [NAN, INF, -INF, -1, "x", "1", True, None, 10**400, 1j, [1.0], {}]
NO_NUMBER += [np.float32(NAN), np.int64(-1), np.array([0.5, 0.5]), torch.tensor(NAN), torch.ones(2)]
NO_COUNT = [v for v in NO_NUMBER if type(v) is not int or v < 1e9]
NO_COUNT += [1.5, 1e38, np.float64(0.5), torch.tensor(0.5), np.array(0.5)]
NO_WORD = [*NO_COUNT, 0, 7]
Given = tuple[list[Any], Callable[[FusedMASPenalty, Any], Any]]
SOME = [NAN, -1, 7, True, 1j]


def but_none(values: list[Any]) -> list[Any]:
    return [v for v in values if v is not None]


GIVEN: dict[str, Given] = {
    "lam": (NO_NUMBER, lambda p, v: setattr(p, "lam", v)),
    "weight": (NO_NUMBER, lambda p, v: p.consolidate([X], weight=v)),
    "weight in adapt": (NO_NUMBER, lambda p, v: p.adapt([X], weight=v)),
    "weight in set_weight": (NO_NUMBER, lambda p, v: p.set_weight(0, v)),
    "eta": (NO_NUMBER[:-2], lambda p, v: p.proximal_(parameters(p), v)),
    "eta in attach": (
        but_none(NO_NUMBER),
        lambda p, v: p.attach(torch.optim.RMSprop(parameters(p)), "proximal", v),
    ),
    "strength": (NO_NUMBER, lambda p, v: FusedMASPenalty(p.model, strength={"*": v})),
    "gamma": (NO_NUMBER, lambda p, v: FusedMASPenalty(p.model, gamma=v)),
    "sweeps": (NO_COUNT, lambda p, v: p.consolidate([X], sweeps=v)),
    "t": (NO_COUNT, lambda p, v: p.drop(v)),
    "t in set_weight": (NO_COUNT, lambda p, v: p.set_weight(v, 1.0)),
    "max_samples": (
        but_none(NO_COUNT),
        lambda p, v: estimate_importance(p.model, [X], max_samples=v),
    ),
    "max_outputs": (NO_COUNT, lambda p, v: estimate_importance(p.model, [X], max_outputs=v)),
    "seed": (NO_COUNT, lambda p, v: estimate_fisher(p.model, [X], "sampled", seed=v)),
    "seed in Replay": (NO_COUNT, lambda p, v: Replay(3, seed=v)),
    "samples": (NO_COUNT, lambda p, v: Replay(v)),
    "window": (NO_COUNT, lambda p, v: TaskFree(p, window=v)),
    "samples in TaskFree": (NO_COUNT, lambda p, v: TaskFree(p, samples=v)),
    "tolerance": (NO_NUMBER, lambda p, v: TaskFree(p, tolerance=v)),
    "temperature": (NO_NUMBER, lambda p, v: Distillation(p.model, temperature=v)),
    "backend": (NO_WORD, lambda p, v: estimate_importance(p.model, [X], backend=v)),
    "method": (NO_WORD, lambda p, v: estimate_importance(p.model, [X], method=v)),
    "merge": (NO_WORD, lambda p, v: FusedMASPenalty(p.model, merge=v)),
    "omega_dtype": (NO_WORD, lambda p, v: FusedMASPenalty(p.model, omega_dtype=v)),
    "importance": (NO_WORD, lambda p, v: FusedMASPenalty(p.model, importance=v)),
    "exclude": (SOME, lambda p, v: FusedMASPenalty(p.model, exclude=v)),
    "forward": (but_none(NO_WORD), lambda p, v: FusedMASPenalty(p.model, forward=v)),
    "importance in consolidate": (SOME, lambda p, v: p.consolidate(importance=v)),
    "batches": (SOME, lambda p, v: p.consolidate(v)),
    "new": (SOME, lambda p, v: p.rename("0.bias", v)),
    "state": (SOME, lambda p, v: p.load_state_dict(v)),
    "optimizer": ([*SOME, None], lambda p, v: p.attach(v)),
}
for kind in (optim.SGD, optim.Adam, optim.AdamW):
    for number in (
        "lr",
        "weight_decay",
        *(("momentum",) if kind is optim.SGD else ("eps", "betas")),
    ):
        GIVEN[f"{number} in {kind.__name__}"] = (
            NO_NUMBER,
            lambda p, v, kind=kind, number=number: kind(parameters(p), **{number: v}),  # type: ignore[misc]
        )
for setting, values in {
    **dict.fromkeys(("lr", "validation", "keep"), NO_NUMBER),
    "clip": [v for v in but_none(NO_NUMBER) if str(v) != "inf"],
    **dict.fromkeys(("batch_size", "epochs", "workers", "seed", "importance_epochs"), NO_COUNT),
    "patience": but_none(NO_COUNT),
    **dict.fromkeys(("setting", "optimizer"), but_none(NO_WORD)),
    "balanced": [v for v in NO_WORD if v is not True],
}.items():
    GIVEN[f"{setting} in Settings"] = (
        values,
        lambda p, v, setting=setting: Settings(**{setting: v}),  # type: ignore[misc]
    )


@pytest.mark.parametrize("name", GIVEN)
def test_what_an_argument_can_not_be_is_named(name: str) -> None:
    """Before anything changes, whatever it is."""
    penalty = penalised(store="per_task")
    values, call = GIVEN[name]
    argument, before = name.partition(" ")[0], snapshot(penalty)
    for value in values:
        with pytest.raises(
            (ValueError, TypeError, IndexError),
            match=rf"^{argument}.*: got .*(expected|choose from)",
        ):
            call(penalty, value)
        assert equal(snapshot(penalty), before), value
