"""Follows a forward pass, and finds where and how parameters are used.

A TorchFunctionMode sees every call of a torch function. Where one uses a parameter in a way that has a rule
(rules.py), an autograd Function takes its place whose backward gives the input's gradient and notes the
parameter's per-sample gradients (gradient_forms.py); the parameter's own gradient is never formed. Whatever
else happens to a parameter is left to autograd, which then reports a gradient for it: a sign that the uses
noted are not all.
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

from mas_ext.importance.exact.gradient_forms import Use, total_of
from mas_ext.importance.exact.layers import Fold, Layer, Layout
from mas_ext.importance.exact.nodes import LayerNode, Slot, Spot, SpreadNode
from mas_ext.importance.single_samples import Totals, gradient
from mas_ext.kernels.dtypes import compute_dtype

# Stands for a function: (tape, function, *its arguments) -> its result, or NotImplemented.
Rule = Callable[..., Any]


class Mention(NamedTuple):
    """That a function uses a parameter, and how the samples lie there."""

    function: str
    layout: Layout
    shape: torch.Size
    # Whether samples have more than one row: with one each, "leading" and "trailing" are the same.
    several: bool


# Sees, on the way back, the uses in one call and the gradient of its result: the gradient to go on with.
Witness = Callable[[Sequence[Spot], Tensor], Tensor]
# All uses of a parameter in a forward pass: a check of these is valid for every pass with the same.
Path = tuple[str, tuple[Mention, ...]]


class Tape(TorchFunctionMode):
    """The uses of some parameters in one forward pass: `with Tape(...) as tape`, then `tape.backward`."""

    def __init__(
        self,
        theta: Mapping[str, Tensor],
        layouts: Mapping[str, Layout],
        samples: int,
        rules: Mapping[Callable[..., Any], Rule],
        square: bool,
        native: bool,
    ) -> None:
        """theta: parameters by name; layouts: how the samples lie where each is used; rules: what stands
        for which function (rules.py).
        """
        super().__init__()
        self.samples, self.square, self.native = samples, square, native
        self.layouts = layouts
        # Parameters that are used in a way that does not fit their layout.
        self.misfits: set[str] = set()
        self.dtypes: set[torch.dtype] = set()
        self.functions: list[str] = []
        # Uses to look at, and those of them with a gradient that is not zero.
        self.watched: set[tuple[str, int]] = set()
        self.active: set[tuple[str, int]] = set()
        # Whether parts of the model ran again on the way back.
        self.replayed = False
        self.theta = theta
        self._rules = rules
        self._mentions: dict[str, list[Mention]] = {}
        self._slots = {id(p): Slot(name, p) for name, p in theta.items()}
        self._transposes: dict[int, tuple[Tensor, Tensor]] = {}
        self._columns = 0
        self._expected: Counter[int] = Counter()
        self._held: dict[int, list[Use]] = {}
        self._totals: dict[int, Tensor] = {}
        self._replaying = False
        self._witness: Witness | None = None

    def paths(self) -> set[Path]:
        """The uses of every parameter that was used."""
        return {(name, tuple(mentions)) for name, mentions in self._mentions.items()}

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
        if rule is not None and any(self._mentioned([*args, *kwargs.values()])):
            result = rule(self, func, *args, **kwargs)
            if result is not NotImplemented:
                return result
        return func(*args, **kwargs)

    def before(self, func: Callable[..., Any], args: Sequence[Any]) -> None:
        """Called before every function."""

    def slot(self, t: Any) -> Slot | None:
        """The parameter that a tensor is, or is a part of."""
        return self._slots.get(id(t))

    def _mentioned(self, values: Iterable[Any]) -> Iterator[Slot]:
        for value in values:
            if isinstance(value, (tuple, list)):
                yield from self._mentioned(value)
            slot = self.slot(value) or self.slot(self.untransposed(value))
            if slot is not None:
                yield slot

    def part(self, whole: Slot, result: Any) -> Any:
        """A tensor, or several, made of elements of a parameter: the same, and remembered as parts."""
        if isinstance(result, (tuple, list)):
            return type(result)(self.part(whole, item) for item in result)
        leaf = result.detach().requires_grad_()
        self._slots[id(leaf)] = Slot(whole.name, leaf, result, whole)
        return leaf

    def transpose(self, source: Tensor, result: Tensor) -> None:
        """Remember that a matrix is another one transposed."""
        self._transposes[id(result)] = result, source

    def untransposed(self, t: Any) -> Tensor | None:
        """The matrix that t is the transpose of."""
        found = self._transposes.get(id(t))
        return None if found is None else found[1]

    def mention(self, func: Callable[..., Any], slot: Slot, several: bool = False) -> int:
        """Write down that a function uses a parameter; the how manieth use it is."""
        mentions = self._mentions.setdefault(slot.name, [])
        if not self._replaying:
            layout, shape = self.layouts[slot.name], self.theta[slot.name].shape
            mentions.append(Mention(func.__name__, layout, shape, several))
        return len(mentions) - 1

    def spot(
        self, func: Callable[..., Any], slot: Slot | None, y_shape: Sequence[int]
    ) -> Spot | None:
        """A use of a parameter to compute y; None, and a misfit, where the samples can't lie so."""
        if slot is None:
            return None
        fold = Fold(self.samples, self.layouts[slot.name], self._columns)
        fits = fold.fits(y_shape)
        number = self.mention(func, slot, fits and fold.rows(y_shape) > 1)
        if fits:
            return Spot(slot, number, fold)
        self.misfits.add(slot.name)
        return None

    def layer(
        self,
        func: Callable[..., Any],
        layer: Layer,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        y_shape: Sequence[int],
    ) -> Tensor:
        """layer.forward(x, weight, bias), with the uses of weight and bias noted on the way back.

        y_shape: that of the result, as far as it says where the samples are.
        """
        slots = [self.slot(t) for t in (weight, bias)]
        spots = [self.spot(func, slot, y_shape) for slot in slots]
        # What needs a gradient but can't be noted is left to autograd.
        left = [
            spot is None and t is not None and t.requires_grad
            for spot, t in zip(spots, (weight, bias), strict=True)
        ]
        if left[0]:
            y = layer.forward(x, weight, None)
            if bias is not None and spots[1] is not None:
                return y + self._spread(spots[1], bias, layer.bias_shape(y, bias), y.shape)
        else:
            y = self.apply(layer, x, weight, None if left[1] else bias, spots)
        return y + bias.view(layer.bias_shape(y, bias)) if bias is not None and any(left) else y

    def apply(
        self,
        layer: Layer,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        spots: Sequence[Spot | None],
    ) -> Tensor:
        """The layer as an autograd Function."""
        self._expect(*spots)
        y: Tensor = LayerNode.apply(self, layer, spots, x, weight, bias)  # type: ignore[no-untyped-call]
        self.dtypes.add(y.dtype)
        return y

    def spread(
        self, func: Callable[..., Any], p: Tensor, shape: Sequence[int], y_shape: Sequence[int]
    ) -> Tensor | None:
        """A parameter, seen with a shape, expanded to y's shape; None where that can't be noted."""
        spot = self.spot(func, self.slot(p), y_shape)
        if spot is None:
            return None
        if spot.fold.spread_over(p.new_zeros(()).expand(y_shape), shape) is None:
            self.misfits.add(spot.slot.name)
            return None
        return self._spread(spot, p, shape, y_shape)

    def _spread(
        self, spot: Spot, p: Tensor, shape: Sequence[int], y_shape: Sequence[int]
    ) -> Tensor:
        self._expect(spot)
        spread: Tensor = SpreadNode.apply(self, spot, p, tuple(shape), tuple(y_shape))  # type: ignore[no-untyped-call]
        return spread

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

    def _expect(self, *spots: Spot | None) -> None:
        if not self._replaying:
            self._expected.update(id(spot.slot.tensor) for spot in spots if spot is not None)

    @torch.no_grad()
    def witness(self, witness: Witness, y: Tensor, grad: Tensor) -> None:
        """A backward pass from y, of gradient grad, in which a witness sees all uses; none is noted."""
        self._replaying, self._witness = True, witness
        tensors = [slot.tensor for slot in self._slots.values()]
        try:
            with self:
                torch.autograd.grad(y, tensors, grad, retain_graph=True, allow_unused=True)
        finally:
            self._witness = None

    def witnessed(self, spots: Sequence[Spot | None], grad: Tensor) -> Tensor | None:
        """The gradient to go on with; None where uses are to be noted."""
        if self._witness is None:
            return None
        return self._witness([spot for spot in spots if spot is not None], grad)

    def note(self, spot: Spot, use: Use) -> None:
        """Take a use; once all uses of a tensor are there, their total."""
        key, name = id(spot.slot.tensor), (spot.slot.name, spot.number)
        if name in self.watched and use.may_count(spot.slot.tensor):
            self.active.add(name)
        self._held.setdefault(key, []).append(use)
        if len(self._held[key]) == self._expected[key]:
            self._add(key)

    def _add(self, key: int) -> None:
        uses = self._held.pop(key)
        tensor = self._slots[key].tensor
        dtype = compute_dtype(tensor.dtype)
        like = torch.empty((), dtype=dtype, device=tensor.device).expand(tensor.shape)
        self._totals[key] = total_of(uses, like, self.square, self.native)

    @torch.no_grad()
    def backward(self, values: Tensor) -> Totals:
        """sum over samples and columns of abs (or square) of d values / d theta, by name.

        What autograd has a gradient for was used in a way that was not noted: a misfit.
        """
        slots = [*self._slots.values()]
        totals: Totals = {}
        # Checkpointed parts run again on the way back, and must do so as they did before.
        self._replaying = True
        with self:
            for c in range(values.shape[1]):
                found = gradient(values, c, {i: slot.tensor for i, slot in enumerate(slots)})
                self.misfits |= {slots[i].name for i in found}
                for name, total in self.collect().items():
                    totals[name] = totals[name].add_(total) if name in totals else total
        return totals

    def collect(self) -> Totals:
        """The totals of all uses noted since the last time, by name."""
        for key in [*self._held]:
            self._add(key)
        for slot in reversed(self._slots.values()):  # parts come after what they are parts of
            self._unite(slot)
        found, self._totals = self._totals, {}
        return {name: found[id(p)] for name, p in self.theta.items() if id(p) in found}

    def _unite(self, part: Slot) -> None:
        """Add a part's total to that of what it is a part of; a misfit if they overlap."""
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
            self.misfits.add(part.name)
        before += found


def _transformed() -> bool:
    """Whether a transform of torch.func runs, which knows nothing of the functions below."""
    return torch._C._functorch.peek_interpreter_stack() is not None
