"""Training on three tasks, and the same once more by plain loops over float64 tensors: methods are compared."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mas_ext.methods import Method, Training
from mas_ext.models import MultiHead
from mas_ext.optim.hooks import Mode
from mas_ext.scenarios import Scenario, Task, Tensors, from_datasets
from mas_ext.state import files as checkpoint
from mas_ext.training.run import Learning
from mas_ext.training.settings import Settings

Weights = dict[str, Tensor]

TASKS, SAMPLES, INPUTS, WIDTH = 3, 20, 5, 6
SETTINGS = ("task", "domain", "class")


def scenario(setting: str) -> Scenario:
    """Two classes a task, other ones in every task but for the domain-incremental setting."""
    generator = torch.Generator().manual_seed(1)
    pairs = []
    for task in range(TASKS):
        y = torch.arange(SAMPLES) % 2
        centres = torch.randn(2, INPUTS, generator=generator, dtype=torch.float64)
        noise = torch.randn(SAMPLES, INPUTS, generator=generator, dtype=torch.float64)
        data = Tensors(centres[y] + 0.7 * noise, y + (0 if setting == "domain" else 2 * task))
        pairs.append((data, data))
    return from_datasets(pairs)


def regression() -> Scenario:
    """Two outputs per task, of other functions of the input in every task."""
    generator = torch.Generator().manual_seed(2)
    tasks = []
    for task in range(TASKS):
        x = torch.randn(SAMPLES, INPUTS, generator=generator, dtype=torch.float64)
        weights = torch.randn(INPUTS, 2, generator=generator, dtype=torch.float64)
        data = Tensors(x, (x @ weights).sin() + task)
        tasks.append(Task(str(task), data, data, outputs=2))
    return Scenario(tuple(tasks))


class Network(MultiHead):
    """One hidden layer, and the values that heads begin with."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.Tanh()), WIDTH)
        self.double()
        self.first = weights(self)

    def add_head(self, classes: int) -> None:
        super().add_head(classes)
        self.first.update({n: p for n, p in weights(self).items() if n not in self.first})


def weights(model: nn.Module) -> Weights:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@dataclass
class Batch:
    """What a step was taken on."""

    x: Tensor
    y: Tensor
    epoch: int
    observing: bool


def steps(learning: Learning) -> Generator[None, None, None]:
    """Learn all tasks; a yield after every step and after every task."""
    while learning.at.task < len(learning.tasks):
        if not learning.inside:
            learning.begin_task()
        while learning.epochs_left():
            for _ in learning.steps():
                yield
            learning.end_epoch()
        learning.end_task()
        yield


def start(
    method: Method,
    setting: str,
    seed: int = 0,
    device: str = "cpu",
    squared: bool = False,
    data: Scenario | None = None,
    **settings: Any,
) -> Learning:
    """A run that is about to begin; its data have batches of 8, 8 and 4 samples; squared: a regression."""
    torch.manual_seed(seed)
    chosen = {"optimizer": "sgd", "lr": 0.05, "epochs": 2, "batch_size": 8, **settings}
    if squared:
        chosen["task_loss"] = F.mse_loss
    return Learning(
        Network(),
        method,
        Settings(setting=setting, **chosen),  # type: ignore[arg-type]
        data or (regression() if squared else scenario(setting)),
        torch.device(device),
    )


def learn(
    method: Method, setting: str, **settings: Any
) -> tuple[Network, list[list[Batch]], list[Weights]]:
    """Learn all tasks: the model, each task's batches, and the weights after each task."""
    learning = start(method, setting, **settings)
    log: list[list[Batch]] = [[] for _ in range(TASKS)]
    found: list[Weights] = []
    loss, end_task = method.loss, method.end_task

    def recorded(training: Training, x: Tensor, y: Tensor) -> Tensor:
        log[training.task].append(Batch(x, y, learning.at.epoch, training.observing))
        return loss(training, x, y)

    def ended(training: Training) -> None:
        end_task(training)
        found.append(weights(training.model))

    vars(method).update(loss=recorded, end_task=ended)
    for _ in steps(learning):
        pass
    assert isinstance(learning.model, Network)
    return learning.model, log, found


