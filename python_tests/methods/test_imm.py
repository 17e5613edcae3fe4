"""Incremental moment matching against a naive training that keeps the weights of every task, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from oracles.naive_training import (
    SETTINGS,
    Naive,
    Weights,
    assert_close,
    compare,
    learn,
    resumed,
    start,
    weights,
)
from torch import Tensor, nn

from mas_ext import methods
from mas_ext.methods.imm import IMM, MeanIMM, ModeIMM
from mas_ext.methods.method import Training
from mas_ext.models import MultiHead
from mas_ext.optim.hooks import Mode

pytestmark = pytest.mark.usefixtures("one_thread")

ALPHA = (0.5, 0.2, 0.3)


@dataclass
class NaiveIMM(Naive):
    """alpha: not normalised; lam: of the pull to the last weights."""

    alpha: tuple[float, ...] = (1.0, 1.0, 1.0)
    by_fisher: bool = False
    lam: float = 0.0
    tasks: list[tuple[Weights, Weights]] = field(default_factory=list)

    def begin(self) -> None:
        if self.tasks:
            own = self.tasks[-1][1]
            self.theta.update({n: t.clone() for n, t in own.items()})
            self.terms = [({n: torch.full_like(t, self.lam) for n, t in own.items()}, own)]

    def end(self, x: Tensor, y: Tensor) -> None:
        own = self.held()
        ones = {n: torch.ones_like(t) for n, t in own.items()}
        share = self.mean_fisher(x, y) if self.by_fisher else ones
        self.tasks.append((share, own))
        for name in own:
            known = [
                (a * share[name], theta[name])
                for a, (share, theta) in zip(self.alpha, self.tasks, strict=False)
                if name in theta
            ]
            total = sum(w for w, _ in known)
            self.theta[name] = sum(w / total * theta for w, theta in known)  # type: ignore[assignment]


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_mean(setting: str) -> None:
    compare(MeanIMM(), NaiveIMM(setting))
    compare(MeanIMM(ALPHA), NaiveIMM(setting, alpha=ALPHA))


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_mode(setting: str) -> None:
    compare(ModeIMM(labels="all"), NaiveIMM(setting, by_fisher=True, labels="all"))
    compare(ModeIMM(ALPHA, labels="true"), NaiveIMM(setting, by_fisher=True, alpha=ALPHA))


def test_the_mode_by_what_was_observed_in_training() -> None:
    naive = NaiveIMM("class", by_fisher=True)
    compare(ModeIMM(labels="true"), naive, importance_epochs=1)


@pytest.mark.parametrize("setting", ["task", "domain"])
def test_regression(setting: str) -> None:
    compare(MeanIMM(lam=0.3), NaiveIMM(setting, lam=0.3, squared=True))
    compare(ModeIMM(labels="normal"), NaiveIMM(setting, by_fisher=True, squared=True))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("mode", ["gradient", "proximal"])
def test_transfer_by_l2(mode: Mode, optimizer: str) -> None:
    naive = NaiveIMM("class", optimizer, mode=mode, lam=0.3)
    compare(MeanIMM(lam=0.3, mode=mode), naive)


def test_labels_of_the_mode_are_drawn_from_the_model() -> None:
    """The defaults: other labels than the true ones, of which the merged weights show traces."""
    drawn, true = (learn(method, "domain")[2][-1] for method in (ModeIMM(), ModeIMM(labels="true")))
    assert float((drawn["backbone.0.weight"] - true["backbone.0.weight"]).abs().max()) > 1e-3


def test_heads_of_a_task_are_its_own() -> None:
    """In the task-incremental setting a head stays as its task left it."""
    found = learn(MeanIMM(), "task")[2]
    assert_close(
        {n: t for n, t in found[2].items() if n.startswith("heads.0")},
        {n: t for n, t in found[0].items() if n.startswith("heads.0")},
    )


def test_frozen_parameters_are_neither_merged_nor_kept() -> None:
    model, method = Convolutional(), MeanIMM()
    model.backbone.requires_grad_(False)
    training = training_of(model)
    method.begin_task(training)
    method.end_task(training)
    state = method.state_dict()
    kept = {key for part in state.values() for key in part["penalty"] if key.startswith("anchor")}
    assert kept == {"anchor.heads.0.weight", "anchor.heads.0.bias"}


MAKERS: list[Callable[[], IMM]] = [
    lambda: MeanIMM(ALPHA, lam=0.3, dropout=0.4),
    lambda: ModeIMM(lam=0.3, dropout=0.4),
]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_stopped_run_goes_on_to_the_same_bits(setting: str, make: Callable[[], IMM]) -> None:
    for after in (7, 11):
        resumed(make, setting, after)


# -- drop-transfer -----------------------------------------------------------------------------------

P = 0.4


class Convolutional(MultiHead):
    def __init__(self) -> None:
        first = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten())
        super().__init__(nn.Sequential(*first, nn.Linear(48, 5), nn.Tanh()), 5)
        self.add_head(3)
        self.double()


def training_of(model: MultiHead, task: int = 0) -> Training:
    def make(parameters: object) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, 0.1)  # type: ignore[arg-type]

    return Training(model, make(model.parameters()), task, "domain", 0, lambda n: [], make)


def naive_drop_transfer(new: Weights, old: Weights, x: Tensor, y: Tensor) -> Tensor:
    """The loss, a sample at a time, with the weights into each unit put together by the paper's formula."""
    torch.manual_seed(5)
    channels = torch.feature_dropout(torch.ones(len(x), 3, 4, 4).double(), P, True)[..., 0, 0] > 0
    units = nn.functional.dropout(torch.ones(len(x), 5).double(), P) > 0
    losses = []
    for sample, label, *kept in zip(x, y.tolist(), channels, units, strict=True):
        effective = dict(new)
        for layer, keep in zip(("backbone.0.", "backbone.3."), kept, strict=True):
            for name in (layer + "weight", layer + "bias"):
                mask = keep.view(-1, *[1] * (new[name].dim() - 1))
                moved = new[name] / (1 - P) - P / (1 - P) * old[name]
                effective[name] = torch.where(mask, moved, old[name])
        maps = nn.functional.conv2d(
            sample[None], effective["backbone.0.weight"], effective["backbone.0.bias"], padding=1
        )
        hidden = maps.tanh().flatten() @ effective["backbone.3.weight"].T
        hidden = (hidden + effective["backbone.3.bias"]).tanh()
        logits = hidden @ new["heads.0.weight"].T + new["heads.0.bias"]
        losses.append(logits.logsumexp(0) - logits[label])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("first", [True, False])
