"""Ctrl-C at any line of a call that changes what is held leaves what was held before, or what will be."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from interrupts import Stop
from snapshots import Snapshot, equal
from times import TIMES
from torch import Tensor, nn
from torch._dynamo import eval_frame
from torch.overrides import _get_current_function_mode_stack

from mas_ext import FusedMASPenalty

X = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


class Net(nn.Module):
    """A body with dropout and running statistics, and two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
        self.heads = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)})

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        return torch.cat([head(h) for head in self.heads.values()], 1)


def case(observed: bool = True, **options: Any) -> FusedMASPenalty:
    """After two tasks and, maybe, some observed samples; the parameters have moved since."""
    torch.manual_seed(0)
    net = Net()
    penalty = FusedMASPenalty(net, lam=0.3, **options)
    for weight in (1.0, 2.0):
        omega = {name: torch.rand_like(p) for name, p in net.named_parameters()}
        penalty.consolidate(importance=omega, weight=weight)
        with torch.no_grad():
            for p in net.parameters():
                p += 0.1
    if observed:
        penalty.observe(X)
    return penalty


def remove_head(penalty: FusedMASPenalty) -> None:
    del penalty.model.heads["b"]  # type: ignore[union-attr,operator]


def wrap(penalty: FusedMASPenalty) -> None:
    heads: Any = penalty.model.heads
    heads["a"] = nn.Sequential(heads["a"])


def renewed(penalty: FusedMASPenalty) -> None:
    """A layer that is another one, under another name."""
    heads: Any = penalty.model.heads
    heads["c"] = nn.Linear(3, 2)
    nn.init.constant_(heads["c"].weight, 0.5)
    nn.init.constant_(heads["c"].bias, 0.5)
    del heads["a"]


def widen(penalty: FusedMASPenalty) -> None:
    heads: Any = penalty.model.heads
    heads["a"] = nn.Linear(3, 4)
    nn.init.constant_(heads["a"].weight, 0.5)
    nn.init.constant_(heads["a"].bias, 0.5)


def nothing(penalty: FusedMASPenalty) -> None:
    pass


OTHER = {name: t.clone() for name, t in case().state_dict().items()}
OTHER["omega.heads.a.bias"] *= 2


# Name: options, what happens to the model before, and the call.
Call = tuple[dict[str, Any], Callable[[FusedMASPenalty], None], Callable[[FusedMASPenalty], Any]]
IMPORTANCE = {"body.0.weight": torch.ones(3, 4)}
PER_TASK, GIVEN = {"store": "per_task"}, {"observed": False}
UINT8, DECAY = {"omega_dtype": torch.uint8}, {"merge": "decay", "gamma": 0.5}
CALLS: dict[str, Call] = {
    "given": (GIVEN, nothing, lambda p: p.consolidate(importance=IMPORTANCE)),
    "given_per_task": (GIVEN | PER_TASK, nothing, lambda p: p.consolidate(importance=IMPORTANCE)),
    "given_uint8": (
        GIVEN | {"omega_dtype": torch.uint8},
        nothing,
        lambda p: p.consolidate(importance=IMPORTANCE),
    ),
    "given_decay": (
        GIVEN | {"merge": "decay", "gamma": 0.5},
        wrap,
        lambda p: p.consolidate(importance=IMPORTANCE),
    ),
    "observed": ({}, nothing, lambda p: p.consolidate()),
    "observed_wrapped": ({}, wrap, lambda p: p.consolidate()),
    "observe": ({}, nothing, lambda p: p.observe(2 * X)),
    "lam": ({}, nothing, lambda p: setattr(p, "lam", 7.0)),
    "weight": (PER_TASK, nothing, lambda p: p.set_weight(0, 5.0)),
    "drop": (PER_TASK, nothing, lambda p: p.drop(0)),
    "drop_wrapped": (PER_TASK, wrap, lambda p: p.drop(1)),
    "rename": ({}, renewed, lambda p: p.rename("heads.a.weight", "heads.c.weight")),
    "follow": ({}, wrap, lambda p: p()),
    "removed": ({}, remove_head, lambda p: p.add_grad_()),
    "widened": (PER_TASK, widen, lambda p: p()),
    "load": ({}, nothing, lambda p: p.load_state_dict(OTHER)),
}
# These run the model, and have thousands of lines.
LONG: dict[str, Call] = {
    "batches": (GIVEN, nothing, lambda p: p.consolidate([X, 2 * X])),
    "adapt": ({"importance": "batch"}, wrap, lambda p: p.adapt([X, 2 * X])),
}


def torch_modes() -> tuple[Any, ...]:
    """What of torch's a call may leave changed."""
    return (
        len(_get_current_function_mode_stack()),
        torch._C._len_torch_dispatch_stack(),
        torch.is_grad_enabled(),
        torch.is_autocast_cache_enabled(),
        torch.get_rng_state().tolist(),
        eval_frame._stance.stance,
    )


def interrupted_everywhere(call: Call, most: int) -> None:
    """At every line, or at some: the penalty holds what it held, or what it would; and goes on."""
    options, change, act = call
    made = case(**options)

    def again() -> FusedMASPenalty:
        penalty: FusedMASPenalty = copy.deepcopy((made.model, made))[1]
        penalty()
        change(penalty)
        return penalty

    before, after, count = held(again()), again(), Stop(None, KeyboardInterrupt)
    count.run(lambda: act(after))
    done = held(after)
    assert count.lines > 3
    for at in range(1, count.lines + 1, max(1, count.lines // most)):
        penalty, modes = again(), torch_modes()
        kept = model_state(penalty.model)
        stop = Stop(at, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            stop.run(lambda p=penalty: act(p))  # type: ignore[misc]
        assert torch_modes() == modes, f"{stop.place}: torch's modes"
        assert equal(model_state(penalty.model), kept), f"{stop.place}: the model"
        found = held(penalty)
        assert equal(found, before) or equal(found, done), f"{stop.place}: line {at}"


def model_state(model: nn.Module) -> Snapshot:
    """Modes, parameters and buffers."""
    return {
        "modes": [module.training for module in model.modules()],
        **{name: t.detach().clone() for name, t in model.state_dict().items()},
    }


def held(penalty: FusedMASPenalty) -> Snapshot:
    """What a user sees of a penalty, after it has followed the model."""
    found: dict[str, Any] = {"lam": penalty.lam, "alpha": penalty.alpha, "tasks": penalty.num_tasks}
    found |= {"value": penalty().detach(), "kernels": penalty._state.memory.groups[0].state.alpha}
    found |= {f"omega.{n}": t for n, t in penalty.omega.items()}
    found |= {f"anchor.{n}": t for n, t in penalty.anchor.items()}
    found |= {f"observed.{n}": t for n, t in penalty._pending.sums.items()}
    found |= {"samples": penalty._pending.samples, "objective": penalty._pending.objective_sum}
    found |= {f"saved.{n}": t for n, t in penalty.state_dict().items()}
    return {n: t.detach().clone() if isinstance(t, Tensor) else t for n, t in found.items()}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.usefixtures("one_thread")
def test_an_interruption_at_any_line_leaves_all_or_nothing(name: str) -> None:
    interrupted_everywhere(CALLS[name], most=40 * TIMES)


@pytest.mark.parametrize("name", LONG)
@pytest.mark.usefixtures("one_thread")
def test_an_interruption_while_the_model_runs_leaves_all_as_it_was(name: str) -> None:
    interrupted_everywhere(LONG[name], most=100 * TIMES)
