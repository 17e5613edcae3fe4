"""Regression: the inverse dynamics of a two-link arm whose payload and segments change from task to task."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.experiment import Cell, Found, Page, Results
from experiments.learned import GRID
from experiments.loops import (
    Batch,
    InOwnLoop,
    Network,
    SquaredGradients,
    Variant,
    learn_task,
)
from experiments.tables import number, percent, table
from mas_ext import models
from mas_ext.compare.charts import canvas, legend, look
from mas_ext.methods.ebll import EBLL
from mas_ext.methods.finetune import Finetune
from mas_ext.methods.imm import IMM, MeanIMM
from mas_ext.methods.lwf import LwF
from mas_ext.methods.mas import MAS
from mas_ext.methods.method import Method, Training
from mas_ext.methods.si import SI
from mas_ext.models import MultiHead

SCORE = "validation_explained"


class Arm(NamedTuple):
    """Lengths in m of both segments, rods of 1.5 kg a metre, and the payload at the end in kg."""

    upper: float = 0.5
    lower: float = 0.4
    payload: float = 0.0

    def torques(self, q: Tensor, dq: Tensor, ddq: Tensor) -> Tensor:
        """What moves it: angles in rad, velocities and accelerations (N, 2) -> Nm (N, 2).

        M(q) ddq + C(q, dq) dq + g(q) of a planar arm of two rods, angles from the horizontal and the upper arm.
        """
        (l1, l2, load), g = self, 9.81
        m1, m2 = 1.5 * l1, 1.5 * l2
        # First and second moments of all that hangs on a joint.
        first, second = (m2 / 2 + load) * l2, (m2 / 3 + load) * l2**2
        inner = (m1 / 3 + m2 + load) * l1**2
        bend = l1 * first * q[:, 1].cos()
        h = l1 * first * q[:, 1].sin()
        low = g * first * q.sum(1).cos()
        shoulder = (
            (inner + second + 2 * bend) * ddq[:, 0]
            + (second + bend) * ddq[:, 1]
            - h * (2 * dq[:, 0] * dq[:, 1] + dq[:, 1] ** 2)
            + g * (m1 / 2 + m2 + load) * l1 * q[:, 0].cos()
            + low
        )
        elbow = (second + bend) * ddq[:, 0] + second * ddq[:, 1] + h * dq[:, 0] ** 2 + low
        return torch.stack([shoulder, elbow], 1)


ARMS = {
    "no payload": Arm(),
    "1 kg": Arm(payload=1.0),
    "3 kg": Arm(payload=3.0),
    "longer forearm": Arm(lower=0.7),
    "shorter upper arm": Arm(upper=0.3),
}


class Squared(Method):
    """A method for regression: the mean squared error instead of the cross entropy."""

    def loss(self, training: Training, x: Tensor, y: Tensor) -> Tensor:
        """See Method.loss; y (N, outputs)."""
        return F.mse_loss(training.logits(x), y)


class Finetuning(Squared, Finetune):
    """On one task after another."""


class Joint(Squared):
    """On all tasks so far."""

    joint = True


class RegressionMAS(Squared, MAS):
    """MAS on the outputs as they are."""


class RegressionSI(Squared, SI):
    """The path integral of the squared error."""


class GaussianEWC(Squared, SquaredGradients):
    """EWC by the Fisher information of normal outputs with variance 1: f are the outputs."""

    def outputs(self, training: Training, network: Network, *sample: Tensor) -> Tensor:
        """See SquaredGradients.outputs."""
        (x,) = sample
        return network(x[None])[0]


class RegressionMeanIMM(Squared, MeanIMM):
    """The mean of the weights."""


class GaussianModeIMM(Squared, IMM):
    """The weights merged by the Fisher information of `GaussianEWC`."""

    def __init__(self, lam: float = 0.0) -> None:
        """lam: of L2-transfer; there is no dropout."""
        super().__init__(GaussianEWC(0.0), None, lam, 0.0, "gradient")


class RegressionLwF(LwF):
    """The squared error, and distillation as if the outputs were of classes."""

    def new_task_loss(self, training: Training, logits: Tensor, y: Tensor) -> Tensor:
        """See LwF.new_task_loss; y (N, outputs)."""
        return F.mse_loss(logits, y)


class RegressionEBLL(EBLL):
    """The same, with codes of the features."""

    new_task_loss = RegressionLwF.new_task_loss


ALPHA = partial(RegressionMAS, merge="consistent")
VARIANTS = {
    "finetune": Variant(Finetuning),
    "joint": Variant(Joint),
    "mas": Variant(RegressionMAS, "mas"),
    "mas-alpha": Variant(ALPHA, "mas-alpha"),
    "ewc": Variant(GaussianEWC, "ewc"),
    "si": Variant(RegressionSI, "si"),
    "imm-mean": Variant(RegressionMeanIMM),
    "imm-mode": Variant(GaussianModeIMM),
    "lwf": Variant(RegressionLwF, "lwf"),
    "ebll": Variant(RegressionEBLL, "lwf"),
    "mas, proximal": Variant(partial(RegressionMAS, mode="proximal"), "mas"),
    "mas-alpha, proximal": Variant(partial(ALPHA, mode="proximal"), "mas-alpha"),
}


@dataclass(frozen=True)
class Regression(InOwnLoop):
    """Squared error over variance, on all arms after each.

    samples: of an arm, to train on; a quarter as many for validation and for testing each.
    """

    title: ClassVar[str] = "Regression: the inverse dynamics of an arm"
    variants: ClassVar[Mapping[str, Variant]] = VARIANTS
    score: ClassVar[str] = SCORE
    samples: int = 2000
    epochs: int = 60
    batch_size: int = 100
    lr: float = 2e-3
    hidden: tuple[int, ...] = (64, 64)

    def quick(self) -> Regression:
        """Few samples and epochs, one seed."""
        return replace(self, samples=400, epochs=20, batch_size=50, seeds=1, grid=GRID[1:6])

    def protocol(self) -> dict[str, Any]:
        """See Experiment.protocol."""
        names = ("samples", "epochs", "batch_size", "lr", "hidden")
        return {"arms": ARMS, **{name: getattr(self, name) for name in names}}

    def plan(self, results: Results) -> Iterator[Cell]:
        """Every method with one seed, then with two, ..."""
        for seed in range(self.seeds):
            yield from self.cells(results, seed)

    def measure(self, cell: Cell) -> Found:
        """See Experiment.measure."""
        lam = {} if cell["lam"] is None else {"lam": cell["lam"]}
        with torch.random.fork_rng([]):
            torch.manual_seed(cell["seed"])
            return self.learn(VARIANTS[cell["method"]].make(**lam))

    def learn(self, method: Method) -> Found:
        """error[t, k], squared error over variance on arm k after arm t; the rest of 1 on validation data."""
        learn, check, test = (self.data_of(n) for n in (self.samples, *[self.samples // 4] * 2))
        model = models.mlp((8,), self.hidden)
        error: list[list[float]] = []
        make = partial(torch.optim.Adam, lr=self.lr)
        for task in range(len(ARMS)):
            model.add_head(2)
            optimizer = make(model.parameters())

            def batches(n: int | None, task: int = task) -> list[tuple[Tensor, Tensor]]:
                x, y = (part[:n].split(self.batch_size) for part in learn[task])
                return list(zip(x, y, strict=True))

            def order(tasks: Any = range(task + 1) if method.joint else [task]) -> Iterator[Batch]:
                for head, index in self._order(tasks):
                    x, y = learn[head]
                    yield head, x[index], y[index]

            training = Training(model, optimizer, task, "task", task, batches, make)
            loss = learn_task(method, training, self.epochs, order)
            if not math.isfinite(loss):
                return {"diverged": f"loss {loss} on arm {task}"}
            error.append([unexplained(model, k, *test[k]) for k in range(task + 1)])
        left = [unexplained(model, k, *check[k]) for k in range(len(ARMS))]
        return {"error": error, "validation_explained": 1 - sum(left) / len(left)}

    def data_of(self, samples: int) -> list[tuple[Tensor, Tensor]]:
        """By arm: sines, cosines of angles, velocities, accelerations (N, 8); torques in the first's scale."""
        found: list[tuple[Tensor, Tensor]] = []
        scale = torch.tensor(1.0)
        for arm in ARMS.values():
            q = torch.pi * (2 * torch.rand(samples, 2) - 1)
            dq, ddq = 3 * torch.randn(samples, 2), 5 * torch.randn(samples, 2)
            y = arm.torques(q, dq, ddq)
            scale = scale if found else y.std(0)
            found.append((torch.cat([q.sin(), q.cos(), dq / 3, ddq / 5], 1), y / scale))
        return found

    def _order(self, tasks: Any) -> list[tuple[int, Tensor]]:
        """An epoch's batches of these tasks, in random order: each of one task."""
        parts = [(k, i) for k in tasks for i in torch.randperm(self.samples).split(self.batch_size)]
        return [parts[i] for i in torch.randperm(len(parts)).tolist()]

    def errors(self, results: Results, name: str) -> tuple[float | None, list[Tensor]]:
        """The chosen lam, and error[t, k] of every seed that did not diverge, NaN for k > t."""
        lam, found = self.finals(results, name)
        rows = [f["error"] for f in found]
        padded = [[[*row, *[torch.nan] * (len(ARMS) - len(row))] for row in each] for each in rows]
        return lam, [torch.tensor(each, dtype=torch.float64) for each in padded]

    def show(self, results: Results) -> Page:
        """A table, and a picture of the errors as arms come."""
        rows = []
        figure, panels = canvas(2, 2, 3.6)
        for i, name in enumerate(VARIANTS):
            lam, errors = self.errors(results, name)
            if not errors:
                continue
            columns = (
                [float(e[-1].mean()) for e in errors],
                [float(e.diagonal().mean()) for e in errors],
                [float((e[-1] - e.diagonal())[:-1].mean()) for e in errors],
            )
            rows.append(
                (f"`{name}`", *(percent(c) for c in columns), number(lam), str(len(errors)))
            )
            mean = 100 * torch.stack(errors).mean(0)
            panels[0].plot(range(1, 6), mean.nanmean(1), label=name, **look(i))
            panels[1].plot(range(1, 6), mean[-1], **look(i))
        for panel, words in zip(panels, ("arms learned", "arm"), strict=True):
            panel.set_yscale("log")
            panel.set_xticks(range(1, len(ARMS) + 1))
            panel.set_xlabel(words)
            panel.grid(alpha=0.3)
        panels[0].set_title("mean over the arms so far", fontsize="medium")
        panels[1].set_title("after the last arm", fontsize="medium")
        figure.supylabel("squared error in % of the variance", fontsize="medium")
        legend(figure, panels[0])
        titles = ("method", "error, %", "error when new, %", "forgetting, %", "lam", "seeds")
        text = [table(titles, rows), results.place(), "![errors by arm](regression.png)"]
        return Page("\n\n".join(text), {"regression.png": figure})


@torch.no_grad()
def unexplained(model: MultiHead, head: int, x: Tensor, y: Tensor) -> float:
    """Squared error over variance: (N, inputs), (N, outputs)."""
    return float((model(x, head) - y).square().mean() / y.var(0).mean())
