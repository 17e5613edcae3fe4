"""`mas-ext bench`: the time of one call of the penalty, beside other ways to compute it.

benchmarks/penalty.py, which is not installed, adds torch.compile, CUDA graphs, cold caches and bytes.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mas_ext._arguments import check_choice, check_count
from mas_ext.comparison.timing import in_turns, median, paired, spread
from mas_ext.models import residual
from mas_ext.penalty import FusedMASPenalty

TaskState = tuple[list[Tensor], list[Tensor]]  # omega and anchors of one task

LAM, ETA = 0.5, 1.0
EAGER = "eager autograd"
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
FLOATS = ("float32", "float64", "bfloat16", "float16")


def _transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(768, 12, 3072)
    return nn.TransformerEncoder(layer, 12, nn.LayerNorm(768), enable_nested_tensor=False)


# Modules with the parameters of MLP 784-400-400-10, ResNet-18, ViT-B/16 and GPT-2 small; none is ever called.
SIZES: dict[str, Callable[[], list[nn.Module]]] = {
    "mlp": lambda: [nn.Linear(784, 400), nn.Linear(400, 400), nn.Linear(400, 10)],
    "resnet18": lambda: [
        nn.Conv2d(3, 64, 7, bias=False),
        nn.BatchNorm2d(64),
        *residual.stages((64, 128, 256, 512), 2, residual.projected),
        nn.Linear(512, 1000),
    ],
    "vit_b": lambda: [
        nn.ParameterList([torch.zeros(1, 1, 768), torch.zeros(1, 197, 768)]),
        nn.Conv2d(3, 768, 16),
        _transformer(),
        nn.Linear(768, 1000),
    ],
    "gpt2": lambda: [nn.Embedding(50257, 768), nn.Embedding(1024, 768), _transformer()],
}


def bench(model: str, device: str, dtype: str, tasks: Sequence[int], repeats: int) -> str:
    """Time every form on the parameters of one network, and return a table.

    model, device, dtype: one of SIZES, DEVICES and FLOATS each, else a ValueError. tasks: numbers of tasks, for
    add_grad_ and eager autograd; 1 is always among them. repeats: rounds in which all forms take their turn.
    """
    network = parameters_of(model, device, dtype)
    penalties, history = after_tasks(network, sorted({1, *tasks}))
    found = forms(network, penalties, history)
    samples = in_turns([form.call for form in found], repeats, device)
    lines = [
        f"{model}: {sum(p.numel() for p in network.parameters()):,} parameters, {dtype}, {device}, "
        f"{torch.get_num_threads()} threads, {repeats} repeats; medians with 95 % intervals",
        f"{'form':<30}{'tasks':>6}{'milliseconds':>36}{'x add_grad_':>26}",
    ]
    for form, taken in zip(found, samples, strict=True):
        time, ratio = spread(median(taken), 3, 1e3), spread(paired(taken, samples[0]), 2)
        lines.append(f"{form.name:<30}{form.tasks:>6}{time:>36}{ratio:>26}")
    lines += [f"{name}: left out, {why}" for name, why in too_large(penalties, history).items()]
    return "\n".join(lines)


def parameters_of(model: str, device: str, dtype: str) -> nn.Module:
    """Parameters of the shapes of one of SIZES, with gradients of 0."""
    check_choice("model", model, SIZES)
    check_choice("device", device, DEVICES)
    check_choice("dtype", dtype, FLOATS)
    network = nn.ModuleList(SIZES[model]()).to(device, getattr(torch, dtype))
    for p in network.parameters():
        p.grad = torch.zeros_like(p)
    return network


def after_tasks(
    network: nn.Module, tasks: Sequence[int]
) -> tuple[dict[int, FusedMASPenalty], list[TaskState]]:
    """The penalty after each of these numbers of tasks, ascending, and the state of every single task.

    The latter is of the first tasks only, as many as eager autograd has memory for, but at least one. Omega of
    task t, counted from 0, is t / 100 plus random numbers in [0, 1); anchors are the parameters as they are.
    """
    check_count(min(tasks), "tasks")
    theta = dict(network.named_parameters())
    generator = torch.Generator().manual_seed(0)
    noise = {n: torch.rand(p.shape, generator=generator).to(p.device) for n, p in theta.items()}
    penalties: dict[int, FusedMASPenalty] = {}
    history: list[TaskState] = []
    for number in tasks:
        penalty = penalties[number] = FusedMASPenalty(network, LAM)
        for t in range(number):
            omega = {n: w + t / 100 for n, w in noise.items()}
            penalty.consolidate(importance=omega)
            if t == len(history) and (t == 0 or eager_fits(number, [*theta.values()])):
                like = [omega[n].to(p.dtype) for n, p in theta.items()]
                history.append((like, [p.detach().clone() for p in theta.values()]))
    return penalties, history


def eager_fits(tasks: int, theta: Sequence[Tensor]) -> bool:
    """Whether eager autograd over so many tasks, what it saves included, fits half the memory."""
    if theta[0].is_cuda:
        memory = torch.cuda.mem_get_info(theta[0].device)[1]
    elif sys.platform == "win32":
        kilobytes = ctypes.c_ulonglong()
        ctypes.windll.kernel32.GetPhysicallyInstalledSystemMemory(ctypes.byref(kilobytes))
        memory = 1024 * kilobytes.value
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 4 * tasks * sum(p.nbytes for p in theta) <= memory / 2


def too_large(
    penalties: Mapping[int, FusedMASPenalty], history: Sequence[TaskState]
) -> dict[str, str]:
    """Why eager autograd over some numbers of tasks is not timed."""
    absent = [t for t in penalties if t > len(history)]
    return {f"{EAGER}, {t} tasks": "needs more than half of the memory" for t in absent}


class Form(NamedTuple):
    """One way to add the penalty's gradient to .grad and tell its value, unless its name says otherwise."""

    name: str
    tasks: int
    call: Callable[[], object]


