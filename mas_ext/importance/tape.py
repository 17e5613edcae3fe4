"""Follows a forward pass, and finds where and how parameters are used.

A TorchFunctionMode sees every call of a torch function. Where one uses a parameter in a way that has a rule
(functions.py), an autograd Function takes its place whose backward gives the input's gradient and notes the
parameter's per-sample gradients (uses.py); the parameter's own gradient is never formed. Whatever else
happens to a parameter is left to autograd, which then reports a gradient for it: a sign that the uses
noted are not all.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mas_ext.importance.alone import Totals, gradients
from mas_ext.importance.layers import Fold, Layer, Layout
from mas_ext.importance.uses import Rows, Use, add_uses
from mas_ext.kernels.reference import compute_dtype

# Stands for a function: (tape, function, *its arguments) -> its result, or NotImplemented.
Rule = Callable[..., Any]


class Slot(NamedTuple):
    """A parameter, or a part of one: a tensor that holds some of its elements (a slice, a view).

    A part is cut off from autograd's graph, so that what is used of it can be told from the rest; `origin` is
    what it was cut from, computed from the tensor of the slot `whole`.
    """

    name: str
    tensor: Tensor
    origin: Tensor | None = None
    whole: Slot | None = None


class Mention(NamedTuple):
    """That a function used a parameter, and how the samples lie there."""

    name: str
    function: str
    layout: Layout
    shape: torch.Size


class Tape(TorchFunctionMode):
    """The uses of some parameters in one forward pass: `with Tape(...) as tape`, backward, `totals()`."""

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
        for which function (functions.py).
        """
        super().__init__()
        self.samples, self.square, self.native = samples, square, native
        self.layouts = layouts
        self.mentions: list[Mention] = []
        # Parameters that are used in a way that does not fit their layout.
        self.misfits: set[str] = set()
        self.dtypes: set[torch.dtype] = set()
        self._theta = theta
        self._rules = rules
        self._slots = {id(p): Slot(name, p) for name, p in theta.items()}
        self._transposes: dict[int, tuple[Tensor, Tensor]] = {}
        self._expected: dict[int, int] = {}
        self._held: dict[int, list[Use]] = {}
        self._totals: dict[int, Tensor] = {}

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

    def _mentioned(self, values: Iterable[Any]) -> Iterator[bool]:
        for value in values:
            if isinstance(value, (tuple, list)):
                yield from self._mentioned(value)
            yield id(value) in self._slots or id(value) in self._transposes

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

    def untransposed(self, t: Tensor) -> Tensor | None:
        """The matrix that t is the transpose of."""
        found = self._transposes.get(id(t))
        return None if found is None else found[1]

    def mention(self, func: Callable[..., Any], slot: Slot) -> None:
        """Write down that a function uses a parameter."""
        layout, shape = self.layouts[slot.name], self._theta[slot.name].shape
        self.mentions.append(Mention(slot.name, func.__name__, layout, shape))

    def fold(self, func: Callable[..., Any], slot: Slot, y_shape: Sequence[int]) -> Fold | None:
        """How the samples lie in y, computed from a parameter; None (and a misfit) if they don't."""
        self.mention(func, slot)
        fold = Fold(self.samples, self.layouts[slot.name])
        if fold.fits(y_shape):
            return fold
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
        """layer.forward(x, weight, bias), with the uses of weight and bias noted on the way back."""
        slots = self.slot(weight), self.slot(bias)
        folds = [None if s is None else self.fold(func, s, y_shape) for s in slots]
        # What needs a gradient but can't be noted is left to autograd.
        if folds[0] is None and weight.requires_grad:
            y = layer.forward(x, weight, None)
            return y if bias is None else self.spread_add(func, layer, y, bias)
        if folds[1] is None and bias is not None and bias.requires_grad:
            y = self.apply(layer, x, weight, None, slots[0], None, folds)
            return y + bias.view(layer.bias_shape(y, bias))
        return self.apply(layer, x, weight, bias, *slots, folds)

    def apply(
        self,
        layer: Layer,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_slot: Slot | None,
        bias_slot: Slot | None,
        folds: Sequence[Fold | None],
    ) -> Tensor:
        """The layer as an autograd Function; uses of the slots that have a fold are counted."""
        noted = [
            s if f is not None else None
            for s, f in zip((weight_slot, bias_slot), folds, strict=True)
        ]
        for slot in noted:
            self._expect(slot)
        y: Tensor = _Layer.apply(  # type: ignore[no-untyped-call]
            self, layer, noted, folds, x, weight, bias
        )
        self.dtypes.add(y.dtype)
        return y

    def spread_add(self, func: Callable[..., Any], layer: Layer, y: Tensor, bias: Tensor) -> Tensor:
        """y + bias, where the weight was left to autograd."""
        shape = layer.bias_shape(y, bias)
        spread = self.spread(func, bias, shape, y.shape)
        return y + (bias.view(shape) if spread is None else spread)

    def spread(
        self,
        func: Callable[..., Any],
        p: Tensor,
        shape: Sequence[int],
        y_shape: Sequence[int],
    ) -> Tensor | None:
        """A parameter, seen with a shape, expanded to y's shape; None where that can't be noted."""
        slot = self.slot(p)
        if slot is None:
            return None
        fold = self.fold(func, slot, y_shape)
        if fold is None:
            return None
        if fold.spread_over(p.new_zeros(()).expand(y_shape), torch.Size(shape)) is None:
            self.misfits.add(slot.name)
            return None
        self._expect(slot)
        spread: Tensor = _Spread.apply(  # type: ignore[no-untyped-call]
            self, slot, fold, p, tuple(shape), tuple(y_shape)
        )
        return spread

    def inside(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the body of a function of torch.nn.functional under this mode.

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

    def _expect(self, slot: Slot | None) -> None:
        if slot is not None:
            key = id(slot.tensor)
            self._expected[key] = self._expected.get(key, 0) + 1

    def note(self, slot: Slot, use: Use) -> None:
        """Take a use; once all uses of a tensor are there, their total."""
        key = id(slot.tensor)
        self._held.setdefault(key, []).append(use)
        if len(self._held[key]) == self._expected[key]:
            self._add(key)

    def _add(self, key: int) -> None:
        uses = self._held.pop(key)
        tensor = self._slots[key].tensor
        total = torch.zeros(tensor.shape, dtype=compute_dtype(tensor.dtype), device=tensor.device)
        add_uses(uses, total, self.square, self.native)
        self._totals[key] = total

    @torch.no_grad()
    def backward(self, values: Tensor) -> Totals:
        """sum over samples and columns of abs (or square) of d values / d theta, by name.

        What autograd has a gradient for was used in a way that was not noted: a misfit.
        """
        slots = [*self._slots.values()]
        united: Totals = {}
        for found in gradients(values, {i: slot.tensor for i, slot in enumerate(slots)}):
            self.misfits |= {slots[i].name for i in found}
            for key in [*self._held]:
                self._add(key)
            # Parts come after what they are parts of.
            for slot in reversed(slots):
                self._unite(slot)
            for name, p in self._theta.items():
                if id(p) in self._totals:
                    total = self._totals[id(p)]
                    united[name] = united[name] + total if name in united else total
            self._totals = {}
        return united

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


class _Layer(torch.autograd.Function):
    """A layer whose backward notes per-sample gradients in place of forming parameter gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        tape: Tape,
        layer: Layer,
        slots: Sequence[Slot | None],
        folds: Sequence[Fold],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        y = layer.forward(x, weight, bias)
        ctx.tape, ctx.layer, ctx.slots, ctx.folds = tape, layer, slots, folds
        # Under autocast the layer computed with a rounded x.
        rounded = x.is_floating_point() and y.dtype.itemsize < x.dtype.itemsize
        ctx.save_for_backward(x.to(y.dtype) if rounded else x, weight)
        ctx.input_dtype = x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        weight_slot, bias_slot = ctx.slots
        if weight_slot is not None:
            ctx.tape.note(weight_slot, ctx.layer.weight_use(grad, x, ctx.folds[0]))
        if bias_slot is not None:
            p = bias_slot.tensor
            g = ctx.folds[1].spread_over(grad, torch.Size(ctx.layer.bias_shape(grad, p)))
            ctx.tape.note(bias_slot, Rows(g.reshape(-1, *p.shape)))
        gradient = None
        if ctx.needs_input_grad[4]:
            gradient = ctx.layer.input_gradient(grad, x, weight).to(ctx.input_dtype)
        return None, None, None, None, gradient, None, None


class _Spread(torch.autograd.Function):
    """A parameter broadcast to the activations' shape."""

    @staticmethod
    def forward(
        ctx: Any,
        tape: Tape,
        slot: Slot,
        fold: Fold,
        p: Tensor,
        shape: tuple[int, ...],
        y_shape: tuple[int, ...],
    ) -> Tensor:
        ctx.tape, ctx.slot, ctx.fold, ctx.shape = tape, slot, fold, shape
        return p.detach().view(shape).expand(y_shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        g = ctx.fold.spread_over(grad, torch.Size(ctx.shape))
        ctx.tape.note(ctx.slot, Rows(g.reshape(-1, *ctx.slot.tensor.shape)))
        return None, None, None, None, None, None
