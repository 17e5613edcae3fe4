"""From per-sample gradients of what is derived from parameters to sums for the parameters themselves.

A source d is a function of parameters p, with the Jacobian J = d d / d p, and g_k is the gradient of sample k
with respect to d. What is asked for is sum_k abs(sum over sources of J^T g_k), or of its square, in one of
three ways:

factors   sums, products and transposes of matrices turn the factors of g_k = left_k^T right_k into others:
          d = A B has left_k^T (right_k B^T) for A, and (left_k A)^T right_k for B.
moves     where every element of p reaches one element of d at most, times a number s, abs comes first:
          abs(s) sum_k abs(g_k), one product with J^T for all samples.
dense     anything else: J^T g_k for some samples at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from mas_ext.importance.exact.gradient_forms import (
    CHUNK,
    PerSample,
    Product,
    joined,
    like_total,
    magnitude,
    total_of,
)
from mas_ext.importance.exact.nodes import GradientSource
from mas_ext.importance.gradients import Totals
from mas_ext.kernels.dtypes import compute_dtype

# What rounding may make of a square, relative to it.
_ROUNDING = 1e-4
# Samples whose gradients are pulled back at once.
_MOST_AT_ONCE = 64


@dataclass
class Moves:
    """Which parameters are reached by moves alone, for as long as all that they depend on stays as it is.

    inputs: versions of the parameters' values, and numbers. alone: by name; absent, where it was not found out.
    dense: the names of parameters that are pulled back sample by sample.
    """

    inputs: tuple[Any, ...] = ()
    alone: dict[str, bool] = field(default_factory=dict)
    dense: set[str] = field(default_factory=set)


@dataclass(eq=False)
class _Part:
    """A tensor before a source, and its per-sample gradients."""

    edge: GradientEdge
    forms: list[PerSample]

    @property
    def dtype(self) -> torch.dtype:
        """The tensor's own."""
        dtype: torch.dtype = self.edge.node._input_metadata[self.edge.output_nr].dtype
        return dtype

    @property
    def like(self) -> Tensor:
        """An empty tensor of the shape of this one, and the dtype of a total."""
        data = self.edge.node._input_metadata[self.edge.output_nr]
        return like_total(torch.empty((), dtype=data.dtype, device=data.device).expand(data.shape))

    def transposed_jacobian(
        self, gradient: Tensor, theta: Mapping[str, Tensor], batched: bool = False
    ) -> Totals:
        """J^T gradient by name, in the dtype of a total; absent where this does not depend on the parameter."""
        found = torch.autograd.grad(
            [self.edge], [*theta.values()], [gradient.to(self.dtype)],
            retain_graph=True, allow_unused=True, is_grads_batched=batched,
        )  # fmt: skip
        return {
            name: (g.to_dense() if g.is_sparse else g).to(gradient.dtype)
            for name, g in zip(theta, found, strict=True)
            if g is not None
        }


def pull_back(
    sources: Sequence[GradientSource],
    theta: Mapping[str, Tensor],
    square: bool,
    native: bool,
    moves: Moves,
    numbers: Sequence[Any],
) -> Totals:
    """sum_k f(gradient of sample k), f = abs or square, by name, of all parameters behind these sources.

    theta: parameters by name. moves: what an earlier pass found out, renewed where that does not hold any more.
    numbers: that sources were made with.
    """
    behind = frozenset[str]().union(*(source.names for source in sources))
    theta = {name: p for name, p in theta.items() if name in behind}
    names = {id(p): name for name, p in theta.items()}
    direct: dict[str, list[PerSample]] = {}
    parts: dict[tuple[Any, int], _Part] = {}
    for source in sources:
        for form in joined(source.forms):
            for edge, before in _factored(get_gradient_edge(source.tensor), form):
                name = names.get(id(getattr(edge.node, "variable", None)))
                if name is not None:
                    direct.setdefault(name, []).append(before)
                elif not hasattr(edge.node, "variable"):
                    key = edge.node, edge.output_nr
                    parts.setdefault(key, _Part(edge, [])).forms.append(before)
    inputs = (*(p._version for p in theta.values()), *numbers)
    if moves.inputs != inputs:
        moves.inputs, moves.alone = inputs, {}
    reached, alone = _find_moves([*parts.values()], theta, direct, moves)
    totals: Totals = {}
    dense: dict[tuple[_Part, ...], Totals] = {}
    for name, p in theta.items():
        like = like_total(p)
        if not reached[name]:
            if name in direct:
                totals[name] = total_of(direct[name], like, square, native)
        elif alone[name]:
            totals[name] = torch.zeros_like(like, memory_format=torch.contiguous_format)
        else:
            dense.setdefault(tuple(reached[name]), {})[name] = p
    moved = {name: theta[name] for name in totals if reached[name]}
    for part in parts.values():
        if any(part in reached[name] for name in moved):
            _add_moved(totals, part, moved, square, native)
    moves.dense = {name for group in dense.values() for name in group}
    for together, group in dense.items():
        _add_dense(totals, together, direct, group, square)
    return totals


