"""Follows a forward pass, and finds where and how parameters are used.

A TorchFunctionMode sees every call of a torch function. Where one uses a parameter in a way that has a rule
(rules.py), an autograd Function takes its place (nodes.py) whose backward gives the input's gradient and
reports the parameter's per-sample gradients (gradient_forms.py); the parameter's own gradient is never formed.
Whatever else happens to a parameter is left to autograd, which then has a gradient for it: a sign that not all
of its uses were handled.
"""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mas_ext.importance.exact.gradient_forms import PerSample, total_of
from mas_ext.importance.exact.layers import Broadcast, Layer
from mas_ext.importance.exact.nodes import LayerNode, ParameterUse, TrackedTensor
from mas_ext.importance.exact.sample_layout import LayoutKind, SampleLayout
from mas_ext.importance.gradients import Totals, gradient
from mas_ext.kernels.dtypes import compute_dtype

# Stands for a function, tape.func: (tape, *its arguments) -> its result, or NotImplemented.
FunctionRule = Callable[..., Any]


class UseRecord(NamedTuple):
    """The use of a parameter by a function, and how the samples lay there."""

    function: str
    layout: LayoutKind
    shape: torch.Size
    # Whether samples have more than one row: with one each, "leading" and "trailing" are the same.
    several: bool


# All uses of a parameter in a forward pass: a check of these is valid for every pass with the same.
UsesOf = tuple[str, tuple[UseRecord, ...]]
# Sees, on the way back, the uses in one call and the gradient of its result: the gradient to go on with.
Observer = Callable[[Sequence[ParameterUse], Tensor], Tensor]


