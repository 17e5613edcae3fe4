"""LwF and EBLL once more, by plain gradient descent on whole tasks, and what else their tests share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from mas_ext.methods import Method, Setting
from mas_ext.models import MultiHead
from mas_ext.scenarios import Scenario, Tensors, from_datasets
from mas_ext.trainer import Trainer
from mas_ext.training.run import Learning

INPUTS, WIDTH, LR, EPOCHS, SEED = 3, 6, 0.3, 4, 5
Pair = tuple[Tensor, Tensor]


def tasks(setting: Setting, count: int = 3) -> list[Pair]:
    """Samples and labels of each task; as many classes for all where there is one head."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for classes in (3, 3, 3) if setting == "domain" else (2, 3, 2):
        x = torch.randn(12, INPUTS, dtype=torch.float64, generator=generator)
        made.append((x, torch.arange(12) % classes))
    return made[:count]


def scenario(pairs: Sequence[Pair]) -> Scenario:
    """The same as Trainer takes it."""
    return from_datasets([(Tensors(*pair), Tensors(*pair)) for pair in pairs])


def model() -> MultiHead:
    """A smooth network in float64, the same on every call."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        backbone = nn.Sequential(nn.Linear(INPUTS, WIDTH, dtype=torch.float64), nn.Tanh())
    return MultiHead(backbone, WIDTH)


def trainer(learner: MultiHead, method: Method, setting: Setting, **settings: Any) -> Trainer:
    """All samples in one batch, unless settings say otherwise."""
    chosen: dict[str, Any] = {
        "optimizer": lambda parameters, lr: torch.optim.SGD(parameters, lr),
        "lr": LR,
        "epochs": EPOCHS,
        "batch_size": 100,
        "seed": SEED,
        **settings,
    }
    return Trainer(learner, method, setting=setting, **chosen)


def run_of(method: Method, setting: Setting, learner: MultiHead, **settings: Any) -> Learning:
    """The same as a run that is taken step by step."""
    its = trainer(learner, method, setting, **settings)
    pairs = scenario(tasks(setting))
    return Learning(its.model, its.method, its.settings, pairs, torch.device("cpu"))


def train(run: Learning) -> None:
    """What is left of a task, but for its end."""
    while run.epochs_left():
        for _ in run.steps():
            pass
        run.end_epoch()


def learn_task(run: Learning) -> None:
    """A task from its beginning to its end."""
    run.begin_task()
    train(run)
    run.end_task()


def with_statistics() -> MultiHead:
    """A model that has BatchNorm and dropout."""
    layers = [nn.Linear(INPUTS, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Tanh()]
    return MultiHead(nn.Sequential(*layers, nn.Linear(8, WIDTH)), WIDTH).double()


def copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether all bits are."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@dataclass
class Encoding:
    """What EBLL has beyond LwF."""

    alpha: float
    code: int
    reconstruction: float
    epochs: int
    lr: float


def probabilities(z: Tensor, temperature: float = 1.0) -> Tensor:
    """Softmax, raised to 1/T and made to sum to one again."""
    p = z.exp() / z.exp().sum(1, keepdim=True)
    p = p ** (1 / temperature)
    return p / p.sum(1, keepdim=True)


def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    """Mean of -log p_y."""
    return -sum(probabilities(z)[i, y[i]].log() for i in range(len(y))) / len(y)  # type: ignore[return-value]


def distance(z: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Mean over samples of -sum_c q'_c log q_c."""
    q, q_target = probabilities(z, temperature), probabilities(target, temperature)
    return -(q_target * q.log()).sum() / len(z)


def linear(x: Tensor, layer: Sequence[Tensor]) -> Tensor:
    return x @ layer[0].T + layer[1]


def side_by_side(features: Tensor, heads: Sequence[Sequence[Tensor]]) -> Tensor:
    return torch.cat([linear(features, head) for head in heads], 1)


