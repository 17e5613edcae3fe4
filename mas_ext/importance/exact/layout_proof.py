"""Where the samples lie in a model's tensors, and the proof that they always do.

Backward is linear. With each sample's objective times a factor of its own, the gradient of a sample's row is
multiplied by that factor; the gradient of another sample's row by another one, and that of a mixture by none.
So the factors tell the owner of every row. They are powers of two, so that even rounding is the same.

`find_owners` tells the owners in one batch. Where random numbers stand for all that the backward pass
remembers of the data, they are those of all batches in which a model does the same: `Proof`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode

from mas_ext.importance.evaluation import Evaluate, Labelled
from mas_ext.importance.exact.nodes import LayerNode, Meeting
from mas_ext.importance.exact.origins import tensors_in
from mas_ext.importance.exact.precision import Precision
from mas_ext.importance.exact.sample_layout import MIXED, UNKNOWN, SampleLayout, find_layout
from mas_ext.importance.exact.tracing import Tape

# How many random numbers are drawn; a tensor has them again and again. A prime, so that its rows differ.
_DRAWN = 4099
_MASKS = {torch.bool, torch.uint8}
_INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
# Nodes of autograd's graph whose integers, as truth values everywhere, seldom choose among rows: factors, which
# pixel of its own plane is the largest. Random ones take their place, which tell if they do.
_WITHIN_SAMPLES = re.compile("^(Mul|Div)Backward|MaxPool")
# And those that never do: their integers are a random generator's state.
_RANDOM = re.compile("ScaledDotProduct")
# Nodes that pass gradients to the larger or smaller of two numbers, and within bounds.
_COMPARING = re.compile("^(Maximum|Minimum|Fmax|Fmin)Backward")
_BOUNDED = re.compile("^(Clamp|Threshold|Hardtanh|Hardshrink|Softshrink)")
# Fewer random ones than these may by chance always choose the same.
_FEW = 16
# Nodes that torch itself brings, not one of which keeps more than tensors, sizes and numbers.
_BUILT_IN = re.compile(r"Backward\d+$|^(torch::autograd::)?(CopyBackwards|AccumulateGrad)$")

# By meeting: the owner of every row of its result over the last dimension, a sample's number, UNKNOWN where the
# gradient is zero, or MIXED.
Owners = dict[int, Tensor]


def find_owners(tape: Tape, values: Tensor, precision: Precision) -> Owners:
    """The owners of all rows with a gradient in this batch; the graph stays for the backward pass proper."""
    generator = torch.Generator().manual_seed(0)
    # Equal gradients of two samples would add up to what another sample's factor makes of one.
    start = (torch.rand(values.shape, generator=generator) + 0.5).to(values)
    return _owners(tape, values, start, precision, None)


def layouts_of(tape: Tape, owners: Owners) -> list[SampleLayout | None]:
    """The layout of each meeting's result, None where it has no gradient or samples don't lie apart."""
    return [
        find_layout(tape.samples, owners[i], meeting.layer.by_row) if i in owners else None
        for i, meeting in enumerate(tape.meetings)
    ]


class ProvenPass:
    """A forward pass whose graph can be walked with random numbers in place of data, and as it is.

    output, values: the model's, and the objectives.
    """

    def __init__(self, evaluate: Evaluate, batch: Labelled, tape: Tape) -> None:
        self.tape = tape
        self._memory, self._choices = _Memory(tape), _Choices()
        tape.around, tape.choices = self._memory.hooks, self._choices
        try:
            with self._memory.hooks(), self._choices, tape:
                self.output, self.values = evaluate(batch)
        finally:
            tape.around, tape.choices = nullcontext, None

    def lasting(self, precision: Precision) -> list[SampleLayout | None] | None:
        """Layouts that hold in this and in all batches with which the model does the same; None without a
        proof.

        There is none where data choose among rows, or decide what Python does without a trace, where a
        function is not torch's own, or where a meeting has no gradient. A sample's objective is taken to
        depend on its own output, and the passes start from there.
        """
        tape, output = self.tape, self.output
        nodes = _between(output)
        if self._choices.found or tape.opened or any(self._chooses(node) for node in nodes):
            return None
        found: Owners | None = None
        try:
            # What a mask hides, its opposite shows.
            for opposite in (False, True) if self._memory.masks else (False,):
                noise = self._memory.noise = _Noise(output.device, opposite)
                with _levelled(nodes):
                    owners = _owners(tape, output, noise(output, 0), precision, noise)
                if any(bool((o == UNKNOWN).all()) for o in owners.values() if o.numel()):
                    return None
                found = owners if found is None else _united(found, owners)
        except Exception:  # caused by the random numbers; whatever else is wrong shows without them
            return None
        finally:
            self._memory.noise = None
        if tape.replayed or found is None:
            return None
        layouts = layouts_of(tape, found)
        for i, layout in enumerate(layouts):
            if layout is None and i in found:
                return None
            if (
                layout is not None
                and layout.table is not None
                and bool((found[i] == UNKNOWN).any())
            ):
                return None
        return layouts

    def _chooses(self, node: Any) -> bool:
        """Whether a node between output and a meeting keeps integers or few truth values of data, or what
        can't be looked at, or has bounds that random numbers don't pass.
        """
        own = isinstance(node, BackwardCFunction)
        if own and type(node)._forward_cls is LayerNode:
            return False
        if own and next(tensors_in(vars(node).values()), None) is not None:
            return True
        names = ["saved_tensors"] if own else _saved(node.__class__)
        kept = [t for t in tensors_in(getattr(node, n) for n in names) if self.tape.is_data(t)]
        integers = [t for t in kept if t.dtype in _INTEGERS and not _RANDOM.search(node.name())]
        compared = _COMPARING.search(node.name())
        if any(t.numel() < _FEW for t in kept if compared or t.dtype == torch.bool):
            return True
        if _BOUNDED.search(node.name()) and not _is_open(node):
            return True
        if _WITHIN_SAMPLES.search(node.name()):  # where all are zero, random ones are, too
            return any(t.numel() < _FEW or not t.any() for t in integers)
        return bool(integers) or not (own or _BUILT_IN.search(node.name()))


@cache
def _saved(kind: type) -> list[str]:
    """The attributes of a node of torch's own that tell what it keeps."""
    return [name for name in dir(kind) if name.startswith("_saved_")]


