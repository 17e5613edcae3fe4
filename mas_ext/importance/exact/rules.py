"""The torch functions in which parameters meet data, and the layer (layers.py) that each of them is.

A function that is not here, or a call for which a rule returns NotImplemented, runs as it is; where it takes
data, its parameters then go to the fallback.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mas_ext.importance.exact.layers import (
    Affine,
    Convolution,
    Embedding,
    GroupedLinear,
    Linear,
    OfZeros,
    Standardised,
    channels,
)
from mas_ext.importance.exact.tracing import FunctionRule, Tape, named
from mas_ext.parameters.names import StandIn

RULES: dict[Callable[..., Any], FunctionRule] = {}


def register_rule(*functions: Callable[..., Any]) -> Callable[[FunctionRule], FunctionRule]:
    """Let the decorated function (tape, *arguments) stand for these torch functions of the same arguments.

    It is called where parameters, or what is derived from them, meet data, and returns the function's result:
    of `tape.layer`, or of functions that have rules, under `with tape:`. NotImplemented sends the parameters
    to the fallback. mas_ext/importance/exact/README.md has examples.

        @register_rule(torch.baddbmm)
        def baddbmm(tape, input, batch1, batch2, *, beta=1, alpha=1):
            with tape:
                return beta * input + alpha * torch.bmm(batch1, batch2)
    """

    def register(rule: FunctionRule) -> FunctionRule:
        RULES.update(dict.fromkeys(functions, rule))
        return rule

    return register


@register_rule(F.linear)
def _linear(tape: Tape, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if weight.dim() != 2:
        return NotImplemented
    if isinstance(weight, StandIn) and bias is None:
        return tape.layer(OfZeros(), input, weight, None)
    return _matrix(tape, input, weight, bias)


@register_rule(*named("matmul", "__matmul__"))
def _matmul(tape: Tape, input: Tensor, other: Tensor) -> Any:
    if tape.source(other) is not None:
        if other.dim() == 1:
            y = _matrix(tape, input, other[None])
            return y if y is NotImplemented else y.squeeze(-1)
        matrix = _one_matrix(other)
        if matrix.dim() > 2:
            y = _matrices(tape, input, matrix.mT)
        else:
            y = _matrix(tape, input, matrix, transposed=True)
        return y if y is NotImplemented else _broadcast_to(y, input, other)
    if other.dim() < 2:
        return NotImplemented
    # y^T = other^T input^T; what torch returns is contiguous, so that it can be viewed in any shape.
    if input.dim() == 2:
        return _matrix(tape, other.mT, input).mT.contiguous()
    y = _matrices(tape, other.mT, input)
    return y if y is NotImplemented else y.mT.contiguous()


@register_rule(*named("mm", "bmm"))
def _two_matrices(tape: Tape, input: Tensor, mat2: Tensor) -> Any:
    return _matmul(tape, input, mat2)


def _matrices(tape: Tape, x: Tensor, weight: Tensor) -> Any:
    """y[..., g, :, :] = x[..., g, :, :] weight[g]^T."""
    if weight.dim() != 3 or x.dim() < 3 or x.shape[-3] != len(weight):
        return NotImplemented
    groups = x.transpose(-3, -2).flatten(-2)
    y = tape.layer(GroupedLinear(len(weight)), groups, weight, None)
    return y.unflatten(-1, weight.shape[:2]).transpose(-3, -2).contiguous()


@register_rule(torch.inner, Tensor.inner)
def _inner(tape: Tape, input: Tensor, other: Tensor) -> Any:
    return NotImplemented if other.dim() != 2 else _matrix(tape, input, other)


@register_rule(torch.einsum)
def _einsum(tape: Tape, equation: Any, *operands: Any) -> Any:
    """A product of data and a weight: grouped by letters of all three, summed over those of both alone."""
    operands = operands[0] if len(operands) == 1 else operands
    terms, arrow, result = str(equation).replace(" ", "").partition("->")
    names = terms.split(",")
    if len(operands) != 2 or len(names) != 2 or not arrow or not isinstance(equation, str):
        return NotImplemented
    (x, weight), (of_x, of_weight) = operands, names
    if tape.source(weight) is None:
        x, weight, of_x, of_weight = weight, x, of_weight, of_x
    if of_x.count("...") and of_x.count("...") == result.count(
        "..."
    ):  # letters for these dimensions
        free = "".join(c for c in string.ascii_letters if c not in equation)[
            : x.dim() + 3 - len(of_x)
        ]
        of_x, result = of_x.replace("...", free), result.replace("...", free)
    grouped = [c for c in of_x if c in of_weight and c in result]
    summed = [c for c in of_x if c in of_weight and c not in result]
    rows = [c for c in of_x if c not in of_weight]
    outputs = [c for c in of_weight if c not in of_x]
    simple = all(len({*term}) == len(term) for term in (of_x, of_weight, result))
    letters = {*rows, *grouped, *outputs}
    if not simple or {*result} != letters or tape.source(weight) is None or not rows:
        return NotImplemented
    size = dict(zip(of_weight, weight.shape, strict=True))
    groups, *shape = (math.prod(size[c] for c in part) for part in (grouped, outputs, summed))
    matrices = weight.permute([of_weight.index(c) for c in grouped + outputs + summed])
    matrices = matrices.reshape(groups, *shape)
    tape.derive(matrices, weight)
    x = x.permute([of_x.index(c) for c in rows + grouped + summed])
    x = x.reshape(*x.shape[: len(rows)], groups * shape[1])
    y = tape.layer(GroupedLinear(groups), x, matrices, None)
    y = y.view(*y.shape[:-1], *(size[c] for c in grouped + outputs))
    return y.permute([(rows + grouped + outputs).index(c) for c in result]).contiguous()


def _broadcast_to(y: Tensor, *factors: Tensor) -> Tensor:
    """A product of matrices, repeated along the dimensions of its factors before the last two."""
    shape = torch.broadcast_shapes(*(t.shape[:-2] for t in factors))
    return y if y.shape[:-2] == shape else y.expand(*shape, -1, -1).contiguous()


def _one_matrix(t: Tensor) -> Tensor:
    """The matrix that a tensor repeats for every sample, if it does."""
    while t.dim() > 2 and (t.stride(0) == 0 or t.shape[0] == 1):
        t = t[0]
    return t


@register_rule(*named("addmm"))
def _addmm(
    tape: Tape,
    input: Tensor,
    mat1: Tensor,
    mat2: Tensor,
    *,
    beta: Any = 1,
    alpha: Any = 1,
) -> Any:
    if beta != 1 or alpha != 1 or input.dim() != 1:
        return NotImplemented
    return _matrix(tape, mat1, mat2, input, transposed=True)


def _matrix(
    tape: Tape, x: Tensor, weight: Tensor, bias: Tensor | None = None, transposed: bool = False
) -> Any:
    """y = x weight^T + bias, or x weight + bias."""
    return NotImplemented if x.dim() < 2 else tape.layer(Linear(transposed), x, weight, bias)


def _numbers(value: Any, count: int) -> tuple[int, ...]:
    return (value,) * count if isinstance(value, int) else tuple(value) * (count // len(value))


@register_rule(torch.conv1d, torch.conv2d, torch.conv3d)
def _convolution(
    tape: Tape,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    kernel, dims = tuple(weight.shape[2:]), weight.dim() - 2
    if input.dim() != dims + 2:
        return NotImplemented
    stride, dilation = _numbers(stride, dims), _numbers(dilation, dims)
    if padding == "valid":
        padding = 0
    if padding == "same":
        around = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        odd = [n % 2 for n in around]
        if any(odd):  # torch, too, puts the odd one behind
            input = F.pad(input, [n for more in reversed(odd) for n in (0, more)])
        padding = [n // 2 for n in around]
    layer = Convolution(kernel, stride, _numbers(padding, dims), dilation, groups)
    return tape.layer(layer, input, weight, bias)


@register_rule(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
def _transposed_convolution(
    tape: Tape,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Any:
    kernel, dims = tuple(weight.shape[2:]), weight.dim() - 2
    if input.dim() != dims + 2:
        return NotImplemented
    layer = Convolution(
        kernel,
        _numbers(stride, dims),
        _numbers(padding, dims),
        _numbers(dilation, dims),
        groups,
        True,
        _numbers(output_padding, dims),
    )
    return tape.layer(layer, input, weight, bias)


def _affine(
    tape: Tape,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    shape: tuple[int, ...],
) -> Tensor:
    """The weight and bias behind a normalisation."""
    if weight is None:
        weight = x.new_ones(shape)
    return tape.layer(Affine(shape), x, weight, bias)


@register_rule(F.layer_norm, torch.layer_norm)
def _layer_norm(
    tape: Tape,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *others: Any,
    **options: Any,
) -> Any:
    x = tape.func(input, normalized_shape, None, None, *others, **options)
    return _affine(tape, x, weight, bias, tuple(normalized_shape))


@register_rule(*([F.rms_norm] if hasattr(F, "rms_norm") else []))
def _rms_norm(
    tape: Tape,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Any:
    x = tape.func(input, normalized_shape, eps=eps)
    return _affine(tape, x, weight, None, tuple(normalized_shape))


@register_rule(F.group_norm, torch.group_norm)
def _group_norm(
    tape: Tape,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *others: Any,
    **options: Any,
) -> Any:
    x = tape.func(input, num_groups, None, None, *others, **options)
    return _affine(tape, x, weight, bias, channels(x))


@register_rule(F.instance_norm)
def _instance_norm(
    tape: Tape,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *others: Any,
    **options: Any,
) -> Any:
    x = tape.func(input, running_mean, running_var, None, None, *others, **options)
    return _affine(tape, x, weight, bias, channels(x))


@register_rule(F.batch_norm)
def _batch_norm(
    tape: Tape,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if training:
        raise ValueError(
            "model: it normalises over the batch (batch_norm in training mode), so that samples interact "
            'and have no gradient of their own; use method="batch" or another normalisation'
        )
    if running_mean is None or running_var is None:
        return NotImplemented
    if weight is None:
        weight = torch.ones_like(running_mean)
    layer = Standardised(running_mean, running_var, eps)
    return tape.layer(layer, input, weight, bias)


@register_rule(torch.prelu)
def _prelu(tape: Tape, input: Tensor, weight: Tensor) -> Any:
    shape = channels(input) if weight.numel() > 1 else (1,)
    slope = tape.broadcast(weight, input.shape, shape)
    return NotImplemented if slope is None else F.relu(input) - slope * F.relu(-input)


@register_rule(F.embedding)
def _embedding(
    tape: Tape,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if tape.source(weight) is None or max_norm is not None or scale_grad_by_freq or not input.dim():
        return NotImplemented
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    return tape.layer(Embedding(padding_idx), input, weight, None)


@register_rule(torch.index_select, Tensor.index_select)
def _index_select(tape: Tape, input: Tensor, dim: int, index: Tensor) -> Any:
    return _rows(tape, input, index) if dim in (0, -input.dim()) else NotImplemented


@register_rule(Tensor.__getitem__)
def _getitem(tape: Tape, input: Tensor, index: Any) -> Any:
    rows = isinstance(index, Tensor) and index.dtype in (torch.int32, torch.int64)
    if rows and index.dim() == 0:  # the same row for all samples, as with a number
        return input[tape.read(int(index))]
    return _rows(tape, input, index) if rows else NotImplemented


def _rows(tape: Tape, input: Tensor, index: Tensor) -> Any:
    """Rows of a derived table, looked up by data."""
    if tape.source(input) is None or index.dim() == 0:
        return NotImplemented
    table = input.flatten(1) if input.dim() > 1 else input[:, None]
    tape.derive(table, input)
    index = torch.where(index < 0, index + len(input), index)
    y = tape.layer(Embedding(None), index, table, None)
    return y.view(*index.shape, *input.shape[1:])


@register_rule(
    *named("add", "__add__", "__radd__", "sub", "__sub__", "rsub", "__rsub__", "mul", "__mul__"),
    *named("__rmul__", "div", "__truediv__", "__rtruediv__", "true_divide", "subtract", "multiply"),
    *named("maximum", "minimum", "where", "lerp", "addcmul", "pow", "__pow__", "__rpow__", "clamp"),
    *named("__iadd__", "__isub__", "__imul__", "__itruediv__", "add_", "sub_", "mul_", "div_"),
    *named("addcmul_"),
)
def _elementwise(tape: Tape, *args: Any, **kwargs: Any) -> Any:
    if tape.writes(tape.func) and tape.source(args[0]):
        return NotImplemented
    values = [*args, *kwargs.values()]
    y_shape = torch.broadcast_shapes(*(t.shape for t in values if isinstance(t, Tensor)))
    expanded = [tape.broadcast(t, y_shape) if tape.source(t) else t for t in values]
    if any(t is None and value is not None for t, value in zip(expanded, values, strict=True)):
        return NotImplemented
    named_ones = zip(kwargs, expanded[len(args) :], strict=True)
    return tape.func(*expanded[: len(args)], **dict(named_ones))


@register_rule(*named("expand", "expand_as", "broadcast_to", "repeat", "tile"))
def _expand(tape: Tape, input: Tensor, *sizes: Any, **kwargs: Any) -> Any:
    result = tape.func(input, *sizes, **kwargs)
    shape = result.shape
    blocks = tape.func in named("repeat", "tile") and len(shape) == input.dim() > 0
    if blocks and shape[0] != len(input) > 1:
        # In blocks: more of them than one have a dimension of their own.
        if shape[1:] != input.shape[1:]:
            return NotImplemented
        shape = (shape[0] // len(input), *input.shape)
    before = (1,) * (len(shape) - input.dim()) + tuple(input.shape)
    sizes_of = [*zip(before, shape, strict=True)]
    if any(a not in (1, b) for a, b in sizes_of):
        return NotImplemented
    along = [a != b and b % tape.samples == 0 for a, b in sizes_of[:2]]
    if not any(along) or (not along[0] and sizes_of[1][1] != tape.samples):
        return NotImplemented  # the same for all samples
    expanded = tape.broadcast(input, shape)
    # Data from here on, in memory of its own: that of the parameter tells another origin.
    return NotImplemented if expanded is None else expanded.clone().view(result.shape)


@register_rule(F.scaled_dot_product_attention)
def _dot_product_attention(
    tape: Tape,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Derived queries, keys, values and masks are repeated for all samples, as torch does it."""
    if kwargs.get("enable_gqa") and (tape.source(key) or tape.source(value)):
        return NotImplemented
    batch = query.shape[:-2]
    if not kwargs.get("enable_gqa"):
        batch = torch.broadcast_shapes(batch, key.shape[:-2], value.shape[:-2])
    of_mask = (query.shape[-2], key.shape[-2])
    operands = [query, key, value, attn_mask]
    for i, t in enumerate(operands):
        if t is not None and tape.source(t) is not None:
            operands[i] = tape.broadcast(t, (*batch, *(of_mask if i == 3 else t.shape[-2:])))
            if operands[i] is None:
                return NotImplemented
    return tape.func(*operands, *args, **kwargs)


@register_rule(Tensor.__setitem__)
def _setitem(tape: Tape, input: Tensor, index: Any, value: Any) -> Any:
    shape = input[index].shape
    expanded = tape.broadcast(value, shape) if tape.source(value) else None
    return NotImplemented if expanded is None else tape.func(input, index, expanded)


@register_rule(F.multi_head_attention_forward)
def _attention(tape: Tape, *args: Any, **kwargs: Any) -> Any:
    return tape.inside(tape.func, *args, **kwargs)
