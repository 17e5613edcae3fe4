"""Captured and replayed passes, emulated: as on a GPU, one that reads a number back can't be captured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import zoo_derived  # noqa: F401  its cases join the zoo's
from definition import Omega, assert_close, cast, loop, waves
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import CASES

from mas_ext import check_importance, estimate_fisher
from mas_ext.importance import ImportanceSum
from mas_ext.importance.accumulator import gather
from mas_ext.importance.evaluation import Labelled
from mas_ext.importance.exact import captured
from mas_ext.importance.gradients import Totals

# Convolutions, products, tables, tied and derived weights, adapters, normalisations.
NAMES = [
    "mlp",
    "conv2d, groups",
    "residual, in-place relu",
    "u-net",
    "transposed 2d, depthwise",
    "embedding tied to the output layer",
    "embedding, padding",
    "gpt2",
    "vit",
    "windows folded into the samples",
    "encoder layer, sequence first, norm last",
    "positions by ids repeated",
    "positions by a table interpolated",
    "relative bias added, its index kept in a buffer",
    "token by expand",
    "scaled by exp",
    "scaled by inverse",
    "adapter, merged",
    "adapter, DoRA",
    "adapter, unmerged",
    "F.linear of a normalised weight",
    "samples backwards inside",
]


class Captured(TorchDispatchMode):
    """Refuses what reads numbers back, or makes shapes of them."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & {*func.tags}
        indices = args[1] if func is torch.ops.aten.index.Tensor else ()
        masks = any(i is not None and i.dtype == torch.bool for i in indices)
        if tags and (masks or func is not torch.ops.aten.index.Tensor):
            raise RuntimeError(f"{func} while a pass was captured")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What became of passes: "captured" and "replayed", where a CPU stands for a GPU."""
    happened: list[str] = []

    def capture(run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        with Captured():
            result = run()
        happened.append("captured")

        def again() -> None:
            happened.append("replayed")
            totals, values, _ = run()
            for name, total in totals.items():
                result[0][name].copy_(total)
            result[1].copy_(values)

        return again, result

    monkeypatch.setattr(captured, "capture", capture)
    monkeypatch.setattr(captured, "possible", lambda theta: True)
    return happened


def importance(model: nn.Module, batches: list[Any], forward: Any = None) -> Omega:
    total = ImportanceSum(forward=forward)
    gather(total, model, batches)
    return total.mean()


@pytest.mark.parametrize("name", NAMES)
def test_batches_of_one_look_are_replayed(name: str, events: list[str]) -> None:
    """The second batch is captured; the third and fourth are replayed, and the last, a smaller one, is not."""
    case = CASES[name]
    torch.manual_seed(1)
    model = case.make().double().eval()
    batches = [cast(case.inputs(size), torch.float64) for size in (6, 6, 6, 6, 4)]
    right = loop(model, batches, case.forward, "l2")[0]
    assert_close(importance(model, batches, case.forward), right, 1e-10, case.noise)
    assert events == ["captured", "replayed", "replayed"]


@pytest.mark.parametrize("objective", ["l1", "vector", waves])
def test_every_objective_is_replayed(objective: Any, events: list[str]) -> None:
    """Also one of many columns, of one backward pass each."""
    torch.manual_seed(1)
    model = CASES["vit"].make().double().eval()
    batches = [CASES["vit"].inputs(6).double() for _ in range(4)]
    total = ImportanceSum(objective=objective, max_outputs=200)
    gather(total, model, batches)
    assert_close(total.mean(), loop(model, batches, None, objective)[0], 1e-10)
    assert events == ["captured", "replayed", "replayed"]


def small() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return model, [(torch.randn(6, 4).double(), torch.randn(6, 3).double()) for _ in range(4)]


def test_squares_are_replayed(events: list[str]) -> None:
    """Fisher information of normal outputs: the mean of the squares of all of them."""
    model, batches = small()
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for inputs, _ in batches:
        for x in inputs:
            for y in model(x[None])[0]:
                grads = torch.autograd.grad(y, [*model.parameters()], retain_graph=True)
                for name, g in zip(expected, grads, strict=True):
                    expected[name] += g.square() / 24
    assert_close(estimate_fisher(model, batches, labels="normal"), expected, 1e-10)
    assert events == ["captured", "replayed", "replayed"]


def test_labels_are_those_of_the_batch_that_is_replayed(events: list[str]) -> None:
    model, batches = small()
    total = ImportanceSum(
        values=lambda output, labels, samples: (output * labels).sum(1, keepdim=True),
        labels=lambda batch, output, samples: batch[1],
    )
    gather(total, model, batches)
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for inputs, labels in batches:
        for x, label in zip(inputs, labels, strict=True):
            grads = torch.autograd.grad((model(x[None])[0] * label).sum(), [*model.parameters()])
            for name, g in zip(expected, grads, strict=True):
                expected[name] += g.abs() / 24
    assert_close(total.mean(), expected, 1e-10)
    assert events == ["captured", "replayed", "replayed"]


class Reading(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * (2.0 if float(x.sum()) > 0 else 1.0)


class Writing(Reading):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return self.linear(x) * self.passes


class Outside(Reading):
    """A parameter whose use has no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.hypot(self.linear(x), self.p)


