"""The penalty against other ways to compute it: prints a table, writes JSON and a plot.

python -m benchmarks.bench_penalty --model resnet18
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks import penalty
from benchmarks.files import OTHER, OWN, bars, machine, place, times, write
from mas_ext.compare.bench import MODELS


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Left: time of one call by form. Right: time over the number of tasks."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 4.8), width_ratios=(1.5, 1), layout="constrained"
    )
    _plot_forms(left, result["cold"])
    _plot_tasks(right, result["cold"])
    figure.suptitle(
        f"{result['model']}, {result['parameters']:,} parameters, {result['dtype']}, {place(result)}, "
        "cold caches",
        fontsize=11,
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _plot_forms(axes: Axes, result: Mapping[str, Any]) -> None:
    rows = [row for row in result["forms"] if row["tasks"] == 1]
    bars(
        axes,
        [row["name"] for row in rows],
        [{key: 1e3 * value for key, value in row["seconds"].items()} for row in rows],
        [times(row["ratio"]["median"]) for row in rows],
        [OWN if row["moved"] else OTHER for row in rows],
    )
    axes.set_xlabel("milliseconds a call, and times add_grad_")
    axes.set_title("one task: this library (blue), other ways (grey)", fontsize=10)


def _plot_tasks(axes: Axes, result: Mapping[str, Any]) -> None:
    for name, color in (("add_grad_", OWN), ("eager autograd", "#7a8087")):
        rows = [row for row in result["forms"] if row["name"] == name]
        tasks = [row["tasks"] for row in rows]
        times = [1e3 * row["seconds"]["median"] for row in rows]
        axes.plot(tasks, times, "o-", color=color)
        axes.annotate(
            f"{name}\n{rows[-1]['held']:,.0f} bytes a parameter",
            (tasks[-1], times[-1]),
            (0, 9),
            textcoords="offset points",
            ha="right" if len(tasks) > 1 else "left",
            color=color,
            fontsize=9,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.margins(y=0.2)
    axes.set_xlabel("tasks")
    axes.set_ylabel("milliseconds a call")
    axes.set_title("any number of tasks", fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=[*MODELS], default="mlp")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tasks", type=int, nargs="+", metavar="T", default=[1, 10, 100])
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/...")
    parser.add_argument("--plot", type=Path, help="default: beside the JSON")
    arguments = parser.parse_args()

    measured = penalty.run(
        arguments.model, arguments.device, arguments.dtype, arguments.tasks, arguments.repeats
    )
    result = {"machine": machine(), **measured}
    print(penalty.table(result))
    write(result, "penalty", plot, arguments.json, arguments.plot)


if __name__ == "__main__":
    main()
