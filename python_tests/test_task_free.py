"""TaskFree: where the loss comes to rest and rises, what is consolidated there, and what stays as it was."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from interrupts import PACKAGE, all_or_nothing
from same_state import assert_same_tree
from times import TIMES
from torch import Tensor, nn

from mas_ext import FusedMASPenalty, TaskFree, task_free
from mas_ext.failures import Diverged

WINDOW = 20
SUM: dict[str, Any] = {"merge": "sum"}


def decay(steps: int, high: float, low: float, pace: float) -> np.ndarray:
    return low + (high - low) * np.exp(-np.arange(steps) / pace)


def noisy(curve: np.ndarray, seed: int, share: float = 0.2) -> list[float]:
    generator = np.random.default_rng(seed)
    return (curve * (1 + share * generator.standard_normal(len(curve)))).tolist()


# The loss of two or three tasks, and how often something new begins.
SHARP = np.concatenate(
    [decay(150, 2.3, 0.1, 15), decay(150, 3.0, 0.15, 15), decay(150, 1.0, 0.1, 9)]
)
HUMP = 0.1 + np.exp(-(((np.arange(450) - 230) / 40) ** 2))
GRADUAL = np.where(np.arange(450) < 150, decay(450, 2.3, 0.1, 15), HUMP)
FIRST = decay(150, 2.3, 0.1, 15)
STAIRS = np.concatenate([FIRST, np.full(100, 1.0), np.full(100, 2.0), decay(150, 2.0, 0.1, 9)])
HALF_LEARNED = np.concatenate([FIRST, decay(150, 2.4, 1.3, 15), np.full(50, 2.5)])
CURVES = {
    "sharp": (noisy(SHARP, 0), 2),
    "sharp, without noise": (SHARP.tolist(), 2),
    "gradual": (noisy(GRADUAL, 1), 1),
    "a rest on the way up is no plateau": (noisy(STAIRS, 5, 0.05), 1),
    "a plateau half-way down is one": (noisy(HALF_LEARNED, 6, 0.05), 2),
    "one task": (noisy(decay(1500, 2.3, 0.1, 40), 2), 0),
    "noise alone": (noisy(np.ones(1500), 3, 0.5), 0),
    "constant": ([0.5] * 200, 0),
    "never at rest": ((1 - 0.001 * np.arange(500)).tolist(), 0),
    "shorter than a window": ([1.0] * (WINDOW - 1), 0),
    "negative": ([x - 5 for x in noisy(SHARP, 0)], 2),
}


def naive(losses: list[float], window: int, tolerance: float) -> list[tuple[int, int]]:
    """Of all plateaus that end, the steps of their consolidation and of the parameters that are kept."""
    ends = range(window, len(losses) + 1)
    parts = {t: np.array(losses[t - window : t]) for t in ends}
    mean = {t: parts[t].mean() for t in ends}
    std = {t: parts[t].std() for t in ends}
    apart = {t: abs(parts[t][: window // 2].mean() - parts[t][window // 2 :].mean()) for t in ends}
    found, start, low = [], window, math.inf
    while True:
        for begin in range(start, len(losses) + 1):
            highest = max(mean[t] for t in range(start, begin + 1))
            fallen = highest - mean[begin]
            enough = low == math.inf or fallen >= (highest - low) / 4
            rests = apart[begin] <= tolerance * max(std[begin], fallen / 100)
            if enough and rests and (begin > start or low == math.inf):
                break
        else:
            return found
        for end in range(begin + 1, len(losses) + 1):
            low = min(mean[t] for t in range(begin, end))
            if mean[end] > low + std[begin]:
                break
        else:
            return found
        kept = begin
        for t in range(begin, end):
            if t >= kept + window and mean[t] < mean[kept]:
                kept = t
        found.append((end, kept))
        start = end


def plateaus(losses: list[float], **given: Any) -> list[tuple[int, int]]:
    watcher = TaskFree(FusedMASPenalty(nn.Linear(2, 1), **SUM), window=WINDOW, **given)
    for loss in losses:
        watcher.step(loss, torch.ones(2, 2))
    return [(each.step, each.learned) for each in watcher.plateaus]


@pytest.mark.parametrize("name", CURVES)
def test_plateaus_are_those_of_a_naive_search(name: str) -> None:
    losses, count = CURVES[name]
    found = plateaus(losses)
    assert found == naive(losses, WINDOW, 0.25)
    assert len(found) == count


def test_sharp_changes_are_found_at_once_and_what_was_before_is_kept() -> None:
    (first, kept), (second, later) = plateaus(CURVES["sharp"][0])
    assert kept <= 150 < first <= 155
    assert first < later <= 300 < second <= 305


def test_a_tolerance_of_its_own() -> None:
    losses = CURVES["sharp"][0]
    assert (
        plateaus(losses, tolerance=0.02)
        == naive(losses, WINDOW, 0.02)
        != naive(losses, WINDOW, 0.25)
    )


@pytest.mark.parametrize("name", ["sharp", "gradual", "noise alone"])
def test_plateaus_do_not_depend_on_the_unit_of_the_loss(name: str) -> None:
    losses = CURVES[name][0]
    assert plateaus([1000 * loss - 300 for loss in losses]) == plateaus(losses)


class Stream:
    """Batches and made-up losses of their samples, while a model moves; with what was there at every step."""

    def __init__(self, make: Callable[[Tensor], Any] = lambda x: x, **penalty: Any) -> None:
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.BatchNorm1d(4), nn.Linear(4, 2))
        self.model[0].bias.requires_grad_(False)
        self.penalty = FusedMASPenalty(self.model, **SUM, **penalty)
        self.watcher = TaskFree(self.penalty, window=WINDOW, samples=50)
        self.make = make
        self.means = CURVES["sharp"][0]
        self.step, self.generator = 0, torch.Generator().manual_seed(5)
        self.seen: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []

    def next(self) -> tuple[Tensor, Tensor]:
        """Move the model; the next batch of seven samples, and their losses."""
        self.model.train()
        x = torch.randn(7, 3, generator=self.generator)
        with torch.no_grad():
            self.model(x)
            for p in self.model.parameters():
                p += 0.01 * torch.randn(p.shape, generator=self.generator)
        losses = self.means[self.step] * torch.rand(7, generator=self.generator).add(0.5)
        self.step += 1
        self.seen.append((x, losses, snapshot(self.model)))
        return x, losses

    def run(self, steps: int) -> None:
        for _ in range(steps):
            x, losses = self.next()
            self.watcher.step(losses, self.make(x))


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def loop(model: nn.Module, samples: Tensor) -> dict[str, Tensor]:
    """Mean over samples of the absolute gradient of the squared norm of the output, in float64."""
    model.double().eval()
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for x in samples.double():
        model.zero_grad()
        model(x[None]).square().sum().backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                total[name] += p.grad.abs() / len(samples)
    return total


def test_importance_is_that_of_the_hardest_samples_at_the_parameters_of_the_plateau() -> None:
    stream = Stream(make=lambda x: {"x": x}, forward=lambda model, batch: model(batch["x"]))
    while not stream.watcher.plateaus:
        before = snapshot(stream.model)
        stream.run(1)
    del before
    (found,) = stream.watcher.plateaus
    assert found.step == stream.step > found.learned + 1
    last = stream.seen[found.learned - WINDOW : found.learned]
    hard = [x[losses.argsort(descending=True)[:3]] for x, losses, _ in last]
    assert found.samples == sum(map(len, hard)) == 3 * WINDOW
    means = [float(losses.double().mean()) for _, losses, _ in last]
    assert found.mean == pytest.approx(np.mean(means))
    assert found.variance == pytest.approx(np.var(means))
    assert f"plateau at {found.mean:.3g}" in found.reason

    now, then = stream.seen[-1][2], stream.seen[found.learned - 1][2]
    assert_same_tree(snapshot(stream.model), now)
    assert not torch.equal(now["0.weight"], then["0.weight"])
    # What is not trained is not kept, and has its importance where it is.
    oracle = Stream().model
    oracle.load_state_dict({**then, "0.bias": now["0.bias"]})
    for name, expected in loop(oracle, torch.cat(hard)).items():
        if name in stream.penalty.anchor and name != "0.bias":
            torch.testing.assert_close(
                stream.penalty.omega[name].double(), expected, rtol=1e-4, atol=1e-7
            )
            assert torch.equal(stream.penalty.anchor[name], then[name]), name
    assert {"0.weight", "3.weight"} <= stream.penalty.anchor.keys()


@pytest.mark.parametrize("steps", [10, 120, 150, 200, 310])
def test_it_is_resumed_to_the_same_bits(steps: int) -> None:
    def make(x: Tensor) -> dict[str, Any]:
        # One item for each sample, and one for all; at three samples both would look alike.
        return {"x": (x, x[:, :1]), "names": [f"{v:.3f}" for v in x[:, 0]], "size": [1, 2, 3]}

    def forward(model: nn.Module, batch: dict[str, Any]) -> Tensor:
        assert len(batch["names"]) == len(batch["x"][0])
        assert batch["size"] == [1, 2, 3]
        return model(batch["x"][0] + batch["x"][1]) * sum(batch["size"])

    whole, part = (Stream(make, forward=forward) for _ in range(2))
    part.model.load_state_dict(whole.model.state_dict())
    whole.run(450)
    part.run(steps)
    file = io.BytesIO()
    torch.save([part.watcher.state_dict(), part.penalty.state_dict()], file)
    file.seek(0)
    watcher, penalty = torch.load(file, weights_only=True)
    part.penalty = FusedMASPenalty(part.model, forward=forward, **SUM)
    part.penalty.load_state_dict(penalty)
    part.watcher = TaskFree(part.penalty, window=WINDOW, samples=50)
    part.watcher.load_state_dict(watcher)
    assert_same_tree(part.watcher.state_dict(), watcher)
    part.run(450 - steps)
    assert len(part.watcher.plateaus) == 2
    assert part.watcher.plateaus == whole.watcher.plateaus
    assert_same_tree(part.watcher.state_dict(), whole.watcher.state_dict())
    assert_same_tree(part.penalty.state_dict(), whole.penalty.state_dict())


@pytest.mark.parametrize(
    "make",
    [
        lambda x: (x, torch.zeros(len(x))),
        lambda x: [x, [str(v) for v in x]],
        lambda x: {"x": x, "mask": x > 0},
    ],
)
def test_a_batch_may_have_any_structure(make: Callable[[Tensor], Any]) -> None:
    def forward(model: nn.Module, batch: Any) -> Tensor:
        x = batch["x"] if isinstance(batch, dict) else batch[0]
        assert isinstance(batch, type(make(x)))
        return model(x)

    plain, other = Stream(), Stream(make, forward=forward)
    other.model.load_state_dict(plain.model.state_dict())
    for stream in (plain, other):
        stream.run(320)
    assert len(other.watcher.plateaus) == 2
    one, two = other.penalty.state_dict(), plain.penalty.state_dict()
    assert not torch.equal(one.pop("settings"), two.pop("settings"))  # the names of their forward
    assert_same_tree(one, two)


def test_what_is_kept_is_copied_and_no_more_than_that() -> None:
    stream = Stream()
    while not stream.watcher.plateaus:
        x, losses = stream.next()
        given = x.clone().requires_grad_()
        kept = losses.clone().requires_grad_()
        stream.watcher.step(kept, given)
        with torch.no_grad():
            given.fill_(torch.nan)
    assert all(torch.isfinite(w).all() for w in stream.penalty.omega.values())
    stream.run(100)
    state = stream.watcher.state_dict()
    assert [len(batch) for batch in state["buffer"]] == [3] * WINDOW
    assert "0.bias" not in state["kept"]["values"]
    assert "2.running_mean" in state["kept"]["values"]


def test_a_mean_loss_keeps_the_first_samples() -> None:
    stream = Stream()
    for _ in range(30):
        x, losses = stream.next()
        stream.watcher.step(losses.mean().item(), x)
    buffer = stream.watcher.state_dict()["buffer"]
    assert_same_tree(buffer, [x[:3] for x, _, _ in stream.seen[-WINDOW:]])


@pytest.mark.parametrize(
    ("loss", "batch", "error", "message"),
    [
        (math.nan, torch.ones(2, 3), Diverged, "loss: got nan, expected a finite one"),
        (10**400, torch.ones(2, 3), Diverged, "loss: got a number beyond 1.7"),
        (torch.tensor(math.inf), torch.ones(2, 3), Diverged, "loss: got inf"),
        (torch.tensor([1.0, -math.inf]), torch.ones(2, 3), Diverged, "loss: got -inf"),
        (torch.ones(3), torch.ones(2, 3), ValueError, r"loss: got shape \(3,\) for 2 samples"),
        (torch.ones(2, 1), torch.ones(2, 3), ValueError, r"loss: got shape \(2, 1\)"),
        (1.0, torch.ones(0, 3), ValueError, "for 0 samples"),
        (1.0, "x", TypeError, "batches: got a batch of str"),
        (1.0, torch.tensor(1.0), TypeError, "batches: got a batch of Tensor"),
    ],
)
@pytest.mark.parametrize("steps", [10, 130])
def test_errors_change_nothing(
    loss: Any, batch: Any, error: type[Exception], message: str, steps: int
) -> None:
    stream = Stream()
    stream.run(steps)
    before = (stream.watcher.state_dict(), snapshot(stream.model), stream.penalty.state_dict())
    with pytest.raises(error, match=message):
        stream.watcher.step(loss, batch)
    after = (stream.watcher.state_dict(), snapshot(stream.model), stream.penalty.state_dict())
    assert_same_tree(after, before)


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()])
def test_a_consolidation_that_fails_changes_nothing_and_may_be_tried_again(
    error: BaseException,
) -> None:
    broken = False

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        if broken:
            raise error
        return model(x)

    stream, other = Stream(forward=forward), Stream(forward=forward)
    other.model.load_state_dict(stream.model.state_dict())
    other.run(160)
    peak = other.watcher.plateaus[0].step
    stream.run(peak - 1)
    x, losses = stream.next()
    before = (stream.watcher.state_dict(), snapshot(stream.model), stream.penalty.state_dict())
    broken = True
    with pytest.raises(type(error)):
        stream.watcher.step(losses, x)
    broken = False
    after = (stream.watcher.state_dict(), snapshot(stream.model), stream.penalty.state_dict())
    assert_same_tree(after, before)
    assert stream.watcher.step(losses, x) == other.watcher.plateaus[0]
    stream.run(160 - peak)
    assert_same_tree(stream.penalty.state_dict(), other.penalty.state_dict())


@pytest.mark.parametrize("consolidated", [False, True])
def test_an_interruption_at_any_line_leaves_all_or_nothing(consolidated: bool) -> None:
    """Nothing is consolidated twice, and what was consolidated is known to be."""
    stream = Stream()
    while not stream.watcher.plateaus:
        before = copy.deepcopy(stream)
        x, losses = stream.next()
        stream.watcher.step(losses, x)
    chosen = before if consolidated else stream
    x, losses = chosen.next()

    def interrupted(within: str, most: int) -> int:
        return all_or_nothing(
            lambda: copy.deepcopy(chosen.watcher),
            lambda watcher: watcher.step(losses, x),
            lambda it: (it.state_dict(), snapshot(it.penalty.model), it.penalty.state_dict()),
            within,
            most,
        )

    assert interrupted(task_free.__file__, most=1000) > 20
    if consolidated:
        assert interrupted(PACKAGE, most=50 * TIMES) > 1000


def test_a_head_that_came_after_the_plateau_is_consolidated_as_it_is() -> None:
    stream = Stream()
    stream.run(150)
    kept = stream.watcher.state_dict()["kept"]
    with torch.no_grad():
        stream.model[3] = nn.Linear(4, 5)
    while not stream.watcher.plateaus:
        stream.run(1)
    assert stream.watcher.plateaus[0].learned == kept["step"]
    assert torch.equal(stream.penalty.anchor["0.weight"], kept["values"]["0.weight"])
    assert torch.equal(stream.penalty.anchor["3.weight"], stream.model[3].weight)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"window": 3}, "window: got 3, expected a whole number from 4 up"),
        ({"samples": 0}, "samples: got 0, expected a whole number from 1 up"),
        ({"tolerance": -0.1}, "tolerance: got -0.1, expected a finite number from 0 up"),
        ({"tolerance": math.nan}, "tolerance: got nan"),
    ],
)
def test_arguments_are_checked(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskFree(FusedMASPenalty(nn.Linear(2, 1), **SUM), **given)


def test_another_state_is_refused() -> None:
    stream = Stream()
    stream.run(130)
    state = stream.watcher.state_dict()
    for other, message in [
        ({**state, "settings": {**state["settings"], "window": 9}}, "state: got the settings .*9"),
        ({"steps": 3}, r"state: got \['steps'\], expected \['buffer'"),
    ]:
        with pytest.raises(ValueError, match=message):
            stream.watcher.load_state_dict(other)
    assert_same_tree(stream.watcher.state_dict(), state)
