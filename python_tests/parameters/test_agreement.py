"""An error on one of several ranks is an error on all: nothing waits, and all hold what they held before."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from interrupts import PACKAGE
from processes import mesh_of, run
from times import TIMES
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from mas_ext import FusedMASPenalty, estimate_importance, load_distributed
from mas_ext.parameters.agreement import Agreement
from mas_ext.parameters.fsdp import Sharding
from mas_ext.parameters.tracked_model import TrackedModel
from mas_ext.state import files, quadratic

X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
RANKS = 2
SHARDED = ("fsdp", "hsdp")


class Breaks(torch.autograd.Function):
    """Raises on the way back, where it is told to."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, error: BaseException | None) -> Tensor:
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        if ctx.error is not None:
            raise ctx.error
        return slopes[0], None


class Net(nn.Module):
    """Three layers; what goes wrong in the passes of this rank, and where, is set from outside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.norm = nn.BatchNorm1d(4)
        self.forward_error: BaseException | None = None
        self.backward_error: BaseException | None = None
        self.interrupted = False
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        for i, layer in enumerate(self.layers):
            if i == 1:
                x = Breaks.apply(x, self.backward_error)  # type: ignore[no-untyped-call]
                if self.forward_error is not None:
                    raise self.forward_error
                if self.interrupted:
                    self.interrupted = False
                    signal.raise_signal(signal.SIGINT)
            x = layer(x).tanh()
        return x


def own(rank: int) -> Tensor:
    """A rank's samples."""
    return X[rank :: dist.get_world_size()]


def made(kind: str, **options: Any) -> FusedMASPenalty:
    """Under a wrapper, after a task."""
    net: nn.Module = Net()
    if kind == "ddp":
        model: nn.Module = DistributedDataParallel(net, broadcast_buffers=False)
    else:
        mesh = mesh_of((2, 2) if kind == "hsdp" else (dist.get_world_size(),))
        for layer in net.layers:  # type: ignore[union-attr]
            fully_shard(layer, mesh=mesh)
        model = fully_shard(net, mesh=mesh)
    penalty = FusedMASPenalty(model, lam=0.5, omega_dtype=torch.float64, **options)
    penalty.consolidate([own(dist.get_rank())])
    return penalty


def net_of(penalty: FusedMASPenalty) -> Any:
    model = penalty.model
    return model.module if isinstance(model, DistributedDataParallel) else model


def full(t: Any) -> Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()


def local(t: Any) -> Tensor:
    return (t.to_local() if isinstance(t, DTensor) else t).detach().clone()


class State(NamedTuple):
    """All that a call must leave as it was."""

    held: dict[str, Tensor]
    model: dict[str, Tensor]
    training: bool
    handler: Any

    @staticmethod
    def of(penalty: FusedMASPenalty) -> State:
        held = {} if penalty._pending.sums else penalty.state_dict()
        return State(
            {name: local(t) for name, t in held.items()},
            {name: local(t) for name, t in penalty.model.state_dict().items()},
            penalty.model.training,
            signal.getsignal(signal.SIGINT),
        )

    def equals(self, other: State) -> bool:
        same = [
            a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
            for a, b in ((self.held, other.held), (self.model, other.model))
        ]
        return all(same) and self[2:] == other[2:]


def said(call: Callable[[], object]) -> str:
    """What a call raised, by name, or nothing."""
    try:
        call()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return ""


def on_all(text: str) -> list[str]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, text)
    return found


# -- where it goes wrong ------------------------------------------------------------------------------


class Case(NamedTuple):
    """act(penalty, rank): the call, on all ranks. broken(penalty): what goes wrong on one of them."""

    act: Callable[[FusedMASPenalty, int], object]
    broken: Callable[[FusedMASPenalty], Any] = lambda penalty: mock.patch("os.devnull")
    kinds: tuple[str, ...] = ("ddp", *SHARDED)


def consolidate(penalty: FusedMASPenalty, rank: int, **given: Any) -> None:
    penalty.consolidate([own(rank), own(rank)], **given)


def adapt(penalty: FusedMASPenalty, rank: int) -> None:
    penalty.adapt([own(rank)])


