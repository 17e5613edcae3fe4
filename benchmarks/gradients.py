"""Ways to the mean of |per-sample gradient|, and to the approximation from whole batches.

Each takes a model and a batch and returns a call, which computes anew and returns importance by name. The
objective is the squared norm of the output. Packages that aren't there, and networks that one can't take,
raise when the call is made or first used.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mas_ext.importance import ImportanceSum

Omega = dict[str, Tensor]
Call = Callable[[], Omega]

# What per-sample gradients of one chunk may take: all that vmap's user can set.
CHUNK_BYTES = 1 << 28


def exact(model: nn.Module, x: Tensor) -> Call:
    """This library's."""
    checked = ImportanceSum("exact")

    def call() -> Omega:
        total = checked.empty()
        total.add(model, x)
        return total.into_mean()

    return call


def batch_approximation(model: nn.Module, x: Tensor) -> Call:
    """|gradient of the batch|, as other libraries compute it."""
    return lambda: _means({n: g.abs() for n, g in _gradients(model, x).items()}, x)


def training(model: nn.Module, x: Tensor) -> Call:
    """An ordinary forward and backward pass; its result is no importance."""
    return lambda: _gradients(model, x)


def loop(model: nn.Module, x: Tensor) -> Call:
    """The definition: one backward pass a sample."""

    def call() -> Omega:
        total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        with torch.no_grad():
            for sample in x.split(1):
                for name, g in _gradients(model, sample).items():
                    total[name] += g.abs_()
        return _means(total, x)

    return call


def vmap(model: nn.Module, x: Tensor) -> Call:
    """torch.func.vmap(grad) in chunks: B x P numbers, as many at a time as CHUNK_BYTES hold."""
    theta = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def value(theta: Omega, sample: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(model, (theta, buffers), (sample[None],))
        return output.square().sum()

    per_sample = torch.func.vmap(torch.func.grad(value), in_dims=(None, 0))
    chunk = max(1, CHUNK_BYTES // sum(p.nbytes for p in theta.values()))

    def call() -> Omega:
        total = {name: torch.zeros_like(p) for name, p in theta.items()}
        for samples in x.split(chunk):
            for name, g in per_sample(theta, samples).items():
                total[name] += g.abs_().sum(0)
        return _means(total, x)

    return call


def backpack(model: nn.Module, x: Tensor) -> Call:
    """BackPACK's BatchGrad, which holds B x P numbers."""
    import backpack
    from backpack.extensions import BatchGrad

    extended = backpack.extend(copy.deepcopy(model))

    def call() -> Omega:
        with backpack.backpack(BatchGrad()):
            extended(x).square().sum().backward()
        return _means(_taken(extended, "grad_batch"), x)

    return call


def opacus(model: nn.Module, x: Tensor) -> Call:
    """Opacus's GradSampleModule, which holds B x P numbers."""
    from opacus import GradSampleModule

    # It looks at modules in train mode only; dropout is 0 here, and BatchNorm it doesn't take.
    wrapped = GradSampleModule(copy.deepcopy(model).train(), loss_reduction="sum")

    def call() -> Omega:
        wrapped(x).square().sum().backward()
        return _means(_taken(wrapped._module, "grad_sample"), x)

    return call


FORMS: dict[str, Callable[[nn.Module, Tensor], Call]] = {
    "exact": exact,
    "batch approximation": batch_approximation,
    "forward + backward": training,
    "loop, one by one": loop,
    "vmap(grad), chunks": vmap,
    "BackPACK BatchGrad": backpack,
    "Opacus GradSampleModule": opacus,
}
OWN, APPROXIMATION, TRAINING = [*FORMS][:3]


def _gradients(model: nn.Module, x: Tensor) -> Omega:
    theta = dict(model.named_parameters())
    with torch.enable_grad():
        value = model(x).square().sum()
    return dict(zip(theta, torch.autograd.grad(value, list(theta.values())), strict=True))


def _means(sums: Omega, x: Tensor) -> Omega:
    return {name: t / len(x) for name, t in sums.items()}


def _taken(model: nn.Module, attribute: str) -> Omega:
    """The sum of |per-sample gradients| that hang at the parameters, which lose them."""
    sums = {}
    for name, p in model.named_parameters():
        per_sample: Tensor | None = getattr(p, attribute, None)
        if per_sample is None:
            raise NotImplementedError(f"no per-sample gradient of {name}")
        sums[name] = per_sample.abs().sum(0)
        setattr(p, attribute, None)
        p.grad = None
    return sums