def test_drop_transfer_is_the_papers_formula(first: bool) -> None:
    """Value and gradient; in the first task the old weights are 0."""
    model, method = Convolutional(), MeanIMM(dropout=P)
    x, y = torch.randn(6, 2, 4, 4, dtype=torch.float64), torch.arange(6) % 3
    old = {n: torch.zeros_like(p) for n, p in weights(model).items()}
    training = training_of(model)
    method.begin_task(training)
    if not first:
        old = weights(model)
        method.end_task(training)
        training = training_of(model, task=1)
        method.begin_task(training)
        with torch.no_grad():
            for p in model.parameters():
                p += 0.1 * torch.randn_like(p)
    new = {n: t.requires_grad_() for n, t in weights(model).items()}
    right = naive_drop_transfer(new, old, x, y)
    torch.manual_seed(5)
    loss = method.loss(training, x, y)
    torch.testing.assert_close(loss, right, rtol=0, atol=1e-12)
    assert abs(loss.item() - nn.functional.cross_entropy(model(x, 0), y).item()) > 1e-3
    loss.backward()
    for g, p in zip(
        torch.autograd.grad(right, list(new.values())), model.parameters(), strict=True
    ):
        torch.testing.assert_close(p.grad, g, rtol=0, atol=1e-12)


def test_no_hook_is_left_on_the_model() -> None:
    model, method = Convolutional(), MeanIMM(dropout=P)
    training = training_of(model)
    method.begin_task(training)
    x, y = torch.randn(6, 2, 4, 4, dtype=torch.float64), torch.arange(6) % 3
    before = model(x, 0)
    method.loss(training, x, y)
    with pytest.raises(RuntimeError):
        method.loss(training, x[:, :1], y)
    assert torch.equal(model(x, 0), before)


def test_a_layer_with_computed_weights_is_not_dropped() -> None:
    backbone = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh())
    model, method = MultiHead(backbone, 5), MeanIMM(dropout=P)
    model.add_head(3)
    training = training_of(model)
    method.begin_task(training)
    x, y = torch.randn(6, 4), torch.arange(6) % 3
    loss = method.loss(training, x, y)
    assert torch.equal(loss, nn.functional.cross_entropy(model(x, 0), y))


# -- what is wrong -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["imm-mean", "imm-mode"])
def test_fewer_weights_than_tasks(name: str) -> None:
    learning = start(methods.create(name, alpha=(1.0,)), "task")
    learning.begin_task()
    learning.at.task = 1
    with pytest.raises(ValueError, match="alpha: got 1 numbers, expected one for every task"):
        learning.begin_task()
