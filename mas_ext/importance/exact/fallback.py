"""The fallback: gradients of single samples, several at once by vmap, or one by one where vmap fails."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mas_ext.importance import batches
from mas_ext.importance.evaluation import Evaluate, Labelled
from mas_ext.importance.exact.gradient_forms import magnitude
from mas_ext.importance.exact.precision import Precision, differ, lowest_precision
from mas_ext.importance.gradients import (
    Summation,
    Totals,
    accumulate_gradients,
    accumulate_sharded,
    zeros,
)

# More samples at once gain little, and fewer gain nothing over a loop.
_MOST_AT_ONCE, _LEAST_AT_ONCE = 64, 4
# Numbers in the gradients of the samples at once. More of them leave the caches, and the loop is faster.
_NUMBERS_AT_ONCE = 1 << 22
# Samples by which vmap is checked.
_CHECKED = 2
# What a sum that should be zero may come to, in units of rounding of the largest tensor's sum.
_NOISE = 32


def one_by_one(
    evaluate: Evaluate,
    batch: Labelled,
    theta: Mapping[str, Tensor],
    how: Summation,
    sketched: bool = False,
) -> tuple[Totals, Tensor, Tensor]:
    """sum over samples of abs (or square) of the gradient by name; the outputs; the objectives.

    Of a sharded model the sums go to the lockstep's, or, `sketched`, sketches of them are what is returned.
    """
    refuse_accumulation_hooks(theta)
    lockstep = evaluate.lockstep
    totals = zeros(theta) if lockstep is None else lockstep.sketches() if sketched else {}
    outputs, values = [], []
    for k in range(batches.size(batch)):
        output, value = evaluate.alone(batches.between(batch, k, k + 1))
        if theta and lockstep is not None:
            into = totals if sketched else None
            accumulate_sharded(lockstep, value, theta, how, into=into)
        elif theta:
            accumulate_gradients(totals, value, theta, how)
        outputs.append(output.detach())
        values.append(value.detach())
    return totals, torch.cat(outputs), torch.cat(values)


def refuse_accumulation_hooks(theta: Mapping[str, Tensor]) -> None:
    """Raise a ValueError for a parameter whose hooks see only what a whole batch adds to its gradient."""
    for name, p in theta.items():
        if getattr(p, "_post_accumulate_grad_hooks", None):
            raise ValueError(
                f"importance of {name}: got a parameter with a hook of register_post_accumulate_grad_hook, "
                "which gradients of single samples don't pass, expected none; remove the hook meanwhile, or "
                "exclude the parameter"
            )


def has_hooks(p: Tensor) -> bool:
    """Whether a gradient of this parameter passes through hooks of its own (register_hook)."""
    return bool(p._backward_hooks)


def refuse_interacting(alone: Tensor, together: Tensor, precision: Precision) -> None:
    """Raise a ValueError if the output of a sample is another one when the sample is run alone."""
    if outputs_differ(alone, together, precision):
        off = (
            float((together - alone).abs().max()) if alone.shape == together.shape else float("inf")
        )
        raise ValueError(
            f"model: samples interact: an output changes by up to {off:.2g} when its sample is run alone, so "
            'that a sample has no gradient of its own; use method="batch", or another normalisation; where '
            "dimension 0 is time, as of a recurrent layer without batch_first, transpose in forward="
        )


def outputs_differ(alone: Tensor, together: Tensor, precision: Precision) -> bool:
    """Whether rows differ by more than rounding, in units of themselves and of a mean row."""
    if alone.shape != together.shape:
        return True
    size = together.flatten(1).norm(dim=1) if together.dim() > 1 else together.abs()
    error = (
        (alone - together).flatten(1).norm(dim=1)
        if together.dim() > 1
        else (alone - together).abs()
    )
    return not bool((error <= precision.tolerance * (size + size.mean())).all())


class Fallback:
    """sum over samples of abs (or square) of the gradient, for any parameters of any model.

    What is at once and what is one by one depends on the model and on sizes, never on time, so that a run gives
    the same bits each time.
    """

    def __init__(self, how: Summation) -> None:
        self._how = how
        self._vmap: bool | None = None

    def __call__(
        self,
        evaluate: Evaluate,
        batch: Labelled,
        theta: Mapping[str, Tensor],
        outputs: Tensor | None = None,
        precision: Precision | None = None,
    ) -> Totals:
        """The sums by name.

        Args:
            evaluate: gives the outputs and objectives of samples.
            batch: the samples.
            theta: parameters by name.
            outputs: those of the batch run together, which samples run alone must have, too; None where the
                model draws random numbers.
            precision: that of the outputs; by default of their dtype and the parameters'.

        Raises:
            ValueError: samples whose outputs are others when they are run alone.
        """
        if precision is None:
            dtypes = {p.dtype for p in theta.values()}
            dtypes |= set() if outputs is None else {outputs.dtype}
            precision = lowest_precision(dtypes, next(iter(theta.values())).is_cuda)
        if evaluate.lockstep is not None:
            self._vmap = False
        if self._may_be_at_once(batch, theta) and self._vmap is None:
            few = batches.between(batch, 0, _CHECKED)
            self._vmap = self._vmap_agrees(evaluate, few, theta, precision)
        if self._may_be_at_once(batch, theta) and self._vmap:
            try:
                totals, alone = self._at_once(evaluate, batch, theta)
            except Exception:  # the loop tells what is wrong, if it is not vmap
                self._vmap = False
            else:
                if outputs is None or not outputs_differ(alone, outputs, precision):
                    return totals
        totals, alone, _ = one_by_one(evaluate, batch, theta, self._how)
        if outputs is not None:
            refuse_interacting(alone, outputs, precision)
        return totals

    def _may_be_at_once(self, batch: Labelled, theta: Mapping[str, Tensor]) -> bool:
        enough = _samples_at_once(theta) >= _LEAST_AT_ONCE
        hooked = any(has_hooks(p) for p in theta.values())  # vmap would pass them by
        return enough and not hooked and batches.differ_in_tensors_alone(batch)

    def _vmap_agrees(
        self, evaluate: Evaluate, few: Labelled, theta: Mapping[str, Tensor], precision: Precision
    ) -> bool:
        expected, output, _ = one_by_one(evaluate, few, theta, self._how)
        try:
            got, alone = self._at_once(evaluate, few, theta)
        except Exception:
            return False
        noise = _NOISE * precision.eps * max(float(total.norm()) for total in expected.values())
        same = not any(differ(got[name], expected[name], precision, noise) for name in theta)
        return same and not outputs_differ(alone, output, precision)

    @torch.no_grad()  # of parameters that are not asked for; torch.func.grad goes on
    def _at_once(
        self, evaluate: Evaluate, batch: Labelled, theta: Mapping[str, Tensor]
    ) -> tuple[Totals, Tensor]:
        """The sums by name, and the outputs."""
        objectives = _Objectives(evaluate)
        raw = {id(p): name for name, p in objectives.named_parameters()}
        chosen = {raw[id(p)]: p.detach() for p in theta.values()}
        totals, outputs = zeros(theta), []
        step = _samples_at_once(theta)
        for start in range(0, batches.size(batch), step):
            few = batches.between(batch, start, start + step)
            column, columns = 0, 1
            while column < columns:
                found, output, columns = _per_sample(objectives, chosen, few, column)
                for total, p in zip(totals.values(), theta.values(), strict=True):
                    g = found[raw[id(p)]].to(total.dtype)
                    total += magnitude(g, self._how.square).sum(0)
                column += 1
            outputs.append(output)
        return totals, torch.cat(outputs)


def _samples_at_once(theta: Mapping[str, Tensor]) -> int:
    numbers = sum(p.numel() for p in theta.values())
    return min(_MOST_AT_ONCE, _NUMBERS_AT_ONCE // max(1, numbers))


def _per_sample(
    objectives: nn.Module, theta: Totals, batch: Labelled, column: int
) -> tuple[Totals, Tensor, int]:
    """d objectives[k, column] / d theta, shape (samples, *parameter), by name; outputs; number of columns."""

    def objective(theta: Totals, sample: list[Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        items = iter(sample)
        single = batches.mapped(batch, lambda _: next(items)[None])
        output, values = torch.func.functional_call(objectives, theta, (single,))
        return values[0, column], (output[0], values[0])

    each = torch.func.vmap(
        torch.func.grad(objective, has_aux=True), in_dims=(None, 0), randomness="different"
    )
    # Fused attention has no vmap.
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        warnings.simplefilter("error")  # vmap warns where it would loop itself, slowly
        found, (output, values) = each(theta, batches.tensors(batch))
    return found, output, values.shape[1]


class _Objectives(nn.Module):
    """From a batch of one sample to its output and objectives, as a module whose parameters can be replaced."""

    def __init__(self, evaluate: Evaluate) -> None:
        super().__init__()
        self.model = evaluate.model
        self._evaluate = evaluate

    def forward(self, sample: Labelled) -> tuple[Tensor, Tensor]:
        return self._evaluate.alone(sample)
