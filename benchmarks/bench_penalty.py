"""The penalty against other ways to compute it: prints a table, writes JSON and a plot.

python benchmarks/bench_penalty.py --model resnet18
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import torch

from mas_ext import benchmark, info
from mas_ext.benchmark_forms import MODELS

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

OWN, OTHER = "#1a6faf", "#b9bec4"
RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """The machine and the versions, in words."""
    cpu = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        names = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        cpu = names[0].split(":")[1].strip() if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "instruction_set": info()["cpu_instruction_set"],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Left: time of one call by form. Right: time over the number of tasks."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 4.8), width_ratios=(1.5, 1), layout="constrained"
    )
    _plot_forms(left, result["cold"])
    _plot_tasks(right, result["cold"])
    place = result["machine"]["cpu"] if result["device"] == "cpu" else result["machine"]["gpu"]
    figure.suptitle(
        f"{result['model']}, {result['parameters']:,} parameters, {result['dtype']}, {place}, "
        f"{result['threads']} threads, cold caches",
        fontsize=11,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _plot_forms(axes: Axes, result: Mapping[str, Any]) -> None:
    rows = [row for row in result["forms"] if row["tasks"] == 1][::-1]
    times = [1e3 * row["seconds"]["median"] for row in rows]
    bars = axes.barh(
        [row["name"] for row in rows], times, color=[OWN if r["moved"] else OTHER for r in rows]
    )
    for bar, row in zip(bars, rows, strict=True):
        low, high = (1e3 * row["seconds"][key] for key in ("low", "high"))
        middle = bar.get_y() + bar.get_height() / 2
        axes.plot([low, high], [middle, middle], color="#333333", linewidth=1)
        axes.annotate(
            f"{row['ratio']['median']:.2g}x",
            (max(high, bar.get_width()), middle),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.set_xlim(0, 1.12 * max(axes.get_xlim()))
    axes.set_xlabel("milliseconds a call, and times add_grad_")
    axes.set_title("one task: this library (blue), other ways (grey)", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


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

    measured = benchmark.run(
        arguments.model, arguments.device, arguments.dtype, arguments.tasks, arguments.repeats
    )
    result = {"machine": machine(), **measured}
    print(benchmark.table(result))
    name = f"penalty_{arguments.model}_{arguments.device.replace(':', '')}.json"
    path = arguments.json or RESULTS / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    picture = arguments.plot or path.with_suffix(".png")
    plot(result, picture)
    print(f"\nwritten: {path}, {picture}")


if __name__ == "__main__":
    main()