def _factored(edge: GradientEdge, form: PerSample) -> Iterator[tuple[GradientEdge, PerSample]]:
    """What a gradient is before sums, products, transposes and scales of matrices, as far as these go back."""
    node: Any = edge.node
    shapes = [None if before is None else _shape(before, i) for before, i in node.next_functions]
    kind = node.name()
    found: list[PerSample | None] | None = None
    if kind in ("AddBackward0", "SubBackward0"):
        if all(s in (None, _shape(node, edge.output_nr)) for s in shapes):
            alpha = float(node._saved_alpha)
            found = [form, form.scaled(-alpha if kind == "SubBackward0" else alpha)]
    elif kind in ("MulBackward0", "DivBackward0"):
        other = node._saved_other
        if shapes[1] is None and other.dim() == 0:
            found = [
                form.scaled(float(other) if kind == "MulBackward0" else 1 / float(other)),
                None,
            ]
    elif kind == "ToCopyBackward0":
        found = [form]
    elif not isinstance(form, Product) or not form.is_matrix:
        pass
    elif _is_transpose(node, edge.output_nr):
        found = [Product(form.right, form.left)]
    elif kind == "MmBackward0":
        left, right, a, b = form.left, form.right, node._saved_self, node._saved_mat2
        found = [
            None
            if shapes[0] is None
            else Product(left, torch.matmul(right, b.t().to(right.dtype))),
            None if shapes[1] is None else Product(torch.matmul(left, a.to(left.dtype)), right),
        ]
    if found is None:
        yield edge, form
        return
    for (before, i), behind in zip(node.next_functions, found, strict=True):
        if before is not None and behind is not None:
            yield from _factored(GradientEdge(before, i), behind)


def _is_transpose(node: Any, output: int) -> bool:
    """Whether a node swaps the dimensions of a matrix, as t, T, mT, transpose and permute do."""
    kind = node.name()
    if kind == "TBackward0":
        return True
    if len(_shape(node, output)) != 2:
        return False
    if kind == "TransposeBackward0":
        return bool(node._saved_dim0 % 2 != node._saved_dim1 % 2)
    return bool(kind == "PermuteBackward0" and node._saved_dims[0] % 2 == 1)


def _shape(node: Any, output: int) -> torch.Size:
    """The shape of a result of a node, or of the parameter that it is of."""
    p = getattr(node, "variable", None)
    return torch.Size(node._input_metadata[output].shape if p is None else p.shape)


def _find_moves(
    parts: Sequence[_Part], theta: Mapping[str, Tensor], direct: Mapping[str, Any], moves: Moves
) -> tuple[dict[str, list[_Part]], dict[str, bool]]:
    """By name: the parts that depend on a parameter, and whether they do so by moves alone.

    With v random, J has at most one number s for each element of p where (J^T v)^2 = (J^T 1) (J^T v^2): s^2
    v^2 on both sides. More of them would have to have equal v. These are powers of two, with which 16 bits are
    rounded as without; but float16 has not the range of totals.
    """
    reached: dict[str, list[_Part]] = {name: [] for name in theta}
    alone = {name: name not in direct for name in theta}
    often = {name: torch.zeros_like(p, dtype=torch.int8) for name, p in theta.items()}
    known = moves.alone.keys() >= theta.keys()
    generator = torch.Generator().manual_seed(0)
    for part in parts:
        like = part.like
        ones = part.transposed_jacobian(torch.ones_like(like), theta)
        for name in ones:
            reached[name].append(part)
        if known:
            continue
        for _ in range(4):
            v = 2.0 ** torch.randint(-16, 17, like.shape, generator=generator).to(like)
            first, second = (part.transposed_jacobian(t, theta) for t in (v, v * v))
            for name, s in ones.items():
                a, b = first[name], second[name]
                same = ((a * a - s * b).abs() <= _ROUNDING * a * a).all()
                alone[name] &= bool(same) and part.dtype != torch.float16
        for name in first:
            often[name] += first[name] != 0
    if known:
        return reached, {name: moves.alone[name] for name in theta}
    alone = {name: found and not bool((often[name] > 1).any()) for name, found in alone.items()}
    moves.alone = alone
    return reached, alone


def _add_moved(
    totals: Totals, part: _Part, theta: Mapping[str, Tensor], square: bool, native: bool
) -> None:
    """Add what a part's total comes to for parameters that it depends on by moves."""
    total = total_of(part.forms, part.like, square, native)
    found = part.transposed_jacobian(total, theta)
    scales = part.transposed_jacobian(torch.ones_like(total), theta) if square else {}
    for name, moved in found.items():
        totals[name] += (moved * scales[name] if square else moved).abs()


def _add_dense(
    totals: Totals,
    parts: Sequence[_Part],
    direct: Mapping[str, Sequence[PerSample]],
    theta: Mapping[str, Tensor],
    square: bool,
) -> None:
    """Add J^T g_k of some samples at a time, of all parts and of the parameters themselves."""
    samples = parts[0].forms[0].samples
    numbers = max(part.like.numel() for part in parts)
    step = min(_MOST_AT_ONCE, max(1, CHUNK // max(1, numbers)))
    for name, p in theta.items():
        totals[name] = torch.zeros(p.shape, dtype=compute_dtype(p.dtype), device=p.device)
    for start in range(0, samples, step):
        stop = min(start + step, samples)
        g: dict[str, Any] = dict.fromkeys(theta, 0)
        for name in theta:
            for form in direct.get(name, ()):
                g[name] = g[name] + form.dense(start, stop, totals[name])
        for part in parts:
            for name, found in _of_samples(part, start, stop, theta).items():
                g[name] = g[name] + found
        for name in theta:
            totals[name] += magnitude(g[name], square).sum(0)


def _of_samples(part: _Part, start: int, stop: int, theta: Mapping[str, Tensor]) -> Totals:
    """J^T g_k of the samples from start to stop, shape (samples, *parameter), by name."""
    like = part.like
    gradients = reduce(torch.add, (form.dense(start, stop, like) for form in part.forms))
    if stop - start > 1:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # vmap warns where it would loop itself, slowly
                return part.transposed_jacobian(gradients, theta, batched=True)
        except Exception:  # some functions can't be run for many at once
            pass
    each = [part.transposed_jacobian(g, theta) for g in gradients]
    return {name: torch.stack([found[name] for found in each]) for name in each[0]}
