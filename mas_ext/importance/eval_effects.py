"""What a model does so that importance would be that of another one: in its eval mode, or in its adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mas_ext.importance import batches
from mas_ext.importance.evaluation import Evaluate, Labelled, overrides_modes
from mas_ext.importance.exact.precision import Precision, differ, lowest_precision
from mas_ext.importance.model_state import Habits, ModelState
from mas_ext.parameters.adapters import factors_of
from mas_ext.parameters.restoring import restoring

# Samples that show whether two models are the same.
_FEW = 2


@torch.no_grad()
def refuse_effects_of_eval(evaluate: Evaluate, batch: Labelled) -> None:
    """Raise a ValueError that names a module after whose own eval() outputs differ.

    Only flags are set where importance is measured, so that nothing that eval() merges or keeps is without a
    gradient. That is the model that is used later only if its outputs are the same.
    """
    model = evaluate.model
    modules = {name: m for name, m in model.named_modules() if overrides_modes(m)}
    if modules and _sets_more_than_flags(evaluate, [*modules.values()]):
        few = batches.between(batch, 0, _FEW)
        try:
            expected = _changed(evaluate, few, lambda: None)
        except Exception:  # of a model that takes batches of its own size alone
            few = batch
            expected = _changed(evaluate, few, lambda: None)
        if not isinstance(expected, Tensor) or not expected.isfinite().all():
            return  # refused for that, later
        precision = _precision(model, expected)

        def computes_else(of: Sequence[nn.Module]) -> bool:
            got = _changed(evaluate, few, lambda: [module.eval() for module in of])
            return _other(got, expected, precision)

        if computes_else([*modules.values()]):
            alone = (item for item in modules.items() if computes_else([item[1]]))
            name, module = next(alone, next(iter(modules.items())))
            raise ValueError(
                f"model: {name or 'it'}, a {type(module).__name__}, computes something else after its own "
                "eval() than with training=False, expected the same; importance is that of a model whose modes "
                "are flags, so let its train() and eval() keep the output"
            )


def refuse_lost_gradients(
    evaluate: Evaluate, batch: Labelled, theta: Mapping[str, Tensor], found: Mapping[str, Tensor]
) -> None:
    """Raise a ValueError for a parameter that is used in eval mode, but has a gradient in training mode alone.

    Such as one of which a table is made and kept for later passes, without its gradient.

    Args:
        theta: parameters by name.
        found: what their importance has come to; only those of zero are looked at.
    """
    zero = {name: theta[name] for name, t in found.items() if not t.any()}
    few = batches.between(batch, 0, _FEW)
    if not zero:
        return
    output = evaluate.output(few)
    lost = {name: p for name, p in zero.items() if id(p) not in _reached(output)}
    if not lost:
        return
    try:
        trained = _changed(evaluate, few, lambda: _train_flags(evaluate.model))
    except Exception:  # training mode may take other batches
        return
    reached = _reached(trained) if isinstance(trained, Tensor) else set()
    precision = _precision(evaluate.model, output)
    for name, p in lost.items():
        if id(p) not in reached:
            continue
        move = partial(_move, p)
        if _other(_changed(evaluate, few, move), output, precision):
            raise ValueError(
                f"importance of {name}: the model uses it in eval mode, but without a gradient, which it has "
                f"in training mode; expected one in both, and nothing kept that is made of parameters by "
                f"{_owner(evaluate.model, p)}"
            )


def refuse_fused_adapters(
    evaluate: Evaluate, batch: Labelled, parameters: Iterable[Tensor]
) -> None:
    """Raise a ValueError for an adapted weight without a gradient whose adapter's factors have one.

    Such as of a kernel that computes with weight and factors at once. Other parameters are not looked at.
    """
    measured = [p for p in parameters if factors_of(p)]
    leaves = {id(t): t for p in measured for t in (p, *factors_of(p))}
    frozen = [t for t in leaves.values() if not t.requires_grad]

    def restore() -> None:
        for t in frozen:
            t.requires_grad_(False)

    if not measured:
        return
    with restoring(restore):
        for t in frozen:
            t.requires_grad_(True)
        try:
            values = evaluate(batches.between(batch, 0, _FEW))[1]
        except Exception:  # of a model that takes batches of its own size alone
            values = evaluate(batch)[1]
        if not values.requires_grad:
            return
        grads = torch.autograd.grad(values.sum(), [*leaves.values()], allow_unused=True)
    used = {key for key, g in zip(leaves, grads, strict=True) if g is not None}
    for p in measured:
        if id(p) not in used and any(id(t) in used for t in factors_of(p)):
            raise ValueError(
                f"model: {_owner(evaluate.model, p)}, gives no gradient of its weight, though its adapter has "
                "one, expected an adapter that is added to what its layer computes, and no kernel for both at "
                "once; unsloth has such kernels where lora_dropout is 0 and bias is 'none'"
            )


def _sets_more_than_flags(evaluate: Evaluate, modules: Sequence[nn.Module]) -> bool:
    """Whether eval() of these modules changes any attribute but the flags, or a tensor."""
    evaluate.state.start_anew()
    state = ModelState(evaluate.model, Habits())
    every = [(module, dict(module.__dict__)) for module in evaluate.model.modules()]
    try:
        with state.watched():
            for module in modules:
                module.eval()
        return state.touched() or any(
            now.__dict__.keys() != before.keys()
            or any(v is not before[k] for k, v in now.__dict__.items() if k != "training")
            for now, before in every
        )
    finally:
        state.restore()


def _move(p: Tensor) -> None:
    p.data.mul_(1.5).add_(0.25)


def _reached(output: Tensor) -> set[int]:
    """The leaves that an output has gradients of, by id."""
    waiting: list[Any] = [output.grad_fn]
    seen = {None, *waiting}
    found = set()
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        for child, _ in node.next_functions if node is not None else ():
            if child not in seen:
                seen.add(child)
                waiting.append(child)
    return found


def _train_flags(model: nn.Module) -> None:
    for module in model.modules():
        module.training = True


def _owner(model: nn.Module, p: Tensor) -> str:
    """The module that has a parameter, with its class."""
    return next(
        f"{name or 'it'}, a {type(module).__name__}"
        for name, module in model.named_modules()
        if any(own is p for own in module.parameters(recurse=False))
    )


def _changed(evaluate: Evaluate, batch: Labelled, change: Callable[[], Any]) -> Tensor:
    """The output after a change of the model, of which nothing is left afterwards."""
    inputs = batches.first(batch)
    evaluate.state.start_anew()
    state = ModelState(evaluate.model, Habits())
    try:
        with torch.random.fork_rng([inputs.device] if inputs.is_cuda else []), state.watched():
            change()
            return evaluate.run(batch.batch)
    finally:
        state.restore()


def _other(got: Tensor, expected: Tensor, precision: Precision) -> bool:
    same = isinstance(got, Tensor) and got.shape == expected.shape
    return not same or differ(got.detach(), expected.detach(), precision)


def _precision(model: nn.Module, output: Tensor) -> Precision:
    return lowest_precision({output.dtype, *(p.dtype for p in model.parameters())}, output.is_cuda)
