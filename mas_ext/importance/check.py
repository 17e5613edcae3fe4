"""How the exact importance of a model is found, parameter by parameter, and how exact it is."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mas_ext.importance import batches
from mas_ext.importance.accumulator import ImportanceSum, gather
from mas_ext.importance.evaluation import Evaluate, Forward, Labelled, evaluating
from mas_ext.importance.exact import captured
from mas_ext.importance.exact.driver import Exact
from mas_ext.importance.exact.origins import tensors_in
from mas_ext.importance.exact.rules import RULES
from mas_ext.importance.exact.tracing import Tape
from mas_ext.importance.gradients import gradient
from mas_ext.importance.objectives import Objective
from mas_ext.kernels.backends import Backend
from mas_ext.parameters.copying import independent_copy
from mas_ext.parameters.names import ModelView, check_patterns
from mas_ext.parameters.tracked_model import alone

# Errors are relative to the norm of a parameter's importance, or to this share of the largest norm.
_LEAST = 1e-6


class CheckedParameter(NamedTuple):
    """One row of a report.

    fast: whether one pass of the batch gives its importance; else it takes the fallback, and `reason` says why.
    layout: where samples lie in the outputs of the functions that use it: "leading", in dimension 0;
    "trailing", there behind positions; "inner", in dimension 1; "table", in rows found one by one; "" in the
    fallback, and where it has no influence. error: the relative L2 error against float64; NaN without a
    reference.
    """

    name: str
    fast: bool
    layout: str
    error: float
    reason: str


@dataclass(frozen=True)
class ImportanceReport:
    """What check_importance found; `print` shows it as a table.

    rows: one for each parameter. note: why there is no float64 reference; "" where there is one. not_captured:
    why passes on a GPU are not captured as a CUDA graph; "" where they are, and on a CPU.
    """

    rows: tuple[CheckedParameter, ...]
    note: str
    not_captured: str = ""

    def __str__(self) -> str:
        lines = [("parameter", "way", "samples", "error", "why")]
        for row in self.rows:
            way = "fast" if row.fast else "fallback"
            lines.append((row.name, way, row.layout, f"{row.error:.1e}", row.reason))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = [
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        notes = [self.note] if self.note else []
        if self.not_captured:
            notes.append(f"passes are not captured as a CUDA graph: {self.not_captured}")
        return "\n".join([*table, *notes])


def check_importance(
    model: nn.Module,
    batch: Any,
    objective: Objective = "l2",
    forward: Forward | None = None,
    exclude: Sequence[str] = (),
    max_outputs: int = 64,
    backend: Backend = "auto",
) -> ImportanceReport:
    """Tell for each parameter how estimate_importance(method="exact") finds its importance, and how exactly.

    The importance of one batch is compared with that of a loop over its samples, from a copy of the model in
    float64. Where the model can't be copied, or can't compute in float64, errors are NaN and the report's note
    says why. The model is left as it was.

    Args:
        model: any module. Parameters that require a gradient take part.
        batch: a tensor, or a tuple, list or dict whose first item is the input; at least two samples, in
            dimension 0. Four or more are better: the first three are what the estimator checks itself by.
        objective: "l2", "l1", "vector" or a callable, output -> tensor (samples,).
        forward: forward(model, batch) -> output tensor with samples in dimension 0. By default the
            model is called with the batch's first item.
        exclude: fnmatch patterns on the names of parameters to leave out.
        max_outputs: the most outputs that "vector" takes, one backward pass each.
        backend: "auto", "native" or "reference": compiled kernels where there are some, always, or never.

    Returns:
        A report whose `rows` have the parameters' name, fast, layout, error and reason; it prints as a table.

    Raises:
        ValueError: fewer than two samples, wrong shapes, or samples that can't be told apart.
        TypeError: an output that is no tensor, or a parameter of an unsupported kind, as one that fully_shard
            has sharded: check the model before.
    """
    check_patterns(model, exclude)
    samples = batches.size(batch)
    if samples < 2:
        raise ValueError(f"batch: got {samples} samples, expected at least 2 to tell them apart")
    exact = Exact(backend)
    total = ImportanceSum(
        "exact", objective, forward, exclude, max_outputs, backend, estimator=exact
    )
    with alone(model):
        view = ModelView(model, exclude)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "importance of .* takes the fallback", UserWarning)
            total.add(view, batch)
            if captured.possible(view.parameters()):
                gather(total.empty(), view, [batch, batch])
        omega = total.mean()
        functions = _functions(view, total, batch, exact.fallback)
        try:
            right, note = _by_single_samples(view.model, total, batch), ""
        except Exception as error:  # of any kind: it is the user's model that fails
            right, note = {}, f"no float64 reference: {type(error).__name__}: {error}"
    largest = max((float(t.norm()) for t in right.values()), default=0.0)
    layouts, dense = exact.layouts(), exact.dense()
    rows = []
    for name, found in omega.items():
        fast, reason = name not in exact.fallback, exact.fallback.get(name, "")
        if name in dense:
            reason = "pulled back through what is computed from it, sample by sample"
        if functions.get(name):
            reason += f" ({', '.join(functions[name])})"
        off = _relative_error(found, right[name], largest) if right else float("nan")
        rows.append(
            CheckedParameter(name, fast, layouts.get(name, "") if fast else "", off, reason)
        )
    return ImportanceReport(tuple(rows), note, exact.not_captured)


def _relative_error(got: Tensor, right: Tensor, largest: float) -> float:
    error, norm = float((got.double() - right).norm()), max(float(right.norm()), _LEAST * largest)
    return error / norm if norm else error


def _by_single_samples(model: nn.Module, total: ImportanceSum, batch: Any) -> dict[str, Tensor]:
    """1/N sum_k sum_c abs(d values[k, c] / d theta) in float64, one sample at a time."""

    def widened(t: Tensor) -> Tensor:
        return t.double() if t.is_floating_point() else t

    model = independent_copy(model).double()
    found = ModelView(model, total.exclude).parameters()
    theta = {name: p for name, p in found.items() if p.requires_grad}
    device = next(iter(theta.values())).device
    told = batches.told(batches.to(batch, device))
    given, samples = Labelled(batches.mapped(told, widened)), total.samples
    omega = {name: torch.zeros_like(p, requires_grad=False) for name, p in theta.items()}
    with evaluating(model, device) as state:
        evaluate = Evaluate(model, total.forward, total.values, state)
        for k in range(samples):
            _, values = evaluate.alone(batches.between(given, k, k + 1))
            for c in range(values.shape[1]):
                for name, g in gradient(values, c, theta).items():
                    omega[name] += g.abs() / samples
    return omega


def _functions(
    view: ModelView, total: ImportanceSum, batch: Any, names: Iterable[str]
) -> dict[str, list[str]]:
    """Where each parameter, or what is derived from it, meets data: functions without a rule, or else all."""
    parameters = view.parameters()
    device = next(iter(parameters.values())).device
    one = Labelled(batches.between(batches.told(batches.to(batch, device)), 0, 1))
    theta = {name: parameters[name] for name in names}
    with evaluating(view.model, device) as state:
        users = _Users(state.tensors, theta, 1, RULES, (), False, False)
        with users:
            Evaluate(view.model, total.forward, total.values, state).alone(one)
    return {
        name: [f.__name__ for f in used if f not in RULES] or [f.__name__ for f in used]
        for name, used in users.meeting_data.items()
    }


class _Users(Tape):
    """Sees in which functions parameters, or what is derived from them, meet data."""

    @cached_property
    def meeting_data(self) -> dict[str, dict[Callable[..., Any], None]]:
        """The functions, by a parameter's name."""
        return {name: {} for name in self.theta}

    def call(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        origins = [self.origins.of(t) for t in tensors_in((*args, *kwargs.values()))]
        if None in origins and torch.is_grad_enabled():
            for name in frozenset[str]().union(*(o.sources for o in origins if o is not None)):
                self.meeting_data[name].setdefault(func)
        return super().call(func, args, kwargs)
