"""What the benchmark measures: the forms of the penalty, and other ways to the same result.

They work on the parameter shapes of known networks, with random numbers for the state.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from mas_ext.importance import ImportanceSum
from mas_ext.parameters.names import named_parameters
from mas_ext.penalty import FusedMASPenalty
from mas_ext.state.merge_rules import MergeRule
from mas_ext.state.quadratic import Consolidation

Shape = tuple[int, ...]
Tensors = list[Tensor]

LAM, ETA = 0.5, 0.1
# Behind the name of a form that is replayed.
GRAPH = ", graph"


# -- shapes ----------------------------------------------------------------------------------------


def _linear(inputs: int, outputs: int) -> list[Shape]:
    return [(outputs, inputs), (outputs,)]


def _norm(width: int) -> list[Shape]:
    return [(width,), (width,)]


def _mlp() -> list[Shape]:
    return [*_linear(784, 400), *_linear(400, 400), *_linear(400, 10)]


def _resnet18() -> list[Shape]:
    shapes: list[Shape] = [(64, 3, 7, 7), *_norm(64)]
    for before, width in ((64, 64), (64, 128), (128, 256), (256, 512)):
        for inputs in (before, width):
            shapes += [(width, inputs, 3, 3), *_norm(width), (width, width, 3, 3), *_norm(width)]
            if inputs != width:
                shapes += [(width, inputs, 1, 1), *_norm(width)]
    return [*shapes, *_linear(512, 1000)]


def _transformer(width: int, depth: int) -> list[Shape]:
    attention = [*_norm(width), *_linear(width, 3 * width), *_linear(width, width)]
    perceptron = [*_norm(width), *_linear(width, 4 * width), *_linear(4 * width, width)]
    return [*(attention + perceptron) * depth, *_norm(width)]


def _vit_b() -> list[Shape]:
    patches: list[Shape] = [(1, 1, 768), (1, 197, 768), (768, 3, 16, 16), (768,)]
    return [*patches, *_transformer(768, 12), *_linear(768, 1000)]


def _gpt2() -> list[Shape]:
    return [(50257, 768), (1024, 768), *_transformer(768, 12)]


MODELS = {"mlp": _mlp, "resnet18": _resnet18, "vit_b": _vit_b, "gpt2": _gpt2}


# -- state -----------------------------------------------------------------------------------------


@dataclass
class Case:
    """A model with its state after some numbers of tasks, merged and task by task.

    `merged` holds the penalty by number of tasks; `history` (omega, anchor) of the first tasks.
    """

    noise: Tensors
    theta: Tensors
    start: Tensors
    merged: dict[int, FusedMASPenalty]
    history: list[tuple[Tensors, Tensors]]

    def task(self, t: int) -> tuple[Tensors, Tensors]:
        """Omega and anchor of task t: by rotation, because drawing numbers takes minutes for a large model."""
        return [x.roll(t).abs() for x in self.noise], [0.1 * x.roll(-t) for x in self.noise]

    @property
    def grads(self) -> Tensors:
        """The parameters' .grad."""
        return [p.grad for p in self.theta if p.grad is not None]

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        return sum(p.numel() for p in self.theta)

    @property
    def element_size(self) -> int:
        """Bytes of one parameter."""
        return self.theta[0].element_size()

    @torch.no_grad()
    def reset(self) -> None:
        """Parameters as at the start, gradients 0: neither drifts while it is measured."""
        torch._foreach_copy_(self.theta, self.start)
        torch._foreach_zero_(self.grads)


def eager_fits(tasks: int, theta: Sequence[Tensor]) -> bool:
    """Whether eager autograd over so many tasks, what it saves included, fits half the memory."""
    if theta[0].is_cuda:
        memory = torch.cuda.mem_get_info(theta[0].device)[1]
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 4 * tasks * sum(p.nbytes for p in theta) <= memory / 2


def build(model: str, device: str, dtype: torch.dtype, tasks: Sequence[int]) -> Case:
    """The shapes of a model of MODELS, with random importance and anchors of max(tasks) tasks."""
    generator = torch.Generator(device).manual_seed(0)
    noise = [
        torch.randn(shape, generator=generator, device=device).to(dtype)
        for shape in MODELS[model]()
    ]
    # A module for each tensor: parameters are found no faster here than in a real model.
    module = nn.ModuleList(nn.ParameterList([nn.Parameter(0.1 * x)]) for x in noise)
    names = named_parameters(module)
    for p in names.values():
        p.grad = torch.zeros_like(p)
    theta: Tensors = [*names.values()]
    case = Case(noise, theta, [p.detach().clone() for p in theta], {}, [])
    state = Consolidation(MergeRule(merge="sum"), LAM)
    for t in range(1, max(tasks) + 1):
        omega, anchor = case.task(t)
        state.add_task(dict(zip(names, anchor, strict=True)), dict(zip(names, omega, strict=True)))
        if t == 1 or any(t <= n and eager_fits(n, theta) for n in tasks):
            case.history.append((omega, anchor))
        if t in tasks:
            case.merged[t] = FusedMASPenalty(module, LAM, merge="sum")
            case.merged[t].load_state_dict({**state.tensors(), **ImportanceSum().tensors()})
    return case


