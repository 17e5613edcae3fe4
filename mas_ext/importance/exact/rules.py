"""The torch functions that use parameters, and the layer (layers.py) that each of them is.

A function that is not here, or a call for which a rule returns NotImplemented, runs as it is; the parameters
that it uses then go to the fallback.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mas_ext.importance.exact.layers import (
    Affine,
    Convolution,
    Embedding,
    Linear,
    Standardised,
    channels,
)
from mas_ext.importance.exact.tracing import FunctionRule, Tape

RULES: dict[Callable[..., Any], FunctionRule] = {}


def _rule(*functions: Callable[..., Any]) -> Callable[[FunctionRule], FunctionRule]:
    """Let the decorated function (tape, *arguments) stand for these functions of the same arguments."""

    def register(rule: FunctionRule) -> FunctionRule:
        RULES.update(dict.fromkeys(functions, rule))
        return rule

    return register


def _named(*names: str) -> list[Callable[..., Any]]:
    """The functions of these names that exist as methods of Tensor and in torch."""
    places = [(where, name) for where in (Tensor, torch) for name in names]
    return [getattr(where, name) for where, name in places if hasattr(where, name)]


@_rule(F.linear)
def _linear(tape: Tape, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if weight.dim() != 2:
        return NotImplemented
    return _matrix(tape, input, weight, bias, transposed=False)


@_rule(*_named("matmul", "__matmul__", "mm"))
def _matmul(tape: Tape, input: Tensor, other: Tensor) -> Any:
    if other.dim() != 2 or not (tape.tracked(other) or tape.untransposed(other) is not None):
        return NotImplemented
    return _matrix(tape, input, other, None, transposed=True)


@_rule(*_named("addmm"))
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


def _matrix(tape: Tape, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Any:
    """y = x weight^T, or x weight; a use of a transpose is recorded as one of the matrix itself."""
    if x.dim() < 2:
        return NotImplemented
    whole = tape.untransposed(weight)
    if whole is not None:
        weight, transposed = whole, not transposed
    y_shape = (*x.shape[:-1], weight.shape[1 if transposed else 0])
    return tape.layer(Linear(transposed), x, weight, bias, y_shape)


def _numbers(value: Any, count: int) -> tuple[int, ...]:
    return (value,) * count if isinstance(value, int) else tuple(value) * (count // len(value))


@_rule(torch.conv1d, torch.conv2d, torch.conv3d)
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
    return tape.layer(layer, input, weight, bias, (input.shape[0], weight.shape[0]))


@_rule(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
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
    return tape.layer(layer, input, weight, bias, (input.shape[0], weight.shape[1] * groups))


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
    return tape.layer(Affine(shape), x, weight, bias, x.shape)


@_rule(F.layer_norm, torch.layer_norm)
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


@_rule(*([F.rms_norm] if hasattr(F, "rms_norm") else []))
def _rms_norm(
    tape: Tape,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Any:
    x = tape.func(input, normalized_shape, eps=eps)
    return _affine(tape, x, weight, None, tuple(normalized_shape))


@_rule(F.group_norm, torch.group_norm)
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


@_rule(F.instance_norm)
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


@_rule(F.batch_norm)
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
    return tape.layer(layer, input, weight, bias, input.shape)


@_rule(torch.prelu)
def _prelu(tape: Tape, input: Tensor, weight: Tensor) -> Any:
    shape = channels(input) if weight.numel() > 1 else (1,)
    slope = tape.broadcast(weight, shape, input.shape)
    return NotImplemented if slope is None else F.relu(input) - slope * F.relu(-input)


@_rule(F.embedding)
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
    tracked = tape.tracked(weight)
    if tracked is None or max_norm is not None or scale_grad_by_freq:
        return NotImplemented
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    if tape.layouts[tracked.name] == "none":
        # The same rows for all samples, such as those of positions: a part of the table.
        tape.record_use(tracked)
        return tape.part(tracked, tape.func(input, weight, padding_idx))
    return tape.layer(Embedding(padding_idx), input, weight, None, input.shape)


@_rule(
    *_named("add", "__add__", "__radd__", "sub", "__sub__", "rsub", "__rsub__", "mul", "__mul__"),
    *_named(
        "__rmul__", "div", "__truediv__", "__rtruediv__", "true_divide", "subtract", "multiply"
    ),
    *_named("maximum", "minimum", "where", "lerp", "addcmul", "pow"),
)
def _elementwise(tape: Tape, *args: Any, **kwargs: Any) -> Any:
    tensors = [t for t in args if isinstance(t, Tensor)]
    y_shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    expanded = [tape.broadcast(t, t.shape, y_shape) if tape.tracked(t) else t for t in tensors]
    if any(t is None for t in expanded):
        return NotImplemented
    found = iter(expanded)
    return tape.func(*(next(found) if isinstance(t, Tensor) else t for t in args), **kwargs)


@_rule(Tensor.expand, Tensor.expand_as, Tensor.broadcast_to, torch.broadcast_to, Tensor.repeat)
def _expand(tape: Tape, input: Tensor, *sizes: Any, **kwargs: Any) -> Any:
    result = tape.func(input, *sizes, **kwargs)
    shape = (1,) * (result.dim() - input.dim()) + tuple(input.shape)
    if any(a not in (1, b) for a, b in zip(shape, result.shape, strict=True)):
        return NotImplemented  # repeated in blocks
    expanded = tape.broadcast(input, input.shape, result.shape)
    return NotImplemented if expanded is None else expanded


@_rule(
    *_named(
        "view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten", "contiguous", "clone"
    ),
    *_named("__getitem__", "narrow", "select", "chunk", "split", "unbind", "movedim", "permute"),
    *_named("transpose", "swapaxes", "t", "float", "double", "half", "bfloat16", "to", "type_as"),
    Tensor.T.__get__,  # type: ignore[attr-defined]
    Tensor.mT.__get__,  # type: ignore[attr-defined]
)
def _selection(tape: Tape, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Elements of a parameter in another order or shape, each at most once."""
    tracked = tape.tracked(input)
    if tracked is None or input.dtype.itemsize < 4:  # sums of 16-bit numbers would be rounded
        return NotImplemented
    result = tape.func(input, *args, **kwargs)
    if isinstance(result, Tensor) and (result.dtype != input.dtype or result is input):
        return result
    turned = isinstance(result, Tensor) and input.dim() == result.dim() == 2
    if turned and result.shape == input.t().shape and result.stride() == input.t().stride():
        tape.transpose(input, result)
        return result
    return tape.part(tracked, result)


@_rule(F.multi_head_attention_forward)
def _attention(tape: Tape, *args: Any, **kwargs: Any) -> Any:
    query = args[0] if args else kwargs["query"]
    with tape.columns(query.shape[1] if query.dim() == 3 else 0):
        return tape.inside(tape.func, *args, **kwargs)
