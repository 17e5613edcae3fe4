"""A model of one product, what is remembered of its tasks, and its optimizers written out in NumPy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from oracles import naive
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from mas_ext import FusedMASPenalty

LAM = 0.7
Array = naive.Array


class Product(nn.Module):
    """y_i = theta_i x_i, whose Omega_i is mean 2 x_i^2 |theta_i|; theta in three parameters."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(3, dtype=dtype))
        self.b = nn.Parameter(torch.randn(2, 2, dtype=dtype))
        self.c = nn.Parameter(torch.randn((), dtype=dtype))

    def theta(self) -> Tensor:
        return torch.cat([p.reshape(-1) for p in self.parameters()])

    def forward(self, x: Tensor) -> Tensor:
        return x * self.theta()


def array(t: Tensor) -> Array:
    return t.detach().double().cpu().numpy().copy()


class Held(NamedTuple):
    """A model after two tasks; what is remembered of them, by the formula; and the loss of a third.

    loss = sum h (theta - target)^2 / 2.
    """

    model: Product
    penalty: FusedMASPenalty
    omega: Array
    anchor: Array
    target: Tensor
    h: Tensor

    def loss(self) -> Tensor:
        return 0.5 * (self.h * (self.model.theta() - self.target).square()).sum()

    def slope(self, theta: Array) -> Array:
        return array(self.h) * (theta - array(self.target))

    @property
    def alpha(self) -> Array:
        return np.full(2, self.penalty.lam)

    def naive_penalty(self) -> Tensor:
        distance = self.model.theta() - torch.from_numpy(self.anchor)
        return self.penalty.lam * (torch.from_numpy(self.omega) * distance.square()).sum()


def held(
    lam: float = LAM, dtype: torch.dtype = torch.float64, seed: int = 3, device: str = "cpu"
) -> Held:
    torch.manual_seed(seed)
    model = Product(dtype).to(device)
    penalty = FusedMASPenalty(model, lam=lam, anchor="own", omega_dtype=torch.float64)
    omega, anchor = [], []
    for _ in range(2):
        x = torch.randn(5, 8, dtype=dtype).to(device)
        theta = array(model.theta())
        omega.append((2 * array(x) ** 2 * np.abs(theta)).mean(0))
        anchor.append(theta)
        penalty.consolidate([x[:3], x[3:]])
        with torch.no_grad():
            for p in model.parameters():
                p += torch.randn(p.shape, dtype=dtype).to(device)
    target, h = torch.randn(8, dtype=dtype) * 2, torch.rand(8, dtype=dtype) + 0.5
    return Held(model, penalty, np.stack(omega), np.stack(anchor), target.to(device), h.to(device))


def train(
    case: Held, optimizers: Sequence[Optimizer], loss: Callable[[], Tensor], steps: int
) -> Array:
    """The parameters after every step, shape (steps, 8)."""
    path = []
    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss().backward()
        for optimizer in optimizers:
            optimizer.step()
        path.append(array(case.model.theta()))
    return np.stack(path)


class Settings(NamedTuple):
    """A torch optimizer and the settings of its naive twin."""

    optimizer: type[Optimizer]
    options: dict[str, Any]


SETTINGS = {
    "sgd": Settings(SGD, {"lr": 0.1}),
    "sgd_decay": Settings(SGD, {"lr": 0.1, "weight_decay": 0.2}),
    "sgd_momentum": Settings(SGD, {"lr": 0.05, "momentum": 0.9}),
    "sgd_nesterov": Settings(SGD, {"lr": 0.05, "momentum": 0.8, "nesterov": True}),
    "sgd_dampening": Settings(SGD, {"lr": 0.1, "momentum": 0.8, "dampening": 0.5}),
    "sgd_dampening_only": Settings(SGD, {"lr": 0.1, "dampening": 0.5}),
    "sgd_tensor_lr": Settings(SGD, {"lr": torch.tensor(0.1, dtype=torch.float64)}),
    "sgd_foreach": Settings(SGD, {"lr": 0.05, "momentum": 0.9, "foreach": True}),
    "sgd_fused": Settings(SGD, {"lr": 0.05, "momentum": 0.9, "fused": True}),
    "adam": Settings(Adam, {"lr": 0.1}),
    "adam_betas_eps": Settings(Adam, {"lr": 0.1, "betas": (0.5, 0.8), "eps": 0.1}),
    "adam_decay": Settings(Adam, {"lr": 0.1, "weight_decay": 0.2}),
    "adam_amsgrad": Settings(Adam, {"lr": 0.1, "betas": (0.5, 0.5), "amsgrad": True}),
    "adam_foreach": Settings(Adam, {"lr": 0.1, "foreach": True}),
    "adam_fused": Settings(Adam, {"lr": 0.1, "fused": True}),
    "adamw": Settings(AdamW, {"lr": 0.1, "weight_decay": 0.3}),
    "adamw_amsgrad": Settings(AdamW, {"lr": 0.1, "betas": (0.5, 0.5), "amsgrad": True}),
    "adamw_fused": Settings(AdamW, {"lr": 0.1, "fused": True}),
}


class NaiveSGD:
    """torch.optim.SGD by its documentation."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.o = {
            "momentum": 0.0,
            "dampening": 0.0,
            "nesterov": False,
            "weight_decay": 0.0,
        } | options
        self.momentum: Array | None = None

    def step(self, theta: Array, slope: Array, lr: Any) -> tuple[Array, Array]:
        """The new theta, and what multiplied the gradient in the long run."""
        o, mu = self.o, self.o["momentum"]
        g = slope + o["weight_decay"] * theta
        if mu == 0:
            return theta - lr * g, lr * np.ones_like(theta)
        first = self.momentum is None
        self.momentum = g if first else mu * self.momentum + (1 - o["dampening"]) * g
        g = g + mu * self.momentum if o["nesterov"] else self.momentum
        return theta - lr * g, lr * (1 - o["dampening"]) / (1 - mu) * np.ones_like(theta)


class NaiveAdam:
    """torch.optim.Adam and AdamW by their documentation."""

    def __init__(self, options: dict[str, Any], decoupled: bool) -> None:
        defaults = {"betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False}
        self.o = defaults | {"weight_decay": 0.01 if decoupled else 0.0} | options
        self.decoupled, self.t = decoupled, 0
        self.m: Any = 0.0
        self.v: Any = 0.0
        self.largest: Any = 0.0

    def step(self, theta: Array, slope: Array, lr: Any) -> tuple[Array, Array]:
        """The new theta, and what multiplied the gradient."""
        o, (beta1, beta2), decay = self.o, self.o["betas"], self.o["weight_decay"]
        self.t += 1
        g = slope if self.decoupled else slope + decay * theta
        theta = theta * (1 - lr * decay) if self.decoupled else theta
        self.m = beta1 * self.m + (1 - beta1) * g
        self.v = beta2 * self.v + (1 - beta2) * g**2
        self.largest = np.maximum(self.largest, self.v)
        v = self.largest if o["amsgrad"] else self.v
        eta = lr / (np.sqrt(v / (1 - beta2**self.t)) + o["eps"])
        return theta - eta * self.m / (1 - beta1**self.t), eta


def twin(s: Settings) -> Any:
    options = {key: float(v) if isinstance(v, Tensor) else v for key, v in s.options.items()}
    return NaiveSGD(options) if s.optimizer is SGD else NaiveAdam(options, s.optimizer is AdamW)
