"""The kernels as functions of tensors and as PyTorch operators: one decorator is all that registers a kernel.

Eager code calls the function itself. Where calls are traced, compiled or transformed, it calls the operator.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

from mas_ext.kernels.flat_state import State

_P = ParamSpec("_P")
_R = TypeVar("_R")

_library = torch.library.Library("mas_ext", "DEF")


def _nothing(*args: Any) -> None:
    return None


def _traced() -> bool:
    """Whether calls are compiled, seen by a dispatch mode, or transformed by torch.func."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
    )


def operator(
    schema: str,
    shapes: Callable[..., Any] = _nothing,
    keep: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    differentiable: Callable[..., Any] | None = None,
    state: type[tuple[Any, ...]] = State,
) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Register a function of tensors as torch.ops.mas_ext.NAME, which stands for it where calls are traced.

    A parameter called `state` is a NamedTuple for Python, and its fields one by one for the operator.

    Args:
        schema: the operator's, without its name; STATE stands for the state.
        shapes: the results as empty tensors, of the same arguments, for tracing; None for an operator that
            returns nothing.
        keep: called with (ctx, flat inputs, output) before `backward`.
        backward: called with (ctx, *gradients of the outputs), returns those of the flat inputs.
        differentiable: what eager code calls while gradients are recorded; the operator without it.
        state: the class of the parameter called `state`.
    """

    def register(kernel: Callable[_P, _R]) -> Callable[_P, _R]:
        name = kernel.__name__
        parameters = list(inspect.signature(kernel).parameters)
        start = parameters.index("state") if "state" in parameters else len(parameters)
        stop = start + len(getattr(state, "_fields", ()))

        def of_flat(function: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any) -> Any:
                return function(*args[:start], state(*args[start:stop]), *args[stop:])

            return run if "state" in parameters else function

        _library.define(name + schema)
        _library.impl(name, of_flat(kernel), "CompositeExplicitAutograd")
        torch.library.register_fake(f"mas_ext::{name}", of_flat(shapes), lib=_library)
        if backward is not None:
            torch.library.register_autograd(
                f"mas_ext::{name}", backward, setup_context=keep, lib=_library
            )
        flat = getattr(torch.ops.mas_ext, name).default

        @functools.wraps(kernel)
        def call(*args: Any, **named: Any) -> Any:
            if not _traced():
                if backward is None or not torch.is_grad_enabled():
                    return kernel(*args, **named)
                if differentiable is not None:
                    return differentiable(*args, **named)
            fields = args[start] if "state" in parameters else ()
            return flat(*args[:start], *fields, *args[start + 1 :], **named)

        return call

    return register
