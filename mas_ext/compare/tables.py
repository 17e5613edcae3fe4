"""What jobs of a comparison found: in numbers, as they are kept, and as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mas_ext import metrics
from mas_ext.training.run import Result

# What `summary` returns, or {"diverged": why}; as it is in a file.
Found = dict[str, Any]


def summary(result: Result, tasks: Sequence[str], joint: Tensor | None) -> Found:
    """What a job found.

    Args:
        result: of a Trainer, for T tasks.
        tasks: their names.
        joint: accuracy of joint training on each task when it was new, (T,), None without joint training.

    Returns:
        tasks; average_accuracy, forgetting, backward_transfer, forward_transfer (in the domain-incremental
        setting, else None), intransigence (None without joint), see `mas_ext.metrics`; validation_accuracy: the
        average accuracy on validation data, None without; step_seconds, border_seconds, held_bytes: see Result.
    """
    accuracy, validation = result.accuracy, result.validation
    known_before = not result.initial.isnan().any()
    return {
        "tasks": list(tasks),
        "average_accuracy": result.average_accuracy,
        "forgetting": result.forgetting,
        "backward_transfer": metrics.backward_transfer(accuracy),
        "forward_transfer": (
            metrics.forward_transfer(accuracy, result.initial) if known_before else None
        ),
        "intransigence": None if joint is None else metrics.intransigence(accuracy, joint),
        "validation_accuracy": (
            None if validation.diagonal().isnan().any() else metrics.average_accuracy(validation)
        ),
        "step_seconds": result.step_seconds,
        "border_seconds": result.border_seconds,
        "held_bytes": result.held_bytes,
    }


def task_line(found: Result) -> dict[str, Any]:
    """What is noted of the last task that is over."""
    task = int((~found.held_bytes.isnan()).sum()) - 1
    return {
        "task": task,
        "epoch": None,
        "accuracy": found.accuracy[task],
        "validation": found.validation[task],
        "step_seconds": float(found.step_seconds[task]),
        "border_seconds": float(found.border_seconds[task]),
        "held_bytes": float(found.held_bytes[task]),
    }


def table(found: Mapping[str, Sequence[Found]], grid: Mapping[str, Any]) -> str:
    """Markdown: a row a method, mean and 95 % interval over its seeds, and how lam was chosen."""
    titles = ("method", "lam", "average accuracy, %", "forgetting, %", "ms per step", "MB held")
    rows = [titles, *(_row(name, results) for name, results in found.items())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(titles))]
    rows.insert(1, tuple("-" * width for width in widths))
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    seeds = max(map(len, found.values()))
    over = f"mean and 95 % interval over {seeds} seeds" if seeds > 1 else "of one seed"
    lines += ["", f"Accuracy on all tasks after the last one, and forgetting: {over}."]
    for name, tried in grid.items():
        each = ", ".join(
            f"{c['lam']:g} ({'diverged' if math.isnan(c['mean']) else format(100 * c['mean'], '.2f')})"
            for c in tried["candidates"]
        )
        lines.append(
            f"{name}: lam was chosen on validation data (average accuracy, %) from {each}."
        )
    for name, results in found.items():
        reasons = {result["diverged"] for result in results if "diverged" in result}
        lines += [f"{name} diverged: {reason}" for reason in sorted(reasons)]
    return "\n".join(lines) + "\n"


def _row(name: str, results: Sequence[Found]) -> tuple[str, ...]:
    lam = results[0].get("lam")
    first = (name, "-" if lam is None else f"{lam:g}")
    lost = sum("diverged" in result for result in results)
    if lost:
        return (*first, f"diverged, {lost} of {len(results)} seeds", "-", "-", "-")

    def average(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    steps = average([average(result["step_seconds"]) for result in results])
    held = average([result["held_bytes"][-1] for result in results])
    return (
        *first,
        metrics.interval_text([100 * result["average_accuracy"] for result in results], 2),
        metrics.interval_text([100 * result["forgetting"] for result in results], 2),
        f"{1000 * steps:.3g}",
        f"{held / 1e6:.3g}",
    )
