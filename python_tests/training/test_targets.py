"""Tasks whose targets are no labels: what is learned, scored and held, against plain loops in float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from oracles.naive_training import INPUTS, SAMPLES, TASKS, Batch, Naive, Weights, learn
from oracles.naive_training import assert_close as assert_weights
from torch import Tensor, nn
from torch.nn import functional as F

from mas_ext import Trainer, models
from mas_ext.methods import MAS, METHODS, create
from mas_ext.models import MultiHead
from mas_ext.scenarios import Scenario, Task, Tensors, from_datasets
from mas_ext.training.settings import Settings, exact_match, hamming

pytestmark = pytest.mark.usefixtures("one_thread")

LAM = 0.2


def data(kind: str) -> Scenario:
    """Scalar floats, or three decisions of 0 or 1 per sample."""
    generator = torch.Generator().manual_seed(3)
    pairs = []
    for task in range(TASKS):
        x = torch.randn(SAMPLES, INPUTS, generator=generator, dtype=torch.float64)
        told = (
            x @ torch.randn(INPUTS, 3, generator=generator, dtype=torch.float64)
        ).sin() + task / 9
        y = told[:, 0] if kind == "scalar" else (told > 0).to(torch.uint8)
        pairs.append((Tensors(x, y), Tensors(x, y)))
    return from_datasets(pairs)


@dataclass
class NaiveMAS(Naive):
    """The task loss and MAS, sample by sample."""

    kind: str = "scalar"

    def loss(self, batch: Batch, theta: Weights) -> Tensor:
        z, total = self.logits(batch.x, theta), torch.zeros((), dtype=torch.float64)
        for row, target in zip(z, batch.y, strict=True):
            if self.kind == "scalar":
                total = total + (row[0] - target) ** 2
            else:
                for c in range(3):
                    p = 1 / (1 + (-row[c]).exp())
                    total = total - (p if target[c] else 1 - p).log() / 3
        return total / len(z)

    def end(self, x: Tensor, y: Tensor) -> None:
        omega = {n: torch.zeros_like(t) for n, t in self.held().items()}
        for sample in x.split(1):
            g = self.gradients(lambda theta: self.logits(sample, theta).square().sum())  # noqa: B023
            omega = {n: t + g[n].abs() / len(x) for n, t in omega.items()}
        before = self.terms[0][0] if self.terms else dict.fromkeys(omega, torch.zeros(()))
        self.terms = [({n: before[n] + LAM * w for n, w in omega.items()}, self.held())]


@pytest.mark.parametrize("setting", ["task", "domain"])
@pytest.mark.parametrize(("kind", "loss"), [("scalar", "mse"), ("marks", "bce")])
def test_trained_and_held_as_by_loops(kind: str, loss: str, setting: str) -> None:
    """Among samples whose targets are (n,), no target is compared with another sample's output."""
    model, log, found = learn(create("mas", lam=LAM), setting, data=data(kind), task_loss=loss)
    right = NaiveMAS(setting, kind=kind).learn(model.first, log)
    for got, own in zip(found, right, strict=True):
        assert_weights(got, own)


@pytest.mark.parametrize("score", [None, "hamming", "exact-match"])
def test_scores_of_several_decisions(score: str | None) -> None:
    torch.manual_seed(0)
    scenario, model = data("marks"), models.mlp((INPUTS,), (8,)).double()
    result = Trainer(model, task_loss="bce", score=score, batch_size=8, lr=0.05).fit(scenario)
    model.eval().requires_grad_(False)
    for k, task in enumerate(scenario.tasks):
        total = 0.0
        for x, y in (task.test[i] for i in range(SAMPLES)):
            z = model(x[None], k)[0]
            right = [bool(z[c] > 0) == bool(y[c]) for c in range(3)]
            loss = -sum(float(F.logsigmoid(z[c] if y[c] else -z[c])) for c in range(3)) / 3
            total += {None: -loss, "hamming": sum(right) / 3, "exact-match": all(right)}[score]
        assert result.accuracy[-1, k] == pytest.approx(total / SAMPLES, abs=1e-12)
    assert model.outputs == [3, 3, 3]


def test_decisions_by_hand() -> None:
    output = torch.tensor([[1.0, -1.0, 2.0], [0.1, 0.1, -3.0]])
    target = torch.tensor([[1, 0, 0], [1, 1, 0]])
    assert hamming(output, target).tolist() == pytest.approx([2 / 3, 1])
    assert exact_match(output, target).tolist() == [False, True]


LOSSES: list[Any] = [
    *("mse", "l1", "smooth-l1", "bce", F.mse_loss, F.huber_loss, partial(F.l1_loss)),
    *(nn.MSELoss(), nn.BCEWithLogitsLoss()),
]