def forms(
    network: nn.Module, penalties: Mapping[int, FusedMASPenalty], history: Sequence[TaskState]
) -> list[Form]:
    """This library's forms, add_grad_ after one task first, and other ways to the same result."""
    theta = [*network.parameters()]
    grads = [p.grad for p in theta if p.grad is not None]
    state = [p.detach() for p in theta], grads, *history[0]
    eager = {t: partial(eager_loss, theta, history[:t]) for t in penalties if t <= len(history)}
    return [
        *(Form("add_grad_", t, penalty.add_grad_) for t, penalty in penalties.items()),
        Form("penalty() + backward", 1, partial(backward, penalties[1])),
        Form("proximal_", 1, partial(penalties[1].proximal_, theta, ETA)),
        *(Form(EAGER, t, partial(backward, loss)) for t, loss in eager.items()),
        Form("official code, gradient only", 1, partial(official_loop, *state)),
        Form("torch._foreach", 1, partial(foreach, *state)),
    ]


def backward(loss: Callable[[], Tensor]) -> None:
    """Add the gradient of a loss to .grad."""
    loss().backward()


def eager_loss(theta: Sequence[Tensor], history: Sequence[TaskState]) -> Tensor:
    """The penalty as Avalanche and FACIL write it, over several tasks as Avalanche's EWC plugin."""
    loss = torch.zeros((), device=theta[0].device)
    for omega, anchor in history:
        for p, w, a in zip(theta, omega, anchor, strict=True):
            loss = loss + (w * (p - a).pow(2)).sum()
    return LAM * loss


def official_loop(
    theta: list[Tensor], grad: list[Tensor], omega: list[Tensor], anchor: list[Tensor]
) -> None:
    """Weight_Regularized_SGD in the code of MAS's authors, temporaries included."""
    for p, g, w, a in zip(theta, grad, omega, anchor, strict=True):
        difference = p.add(a, alpha=-1)
        regularizer = difference.mul(2 * LAM * w)
        g.add_(regularizer)


def foreach(
    theta: list[Tensor], grad: list[Tensor], omega: list[Tensor], anchor: list[Tensor]
) -> Tensor:
    """Value and gradient by torch's operations on lists of tensors."""
    distance = torch._foreach_sub(theta, anchor)
    pull = torch._foreach_mul(distance, omega)
    torch._foreach_add_(grad, pull, alpha=2 * LAM)
    torch._foreach_mul_(pull, distance)
    return LAM * torch.stack([x.sum() for x in pull]).sum()
