"""Regression: the inverse dynamics of a two-link arm whose payload and segments change from task to task."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from experiments.experiment import Page, Results
from experiments.learned import GRID, with_auto
from experiments.loops import Batch, InOwnLoop, Pair, SquaredGradients, Variant, course
from experiments.tables import number, percent, table
from mas_ext import models
from mas_ext.comparison.cells import Cell, Found
from mas_ext.methods.ebll import EBLL
from mas_ext.methods.finetune import Finetune
from mas_ext.methods.imm import IMM, MeanIMM
from mas_ext.methods.joint import Joint
from mas_ext.methods.lwf import LwF
from mas_ext.methods.mas import MAS
from mas_ext.methods.method import Method, Training
from mas_ext.methods.quadratic import Lam, Quadratic
from mas_ext.methods.si import SI
from mas_ext.models import MultiHead
from mas_ext.penalty import FusedMASPenalty
from mas_ext.training.lam import choose_lam


class Arm(NamedTuple):
    """Lengths in m of both segments, rods of 1.5 kg per metre, and the payload at the end in kg."""

    upper: float = 0.5
    lower: float = 0.4
    payload: float = 0.0

    def torques(self, q: Tensor, dq: Tensor, ddq: Tensor) -> Tensor:
        """Torques that move it: angles in rad, velocities and accelerations (N, 2) -> Nm (N, 2).

        M(q) ddq + C(q, dq) dq + g(q) of a planar arm of two rods, angles from the horizontal and the upper arm.
        """
        (l1, l2, load), g = self, 9.81
        m1, m2 = 1.5 * l1, 1.5 * l2
        # First and second moments of all that a joint carries.
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


ALPHA = partial(MAS, merge="consistent", anchor="own")
# With lam "auto", which another loop than the Trainer's chooses by mas_ext.choose_lam.
AUTOMATIC = ("mas", "mas-alpha", "ewc", "si")
# LwF and EBLL take outputs for logits of classes, as their papers do.
TAUGHT: dict[str, Any] = {"distance": "softmax"}
VARIANTS = {
    "finetune": Variant(Finetune),
    "joint": Variant(Joint),
    "mas": Variant(MAS, "mas"),
    "mas-alpha": Variant(ALPHA, "mas-alpha"),
    "ewc": Variant(SquaredGradients, "ewc"),
    "si": Variant(SI, "si"),
    "imm-mean": Variant(MeanIMM),
    "imm-mode": Variant(lambda lam=0.0: IMM(SquaredGradients(0.0), lam=lam)),
    "lwf": Variant(partial(LwF, **TAUGHT), "lwf"),
    "ebll": Variant(partial(EBLL, **TAUGHT), "lwf"),
    "mas, proximal": Variant(partial(MAS, mode="proximal"), "mas"),
    "mas-alpha, proximal": Variant(partial(ALPHA, mode="proximal"), "mas-alpha"),
}


@dataclass(frozen=True)
class Regression(InOwnLoop):
    """Squared error over variance, on all arms after each.

    samples: of an arm, to train on; a quarter as many for validation and for testing each.
    """

    title: ClassVar[str] = "Regression: the inverse dynamics of an arm"
    variants: ClassVar[Mapping[str, Variant]] = VARIANTS
    score: ClassVar[str] = "validation_explained"
    samples: int = 2000
    epochs: int = 60
    batch_size: int = 100
    hidden: tuple[int, ...] = (64, 64)

    def quick(self) -> Regression:
        """Few samples and epochs, one seed."""
        return replace(self, samples=400, epochs=20, batch_size=50, seeds=1, grid=GRID[1:6])

    def protocol(self) -> dict[str, Any]:
        names = ("samples", "epochs", "batch_size", "lr", "hidden")
        return {"arms": ARMS, **{name: getattr(self, name) for name in names}}

    def plan(self, results: Results) -> Iterator[Cell]:
        """Every method with one seed, then with two, ..., and then with lam "auto"."""
        for seed in range(self.seeds):
            yield from self.cells(results, seed)
        for seed in range(self.seeds):
            for name in AUTOMATIC:
                yield {"method": name, "lam": "auto", "seed": seed, "purpose": "auto"}

    def measure_seeded(self, cell: Cell) -> Found:
        return self.learn(self.method(cell))

    def learn(self, method: Method) -> Found:
        """error[t, k], squared error over variance on arm k after arm t; 1 minus that on validation data."""
        learn, check, test = (self.data_of(n) for n in (self.samples, *[self.samples // 4] * 2))
        model = models.mlp((8,), self.hidden)
        error: list[list[float]] = []
        lams: list[float] = []
        for task, pair in enumerate(learn):
            model.add_head(2)

            def order(tasks: Any = range(task + 1) if method.joint else [task]) -> Iterator[Batch]:
                for head, index in self._order(tasks):
                    x, y = learn[head]
                    yield head, x[index], y[index]

            training = self.training(model, task, "task", task, pair, F.mse_loss)
            if task and isinstance(method, Quadratic) and method.automatic:
                assert method.penalty is not None
                lams.append(self._choose_lam(method.penalty, training, order, check[task], lams))
                method.penalty.lam = lams[-1]
            self.learn_task(method, training, order)
            error.append([unexplained(model, k, *test[k]) for k in range(task + 1)])
        if lams:
            return {"error": error, "chosen_lam": lams}
        left = [unexplained(model, k, *check[k]) for k in range(len(ARMS))]
        return {"error": error, "validation_explained": 1 - sum(left) / len(left)}

    def _choose_lam(
        self,
        penalty: FusedMASPenalty,
        training: Training,
        order: Callable[[], Iterator[Batch]],
        held_out: Pair,
        before: Sequence[float],
    ) -> float:
        """The lam for a new arm, from its own data."""
        model = training.model
        x_new, y_new = held_out

        def learn() -> Generator[Optimizer, None, None]:
            optimizer = training.make_optimizer(model.parameters())
            for _ in range(self.epochs):
                for head, x, y in order():
                    optimizer.zero_grad()
                    F.mse_loss(model(x, head), y).backward()
                    optimizer.step()
                    yield optimizer

        @torch.no_grad()
        def measure() -> tuple[float, list[Tensor]]:
            *old, output = (model(x_new, head) for head in range(training.task + 1))
            return float(F.mse_loss(output, y_new)), old

        return choose_lam(penalty, learn, measure, before=before)

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

    def show(self, results: Results) -> Page:
        """A table, and a picture of the errors as arms come."""
        rows, by_method = [], {}
        for name in VARIANTS:
            lam, found = self.finals(results, name)
            if not found:
                continue
            errors = [_square(each["error"]) for each in found]
            by_method[name] = errors
            columns = (
                [float(e[-1].mean()) for e in errors],
                [float(e.diagonal().mean()) for e in errors],
                [float((e[-1] - e.diagonal())[:-1].mean()) for e in errors],
            )
            shown = (*map(percent, columns), number(lam), str(len(errors)))
            rows.append((f"`{name}`", *shown))
        titles = ("method", "error, %", "error when new, %", "forgetting, %", "lam", "seeds")
        text = [table(titles, rows)]

        def by_seed(name: str, purpose: str, lam: Lam | None) -> dict[int, Found]:
            return results.by_seed(method=name, purpose=purpose, lam=lam)

        text += with_auto(
            [
                (
                    f"`{name}`",
                    by_seed(name, "auto", "auto"),
                    by_seed(name, "final", self.finals(results, name)[0]),
                )
                for name in AUTOMATIC
            ],
            lambda found: float(_square(found["error"])[-1].mean()),
        )
        text += [results.place(), "![errors by arm](regression.svg)"]
        figure = course(by_method, "arm", "squared error in % of the variance")
        for panel in figure.axes:
            panel.set_yscale("log")
        return Page("\n\n".join(text), {"regression.svg": figure})


def _square(rows: Sequence[Sequence[float]]) -> Tensor:
    """error[t, k] as (T, T), NaN for k > t."""
    padded = [[*row, *[torch.nan] * (len(rows) - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.float64)


@torch.no_grad()
def unexplained(model: MultiHead, head: int, x: Tensor, y: Tensor) -> float:
    """Squared error over variance: (N, inputs), (N, outputs)."""
    return float((model(x, head) - y).square().mean() / y.var(0).mean())