def estimate(penalty: FusedMASPenalty, rank: int) -> None:
    estimate_importance(penalty.model, [own(rank)])


def observe(penalty: FusedMASPenalty, rank: int) -> None:
    penalty.observe(own(rank))


def raising(owner: Any, name: str, error: type[BaseException] = MemoryError) -> Any:
    """Patch a function so that it raises."""
    return lambda penalty: mock.patch.object(owner, name, side_effect=error("here"))


def late(owner: Any, name: str) -> Any:
    """Patch a function so that it raises once it has done its work."""
    original = getattr(owner, name)

    def act(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        raise MemoryError("here")

    return lambda penalty: mock.patch.object(owner, name, act)


def setting(name: str, value: Any) -> Any:
    """Have the model of one rank do something."""

    @contextmanager
    def broken(penalty: FusedMASPenalty) -> Iterator[None]:
        net = net_of(penalty)
        before = getattr(net, name)
        setattr(net, name, value)
        try:
            yield
        finally:
            setattr(net, name, before)

    return broken


def failing_data(error: BaseException) -> Callable[[FusedMASPenalty, int], None]:
    def act(penalty: FusedMASPenalty, rank: int) -> None:
        def batches() -> Iterator[Tensor]:
            yield X[:2]
            if rank == 1:
                raise error

        penalty.consolidate(batches())

    return act


def save(penalty: FusedMASPenalty, rank: int) -> None:
    penalty.save(os.environ["AGREEMENT_FOLDER"] + "/saved")


def load(penalty: FusedMASPenalty, rank: int) -> None:
    path = Path(os.environ["AGREEMENT_FOLDER"]) / ("whole" if rank == 0 else "nowhere")
    FusedMASPenalty.load(path, penalty.model)


def load_state(penalty: FusedMASPenalty, rank: int) -> None:
    penalty.load_state_dict(penalty.state_dict())


def load_less(penalty: FusedMASPenalty, rank: int) -> None:
    state = penalty.state_dict()
    penalty.load_state_dict({k: t for k, t in state.items() if rank == 0 or k != "config"})


def load_parts(penalty: FusedMASPenalty, rank: int) -> None:
    folder = os.environ["AGREEMENT_FOLDER"] + "/parts"
    if not Path(folder).exists():
        dcp.save({"penalty": penalty.state_dict()}, checkpoint_id=folder)
    load_distributed(penalty, folder if rank == 0 else folder + "x")


CASES = {
    "sweeps": Case(lambda p, rank: consolidate(p, rank, sweeps=1 - rank)),
    "data": Case(failing_data(OSError("here"))),
    "data, Ctrl-C": Case(failing_data(KeyboardInterrupt())),
    "data, exit": Case(failing_data(SystemExit(3))),
    "forward": Case(consolidate, setting("forward_error", OSError("here"))),
    "forward, Ctrl-C": Case(consolidate, setting("forward_error", KeyboardInterrupt())),
    "signal": Case(consolidate, setting("interrupted", True)),
    "signal, adapt": Case(adapt, setting("interrupted", True)),
    "backward": Case(consolidate, setting("backward_error", OSError("here"))),
    "backward, estimate": Case(estimate, setting("backward_error", OSError("here")), SHARDED),
    "backward, observe": Case(observe, setting("backward_error", OSError("here")), SHARDED),
    "forward, observe": Case(observe, setting("forward_error", OSError("here")), SHARDED),
    "merging": Case(consolidate, raising(quadratic, "merge_omega_")),
    "groups": Case(adapt, raising(quadratic, "omega_groups")),
    "check": Case(consolidate, raising(quadratic, "check_supported")),
    "after merging": Case(consolidate, late(quadratic.Consolidation, "add_task")),
    "remainders": Case(consolidate, raising(quadratic, "_finish")),
    "binding": Case(consolidate, raising(TrackedModel, "bind")),
    "rounding": Case(consolidate, raising(TrackedModel, "own_parameters")),
    "sums": Case(consolidate, raising(Sharding, "add_up"), SHARDED),
    "shares": Case(consolidate, raising(Sharding, "share"), SHARDED),
    "packing": Case(save, raising(quadratic.Consolidation, "tensors"), SHARDED),
    "writing": Case(save, raising(files, "save"), SHARDED),
    "loading": Case(load),
    "loading, last": Case(load_state, raising(TrackedModel, "bind")),
    "parts": Case(load_parts, kinds=SHARDED),
}


def fails(kind: str, rank: int) -> None:
    """Every case, with either rank the one where it goes wrong."""
    penalty = made(kind)
    before = State.of(penalty)
    for name, case in CASES.items():
        if kind not in case.kinds:
            continue
        by_turns = TIMES > 1 and case.broken is not Case._field_defaults["broken"]
        for bad in (0,) if name == "writing" else (0, 1) if by_turns else (1,):
            at = (kind, name, bad)
            with case.broken(penalty) if rank == bad else mock.patch("os.devnull"):
                told = on_all(said(partial(case.act, penalty, rank)))
            assert all(told), (at, told)
            assert "RuntimeError" in told[1 - bad], (at, told)
            assert f"rank {bad} failed with {told[bad]}" in told[1 - bad], (at, told)
            assert State.of(penalty).equals(before), at
    consolidate(penalty, rank)
    assert penalty.num_tasks == 2
    fresh = made(kind)
    consolidate(fresh, rank)
    assert State.of(fresh).equals(State.of(penalty))


# -- what is not the same on all ranks ------------------------------------------------------------------


def differ(kind: str, rank: int) -> None:
    """Told by name, on every rank."""
    names = [name for name, _ in Net().named_parameters()]

    def given(penalty: FusedMASPenalty, value: float) -> None:
        net = Net()
        penalty.consolidate(
            importance={name: torch.full_like(p, value) for name, p in net.named_parameters()}
        )

    def swapped(penalty: FusedMASPenalty) -> None:
        omega = torch.arange(16.0, dtype=torch.float64).view(4, 4)
        penalty.consolidate(importance={names[0]: omega.T if rank else omega})

    def with_buffer(penalty: FusedMASPenalty, size: int | None, dtype: torch.dtype) -> None:
        if size is not None:
            net_of(penalty).register_buffer("extra", torch.zeros(size, dtype=dtype))
        penalty.consolidate([X])

    def with_parameter(penalty: FusedMASPenalty) -> None:
        if rank == 1 and kind == "ddp":
            net_of(penalty).extra = nn.Parameter(torch.ones(2, dtype=torch.float64))
        elif rank == 1:
            net_of(penalty).layers[0].bias.requires_grad_(False)
        penalty.consolidate([X])

    def with_lam(penalty: FusedMASPenalty) -> None:
        penalty.lam = 1.0 + rank
        penalty.consolidate([X])

    def with_tasks(penalty: FusedMASPenalty) -> None:
        if rank == 1:
            penalty.set_weight(0, 2.0)
        penalty.consolidate([X])

    def loaded(penalty: FusedMASPenalty) -> None:
        state = penalty.state_dict()
        if rank == 1:
            penalty.lam = 3.0
            state = penalty.state_dict()
        penalty.load_state_dict(state)

    def kinds_of_batches(penalty: FusedMASPenalty) -> None:
        if rank == 0:
            penalty.consolidate([X])
        else:
            given(penalty, 1.0)

    cases: dict[str, tuple[Callable[[FusedMASPenalty], object], str]] = {
        "weight": (lambda p: p.consolidate([X], weight=1.0 + rank), "weight: got 2.0 on rank 1"),
        "kind of weight": (
            lambda p: p.consolidate([X], weight="x" if rank else 1.0),  # type: ignore[arg-type]
            "weight: got 'x' on rank 1, expected 1.0",
        ),
        "state": (lambda p: load_less(p, rank), "state: got .* on rank 1, expected .*'config'"),
        "importance": (
            lambda p: given(p, 1.0 + rank),
            "importance of '.*': got .* on rank 1, expected",
        ),
        "places": (swapped, "importance of '.*': got .* on rank 1, expected"),
        "source": (kinds_of_batches, "batches: got 'none' on rank 1, expected 'some'"),
        "call": (
            lambda p: p.adapt([X]) if rank else p.consolidate([X]),
            "(batches|ends a task): got .* on rank 1",
        ),
        "another buffer": (
            lambda p: with_buffer(p, 2 if rank else None, torch.float64),
            r"buffer '.*extra': got .*\(2,\).* on rank 1, expected none as on rank 0",
        ),
        "size of a buffer": (
            lambda p: with_buffer(p, 2 + rank, torch.float64),
            r"buffer '.*extra': got .*\(3,\).* on rank 1",
        ),
        "dtype of a buffer": (
            lambda p: with_buffer(p, 2, torch.float32 if rank else torch.float64),
            r"buffer '.*extra': got .*float32.* on rank 1",
        ),
        "parameter": (with_parameter, "parameter '.*(extra|bias)': got .* on rank 1"),
        "lam": (with_lam, "lam: got 2.0 on rank 1, expected 1.0"),
        "tasks": (with_tasks, r"tasks: got \[\(.*, 2.0\)\] on rank 1"),
        "loaded": (loaded, "lam: got 3.0 on rank 1, expected 0.5"),
    }
    for name, (act, message) in cases.items():
        penalty = made(kind, store="per_task")
        before = penalty.num_tasks
        with pytest.raises(ValueError, match=message):
            act(penalty)
        assert penalty.num_tasks == before, name


def alike(kind: str, rank: int) -> None:
    """What differs without being another: the order of names, and who had samples."""
    omega = {name: torch.rand(p.shape).double() for name, p in Net().named_parameters()}
    dist.broadcast_object_list(told := [omega])
    turned = dict(sorted(told[0].items(), reverse=bool(rank)))
    if kind == "fsdp":  # and what lies on the ranks
        places = dict(made(kind).model.named_parameters())
        turned = {
            n: distribute_tensor(t, places[n].device_mesh, places[n].placements)  # type: ignore[attr-defined]
            for n, t in sorted(turned.items())
        }
        turned = dict(sorted(turned.items(), reverse=bool(rank)))
    penalty = made(kind)
    before = {name: full(t) for name, t in penalty.omega.items()}
    penalty.consolidate(importance=turned)
    for name, t in penalty.omega.items():
        torch.testing.assert_close(full(t), before[name] + told[0][name])
    if kind == "ddp":  # the first has none; this importance leaves parameters out
        rest = FusedMASPenalty(penalty.model, importance="local", omega_dtype=torch.float64)
        rest.consolidate([X] if rank else [])
        alone = FusedMASPenalty(
            Net(), importance="local", omega_dtype=torch.float64, process_group=None
        )
        alone.consolidate([X])
        assert rest.omega.keys() == alone.omega.keys()
        for name, t in alone.omega.items():
            torch.testing.assert_close(rest.omega[name], t)
    if kind == "fsdp":
        penalty.observe(X if rank == 0 else X[:0])
        with pytest.raises(RuntimeError, match="importance of observed samples"):
            penalty.state_dict()
        penalty.consolidate()
        penalty.observe(X[:0])  # on all ranks: nothing was observed
        penalty.state_dict()


# -- Ctrl-C at any line -----------------------------------------------------------------------------------


class Presses:
    """Sends SIGINT at the line of the library with a number, once ranks have begun to talk; counts them."""

    def __init__(self, at: int | None) -> None:
        self.at, self.lines, self.begun, self.place = at, 0, False, ""

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line" and self.begun:
            self.lines += 1
            if self.lines == self.at:
                sys.settrace(None)
                self.place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                signal.raise_signal(signal.SIGINT)
        return self

    def run(self, call: Callable[[], object]) -> str:
        entered = Agreement.__enter__

        def enter(agreement: Agreement) -> Agreement:
            found = entered(agreement)
            self.begun = True
            return found

        before = sys.gettrace()
        with mock.patch.object(Agreement, "__enter__", enter):
            sys.settrace(self)
            try:
                return said(call)
            finally:
                sys.settrace(before)


def pressed(kind: str, rank: int) -> int:
    """All ranks hold what they held before, or all what comes next."""
    penalty = made(kind)
    start = {name: t.clone() for name, t in penalty.state_dict().items()}
    before = State.of(penalty)
    counted = Presses(None)
    counted.run(partial(consolidate, penalty, rank))
    after = State.of(penalty)
    penalty.load_state_dict(start)
    times = 6 * TIMES
    places = torch.linspace(1, counted.lines, times).long().tolist()
    for at in places if rank == 1 else [None] * times:
        presses = Presses(at)
        call = partial(consolidate, penalty, rank)
        told = on_all(presses.run(call) if rank == 1 else said(call))
        now = State.of(penalty)
        found = on_all("before" if now.equals(before) else "after" if now.equals(after) else "?")
        assert found in (["before"] * RANKS, ["after"] * RANKS), (kind, presses.place, told, found)
        assert "KeyboardInterrupt" in told[1], (presses.place, told)
        if found[0] == "before":
            assert "rank 1 failed with KeyboardInterrupt" in told[0], (presses.place, told)
        else:
            assert told[0] == ""
            penalty.load_state_dict(start)
    return counted.lines


def everything(kind: str, rank: int, ranks: int) -> int:
    if rank == 0:
        plain = FusedMASPenalty(Net(), process_group=None, omega_dtype=torch.float64)
        plain.consolidate([X])
        plain.save(os.environ["AGREEMENT_FOLDER"] + "/whole")
    dist.barrier()
    fails(kind, rank)
    differ(kind, rank)
    alike(kind, rank)
    return pressed(kind, rank)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_an_error_on_one_rank_is_one_on_all(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGREEMENT_FOLDER", str(tmp_path))
    lines = run(partial(everything, kind), RANKS, tmp_path)
    assert lines[1] > 500


def two_fail(kind: str, rank: int, ranks: int) -> None:
    penalty = made(kind)
    before = State.of(penalty)
    for name, case in CASES.items():
        if kind not in case.kinds or case.broken is Case._field_defaults["broken"]:
            continue
        bad = (0,) if name == "writing" else (1, 3)
        with case.broken(penalty) if rank in bad else mock.patch("os.devnull"):
            told = on_all(said(partial(case.act, penalty, rank)))
        # One of them may be told of the other before it comes to its own error.
        first = [each for each in bad if "failed with" not in told[each]]
        others = {*range(ranks)} - {*first}
        said_so = [f"rank {each} failed with {told[each]}" for each in first]
        assert all(any(so in told[each] for so in said_so) for each in others), (name, told)
        assert State.of(penalty).equals(before), (kind, name)


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "hsdp"])
def test_errors_on_two_of_four_ranks_are_one_on_all(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGREEMENT_FOLDER", str(tmp_path))
    run(partial(two_fail, kind), 4, tmp_path)


def waiting(rank: int, ranks: int) -> None:
    """Ctrl-C between an agreement and what follows it."""
    before, done = signal.getsignal(signal.SIGINT), []

    def agreement() -> Agreement:
        return Agreement("call", dist.group.WORLD, torch.device("cpu"))

    with suppress(KeyboardInterrupt), agreement() as call:
        with call.uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append("waits until the end")
        done.append("no longer")
    with suppress(KeyboardInterrupt), agreement() as call, call.uninterrupted():
        signal.raise_signal(signal.SIGINT)
        done.append("waits until the next agreement")
        call.largest(1)
        done.append("no longer")
    with suppress(KeyboardInterrupt), agreement() as call, call.uninterrupted():
        signal.raise_signal(signal.SIGINT)
        done.append("waits the first time")
        signal.raise_signal(signal.SIGINT)
        done.append("no longer")
    assert done == [
        "waits until the end",
        "waits until the next agreement",
        "waits the first time",
    ]
    assert signal.getsignal(signal.SIGINT) is before

    def elsewhere() -> list[int]:
        with agreement() as call, call.uninterrupted():
            return call.largest(5, 7)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(elsewhere).result() == [5, 7]


def test_ctrl_c_waits(tmp_path: Path) -> None:
    run(waiting, 1, tmp_path)
