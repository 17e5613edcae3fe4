"""The generic way: samples alone, many at once by vmap, or one by one where vmap can't follow a model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mas_ext.importance import batches
from mas_ext.importance.exact.gradient_forms import CHUNK, measure
from mas_ext.importance.single_samples import (
    Evaluate,
    Totals,
    differ,
    lowest_precision,
    one_by_one,
    zeros,
)
from mas_ext.kernels.backends import Backend

# More samples at once gain little.
MOST_AT_ONCE = 64
CHECKED = 2


class Generic:
    """sum over samples of abs (or square) of the gradient, for any parameters of any model."""

    def __init__(self, backend: Backend, square: bool) -> None:
        """backend: see kernels.backends.serves."""
        self.backend, self.square = backend, square
        self._vmap: bool | None = None

    def __call__(
        self, evaluate: Evaluate, batch: Any, samples: int, theta: Mapping[str, Tensor]
    ) -> Totals:
        """The sums by name."""
        if self._vmap is None:
            self._vmap = self._vmap_agrees(evaluate, batch, min(CHECKED, samples), theta)
        if self._vmap:
            try:
                return self._at_once(evaluate, batch, samples, theta)
            except Exception:  # the loop tells what is wrong, if it is not vmap
                self._vmap = False
        return one_by_one(evaluate, batch, samples, theta, self.square, self.backend)[0]

    def _vmap_agrees(
        self, evaluate: Evaluate, batch: Any, samples: int, theta: Mapping[str, Tensor]
    ) -> bool:
        few = batches.part(batch, 0, samples)
        expected, output, _ = one_by_one(evaluate, few, samples, theta, self.square, self.backend)
        try:
            got = self._at_once(evaluate, few, samples, theta)
        except Exception:
            return False
        precision = lowest_precision([output.dtype], output.is_cuda)
        return not any(differ(got[name], expected[name], precision) for name in theta)

    @torch.no_grad()  # of parameters that are not asked for; torch.func.grad goes on
    def _at_once(
        self, evaluate: Evaluate, batch: Any, samples: int, theta: Mapping[str, Tensor]
    ) -> Totals:
        whole = _Whole(evaluate)
        raw = {id(p): name for name, p in whole.named_parameters()}
        chosen = {raw[id(p)]: p.detach() for p in theta.values()}
        totals = zeros(theta)
        columns = evaluate(batches.part(batch, 0, 1), 1)[1].shape[1]
        numbers = sum(p.numel() for p in theta.values())
        step = min(MOST_AT_ONCE, max(1, CHUNK // max(1, numbers)))
        for start in range(0, samples, step):
            few = batches.part(batch, start, min(start + step, samples))
            for c in range(columns):
                with warnings.catch_warnings():
                    warnings.simplefilter("error")  # vmap warns where it would loop itself, slowly
                    found = _per_sample(whole, chosen, few, c)
                for total, p in zip(totals.values(), theta.values(), strict=True):
                    total += measure(found[raw[id(p)]].to(total.dtype), self.square).sum(0)
        return totals


def _per_sample(whole: nn.Module, theta: Totals, batch: Any, column: int) -> Totals:
    """d objectives[k, column] / d theta, shape (samples, *parameter), by name."""
    tensors: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        tensors.append(t)
        return t

    batches.mapped(batch, keep)

    def objective(theta: Totals, sample: list[Tensor]) -> Tensor:
        items = iter(sample)
        alone = batches.mapped(batch, lambda _: next(items)[None])
        values: Tensor = torch.func.functional_call(whole, theta, (alone,))
        return values[0, column]

    each = torch.func.vmap(torch.func.grad(objective), in_dims=(None, 0), randomness="different")
    found: Totals = each(theta, tensors)
    return found


class _Whole(nn.Module):
    """From a sample to its objectives, as a module whose parameters can be replaced."""

    def __init__(self, evaluate: Evaluate) -> None:
        super().__init__()
        self.model = evaluate.model
        self._evaluate = evaluate

    def forward(self, sample: Any) -> Tensor:
        return self._evaluate(sample, 1)[1]
