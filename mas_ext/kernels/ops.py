"""The kernels as PyTorch operators, torch.ops.mas_ext.*: schemas, shapes for tracing, and autograd.

One schema per kernel; the last argument chooses the compiled kernels or the plain-PyTorch reference,
which compute the same (reference.py and optim_reference.py specify them).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mas_ext.kernels import native, optim_native, optim_reference, per_sample_native, reference

_STATE = "int[] offsets, Tensor omega, Tensor anchor, Tensor alpha"
# Of a penalty that may be absent, or hold some of the tensors only.
_PART = "int[] offsets, Tensor? omega, Tensor? anchor, Tensor? alpha"
_ENTERING = "bool proximal, Tensor? scale, Tensor? overflow"

_SCHEMAS = {
    "penalty": f"(Tensor[] theta, {_STATE}, Tensor remainder, bool native) -> Tensor",
    "penalty_with_grad": f"(Tensor[] theta, {_STATE}, Tensor remainder, Tensor grad_output, "
    "bool native) -> (Tensor, Tensor[])",
    "add_grad_": f"(Tensor[] theta, Tensor(a!)[] grad, {_STATE}, Tensor remainder, bool native) "
    "-> Tensor",
    "proximal_": f"(Tensor(a!)[] theta, {_STATE}, Tensor[] second_moment, float eta, "
    "float correction, float eps, bool native) -> ()",
    "sgd_": f"(Tensor(a!)[] theta, Tensor[] grad, Tensor(b!)[] momentum_buffer, {_PART}, float lr, "
    "float momentum, float dampening, float weight_decay, float eta, bool nesterov, bool first, "
    f"{_ENTERING}, bool native) -> ()",
    "adamw_": "(Tensor(a!)[] theta, Tensor[] grad, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, "
    f"Tensor(d!)[] max_exp_avg_sq, Tensor(e!)[] step, {_PART}, float lr, float beta1, float beta2, "
    f"float eps, float weight_decay, {_ENTERING}, bool native) -> ()",
    "accumulate_": "(Tensor(a!)[] omega, Tensor[] grad, float weight, bool native) -> ()",
    "merge_": "(Tensor(a!) omega, Tensor(b!) anchor, Tensor[] theta, Tensor[] importance, "
    "int[] offsets, float keep, float gain, str anchor_rule, int entry, bool native) -> Tensor",
    "per_sample_": "(Tensor(a!) omega, Tensor grad, Tensor input, Tensor? rows, bool square, "
    "bool native) -> ()",
}


def _found(name: str, *modules: ModuleType) -> Callable[..., Any]:
    (found,) = (getattr(module, name) for module in modules if hasattr(module, name))
    function: Callable[..., Any] = found
    return function


def _implementation(name: str) -> Callable[..., Any]:
    compiled = _found(name, native, optim_native, per_sample_native)
    plain = _found(name, reference, optim_reference)

    def run(*args: Any) -> Any:
        return compiled(*args[:-1]) if args[-1] else plain(*args[:-1])

    return run


_library = torch.library.Library("mas_ext", "DEF")
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema)
    _library.impl(_name, _implementation(_name), "CompositeExplicitAutograd")


def _fake_value(theta: Sequence[Tensor], alpha: Tensor) -> Tensor:
    return alpha.new_empty((), dtype=reference.compute_dtype(theta[0].dtype))


def _fake_penalty(
    theta: Sequence[Tensor],
    offsets: Sequence[int],
    omega: Tensor,
    anchor: Tensor,
    alpha: Tensor,
    remainder: Tensor,
    native: bool,
) -> Tensor:
    return _fake_value(theta, alpha)


def _fake_penalty_with_grad(
    theta: Sequence[Tensor],
    offsets: Sequence[int],
    omega: Tensor,
    anchor: Tensor,
    alpha: Tensor,
    remainder: Tensor,
    grad_output: Tensor,
    native: bool,
) -> tuple[Tensor, list[Tensor]]:
    return _fake_value(theta, alpha), [torch.empty_like(t) for t in theta]


def _fake_add_grad_(
    theta: Sequence[Tensor],
    grad: Sequence[Tensor],
    offsets: Sequence[int],
    omega: Tensor,
    anchor: Tensor,
    alpha: Tensor,
    remainder: Tensor,
    native: bool,
) -> Tensor:
    return _fake_value(theta, alpha)


def _fake_nothing(*args: Any) -> None:
    return None


def _fake_merge_(omega: Tensor, anchor: Tensor, theta: Sequence[Tensor], *args: Any) -> Tensor:
    return omega.new_empty(len(theta), dtype=torch.float64)


torch.library.register_fake("mas_ext::penalty", _fake_penalty, lib=_library)
torch.library.register_fake("mas_ext::penalty_with_grad", _fake_penalty_with_grad, lib=_library)
torch.library.register_fake("mas_ext::add_grad_", _fake_add_grad_, lib=_library)
torch.library.register_fake("mas_ext::proximal_", _fake_nothing, lib=_library)
torch.library.register_fake("mas_ext::sgd_", _fake_nothing, lib=_library)
torch.library.register_fake("mas_ext::adamw_", _fake_nothing, lib=_library)
torch.library.register_fake("mas_ext::accumulate_", _fake_nothing, lib=_library)
torch.library.register_fake("mas_ext::merge_", _fake_merge_, lib=_library)
torch.library.register_fake("mas_ext::per_sample_", _fake_nothing, lib=_library)

penalty = torch.ops.mas_ext.penalty.default
penalty_with_grad = torch.ops.mas_ext.penalty_with_grad.default
add_grad_ = torch.ops.mas_ext.add_grad_.default
proximal_ = torch.ops.mas_ext.proximal_.default
sgd_ = torch.ops.mas_ext.sgd_.default
adamw_ = torch.ops.mas_ext.adamw_.default
accumulate_ = torch.ops.mas_ext.accumulate_.default
merge_ = torch.ops.mas_ext.merge_.default
per_sample_ = torch.ops.mas_ext.per_sample_.default


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    theta, offsets, omega, anchor, alpha, remainder, native = inputs
    ctx.offsets, ctx.native, ctx.count = offsets, native, len(theta)
    ctx.save_for_backward(omega, anchor, alpha, remainder, *theta)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
    omega, anchor, alpha, remainder, *theta = ctx.saved_tensors
    _, grad = penalty_with_grad(
        theta, ctx.offsets, omega, anchor, alpha, remainder, grad_output, ctx.native
    )
    return grad, None, None, None, None, None, None


def _refuse_double_backward(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError(
        "the penalty's gradient can't be differentiated again: call backward without create_graph"
    )


torch.library.register_autograd(
    "mas_ext::penalty", _backward, setup_context=_keep_for_backward, lib=_library
)
torch.library.register_autograd("mas_ext::penalty_with_grad", _refuse_double_backward, lib=_library)
