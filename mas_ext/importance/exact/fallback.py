"""The fallback: gradients of single samples, many at once by vmap, or one by one where vmap fails."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mas_ext.importance import batches
from mas_ext.importance.evaluation import Evaluate, Labelled
from mas_ext.importance.exact.gradient_forms import CHUNK, magnitude
from mas_ext.importance.exact.precision import differ, lowest_precision
from mas_ext.importance.gradients import Summation, Totals, accumulate_gradients, zeros

# More samples at once gain little.
_MOST_AT_ONCE = 64
# Samples by which vmap is checked.
_CHECKED = 2


def one_by_one(
    evaluate: Evaluate, batch: Labelled, theta: Mapping[str, Tensor], how: Summation
) -> tuple[Totals, Tensor, Tensor]:
    """sum over samples of abs (or square) of the gradient by name; the outputs; the objectives."""
    totals = zeros(theta)
    outputs, values = [], []
    for k in range(batches.size(batch)):
        output, value = evaluate(batches.between(batch, k, k + 1))
        if theta:
            accumulate_gradients(totals, value, theta, how)
        outputs.append(output.detach())
        values.append(value.detach())
    return totals, torch.cat(outputs), torch.cat(values)


class Fallback:
    """sum over samples of abs (or square) of the gradient, for any parameters of any model."""

    def __init__(self, how: Summation) -> None:
        self._how = how
        self._vmap: bool | None = None

    def __call__(self, evaluate: Evaluate, batch: Labelled, theta: Mapping[str, Tensor]) -> Totals:
        """The sums by name."""
        if not batches.differ_in_tensors_alone(batch):
            return one_by_one(evaluate, batch, theta, self._how)[0]
        if self._vmap is None:
            few = batches.between(batch, 0, _CHECKED)
            self._vmap = self._vmap_agrees(evaluate, few, theta)
        if self._vmap:
            try:
                return self._at_once(evaluate, batch, theta)
            except Exception:  # the loop tells what is wrong, if it is not vmap
                self._vmap = False
        return one_by_one(evaluate, batch, theta, self._how)[0]

    def _vmap_agrees(self, evaluate: Evaluate, few: Labelled, theta: Mapping[str, Tensor]) -> bool:
        expected, output, _ = one_by_one(evaluate, few, theta, self._how)
        try:
            got = self._at_once(evaluate, few, theta)
        except Exception:
            return False
        precision = lowest_precision([output.dtype], output.is_cuda)
        return not any(differ(got[name], expected[name], precision) for name in theta)

    @torch.no_grad()  # of parameters that are not asked for; torch.func.grad goes on
    def _at_once(self, evaluate: Evaluate, batch: Labelled, theta: Mapping[str, Tensor]) -> Totals:
        objectives = _Objectives(evaluate)
        raw = {id(p): name for name, p in objectives.named_parameters()}
        chosen = {raw[id(p)]: p.detach() for p in theta.values()}
        totals = zeros(theta)
        columns = evaluate(batches.between(batch, 0, 1))[1].shape[1]
        numbers = sum(p.numel() for p in theta.values())
        step = min(_MOST_AT_ONCE, max(1, CHUNK // max(1, numbers)))
        for start in range(0, batches.size(batch), step):
            few = batches.between(batch, start, start + step)
            for c in range(columns):
                with warnings.catch_warnings():
                    warnings.simplefilter("error")  # vmap warns where it would loop itself, slowly
                    found = _per_sample(objectives, chosen, few, c)
                for total, p in zip(totals.values(), theta.values(), strict=True):
                    g = found[raw[id(p)]].to(total.dtype)
                    total += magnitude(g, self._how.square).sum(0)
        return totals


def _per_sample(objectives: nn.Module, theta: Totals, batch: Labelled, column: int) -> Totals:
    """d objectives[k, column] / d theta, shape (samples, *parameter), by name."""
    tensors: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        tensors.append(t)
        return t

    batches.mapped(batch, keep)

    def objective(theta: Totals, sample: list[Tensor]) -> Tensor:
        items = iter(sample)
        single = batches.mapped(batch, lambda _: next(items)[None])
        values: Tensor = torch.func.functional_call(objectives, theta, (single,))
        return values[0, column]

    each = torch.func.vmap(torch.func.grad(objective), in_dims=(None, 0), randomness="different")
    found: Totals = each(theta, tensors)
    return found


class _Objectives(nn.Module):
    """From a batch of one sample to its objectives, as a module whose parameters can be replaced."""

    def __init__(self, evaluate: Evaluate) -> None:
        super().__init__()
        self.model = evaluate.model
        self._evaluate = evaluate

    def forward(self, sample: Labelled) -> Tensor:
        return self._evaluate(sample)[1]
