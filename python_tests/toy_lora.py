"""A network with low-rank adapters of a library of its own, and its penalty by definition in float64."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from definition import loop
from torch import Tensor, nn

from mas_ext.parameters.adapters import AdaptedWeight, Factor, LowRankProduct, register_adapter


class LoRA(nn.Module):
    """W0 x + sum over active adapters of scale B A x."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs, bias=bias)
        self.base.weight.requires_grad_(False)
        self.down = nn.ParameterDict()
        self.up = nn.ParameterDict()
        self.scale: dict[str, float] = {}
        self.active: list[str] = []

    def add(self, name: str, rank: int = 2, scale: float = 1.5, std: float = 0.3) -> None:
        outputs, inputs = self.base.weight.shape
        like = self.base.weight
        self.down[name] = nn.Parameter(torch.randn(rank, inputs).to(like) * std)
        self.up[name] = nn.Parameter(torch.randn(outputs, rank).to(like) * std)
        self.scale[name] = scale
        self.active = [name]

    def update(self) -> Tensor:
        total = torch.zeros_like(self.base.weight)
        for name in self.active:
            total = total + self.scale[name] * self.up[name] @ self.down[name]
        return total

    def merge(self) -> None:
        """Add the update to the weight, and drop the adapters."""
        self.base.weight.data += self.update().detach()
        self.down, self.up, self.active = nn.ParameterDict(), nn.ParameterDict(), []

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        for name in self.active:
            y = y + self.scale[name] * (x @ self.down[name].T @ self.up[name].T)
        return y


@register_adapter
def of_toy(module: nn.Module) -> AdaptedWeight | None:
    if not isinstance(module, LoRA):
        return None
    products = [
        LowRankProduct(name, Factor(module.up[name]), Factor(module.down[name]), module.scale[name])
        for name in module.active
    ]
    return AdaptedWeight(module.base, "weight", products)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = LoRA(4, 6), LoRA(6, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(torch.tanh(self.first(x))))


# Of the weights whose updates are held: their layers, by the names they are held under.
LAYERS = {"first.weight": "first", "second.weight": "second"}


def make(dtype: torch.dtype = torch.float64, name: str = "default") -> Net:
    model = Net().to(dtype)
    for layer in LAYERS.values():
        model.get_submodule(layer).add(name)
    return model


def batches(count: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 4, generator=generator).to(dtype) for _ in range(count)]


def move(model: nn.Module, seed: int = 7) -> None:
    """As training does, every trainable parameter to somewhere near."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape, generator=generator).to(p)


def merged(model: Net) -> nn.Module:
    """The same network without adapters, all of whose parameters are trained."""
    plain = copy.deepcopy(model).double()
    for layer in LAYERS.values():
        plain.get_submodule(layer).merge()
    for p in plain.parameters():
        p.requires_grad_(True)
    return plain


def importance(model: Net, data: Sequence[Tensor]) -> dict[str, Tensor]:
    """Of the whole weights, and of what is trained beside the adapters."""
    found, _ = loop(merged(model), [b.double() for b in data], objective="l2")
    return {n.replace(".base.weight", ".weight"): t for n, t in found.items()}


def held(model: Net) -> dict[str, Tensor]:
    """What a penalty holds, by name, differentiable: updates, and parameters."""
    updates: dict[str, Any] = {
        n: model.get_submodule(layer).update() for n, layer in LAYERS.items()
    }
    rest = {n: p for n, p in model.named_parameters() if p.requires_grad and ".down." not in n}
    return updates | {n: p for n, p in rest.items() if ".up." not in n}


class Definition:
    """sum_t alpha_t sum_i Omega_ti (x_i - x*_i)^2 with the latest anchor, x being what is held."""

    def __init__(self, model: Net, lam: float, merge: str = "sum", gamma: float = 1.0) -> None:
        self.model, self.lam, self.merge, self.gamma = model, lam, merge, gamma
        self.tasks: list[dict[str, Tensor]] = []
        self.anchor: dict[str, Tensor] = {}

    def consolidate(self, data: Sequence[Tensor]) -> None:
        self.tasks.append(importance(self.model, data))
        self.anchor = {n: x.detach().double().clone() for n, x in held(self.model).items()}

    def alpha(self) -> list[float]:
        count = len(self.tasks)
        if self.merge == "sum":
            return [self.lam] * count
        if self.merge == "decay":
            return [self.lam * self.gamma ** (count - 1 - t) for t in range(count)]
        totals = [float(sum(t.sum() for t in task.values())) for task in self.tasks]
        return [self.lam * count / s / sum(1 / other for other in totals) for s in totals]

    def __call__(self) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for alpha, task in zip(self.alpha(), self.tasks, strict=True):
            for name, x in held(self.model).items():
                total = total + alpha * (task[name] * (x.double() - self.anchor[name]) ** 2).sum()
        return total

    def gradients(self) -> dict[str, Tensor]:
        theta = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(self(), [*theta.values()], allow_unused=True)
        return {n: g for n, g in zip(theta, grads, strict=True) if g is not None}