def _is_open(node: Any) -> bool:
    """Whether random numbers, from 1/4 to 3/4, are within a node's bounds."""
    low = [
        getattr(node, f"_saved_{name}", None) for name in ("min", "min_val", "threshold", "lambd")
    ]
    high = [getattr(node, f"_saved_{name}", None) for name in ("max", "max_val")]
    if any(isinstance(bound, Tensor) for bound in low + high):
        return False
    return all(b is None or b <= 0.25 for b in low) and all(b is None or b >= 0.75 for b in high)


def _united(one: Owners, other: Owners) -> Owners:
    """Owners known from either, MIXED where they contradict each other."""
    both = dict(one)
    for i, o in other.items():
        if i in both:
            same = (both[i] == o) | (o == UNKNOWN)
            both[i] = torch.where(both[i] == UNKNOWN, o, torch.where(same, both[i], MIXED))
        else:
            both[i] = o
    return both


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
    """Random numbers instead of a tensor's; none is zero, which would hide what it is multiplied by.

    opposite: whether truth values are the opposite of what they are without.
    """

    def __init__(self, device: torch.device, opposite: bool) -> None:
        self._opposite = opposite
        generator = torch.Generator(device).manual_seed(0)
        self._drawn = torch.rand(_DRAWN, generator=generator, device=device) / 2 + 0.25
        # By dtype, as often as the largest tensor asked for.
        self._repeated: dict[torch.dtype, Tensor] = {}

    def __call__(self, like: Tensor, number: int) -> Tensor:
        """Random numbers like a tensor's, equal for equal `number`; not to be written to."""
        count, start = like.numel(), number * 997 % _DRAWN
        if like.dtype in _INTEGERS or like.dtype == torch.bool:
            top = int(like.max()) + 1 if like.dtype in _INTEGERS and count else 1
            drawn = self._slice(torch.float32, start, count)
            truths = like.dtype == torch.bool
            drawn = (drawn > 0.5) != self._opposite if truths else (drawn * 2 - 0.5) * top
            return drawn.to(like.device, like.dtype).view(like.shape)
        return self._slice(like.dtype, start, count).to(like.device).view(like.shape)

    def _slice(self, dtype: torch.dtype, start: int, count: int) -> Tensor:
        repeated = self._repeated.get(dtype)
        if repeated is None or len(repeated) < start + count:
            repeated = self._drawn.to(dtype).repeat((start + count) // _DRAWN + 1)
            self._repeated[dtype] = repeated
        return repeated[start : start + count]


def _owners(
    tape: Tape, y: Tensor, start: Tensor, precision: Precision, noise: _Noise | None
) -> Owners:
    """The owners of rows, from backward passes in which a row's gradient has a factor of its sample.

    start: d objective / d y, but for the factors; noise: what gradients start anew from at every meeting,
    where a row has one.
    """
    ones, *factors = _factors(tape.samples, precision.reach, y.device)
    plain = _row_sizes(tape, y, start, ones, precision, noise, {})
    others = [_row_sizes(tape, y, start, f, precision, noise, plain) for f in factors]
    owners: Owners = {}
    for i, (sizes, rounding) in plain.items():
        owner = torch.zeros(sizes.shape, dtype=torch.int64, device=sizes.device)
        place, mixed = 1, torch.zeros_like(owner, dtype=torch.bool)
        for other in others:
            scaled = other[i][0]
            power = torch.where(sizes > 0, scaled / sizes, 1.0).log2().round()
            power = power.nan_to_num(0.0, 0.0, 0.0)
            off = (scaled / torch.pow(2.0, power) - sizes).abs()
            mixed |= ~(off <= precision.order * sizes + rounding)
            digit = torch.where(power > 0, 2 * power - 1, -2 * power).long()
            mixed |= digit > 2 * precision.reach
            owner += place * digit
            place *= 2 * precision.reach + 1
        owner[mixed | (owner >= tape.samples)] = MIXED
        owners[i] = torch.where(sizes > rounding, owner, UNKNOWN)
    for i in [i for i in owners if i < 0]:
        owners = _united(owners, {-1 - i: owners.pop(i)})
    return owners


# By meeting: the sizes of all rows' gradients, and what rounding may make of numbers too small for their dtype.
_Sizes = dict[int, tuple[Tensor, float]]


def _row_sizes(
    tape: Tape,
    y: Tensor,
    start: Tensor,
    factors: Tensor,
    precision: Precision,
    noise: _Noise | None,
    plain: _Sizes,
) -> _Sizes:
    """The sizes that a backward pass with these factors meets; plain: those without factors."""
    found: _Sizes = {}
    numbers = {id(meeting): i for i, meeting in enumerate(tape.meetings)}

    def observer(meeting: Meeting, grad: Tensor) -> Tensor:
        i = numbers[id(meeting)]
        again = i in found  # of what a layer's weight multiplies, behind its result
        if grad.dim() > 1:
            dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
            rows = grad.abs().sum(-1, dtype=dtype)  # faster by far than a norm
        else:
            rows = grad.abs()
        limits = torch.finfo(grad.dtype)
        each = grad.numel() / max(1, rows.numel())
        found[-1 - i if again else i] = rows, 2.0**precision.reach * limits.eps * limits.tiny * each
        if noise is None or again:
            return grad
        # Of the size of the factor, not of the gradient, which would grow beyond all limits on its way.
        size = rows / torch.where(rows > 0, plain[i][0] if i in plain else rows, 1)
        size = (size[..., None] if grad.dim() > 1 else size).to(grad.dtype)
        return noise(grad, i + 1).mul(size)

    each = factors.to(y.dtype).reshape(-1, *[1] * (y.dim() - 1))
    tape.random = noise is not None
    tape.observe(observer, y, start * each)
    tape.random = False
    return found


@contextmanager
def _levelled(nodes: Iterable[Any]) -> Iterator[None]:
    """While it lasts, gradients neither grow nor vanish on their way, as random numbers would have them.

    What comes to a node is multiplied by a power of two: the one that makes it about 1 in the first pass.
    """
    factors: dict[Any, list[float]] = {}

    def factor(grad: Tensor | None) -> float:
        size = 0.0 if grad is None else float(grad.abs().mean(dtype=torch.float64))
        return 2.0 ** -round(math.log2(size)) if 0 < size < math.inf else 1.0

    def level(node: Any, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        with torch._C.DisableTorchFunction():  # none of the model's functions
            if node not in factors:
                factors[node] = [*map(factor, grads)]
            pairs = zip(grads, factors[node], strict=True)
            return tuple(None if grad is None else grad * by for grad, by in pairs)

    handles = [node.register_prehook(partial(level, node)) for node in nodes]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Memory:
    """What a forward pass keeps for its backward pass, and, where there is noise, noise instead."""

    def __init__(self, tape: Tape) -> None:
        self.noise: _Noise | None = None
        self.masks = False
        self._tape, self._kept = tape, 0

    def hooks(self) -> AbstractContextManager[Any]:
        """What autograd keeps inside is kept here; within calls too, before a checkpoint sees it."""
        return torch.autograd.graph.saved_tensors_hooks(self._keep, self._recall)

    def _keep(self, t: Tensor) -> tuple[Tensor, int]:
        number = 0
        with torch._C.DisableTorchFunction():  # none of the model's functions
            if t.is_floating_point() or self._tape.is_data(t):
                self.masks |= t.dtype == torch.bool
                self._kept += 1
                number = self._kept
            return t.detach(), number  # a node that keeps its own result would never be freed

    def _recall(self, kept: tuple[Tensor, int]) -> Tensor:
        t, number = kept
        if self.noise is None or number == 0:
            return t
        with torch._C.DisableTorchFunction():  # none of the model's functions
            return self.noise(t, number)


class _Choices(TorchDispatchMode):
    """Sees whether a shape, or a number, comes from data."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: to import the compiler, which would be told to leave this alone, takes seconds."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if torch.Tag.data_dependent_output in func.tags:
            self.found = True
        if torch.Tag.dynamic_output_shape in func.tags:
            by_index = func is torch.ops.aten.index.Tensor
            masks = [i for i in args[1] if i is not None and i.dtype in _MASKS] if by_index else []
            self.found |= not by_index or bool(masks)
        with torch._C.DisableTorchFunction():  # none of the model's functions
            return func(*args, **(kwargs or {}))


def _between(y: Tensor) -> set[Any]:
    """The nodes of autograd's graph from y to the meetings, these included."""
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
    return between