def descend(parameters: Sequence[Tensor], loss: Callable[[], Tensor], steps: int) -> None:
    """Plain gradient descent."""
    for _ in range(steps):
        gradients = torch.autograd.grad(loss(), list(parameters))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.data -= LR * gradient


def adadelta(
    parameters: Sequence[Tensor], loss: Callable[[], Tensor], steps: int, lr: float
) -> None:
    """Zeiler 2012, with the constants of torch."""
    squares = [torch.zeros_like(p) for p in parameters]
    moved = [torch.zeros_like(p) for p in parameters]
    for _ in range(steps):
        gradients = torch.autograd.grad(loss(), list(parameters))
        for i, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
            squares[i] = 0.9 * squares[i] + 0.1 * gradient**2
            delta = ((moved[i] + 1e-6) / (squares[i] + 1e-6)).sqrt() * gradient
            moved[i] = 0.9 * moved[i] + 0.1 * delta**2
            parameter.data -= lr * delta


def parameters_after(
    setting: Setting,
    pairs: Sequence[Pair],
    *,
    lam: float,
    temperature: float,
    warm_up: int,
    encoding: Encoding | None = None,
) -> dict[str, Tensor]:
    """The parameters after the last task, by name."""
    torch.manual_seed(SEED)

    def new_layer(inputs: int, outputs: int) -> list[Tensor]:
        layer = nn.Linear(inputs, outputs, dtype=torch.float64)
        return [layer.weight, layer.bias]

    body: list[Tensor] = list(model().backbone.parameters())
    heads: list[list[Tensor]] = []
    encoders: list[list[Tensor]] = []

    def one_task(task: int, x: Tensor, y: Tensor) -> None:
        if task == 0 or setting != "domain":
            heads.append(new_layer(WIDTH, int(y.max()) + 1))
        old_body = [p.detach().clone() for p in body]
        old_heads = [[p.detach().clone() for p in head] for head in heads]
        before = sum(len(head[1]) for head in heads[:-1])

        def present(features: Tensor) -> Tensor:
            return cross_entropy(linear(features, heads[0 if setting == "domain" else task]), y)

        def whole() -> Tensor:
            features, old = linear(x, body).tanh(), linear(x, old_body).tanh()
            loss = present(features)
            if task == 0:
                return loss
            if setting == "class":
                now = side_by_side(features, heads)[:, :before]
                then = side_by_side(old, old_heads)[:, :before]
                loss = loss + lam * distance(now, then, temperature)
            else:
                for k in range(task if setting == "task" else 1):
                    now, then = linear(features, heads[k]), linear(old, old_heads[k])
                    loss = loss + lam * distance(now, then, temperature)
            for encoder in encoders:
                now, then = linear(features, encoder).sigmoid(), linear(old, encoder).sigmoid()
                loss = loss + encoding.alpha / 2 * ((now - then) ** 2).sum() / len(x)
            return loss

        def rebuilding() -> Tensor:
            features = linear(x, body).tanh().detach()
            rebuilt = linear(linear(features, encoder).sigmoid(), decoder)
            squares = ((rebuilt - features) ** 2).sum() / len(x)
            return encoding.reconstruction * squares + present(rebuilt)

        if task > 0 and setting != "domain":
            descend(heads[-1], lambda: present(linear(x, body).tanh()), warm_up)
        descend([*body, *chain.from_iterable(heads)], whole, EPOCHS)
        if encoding is not None:
            encoder, decoder = new_layer(WIDTH, encoding.code), new_layer(encoding.code, WIDTH)
            adadelta([*encoder, *decoder], rebuilding, encoding.epochs, encoding.lr)
            encoders.append([p.detach() for p in encoder])

    for task, pair in enumerate(pairs):
        one_task(task, *pair)
    names = [f"heads.{k}.{kind}" for k in range(len(heads)) for kind in ("weight", "bias")]
    names = ["backbone.0.weight", "backbone.0.bias", *names]
    return dict(zip(names, [*body, *chain.from_iterable(heads)], strict=True))