class Tape(TorchFunctionMode):
    """The uses of some parameters in one forward pass: `with Tape(...) as tape`, then `tape.backward`.

    Args:
        theta: parameters by name.
        layouts: how the samples lie where each is used.
        samples: how many there are.
        rules: what stands for which function (rules.py).
        square: whether squares are summed, or absolute values.
        native: whether the compiled kernels sum them.
    """

    def __init__(
        self,
        theta: Mapping[str, Tensor],
        layouts: Mapping[str, LayoutKind],
        samples: int,
        rules: Mapping[Callable[..., Any], FunctionRule],
        square: bool,
        native: bool,
    ) -> None:
        super().__init__()
        self.samples, self.square, self.native = samples, square, native
        self.layouts = layouts
        # Parameters with a use that no rule handles, or that does not fit their layout.
        self.unhandled: set[str] = set()
        self.dtypes: set[torch.dtype] = set()
        self.functions: list[str] = []
        # Uses to look at, by number, and those of them with a gradient that is not zero.
        self.watched: set[tuple[UsesOf, int]] = set()
        self.active: set[tuple[UsesOf, int]] = set()
        # Whether parts of the model ran again on the way back.
        self.replayed = False
        self.theta = theta
        # The function that a rule stands for, while the rule runs.
        self.func: Callable[..., Any]
        self._rules = rules
        self._records: dict[str, list[UseRecord]] = {}
        self._tracked = {id(p): TrackedTensor(name, p) for name, p in theta.items()}
        self._transposes: dict[int, tuple[Tensor, Tensor]] = {}
        self._columns = 0
        self._expected: Counter[int] = Counter()
        self._gradients: dict[int, list[PerSample]] = {}
        self._totals: dict[int, Tensor] = {}
        self._replaying = False
        self._observer: Observer | None = None

    def uses(self) -> set[UsesOf]:
        """The uses of every parameter that was used."""
        return {self._uses_of(name) for name in self._records}

    def _uses_of(self, name: str) -> UsesOf:
        return name, tuple(self._records[name])

    # -- forward -----------------------------------------------------------------------------------

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call a torch function, or what stands for it where it uses a parameter."""
        kwargs = kwargs or {}
        if func is torch.autograd.grad:  # checkpointed parts run again inside
            return self.inside(func, *args, **kwargs)
        if not self._replaying:
            self.functions.append(func.__name__)
        if not torch.is_grad_enabled() or _transformed():
            return func(*args, **kwargs)
        self.replayed |= self._replaying
        self.before(func, args)
        rule = self._rules.get(func)
        if rule is not None and any(self._tracked_in([*args, *kwargs.values()])):
            self.func = func
            result = rule(self, *args, **kwargs)
            if result is not NotImplemented:
                return result
        return func(*args, **kwargs)

    def before(self, func: Callable[..., Any], args: Sequence[Any]) -> None:
        """Called before every function."""

    def tracked(self, t: Any) -> TrackedTensor | None:
        """The parameter, or the part of one, that a tensor is."""
        return self._tracked.get(id(t))

    def _tracked_in(self, values: Iterable[Any]) -> Iterator[TrackedTensor]:
        for value in values:
            if isinstance(value, (tuple, list)):
                yield from self._tracked_in(value)
            tracked = self.tracked(value) or self.tracked(self.untransposed(value))
            if tracked is not None:
                yield tracked

    def part(self, whole: TrackedTensor, result: Any) -> Any:
        """A tensor, or several, made of elements of a parameter: the same, and tracked as parts of it."""
        if isinstance(result, (tuple, list)):
            return type(result)(self.part(whole, item) for item in result)
        leaf = result.detach().requires_grad_()
        self._tracked[id(leaf)] = TrackedTensor(whole.name, leaf, result, whole)
        return leaf

    def transpose(self, source: Tensor, result: Tensor) -> None:
        """Remember that a matrix is another one transposed."""
        self._transposes[id(result)] = result, source

    def untransposed(self, t: Any) -> Tensor | None:
        """The matrix that t is the transpose of."""
        found = self._transposes.get(id(t))
        return None if found is None else found[1]

    def record_use(self, tracked: TrackedTensor, several: bool = False) -> int:
        """Write down that the function uses a parameter; the number of this use."""
        records = self._records.setdefault(tracked.name, [])
        if not self._replaying:
            layout, shape = self.layouts[tracked.name], self.theta[tracked.name].shape
            records.append(UseRecord(self.func.__name__, layout, shape, several))
        return len(records) - 1

    def use(self, tracked: TrackedTensor | None, y_shape: Sequence[int]) -> ParameterUse | None:
        """A use of a parameter to compute y; None, and unhandled, where the samples can't lie so in y."""
        if tracked is None:
            return None
        layout = SampleLayout(self.samples, self.layouts[tracked.name], self._columns)
        fits = layout.fits(y_shape)
        number = self.record_use(tracked, fits and layout.rows(y_shape) > 1)
        if fits:
            return ParameterUse(tracked, number, layout)
        self.unhandled.add(tracked.name)
        return None

    def layer(
        self,
        layer: Layer,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        y_shape: Sequence[int],
    ) -> Tensor:
        """layer.forward(x, weight, bias), with gradients of weight and bias recorded on the way back.

        y_shape: the shape of the result, as far as it says where the samples are.
        """
        uses = [self.use(self.tracked(t), y_shape) for t in (weight, bias)]
        # What needs a gradient but has no use that can be recorded is left to autograd.
        left = [
            use is None and t is not None and t.requires_grad
            for use, t in zip(uses, (weight, bias), strict=True)
        ]
        if left[0]:
            y = layer.forward(x, weight, None)
            if bias is not None and uses[1] is not None:
                return y + self._broadcast(uses[1], bias, layer.bias_shape(y, bias), y.shape)
        else:
            y = self.apply(layer, x, weight, None if left[1] else bias, uses)
        return y + bias.view(layer.bias_shape(y, bias)) if bias is not None and any(left) else y

    def apply(
        self,
        layer: Layer,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        uses: Sequence[ParameterUse | None],
    ) -> Tensor:
        """The layer as an autograd Function."""
        self._expect(*uses)
        y: Tensor = LayerNode.apply(self, layer, uses, x, weight, bias)  # type: ignore[no-untyped-call]
        self.dtypes.add(y.dtype)
        return y

    def broadcast(self, p: Tensor, shape: Sequence[int], y_shape: Sequence[int]) -> Tensor | None:
        """A parameter, seen with a shape, expanded to y's shape; None where that can't be recorded."""
        use = self.use(self.tracked(p), y_shape)
        if use is None:
            return None
        if use.layout.varies(shape, len(y_shape)):
            self.unhandled.add(use.source.name)
            return None
        return self._broadcast(use, p, shape, y_shape)

    def _broadcast(
        self, use: ParameterUse, p: Tensor, shape: Sequence[int], y_shape: Sequence[int]
    ) -> Tensor:
        layer = Broadcast(tuple(shape), tuple(y_shape))
        return self.apply(layer, p.new_empty(0), p, None, (use, None))

    @contextmanager
    def columns(self, number: int) -> Iterator[None]:
        """Rows may come from tensors with dimension 1 of this size."""
        before, self._columns = self._columns, number
        try:
            yield
        finally:
            self._columns = before

    def inside(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the body of a Python function of torch under this mode.

        Called as it is, it would only hand itself to the mode again.
        """
        body = types.FunctionType(
            func.__code__,
            {**func.__globals__, "has_torch_function": lambda _: False},
            argdefs=func.__defaults__,
        )
        body.__kwdefaults__ = func.__kwdefaults__
        with self:
            return body(*args, **kwargs)

    # -- backward ----------------------------------------------------------------------------------

    def _expect(self, *uses: ParameterUse | None) -> None:
        if not self._replaying:
            self._expected.update(id(use.source.tensor) for use in uses if use is not None)

    @torch.no_grad()
    def observe(self, observer: Observer, y: Tensor, grad: Tensor) -> None:
        """A backward pass from y, of gradient grad, in which an observer sees all uses; nothing is recorded."""
        self._replaying, self._observer = True, observer
        tensors = [tracked.tensor for tracked in self._tracked.values()]
        try:
            with self:
                torch.autograd.grad(y, tensors, grad, retain_graph=True, allow_unused=True)
        finally:
            self._observer = None

    def observed(self, uses: Sequence[ParameterUse | None], grad: Tensor) -> Tensor | None:
        """The gradient to go on with; None where per-sample gradients are to be recorded."""
        if self._observer is None:
            return None
        return self._observer([use for use in uses if use is not None], grad)

    def record(self, use: ParameterUse, gradients: PerSample) -> None:
        """Take the gradients of a use; once all uses of a tensor are there, their total."""
        key = id(use.source.tensor)
        if self.watched:
            which = self._uses_of(use.source.name), use.number
            if which in self.watched and gradients.may_be_nonzero(use.source.tensor):
                self.active.add(which)
        self._gradients.setdefault(key, []).append(gradients)
        if len(self._gradients[key]) == self._expected[key]:
            self._add_up(key)

    def _add_up(self, key: int) -> None:
        gradients = self._gradients.pop(key)
        tensor = self._tracked[key].tensor
        dtype = compute_dtype(tensor.dtype)
        like = torch.empty((), dtype=dtype, device=tensor.device).expand(tensor.shape)
        self._totals[key] = total_of(gradients, like, self.square, self.native)

    @torch.no_grad()
    def backward(self, values: Tensor) -> Totals:
        """sum over samples and columns of abs (or square) of d values / d theta, by name.

        A parameter that autograd has a gradient for has a use that was not recorded: it is unhandled.
        """
        tracked = [*self._tracked.values()]
        totals: Totals = {}
        # Checkpointed parts run again on the way back, and must do so as they did before.
        self._replaying = True
        with self:
            for c in range(values.shape[1]):
                found = gradient(values, c, {i: part.tensor for i, part in enumerate(tracked)})
                self.unhandled |= {tracked[i].name for i in found}
                for name, total in self.collect().items():
                    totals[name] = totals[name].add_(total) if name in totals else total
        return totals

    def collect(self) -> Totals:
        """The totals of all gradients recorded since the last time, by name."""
        for key in [*self._gradients]:
            self._add_up(key)
        for tracked in reversed(self._tracked.values()):  # parts come after what they are parts of
            self._add_to_whole(tracked)
        found, self._totals = self._totals, {}
        return {name: found[id(p)] for name, p in self.theta.items() if id(p) in found}

    def _add_to_whole(self, part: TrackedTensor) -> None:
        """Add a part's total to the total of what it is a part of; unhandled if parts overlap."""
        if part.whole is None or part.origin is None or id(part.tensor) not in self._totals:
            return
        total = self._totals.pop(id(part.tensor))
        # A linear map that moves elements: its transpose moves them, and counts, back.
        found, count = (
            torch.autograd.grad(part.origin, part.whole.tensor, values, retain_graph=True)[0]
            for values in (total, (total > 0).to(total.dtype))
        )
        key = id(part.whole.tensor)
        if key not in self._totals:
            self._totals[key] = torch.zeros_like(found)
        before = self._totals[key]
        if ((before > 0) * 1 + count > 1).any():
            self.unhandled.add(part.name)
        before += found


def _transformed() -> bool:
    """Whether a transform of torch.func runs, which knows nothing of the functions below."""
    return torch._C._functorch.peek_interpreter_stack() is not None
