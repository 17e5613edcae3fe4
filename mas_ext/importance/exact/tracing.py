"""Follows a forward pass, and finds where parameters, or what is derived from them, meet data.

A TorchFunctionMode sees every call of a torch function. What is computed from parameters and constants alone is
left to autograd and remembered (origins.py). Where it meets data, and a rule (rules.py) knows the layer that
this is, an autograd Function takes the place of the call (nodes.py), whose backward gives the input's
gradient and reports per-sample gradients (gradient_forms.py); these are then pulled back to the parameters
(pull_back.py). A parameter that autograd itself has a gradient for has a use that no rule handled.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mas_ext.importance.exact.gradient_forms import PerSample, Product, like_total, total_of
from mas_ext.importance.exact.layers import Broadcast, Layer
from mas_ext.importance.exact.nodes import GradientSource, LayerNode, Meeting
from mas_ext.importance.exact.origins import CONSTANT, MADE, Origin, Origins, tensors_in
from mas_ext.importance.exact.pull_back import Moves, pull_back
from mas_ext.importance.exact.sample_layout import SampleLayout
from mas_ext.importance.gradients import Totals, column_sum, gradient
from mas_ext.parameters.lockstep import Lockstep

# Stands for a function, tape.func: (tape, *its arguments) -> its result, or NotImplemented.
FunctionRule = Callable[..., Any]
# Sees, on the way back, a meeting and the gradient of its result: the gradient to go on with.
Observer = Callable[[Meeting, Tensor], Tensor]


def named(*names: str) -> list[Callable[..., Any]]:
    """The functions of these names that exist as methods of Tensor and in torch."""
    places = [(where, name) for where in (Tensor, torch) for name in names]
    return [getattr(where, name) for where, name in places if hasattr(where, name)]


# These tell shapes, dtypes and the like.
_METADATA = {
    *(getattr(Tensor, name).__get__ for name in (
        "shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "is_leaf", "layout", "is_meta",
        "is_sparse", "itemsize", "nbytes", "is_quantized", "is_nested", "is_mkldnn", "grad_fn")),
    *named("size", "dim", "numel", "nelement", "ndimension", "element_size", "stride", "is_contiguous",
           "get_device", "is_floating_point", "is_complex", "storage_offset", "__len__", "is_same_size",
           "is_inference", "type"),
}  # fmt: skip
# Of these, only the first argument's numbers count.
_LIKE_ANOTHER = {*named("type_as", "view_as", "reshape_as", "to")}
# These make a tensor of anything: random numbers, or what lies in memory.
_UNKNOWN = {*named(
    "empty", "empty_strided", "empty_permuted", "rand", "randn", "randint", "randperm", "normal", "bernoulli",
    "multinomial", "poisson", "dropout", "rand_like", "randn_like", "randint_like", "empty_like", "new_empty",
    "random_", "normal_", "uniform_", "bernoulli_", "exponential_", "from_numpy", "frombuffer", "from_file",
    "from_dlpack",
)}  # fmt: skip
# These run a backward pass.
_BACKWARD = {torch.autograd.grad, torch.autograd.backward}
# These give all of a tensor new numbers.
_FILLING = {Tensor.fill_, Tensor.zero_, Tensor.copy_}
# These hand a tensor's memory out, where what becomes of it can't be seen.
_OPENING = {
    *named("numpy", "__array__", "__dlpack__", "data_ptr", "untyped_storage", "storage"),
}
# These make tensors of numbers that Python may have read.
_OF_ANYTHING = {torch.tensor, torch.as_tensor, torch.asarray}
# These repeat a tensor, maybe as often as there are samples.
_EXPANDING = {*named("expand", "expand_as", "broadcast_to", "repeat", "tile")}
_IN_PLACE = {
    "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__idiv__", "__imod__",
    "__ipow__", "__iand__", "__ior__", "__ixor__",
}  # fmt: skip


class Tape(TorchFunctionMode):
    """The meetings of some parameters with data in one forward pass: `with Tape(...) as tape`, then `backward`.

    Args:
        constants: the tensors that the model keeps.
        theta: parameters by name.
        samples: how many there are.
        rules: what stands for which function (rules.py).
        shared: functions and shapes of the calls without data whose results are the same for all samples,
        though
            their sizes are those of the batch.
        square: whether squares are summed, or absolute values.
        native: whether the compiled kernels sum them.
        lockstep: of a model under fully_shard, whose ranks run every pass together.
    """

    def __init__(
        self,
        constants: Iterable[Tensor],
        theta: Mapping[str, Tensor],
        samples: int,
        rules: Mapping[Callable[..., Any], FunctionRule],
        shared: Collection[Any],
        square: bool,
        native: bool,
        lockstep: Lockstep | None = None,
    ) -> None:
        super().__init__()
        self.lockstep = lockstep
        self.theta, self.samples, self.square, self.native = theta, samples, square, native
        # Parameters with a use that no rule handles.
        self.unhandled: set[str] = set()
        self.dtypes: set[torch.dtype] = set()
        # The functions called, with what is noted of their results' sizes, and what Python read from data.
        self.functions: list[Hashable] = []
        self.reads: list[Any] = []
        # Whether Python has numbers of the samples.
        self.of_samples, self._truths = False, 0
        self.meetings: list[Meeting] = []
        # Of each meeting's result, as far as a proof depends on them.
        self.shapes: list[tuple[int, ...]] = []
        # Whether data left for where it can't be followed, or parts of the model ran again on the way back.
        self.opened = self.replayed = False
        # The function that a rule stands for, while the rule runs.
        self.func: Callable[..., Any]
        self.origins = Origins(constants, theta)
        # In a proof: what each call runs in, and whether a number was read or a shape was made of data.
        self.around: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.choices: Any = None
        self.random = False
        # What sums are read by, for as long as they may be read again.
        self.tables: list[Tensor | None] = []
        self._rules, self._shared = rules, shared
        self._moves: dict[int, Moves] = {}
        self._groups: dict[int, _Group] = {}
        self._numbers: dict[int, int] = {}
        self._sources = {
            id(p): GradientSource(frozenset((name,)), p, p) for name, p in theta.items()
        }
        self._layouts: Sequence[SampleLayout | None] = ()
        self._totals: Totals = {}
        # Of calls without data: what went in beside tensors.
        self._arguments: list[str] = []
        # The call that a rule stands for, if no data goes in.
        self._optional: Any = None
        self._replaying = False
        self._observer: Observer | None = None

    # -- forward -----------------------------------------------------------------------------------

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call a torch function, or what stands for it where parameters meet data."""
        kwargs = kwargs or {}
        if func in _METADATA:
            return func(*args, **kwargs)
        if func in _BACKWARD:  # checkpointed parts run again inside
            return self.inside(func, *args, **kwargs)
        if self._replaying:
            return self.call(func, args, kwargs)
        self.functions.append(func)
        if self.choices is None:
            result = self.call(func, args, kwargs)
        else:
            with self.around():
                result = self.call(func, args, kwargs)
        self._note_sizes(result)
        return result

    def _note_sizes(self, result: Any) -> None:
        """Note which sizes are 1, along which rows in several orders are the same, and how many results."""
        if isinstance(result, Tensor):
            if not result.is_nested and 1 in result.shape:
                self.functions.append(tuple(size == 1 for size in result.shape))
        elif isinstance(result, (tuple, list)):
            self.functions.append(len(result))

    def call(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The result of a function, or of what stands for it."""
        rule = self._rules.get(func)
        likely = rule is None and args and isinstance(args[0], Tensor)
        if likely and func not in _LIKE_ANOTHER and self.origins.of(args[0]) is None:
            return self._call_on_data(func, args, kwargs)  # as most calls are
        tensors = [*tensors_in(args), *tensors_in(kwargs.values())]
        if func in _LIKE_ANOTHER:
            tensors = tensors[:1]
        origins = [self.origins.of(t) for t in tensors]
        data = None in origins
        follow = torch.is_grad_enabled() and not _transformed()
        if rule is not None and follow:
            sources = any(
                origin is not None and origin.sources and t.requires_grad
                for t, origin in zip(tensors, origins, strict=True)
            )
            if sources:
                if data:
                    origins = [
                        o or self.origins.look_back(t)
                        for t, o in zip(tensors, origins, strict=True)
                    ]
                    data = None in origins
                optional = None if data else (func, *(t.shape for t in tensors))
                if data or self._may_have_samples(optional, tensors, origins):
                    self.func, self._optional = func, optional
                    result = rule(self, *args, **kwargs)
                    if result is not NotImplemented:
                        return result
        if data:
            return self._call_on_data(func, args, kwargs)
        known = [origin for origin in origins if origin is not None]
        origin = MADE if not tensors else Origin(
            frozenset[str]().union(*(o.sources for o in known)),
            func in _EXPANDING or any(o.made for o in known),
        )  # fmt: skip
        derived = bool(origin.sources) and follow
        if derived and not self._replaying:
            others = (a for a in (*args, *kwargs.values()) if not isinstance(a, Tensor))
            self._arguments.extend(map(repr, others))
        seen = self.choices and self.choices.found
        with _own_memory() if derived else nullcontext():
            result = func(*args, **kwargs)
        if self.choices is not None:
            self.choices.found = seen
        if func not in _UNKNOWN and not (func in _OF_ANYTHING and self._of_data(args)):
            for t in tensors_in(args[:1] if func is Tensor.__setitem__ else (result,)):
                self.origins.note(t, origin)
        return result

    def _call_on_data(
        self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        seen = self.choices and self.choices.found
        if self._replaying and not self.replayed:
            self.replayed = torch.is_grad_enabled() and not _transformed()
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor):
            if func in _OPENING:
                self.opened = True
            elif result is not None and next(tensors_in((result,)), None) is None:
                self.read(result)
                # Fewer truth values than samples are not one of each, which a tensor may be made of.
                self._truths += isinstance(result, bool)
                self.of_samples |= not isinstance(result, bool) or self._truths >= self.samples
                if self.choices is not None:
                    self.choices.found = seen
        elif self.choices is not None and func is Tensor.__getitem__:
            self._note_indices(result, args[1])
        if self.writes(func) and args and isinstance(args[0], Tensor):
            if func in _FILLING and self._fills(args):
                self.origins.note(args[0], CONSTANT)
            else:
                self.origins.forget(args[0])
        if kwargs and isinstance(kwargs.get("out"), Tensor):
            self.origins.forget(kwargs["out"])
        return result

    def _note_indices(self, result: Tensor, index: Any) -> None:
        """Take what autograd keeps of an index without data for a constant."""
        if all(self.origins.of(t) is not None for t in tensors_in((index,))):
            for t in tensors_in((getattr(result.grad_fn, "_saved_indices", ()),)):
                self.origins.note(t, CONSTANT)

    def _of_data(self, args: Sequence[Any]) -> bool:
        """Whether a tensor that is made of Python's numbers may be made of the batch's."""
        return self.of_samples or not isinstance(args[0], (bool, int, float, list, tuple))

    def _fills(self, args: Sequence[Any]) -> bool:
        """Whether all numbers of the first argument are new, and none is data."""
        whole = args[0].nbytes == args[0].untyped_storage().nbytes()
        others = [self.origins.of(t) for t in tensors_in(args[1:])]
        return whole and all(origin is not None and not origin.sources for origin in others)

    def _may_have_samples(
        self, call: Any, tensors: Sequence[Tensor], origins: Sequence[Origin | None]
    ) -> bool:
        """Whether a call without data may be of rows of samples: zeros, or a parameter expanded to them."""
        if call in self._shared:
            return False
        return call[0] in _EXPANDING or any(
            origin is not None
            and origin.made
            and not origin.sources
            and self._may_hold_samples(t.shape)
            for t, origin in zip(tensors, origins, strict=True)
        )

    @staticmethod
    @cache
    def writes(func: Callable[..., Any]) -> bool:
        """Whether a function writes into its first argument."""
        name = getattr(func, "__name__", "")
        return name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))

    def _may_hold_samples(self, shape: Sequence[int]) -> bool:
        rows = len(shape) > 1 and shape[0] > 1 and shape[0] % self.samples == 0
        return rows or self.samples in shape[:2]

    @property
    def met(self) -> list[frozenset[str]]:
        """The names of the parameters in each meeting."""
        return [meeting.names for meeting in self.meetings]

    def source(self, t: Any) -> GradientSource | None:
        """A parameter, or a real tensor that is derived from parameters; None for everything else."""
        if not isinstance(t, Tensor):
            return None
        found = self._sources.get(id(t))
        if found is not None:
            return found
        origin = self.origins.of(t) if t.requires_grad else None
        if origin is None or not origin.sources or t._backward_hooks or t.is_complex():
            return None
        found = GradientSource(origin.sources, t, t.detach().requires_grad_())
        self._sources[id(t)] = found
        return found

    def read(self, numbers: Any) -> Any:
        """Numbers that a rule read from data, which a proof depends on."""
        if not self._replaying:
            self.reads.append(_as_key(numbers))
        return numbers

    def derive(self, t: Tensor, source: Tensor) -> None:
        """Remember that a rule computed a tensor from what is no data."""
        origin = self.origins.of(source)
        if origin is not None:
            self.origins.note(t, origin)

    def follows(self, t: Tensor | None) -> bool:
        """Whether a weight has no gradient but that of a source."""
        return (
            t is None
            or not t.requires_grad
            or self.source(t) is not None
            or not self._has_gradient(t)
        )

    def is_data(self, t: Tensor) -> bool:
        """Whether a tensor depends on the batch, as far as is known."""
        return self.origins.of(t) is None

    def layer(self, layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """layer.forward(x, weight, bias), with gradients of weight and bias recorded on the way back."""
        sources = self.source(weight), self.source(bias)
        # What needs a gradient, but is no source, is left to autograd.
        left = [
            source is None and not self.follows(t)
            for source, t in zip(sources, (weight, bias), strict=True)
        ]
        if not any(left):
            return self._meet(layer, x, weight, bias, *sources)
        if not left[0]:
            y = self._meet(layer, x, weight, None, sources[0], None)
        else:
            y = layer.forward(x, weight, None)
            if bias is not None and sources[1] is not None:
                return y + self._broadcast(sources[1], layer.bias_shape(y, bias), y.shape)
        return y if bias is None else y + bias.view(layer.bias_shape(y, bias))

    def _has_gradient(self, t: Tensor) -> bool:
        origin = self.origins.of(t)
        return origin is None or bool(origin.sources)

    def _meet(
        self,
        layer: Layer,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_source: GradientSource | None,
        bias_source: GradientSource | None,
    ) -> Tensor:
        """The layer, as a meeting of its sources."""
        weight = weight if weight_source is None else weight_source.leaf
        bias = bias if bias_source is None else bias_source.leaf
        meeting = Meeting(self._optional, layer, weight_source, bias_source)
        y = self.apply(meeting, x, weight, bias)
        if not self._replaying:
            self.meetings.append(meeting)
            self.shapes.append(tuple(y.shape))
            self.dtypes.add(y.dtype)
            for source in meeting.sources:
                source.meetings += 1
        return y

    def apply(self, meeting: Meeting, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer as an autograd Function."""
        y: Tensor = LayerNode.apply(self, meeting, x, weight, bias)  # type: ignore[no-untyped-call]
        return y

    def broadcast(
        self, t: Tensor, y_shape: Sequence[int], shape: Sequence[int] = ()
    ) -> Tensor | None:
        """A source, seen with a shape, expanded to y's shape; None where that can't be recorded."""
        for dim, stride in enumerate(t.stride()):
            if stride == 0 and t.shape[dim] > 1:  # the same again and again
                t, shape = t.narrow(dim, 0, 1), ()
                self.origins.note(t, self.origins.of(t) or CONSTANT)
        source = self.source(t)
        return None if source is None else self._broadcast(source, shape or t.shape, y_shape)

    def _broadcast(
        self, source: GradientSource, shape: Sequence[int], y_shape: Sequence[int]
    ) -> Tensor:
        layer = Broadcast(tuple(shape), tuple(y_shape))
        return self._meet(layer, source.leaf.new_empty(0), source.leaf, None, source, None)

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

    @property
    def _derived(self) -> dict[int, Tensor]:
        """The derived tensors cut off from the graph, by what `_sources` has them under."""
        sources = self._sources.items()
        return {i: source.leaf for i, source in sources if source.leaf is not source.tensor}

    @property
    def _leaves(self) -> list[Tensor]:
        return [source.leaf for source in self._sources.values()]

    @torch.no_grad()
    def observe(self, observer: Observer, y: Tensor, grad: Tensor) -> None:
        """A backward pass from y, of gradient grad, in which an observer sees all meetings."""
        with torch.enable_grad():
            # To start from a gradient, autograd would import what takes seconds.
            total = (y * grad).sum()
        self._replaying, self._observer = True, observer
        try:
            if self.lockstep is not None:
                derived = [*self._derived.values()]
                self.lockstep.backward(total, derived, retain=True, around=lambda: self)
                self._used_elsewhere()
                return
            with self:
                torch.autograd.grad(total, self._leaves, retain_graph=True, allow_unused=True)
        finally:
            self._replaying, self._observer = False, None

    def seen(self, meeting: Meeting, grad: Tensor) -> Tensor:
        """The gradient of a meeting's result to go on with."""
        return grad if self._observer is None else self._observer(meeting, grad)

    def layout_of(self, meeting: Meeting, grad: Tensor) -> SampleLayout | None:
        """Where samples lie in a meeting's result; None where its gradients are not asked for."""
        if id(meeting) not in self._numbers:
            return None
        layout = self._layouts[self._numbers[id(meeting)]]
        if layout is None or any(
            layout.varies(shape, grad.dim()) for shape in meeting.layer.repeated_shapes(grad)
        ):
            self.unhandled |= meeting.names
            return None
        return layout

    def record(self, source: GradientSource, gradients: PerSample) -> None:
        """Take a source's per-sample gradients from one meeting; totals, once all are there that add up."""
        source.forms.append(gradients)
        if isinstance(gradients, Product):
            self.tables.append(gradients.rows)
        group = self._groups[id(source)]
        group.missing -= 1
        if group.missing == 0:
            self._add_up(group)

    def take(self, theta: Mapping[str, Tensor]) -> Totals:
        """The totals of some parameters by name, once no meeting adds to them any more."""
        used = {name for name, p in theta.items() if p.grad is not None}
        self.unhandled |= used & self.theta.keys()
        for group in {id(g): g for g in self._groups.values()}.values():
            names = frozenset[str]().union(*(source.names for source in group.sources))
            if any(source.forms for source in group.sources) and names & theta.keys():
                self._add_up(group)
        return {name: self._totals.pop(name) for name in theta if name in self._totals}

    def _used_elsewhere(self) -> set[str]:
        """The parameters behind derived tensors that autograd has a gradient for, which is dropped."""
        found = {i: leaf for i, leaf in self._derived.items() if leaf.grad is not None}
        names = frozenset[str]().union(*(self._sources[i].names for i in found))
        for leaf in found.values():
            leaf.grad = None
        return {*names}

    def _add_up(self, group: _Group) -> None:
        sources = [source for source in group.sources if source.forms]
        first = sources[0]
        if len(sources) == 1 and first.leaf is first.tensor:
            (name,) = first.names
            like = like_total(first.leaf)
            found = {name: total_of(first.forms, like, self.square, self.native)}
        else:
            moves = self._moves.setdefault(group.number, Moves())
            found = pull_back(sources, self.theta, self.square, self.native, moves, self._arguments)
        for name, total in found.items():
            self._totals[name] = self._totals[name].add_(total) if name in self._totals else total
        for source in sources:
            source.forms = []

    @torch.no_grad()
    def backward(
        self,
        values: Tensor,
        layouts: Sequence[SampleLayout | None],
        moves: dict[int, Moves],
        totals: Totals,
        sketched: bool = False,
        retain: bool = False,
    ) -> Totals:
        """Adds the sum over samples and columns of abs (or square) of d values / d theta to `totals`, by name.

        Of a sharded model it goes to the lockstep's sums, or, `sketched`, its sketches to `totals`.

        layouts: where samples lie in each meeting's result, None where that is not known. moves: what is
        known of the ways from sources to parameters, for passes of the same signature. A parameter that
        autograd has a gradient for has a use that was not recorded: it is unhandled. retain: whether a sharded
        model's graph is kept.
        """
        if self.lockstep is not None:
            self._backward_in_lockstep(
                self.lockstep, values, layouts, moves, totals if sketched else None, retain
            )
            return totals
        self._layouts, self._moves, self._totals = layouts, moves, totals
        self._numbers = {id(meeting): i for i, meeting in enumerate(self.meetings)}
        sources = [*self._sources.values()]
        leaves = {i: source.leaf for i, source in enumerate(sources)}
        # Checkpointed parts run again on the way back, and must do so as they did before.
        self._replaying = True
        device = values.device.type
        rounded = torch.is_autocast_enabled(device)  # sums would be, too
        with self, torch.autocast(device, enabled=False) if rounded else nullcontext():
            for c in range(values.shape[1]):
                groups = self._groups = _groups(sources)
                for i in gradient(values, c, leaves):
                    self.unhandled |= sources[i].names
                with torch._C.DisableTorchFunction():
                    for (
                        group
                    ) in groups.values():  # some gradients may be missing, where there is none
                        if any(source.forms for source in group.sources):
                            self._add_up(group)
        self._totals, self._numbers = {}, {}
        return totals

    @torch.no_grad()
    def _backward_in_lockstep(
        self,
        lockstep: Lockstep,
        values: Tensor,
        layouts: Sequence[SampleLayout | None],
        moves: dict[int, Moves],
        sketches: Totals | None,
        retain: bool,
    ) -> None:
        """`backward` of a sharded model, whose totals are taken unit by unit."""
        derived = [*self._derived.values()]

        @contextmanager
        def around() -> Iterator[None]:
            self._layouts, self._moves, self._totals = layouts, moves, {}
            self._numbers = {id(meeting): i for i, meeting in enumerate(self.meetings)}
            self._groups = _groups([*self._sources.values()])
            self._replaying = True
            with self, torch.autocast(values.device.type, enabled=False):
                yield
            self._numbers, self._replaying = {}, False

        for c in range(values.shape[1]):
            again = retain or c + 1 < values.shape[1]
            lockstep.backward(column_sum(values, c), derived, self.take, sketches, again, around)
            self.unhandled |= self._used_elsewhere() | self._totals.keys()


@dataclass(eq=False)
class _Group:
    """Sources with parameters in common: their gradients add up before abs.

    missing: how many meetings have not reported yet.
    """

    number: int
    sources: list[GradientSource]
    missing: int


def _groups(sources: Iterable[GradientSource]) -> dict[int, _Group]:
    """The group of each source that data meets, by its id."""
    by_name: dict[str, _Group] = {}
    found: dict[int, _Group] = {}
    for number, source in enumerate(s for s in sources if s.meetings):
        group = _Group(number, [source], source.meetings)
        for other in {id(g): g for n in source.names if (g := by_name.get(n))}.values():
            group.sources = other.sources + group.sources
            group.missing += other.missing
        found |= {id(s): group for s in group.sources}
        by_name |= {name: group for s in group.sources for name in s.names}
    return found


def _as_key(read: Any) -> Any:
    """What Python read, so that it compares equal to the same, NaN included."""
    if isinstance(read, (bool, int, str, tuple)):
        return read
    return repr(read) if isinstance(read, (float, list)) else type(read).__qualname__


def _own_memory() -> AbstractContextManager[Any]:
    """Keeps what autograd remembers of a derived tensor out of checkpoints, which would run again for it."""
    return torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda t: t)


def _transformed() -> bool:
    """Whether a transform of torch.func runs, which knows nothing of the functions below."""
    return torch._C._functorch.peek_interpreter_stack() is not None