@pytest.mark.parametrize("loss", LOSSES)
def test_no_target_is_broadcast(loss: Any) -> None:
    compute = Settings(task_loss=loss).loss_function
    plain = {"bce": F.binary_cross_entropy_with_logits, "mse": F.mse_loss, "l1": F.l1_loss}
    plain["smooth-l1"] = F.smooth_l1_loss
    function = plain[loss] if isinstance(loss, str) else loss
    output, target = torch.randn(4, 1), torch.rand(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compute(output, target) == function(output[:, 0], target)
        assert compute(output, target[:, None]) == function(output[:, 0], target)
        marks = target > 0.5
        assert compute(output, marks) == function(output[:, 0], marks.float())
    for other in (torch.rand(4, 2), torch.rand(1, 1), torch.rand(1), torch.rand(())):
        with pytest.raises(
            ValueError, match=r"targets: got shape .* for outputs \(4, 1\), expected"
        ):
            compute(output, other)
    with pytest.raises(ValueError, match=r"targets: got shape \(4,\) for outputs \(4, 2\)"):
        compute(torch.randn(4, 2), target)


@pytest.mark.parametrize("score", ["hamming", "exact-match", F.l1_loss])
def test_no_target_of_a_score_is_broadcast(score: Any) -> None:
    compute = Settings(score=score).score_function
    assert compute is not None
    output, target = torch.tensor([[1.0], [-1.0], [2.0]]), torch.tensor([1.0, 1.0, 0.0])
    right = {"hamming": [1, 0, 0], "exact-match": [1, 0, 0]}.get(score, 4 / 3)
    assert compute(output, target).double().tolist() == pytest.approx(right)


def test_what_a_checkpoint_calls_a_loss() -> None:
    for loss, name in (("mse", "mse_loss"), (F.l1_loss, "l1_loss"), (nn.MSELoss(), "MSELoss")):
        assert Settings(task_loss=loss).described()["task_loss"] == name
    assert Settings(task_loss=partial(F.mse_loss)).described()["task_loss"] == "partial"


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.rand(6), r"for task '0' with targets torch.float32 of shape \(\), expected another"),
        (torch.rand(6, 2), r"for task '0' with targets torch.float32 of shape \(2,\)"),
        (torch.randint(2, (6, 3)), r"for task '0' with targets torch.int64 of shape \(3,\)"),
    ],
)
def test_a_cross_entropy_of_no_labels(y: Tensor, message: str) -> None:
    """Torch would take floats for probabilities: of one output the loss is 0, whatever they are."""
    part = Tensors(torch.ones(6, INPUTS), y)
    scenario, model = from_datasets([(part, part)]), models.mlp((INPUTS,), (4,))
    with pytest.raises(ValueError, match="task_loss: got the cross entropy " + message):
        Trainer(model).fit(scenario)
    assert model.outputs == []


def test_a_cross_entropy_of_probabilities() -> None:
    p = torch.rand(6, 3, dtype=torch.float64).softmax(1)
    part = Tensors(torch.randn(6, INPUTS, dtype=torch.float64), p)
    model = models.mlp((INPUTS,), (4,)).double()
    result = Trainer(model, epochs=1, score=lambda z, p: -F.cross_entropy(z, p)).fit(
        from_datasets([(part, part)])
    )
    x, p = part.batch(torch.arange(6))
    z = model(x, 0).detach()
    assert float(result.accuracy) == pytest.approx(float((p * z.log_softmax(1)).sum(1).mean()))


@pytest.mark.parametrize("name", [name for name in METHODS if name != "joint"])
@pytest.mark.parametrize(
    ("kind", "loss", "chance"), [("scalar", "mse", 1.0), ("marks", "bce", 0.69)]
)
def test_every_method_learns_them_or_says_why_not(
    name: str, kind: str, loss: str, chance: float
) -> None:
    """Better than an output of 0, whose loss is `chance`."""
    options = {"labels": "normal"} if "labels" in create(name).options() else {}
    torch.manual_seed(0)
    model = models.mlp((INPUTS,), (8,)).double()
    trainer = Trainer(model, create(name, **options), task_loss=loss, lr=0.02, batch_size=8)
    if name == "imm-mode":
        with pytest.raises(ValueError, match="labels: got 'sampled' with a task loss that is no"):
            trainer.fit(data(kind))
        return
    assert float(trainer.fit(data(kind)).accuracy.diagonal().mean()) > -chance


class EveryPlace(nn.Module):
    """Features of each pixel, (N, H, W, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 4, 3, padding=1, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).relu().movedim(1, -1)


def test_dense_targets_by_a_task_made_by_hand() -> None:
    """As from_datasets says: outputs per place, a loss and a score of one's own; held as by a loop."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(12, 1, 3, 4, generator=generator, dtype=torch.float64)
    y = (x[:, 0] > 0).long()
    part = Tensors(x, y)
    with pytest.raises(ValueError, match=r"a target int64 of shape \(3, 4\) in task '0'"):
        from_datasets([(part, part)])

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.movedim(-1, 1), target)

    def share(output: Tensor, target: Tensor) -> Tensor:
        return (output.argmax(-1) == target).double().mean((1, 2))

    torch.manual_seed(0)
    model, mas = MultiHead(EveryPlace(), 4), MAS()
    scenario = Scenario((Task("0", part, part, outputs=2),))
    chosen: dict[str, Callable[..., Tensor]] = {"task_loss": loss, "score": share}
    result = Trainer(model, mas, **chosen, epochs=40, lr=0.05, batch_size=4).fit(scenario)
    output = model(x, 0)
    assert float(result.accuracy) == float((output.argmax(-1) == y).double().mean()) > 0.9
    assert mas.penalty is not None
    for name, omega in mas.penalty.omega.items():
        right = torch.zeros_like(omega)
        for each in x.split(1):
            value = model(each, 0).square().sum()
            right += torch.autograd.grad(value, model.get_parameter(name))[0].abs() / len(x)
        torch.testing.assert_close(omega, right, rtol=1e-9, atol=1e-12)


def test_floats_of_a_task_with_classes_are_not_rounded() -> None:
    x = torch.ones(6, INPUTS)
    part = Tensors(x, torch.tensor([0.0, 1.0, 0.4, 1.0, 0.0, 1.9]))
    scenario = Scenario((Task("a", part, part, (0, 1)),))
    with pytest.raises(ValueError, match=r"labels: got torch.float32 of shape .* in task 'a', exp"):
        Trainer(models.mlp((INPUTS,), (4,)), "finetune").fit(scenario)
