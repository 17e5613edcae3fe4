"""What the adapters have to arrive at: two tasks in a plain loop, in float64 where nothing else is said."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAM, LR, SAMPLES, INPUTS, CLASSES = 0.7, 0.2, 32, 5, 3
Omega = dict[str, Tensor]


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(INPUTS, 6), nn.Tanh(), nn.Dropout(0.0), nn.Linear(6, CLASSES))


def task(
    t: int, samples: int = SAMPLES, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(t)
    x = torch.randn(samples, INPUTS, generator=generator, dtype=torch.float64)
    return x.to(dtype), (x @ torch.randn(INPUTS, CLASSES, generator=generator).double()).argmax(1)


def importance(model: nn.Module, x: Tensor) -> Omega:
    """1/N sum_k abs(d |F(x_k)|^2 / d theta), one sample after another."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    total = [torch.zeros_like(p) for p in parameters]
    for sample in x:
        value = model(sample[None]).square().sum()
        found = torch.autograd.grad(value, parameters)
        total = [t + g.abs() for t, g in zip(total, found, strict=True)]
    return {n: t / len(x) for n, t in zip(names, total, strict=True)}


def penalty(model: nn.Module, omega: Omega, anchor: Omega) -> Tensor:
    theta = dict(model.named_parameters())
    terms = [(w * (theta[n] - anchor[n]) ** 2).sum() for n, w in omega.items()]
    return LAM * torch.stack(terms).sum()


def divergence(model: nn.Module, teacher: nn.Module, x: Tensor) -> Tensor:
    """The mean over samples of sum_c q*_c log(q*_c / q_c), q = softmax(output / 2)."""
    q, target = ((m(x) / 2).softmax(-1) for m in (model, teacher))
    target = target.detach()
    return (target * (target / q).log()).sum(-1).mean()


def learn(
    model: nn.Module,
    step: Callable[[Tensor], None],
    batches: Iterable[tuple[Tensor, Tensor]],
    clip: float | None,
    omega: Omega,
    anchor: Omega,
    distillation: float = 0.0,
) -> None:
    """SGD on cross entropy + penalty + distillation; the gradient of their sum is clipped."""
    teacher = copy.deepcopy(model)
    for x, y in batches:
        loss = F.cross_entropy(model(x), y)
        if distillation:
            loss = loss + distillation * divergence(model, teacher, x)
        if omega:
            loss = loss + penalty(model, omega, anchor)
        model.zero_grad()
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        step(loss)


def two_tasks(
    batch: int = 8, clip: float | None = None, extra: int = SAMPLES, distillation: float = 0.0
) -> tuple[nn.Module, Omega, Omega]:
    """The model after two tasks of two epochs, merged by "latest": theta, W of both and the last anchor."""
    model = copy.deepcopy(network()).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.5)
    omega: Omega = {}
    anchor: Omega = {}
    for t in range(2):
        optimizer.state.clear()
        x, y = task(t)
        batches = [*zip(x.split(batch), y.split(batch), strict=True)] * 2
        weight = distillation if t else 0.0
        learn(model, lambda _: optimizer.step(), batches, clip, omega, anchor, weight)
        new = importance(model, task(t, extra)[0])
        omega = {n: omega.get(n, 0) + w for n, w in new.items()}
        anchor = {n: p.detach().clone() for n, p in model.named_parameters()}
    return model, omega, anchor


def close(got: Omega, expected: Omega, rtol: float = 1e-9) -> None:
    assert got.keys() == expected.keys()
    for n, t in expected.items():
        torch.testing.assert_close(got[n], t, rtol=rtol, atol=rtol * 1e-2, msg=n)
