"""Proof that the rows of a model's tensors belong to the samples that they are taken for.

Backward is linear. With each sample's objective times a factor of its own, the gradient of a sample's row is
multiplied by that factor; the gradient of another sample's row by another one, and that of a mixture by none.
The factors are powers of two, so that even rounding is the same.

`layout_violations` proves one batch. `keeps_rows` proves, once, every batch in which a model does the same:
there, random numbers stand for all that a backward pass remembers of the data.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode

from mas_ext.importance.evaluation import Evaluate, Labelled
from mas_ext.importance.exact.nodes import LayerNode, ParameterUse
from mas_ext.importance.exact.precision import Precision
from mas_ext.importance.exact.tracing import Tape

# How many random numbers are drawn; a tensor has them again and again. A prime, so that its rows differ.
_DRAWN = 4099
# Ways from a tensor to Python that the dispatcher does not see.
_READING = {"tolist", "numpy", "__array__", "__dlpack__", "data_ptr", "untyped_storage"}
_INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
# Nodes of autograd's graph whose integers don't choose among rows: factors, which pixel of its own plane is
# the largest, a random generator's state. Random ones take their place.
_WITHIN_SAMPLES = re.compile("^(Mul|Div)Backward|MaxPool|ScaledDotProduct")
# Nodes that torch itself brings, not one of which keeps more than tensors, sizes and numbers.
_BUILT_IN = re.compile(r"Backward\d+$|^(torch::autograd::)?(CopyBackwards|AccumulateGrad)$")


class RowSizes(NamedTuple):
    """Of a use: the size of every row's gradient over the factor of the row's sample, and its rounding."""

    name: str
    sizes: Tensor
    # Of numbers too small for their dtype.
    rounding: float


def layout_violations(tape: Tape, values: Tensor, precision: Precision) -> set[str]:
    """The parameters used on rows that, in this batch, are not of the samples that they are taken for.

    The graph stays for the backward pass proper.
    """
    generator = torch.Generator().manual_seed(0)
    columns = (torch.rand(values.shape[1], generator=generator) + 0.5).to(values)
    plain, *others = (
        _row_sizes(tape, values, columns.expand_as(values), factors, precision.reach)
        for factors in _factors(len(values), precision.reach, values.device)
    )
    return {
        seen.name
        for other in others
        for seen, scaled in zip(plain, other, strict=True)
        if not _agree(seen, scaled, precision)
    }


def keeps_rows(evaluate: Evaluate, batch: Labelled, tape: Tape, precision: Precision) -> bool:
    """Whether rows belong to the samples they are taken for, in this and all batches of these shapes.

    False where no proof is found: where data choose among rows, or decide what Python does, where a function
    is not torch's own, or where a use has no gradient. A sample's objective is taken to depend on its own
    output, and the pass starts from there.
    """
    memory, choices = _Memory(), _Choices()
    try:
        with torch.autograd.graph.saved_tensors_hooks(memory.keep, memory.recall), choices, tape:
            output = evaluate.output(batch)
        if choices.found or _READING & {*tape.functions} or _choosing(output):
            return False
        # One draw may hide rows behind a mask.
        for draw in range(2 if memory.masks else 1):
            memory.noise = _Noise(output.device, draw)
            start = memory.noise(output, 0)
            plain, *others = (
                _row_sizes(tape, output, start, factors, precision.reach, memory.noise)
                for factors in _factors(tape.samples, precision.reach, output.device)
            )
            if any(seen.sizes.numel() and not seen.sizes.any() for seen in plain):
                return False
            for other in others:
                for seen, scaled in zip(plain, other, strict=True):
                    if not _agree(seen, scaled, precision):
                        return False
    except Exception:  # caused by the random numbers; whatever else is wrong shows without them
        return False
    return not tape.replayed


def _factors(samples: int, reach: int, device: torch.device) -> Iterator[Tensor]:
    """1 for every sample, then 2^-reach to 2^reach, so that any two samples differ in some of them."""
    number = torch.arange(samples, device=device)
    yield torch.ones(samples, dtype=torch.float64, device=device)
    different = 2 * reach + 1
    while number.any():
        digit = number % different  # 0, 1, -1, 2, -2, ...
        power = torch.where(digit % 2 == 1, (digit + 1) // 2, -(digit // 2))
        yield torch.pow(2.0, power.double())
        number = number // different


class _Noise:
    """Random numbers instead of a tensor's; none is zero, which would hide what it is multiplied by."""

    def __init__(self, device: torch.device, seed: int) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        self._drawn = torch.rand(_DRAWN, generator=generator, device=device) / 2 + 0.25

    def __call__(self, like: Tensor, number: int) -> Tensor:
        """Random numbers like a tensor's, equal for equal `number`."""
        count = like.numel()
        drawn = self._drawn.roll(number * 9973)
        if like.dtype in _INTEGERS:
            top = int(like.max()) + 1 if count else 1
            drawn = (drawn * 2 - 0.5) * top
        drawn = (drawn > 0.5 if like.dtype == torch.bool else drawn).to(like.device, like.dtype)
        return drawn.repeat(count // _DRAWN + 1)[:count].view(like.shape)


def _row_sizes(
    tape: Tape, y: Tensor, start: Tensor, factors: Tensor, reach: int, noise: _Noise | None = None
) -> list[RowSizes]:
    """The sizes of gradients that a backward pass meets at every use, in turn.

    start: d objective / d y, but for the factors; noise: what gradients start anew from at every use, where
    a row has one.
    """
    found: list[RowSizes] = []

    def observer(uses: Sequence[ParameterUse], grad: Tensor) -> Tensor:
        if grad.dim() > 1:
            dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
            rows = torch.linalg.vector_norm(grad, 1, -1, keepdim=True, dtype=dtype)
        else:
            rows = grad.abs()
        limits = torch.finfo(grad.dtype)
        rounding = 2.0**reach * limits.eps * limits.tiny * grad.numel() / max(1, rows.numel())
        for use in uses:
            each = use.layout.expand(factors.to(rows.dtype), rows)
            found.append(RowSizes(use.source.name, rows / each, rounding))
        if noise is not None:
            grad = noise(grad, len(found)).mul_((rows > 0) * each)
        return grad

    each = factors.reshape(-1, *[1] * (y.dim() - 1))
    tape.observe(observer, y, (start * each).to(y.dtype))
    return found


def _agree(plain: RowSizes, scaled: RowSizes, precision: Precision) -> bool:
    """Whether sizes are the same, but for functions that add up in a random order."""
    most = precision.order * plain.sizes + plain.rounding
    return bool(((scaled.sizes - plain.sizes).abs() <= most).all())


class _Memory:
    """What a forward pass keeps for its backward pass, and, where there is noise, noise instead."""

    def __init__(self) -> None:
        self.noise: _Noise | None = None
        self.masks = False
        self._kept = 0

    def keep(self, t: Tensor) -> tuple[Tensor, int]:
        self.masks |= t.dtype == torch.bool
        self._kept += 1
        return t.detach(), self._kept  # a node that keeps its own result would never be freed

    def recall(self, kept: tuple[Tensor, int]) -> Tensor:
        return kept[0] if self.noise is None else self.noise(*kept)


class _Choices(TorchDispatchMode):
    """Sees whether a shape, or a number that Python reads, comes from data."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if torch.Tag.data_dependent_output in func.tags:
            self.found = True
        if torch.Tag.dynamic_output_shape in func.tags:
            indices = args[1] if func is torch.ops.aten.index.Tensor else [None]
            self.found |= any(i is None or i.dtype == torch.bool for i in indices)
        return func(*args, **(kwargs or {}))


def _choosing(y: Tensor) -> bool:
    """Whether, between y and a use, a node keeps integers that choose among rows, or is not torch's own."""
    waiting: list[Any] = [y.grad_fn]
    parents: dict[Any, list[Any]] = {y.grad_fn: []}
    while waiting:
        node = waiting.pop()
        for child, _ in node.next_functions:
            if child is not None and child not in parents:
                parents[child] = []
                waiting.append(child)
            if child is not None:
                parents[child].append(node)
    waiting = [node for node in parents if getattr(node, "_forward_cls", None) is LayerNode]
    between = {*waiting}
    while waiting:
        for node in parents[waiting.pop()]:
            if node not in between:
                between.add(node)
                waiting.append(node)
    return any(_chooses(node) for node in between)


def _chooses(node: Any) -> bool:
    if isinstance(node, BackwardCFunction):
        return type(node)._forward_cls is not LayerNode  # type: ignore[attr-defined]
    if _WITHIN_SAMPLES.search(node.name()):
        return False
    kept = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
    tensors = [t for item in kept for t in (item if isinstance(item, tuple) else (item,))]
    integers = any(isinstance(t, Tensor) and t.dtype in _INTEGERS for t in tensors)
    return integers or not _BUILT_IN.search(node.name())