def exact_results(case: Case) -> dict[tuple[str, int], Tensors]:
    """What the forms should compute, in float64, by kind and number of tasks."""
    exact: dict[tuple[str, int], Tensors] = {}
    value, gradient = 0.0, [torch.zeros_like(x, dtype=torch.float64) for x in case.noise]
    for t in range(1, max(case.merged) + 1):
        omega, anchor = case.task(t)
        for g, x, w, a in zip(gradient, case.start, omega, anchor, strict=True):
            distance = x.double() - a.double()
            g.add_(w.double() * distance, alpha=2 * LAM)
            value += LAM * float((w.double() * distance.square()).sum())
        if t == 1:
            # The minimiser of penalty + |change|^2 / (2 eta), as a change.
            exact["step", t] = [
                -ETA * g / (1 + 2 * ETA * LAM * w.double())
                for g, w in zip(gradient, omega, strict=True)
            ]
        if t in case.merged:
            exact["gradient", t] = [g.clone() for g in gradient]
            exact["value", t] = [torch.tensor(value, dtype=torch.float64)]
    return exact


# -- forms -----------------------------------------------------------------------------------------


class Form(NamedTuple):
    """One way to compute a kind of result.

    `held` counts the state's bytes, `moved` those that have to be moved, per parameter; 0: not counted.
    """

    name: str
    tasks: int
    kind: Literal["gradient", "value", "step"]
    call: Callable[[], object]
    held: float
    moved: int = 0
    compiled: bool = False


def own_forms(case: Case) -> Iterator[Form]:
    """This library's; add_grad_ after the fewest tasks comes first. On a GPU as CUDA graphs, too, but for
    autograd's pass, which has launches of its own.
    """
    for form in _called(case):
        yield form
        if case.theta[0].is_cuda and "backward" not in form.name:
            yield _replayed(form)


def _replayed(form: Form) -> Form:
    """The form as a CUDA graph, which Python does not keep waiting."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        form.call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = form.call()

    def call() -> object:
        graph.replay()
        return result

    return form._replace(name=f"{form.name}{GRAPH}", call=call)


def _called(case: Case) -> Iterator[Form]:
    size = case.element_size
    for tasks, penalty in case.merged.items():
        held = held_bytes(penalty) / case.parameters
        read = size + state_bytes(penalty)
        yield Form("add_grad_", tasks, "gradient", penalty.add_grad_, held, read + 2 * size)
        if tasks == 1:
            loss, step = partial(_backward, penalty), partial(penalty.proximal_, case.theta, ETA)
            value = torch.no_grad()(penalty.forward)
            # Reads everything forward and backward; autograd then adds a new gradient to the old one.
            yield Form("penalty() + backward", 1, "gradient", loss, held, 2 * read + 4 * size)
            yield Form("penalty(), value only", 1, "value", value, held, read)
            yield Form("proximal_", 1, "step", step, held, read + size)


def held_bytes(penalty: FusedMASPenalty) -> int:
    """What the penalty's omega and anchors take."""
    states = [*penalty.omega.values(), *penalty.anchor.values()]
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in states)}
    return sum(storages.values())


def state_bytes(penalty: FusedMASPenalty) -> int:
    """Bytes of one omega and one anchor."""
    states = [*penalty.omega.values(), *penalty.anchor.values()]
    return states[0].element_size() + states[-1].element_size()


def other_forms(case: Case) -> Iterator[Form]:
    """Value and gradient by other means, and the gradient alone."""
    held = 2 * case.element_size
    for tasks in case.merged:
        if tasks <= len(case.history):
            loss = partial(_eager_loss, case.theta, case.history[:tasks])
            call = partial(_backward, loss)
            yield Form("eager autograd", tasks, "gradient", call, tasks * held)
    state = [p.detach() for p in case.theta], case.grads, *case.history[0]
    yield Form("official code, gradient only", 1, "gradient", partial(_official, *state), held)
    for name, compute in (("torch._foreach", _foreach), ("torch.compile", _plain)):
        compiled = compute is _plain
        if compiled:
            compute = torch.compile(compute, fullgraph=True, dynamic=False)
        for suffix, value in (("", True), (", gradient only", False)):
            gradient = partial(compute, *state, value)
            yield Form(name + suffix, 1, "gradient", gradient, held, compiled=compiled)


def _backward(loss: Callable[[], Tensor]) -> None:
    loss().backward()


def _eager_loss(theta: Tensors, history: Sequence[tuple[Tensors, Tensors]]) -> Tensor:
    """As Avalanche and FACIL write it, over several tasks as Avalanche's EWC plugin."""
    loss = torch.zeros((), device=theta[0].device)
    for omega, anchor in history:
        for p, w, a in zip(theta, omega, anchor, strict=True):
            loss = loss + (w * (p - a).pow(2)).sum()
    return LAM * loss


def _official(theta: Tensors, grad: Tensors, omega: Tensors, anchor: Tensors) -> None:
    """As Weight_Regularized_SGD in the code of MAS's authors, temporaries included."""
    for p, g, w, a in zip(theta, grad, omega, anchor, strict=True):
        difference = p.add(a, alpha=-1)
        regularizer = difference.mul(2 * LAM * w)
        g.add_(regularizer)


def _foreach(
    theta: Tensors, grad: Tensors, omega: Tensors, anchor: Tensors, value: bool
) -> Tensor | None:
    distance = torch._foreach_sub(theta, anchor)
    if not value:
        torch._foreach_addcmul_(grad, distance, omega, value=2 * LAM)
        return None
    pull = torch._foreach_mul(distance, omega)
    torch._foreach_add_(grad, pull, alpha=2 * LAM)
    torch._foreach_mul_(pull, distance)
    return LAM * torch.stack([x.sum() for x in pull]).sum()


def _plain(
    theta: Tensors, grad: Tensors, omega: Tensors, anchor: Tensors, value: bool
) -> Tensor | None:
    total = torch.zeros((), device=theta[0].device)
    for p, g, w, a in zip(theta, grad, omega, anchor, strict=True):
        distance = p - a
        pull = w * distance
        g.add_(pull, alpha=2 * LAM)
        total = total + (pull * distance).sum()
    return LAM * total if value else None