def resumed(make: Callable[[], Method], setting: str, after: int, **settings: Any) -> None:
    """Assert that a run stopped after so many yields of `steps` goes on elsewhere to the same bits."""
    whole = start(make(), setting, **settings)
    for _ in steps(whole):
        pass
    stopped = start(make(), setting, **settings)
    running = steps(stopped)
    for _ in range(after):
        next(running)
    packed = {n: t.clone() for n, t in checkpoint.pack(stopped.state_dict()).items()}
    running.close()
    elsewhere = start(make(), setting, seed=1, **settings)
    elsewhere.load_state_dict(checkpoint.unpack(packed))
    for _ in steps(elsewhere):
        pass
    right, got = (
        {**weights(run.model), **checkpoint.pack(run.method.state_dict())}
        for run in (whole, elsewhere)
    )
    assert right.keys() == got.keys()
    for name, t in right.items():
        assert torch.equal(t, got[name]), name


def assert_close(got: Weights, right: Weights) -> None:
    assert got.keys() == right.keys()
    for name, t in right.items():
        torch.testing.assert_close(got[name], t, rtol=0, atol=1e-10, msg=name)


@dataclass
class Naive:
    """Cross entropy + sum over terms of sum omega (theta - anchor)^2, step by step.

    Subclasses make terms, (omega, anchor), at the end of tasks. squared: the mean squared error instead, and
    the Fisher information of normal outputs. by_batch: n times the square of the mean gradient of n samples.
    """

    setting: str
    optimizer: str = "sgd"
    lr: float = 0.05
    clip: float | None = None
    decay: float = 0.0
    mode: Mode = "gradient"
    labels: str = "true"
    by_batch: bool = False
    squared: bool = False
    theta: Weights = field(default_factory=dict)
    terms: list[tuple[Weights, Weights]] = field(default_factory=list)

    def learn(self, first: Weights, log: list[list[Batch]]) -> list[Weights]:
        """The weights after each task, from those that they began with and the batches."""
        found = []
        self.theta = {n: t.clone() for n, t in first.items() if n.startswith("backbone")}
        for task, batches in enumerate(log):
            self.task = task
            head = f"heads.{0 if self.setting == 'domain' else task}."
            if head + "weight" not in self.theta:
                self.theta.update({n: t.clone() for n, t in first.items() if n.startswith(head)})
            self.memory: dict[str, Any] = {}
            self.observed: list[tuple[int, Weights]] = []
            self.begin()
            for number, batch in enumerate(batches):
                self.step(number + 1, batch)
                if batch.observing:
                    self.observed.append((len(batch.y), self.fisher(batch.x, batch.y)))
            once = [batch for batch in batches if batch.epoch == 0]
            x, y = torch.cat([batch.x for batch in once]), torch.cat([batch.y for batch in once])
            assert len(x) == SAMPLES
            self.end(x, y)
            found.append({n: t.clone() for n, t in self.theta.items()})
        return found

    def held(self) -> Weights:
        """A copy of the weights that more than one task uses."""
        shared = "backbone" if self.setting == "task" else ""
        return {n: t.clone() for n, t in self.theta.items() if n.startswith(shared)}

    def logits(self, x: Tensor, theta: Weights) -> Tensor:
        """(N, classes) of the present task."""
        hidden = torch.tanh(x @ theta["backbone.0.weight"].T + theta["backbone.0.bias"])
        heads = {"task": [self.task], "domain": [0], "class": range(self.task + 1)}[self.setting]
        return torch.cat(
            [hidden @ theta[f"heads.{h}.weight"].T + theta[f"heads.{h}.bias"] for h in heads], 1
        )

    def log_p(self, x: Tensor, theta: Weights, sign: int = 1) -> Tensor:
        """Of the same shape."""
        logits = sign * self.logits(x, theta)
        return logits - logits.exp().sum(1, keepdim=True).log()

    def true_log_p(self, x: Tensor, y: Tensor, theta: Weights) -> Tensor:
        """log p of labels as the Fisher information takes it, (N,)."""
        sign = -1 if self.labels == "reversed" else 1
        return self.log_p(x, theta, sign)[torch.arange(len(y)), y]

    def gradients(self, value: Callable[[Weights], Tensor]) -> Weights:
        """d value / d theta, of the weights that it depends on."""
        theta = {n: t.clone().requires_grad_() for n, t in self.theta.items()}
        found = torch.autograd.grad(value(theta), list(theta.values()), allow_unused=True)
        return {n: g for n, g in zip(theta, found, strict=True) if g is not None}

    def loss(self, batch: Batch, theta: Weights) -> Tensor:
        """The task loss, 0-dim."""
        if self.squared:
            return ((self.logits(batch.x, theta) - batch.y) ** 2).sum() / batch.y.numel()
        return -self.log_p(batch.x, theta)[torch.arange(len(batch.y)), batch.y].mean()

    def step(self, number: int, batch: Batch) -> None:
        g = self.gradients(lambda theta: self.loss(batch, theta))
        if self.clip is not None:
            norm = float(sum(t.square().sum() for t in g.values())) ** 0.5
            g = {n: t * min(1.0, self.clip / (norm + 1e-6)) for n, t in g.items()}
        before = {n: t.clone() for n, t in self.theta.items()}
        for name, own in g.items():
            terms = [(w[name], a[name]) for w, a in self.terms if name in w]
            theta = self.theta[name]
            total = own + self.decay * theta
            if self.mode == "gradient":
                for omega, anchor in terms:
                    total = total + 2 * omega * (theta - anchor)
            eta = self._move(name, total, number)
            if self.mode == "proximal":
                weight = sum((2 * eta * omega for omega, _ in terms), torch.zeros_like(theta))
                pull = sum((2 * eta * omega * a for omega, a in terms), torch.zeros_like(theta))
                self.theta[name] = (self.theta[name] + pull) / (1 + weight)
        self.stepped(batch, g, before)

    def _move(self, name: str, g: Tensor, number: int) -> Tensor | float:
        """A step of the optimizer; what it multiplied the gradient by."""
        m, v = self.memory.get(name, (torch.zeros_like(g), torch.zeros_like(g)))
        if self.optimizer == "sgd":
            m = 0.9 * m + g
            self.theta[name] = self.theta[name] - self.lr * m
            self.memory[name] = m, v
            return self.lr / (1 - 0.9)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        self.memory[name] = m, v
        eta = self.lr / ((v / (1 - 0.999**number)).sqrt() + 1e-8)
        self.theta[name] = self.theta[name] - eta * m / (1 - 0.9**number)
        return eta

    def fisher(self, x: Tensor, y: Tensor) -> Weights:
        """Sum over samples of (d log p(y) / d theta)^2, for the true y or the mean over all."""
        total = {n: torch.zeros_like(t) for n, t in self.held().items()}
        if self.by_batch:
            g = self.gradients(lambda theta: self.true_log_p(x, y, theta).mean())
            return {name: len(y) * g[name].square() for name in total}
        if self.squared:
            for sample in x.split(1):
                for c in range(y.shape[1]):
                    g = self.gradients(lambda theta: self.logits(sample, theta)[0, c])  # noqa: B023
                    total = {name: t + g[name].square() for name, t in total.items()}
            return total
        for sample, true in zip(x.split(1), y.tolist(), strict=True):
            p = self.log_p(sample, self.theta)[0].exp().tolist()
            chosen = dict(enumerate(p)) if self.labels == "all" else {true: 1.0}
            for label, weight in chosen.items():
                y = torch.tensor([label])
                g = self.gradients(lambda theta: self.true_log_p(sample, y, theta)[0])  # noqa: B023
                for name in total:
                    total[name] += weight * g[name].square()
        return total

    def mean_fisher(self, x: Tensor, y: Tensor) -> Weights:
        """Over these samples, or over those that were observed during training."""
        sums = self.observed or [(len(y), self.fisher(x, y))]
        samples = sum(n for n, _ in sums)
        return {name: sum(t[name] for _, t in sums) / samples for name in sums[0][1]}

    def begin(self) -> None:
        """Before a task's first step."""

    def stepped(self, batch: Batch, g: Weights, before: Weights) -> None:
        """After a step: the loss's gradient, and the weights before the step."""

    def end(self, x: Tensor, y: Tensor) -> None:
        """After a task's last step; all its samples."""


def compare(method: Method, naive: Naive, **settings: Any) -> list[Weights]:
    """Assert that a method learns what its naive version does; the weights after each task."""
    same = ("optimizer", "lr", "clip", "squared")
    settings = {**{name: getattr(naive, name) for name in same}, **settings}
    model, log, found = learn(method, naive.setting, **settings)
    for got, right in zip(found, naive.learn(model.first, log), strict=True):
        assert_close(got, right)
    return found