@pytest.mark.parametrize(
    ("kind", "why"),
    [(Reading, "_local_scalar_dense"), (Writing, "writes"), (Outside, "run alone")],
)
def test_what_a_replay_would_get_wrong_is_not_captured(
    kind: type[Reading], why: str, events: list[str]
) -> None:
    model = kind().double().eval()
    batches = [torch.rand(6, 4, dtype=torch.float64) - float(k == 2) for k in range(4)]
    state = {name: t.clone() for name, t in model.state_dict().items()}
    found = importance(model, batches)
    for name, t in model.state_dict().items():
        assert torch.equal(t, state[name])
    naive = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for batch in batches:
        for x in batch:
            model.load_state_dict(state)
            grads = torch.autograd.grad(model(x[None]).square().sum(), [*model.parameters()])
            for name, g in zip(naive, grads, strict=True):
                naive[name] += g.abs() / 24
    assert_close(found, naive, 1e-10)
    assert "replayed" not in events
    model.load_state_dict(state)
    assert why in check_importance(model, batches[0]).not_captured


def test_a_replay_holds_for_as_long_as_nothing_but_the_batch_changes(events: list[str]) -> None:
    """Two calls of gather, between which the model and what it computes change."""
    model, total = nn.Sequential(nn.Linear(4, 3), nn.Tanh()).double(), ImportanceSum()
    batches = [torch.randn(6, 4, dtype=torch.float64) for _ in range(3)]
    gather(total, model, batches)
    before = total.mean()
    assert_close(before, loop(model, batches, None, "l2")[0], 1e-10)
    model[1] = nn.Sigmoid()
    gather(total, model, batches)
    both = {name: 2 * t - before[name] for name, t in total.mean().items()}
    assert_close(both, loop(model, batches, None, "l2")[0], 1e-10)
    events.clear()
    for batch in batches:
        total.add(model, batch)
    assert not events


def test_what_was_captured_is_told(events: list[str]) -> None:
    report = check_importance(nn.Linear(4, 3), torch.randn(6, 4))
    assert report.not_captured == ""
    assert "CUDA graph" not in str(report)
    assert events == ["captured"]
    told = str(check_importance(Writing(), torch.randn(6, 4)))
    assert "not captured as a CUDA graph: RuntimeError: the model writes what it keeps" in told


def test_sums_of_one_replay_outlast_the_next(events: list[str]) -> None:
    def run(batch: Labelled) -> tuple[Totals, Tensor, None]:
        return {"w": batch.batch.sum(0)}, batch.batch.sum(1), None

    x, y = torch.randn(5, 3), torch.randn(5, 3)
    given = x.clone()
    again = captured.CapturedPass(run, Labelled(given))
    totals, values = again(Labelled(x))
    more, others = again(Labelled(y))
    assert torch.equal(given, x)
    assert torch.equal(totals["w"], x.sum(0))
    assert torch.equal(values, x.sum(1))
    assert torch.equal(more["w"], y.sum(0))
    assert torch.equal(others, y.sum(1))
