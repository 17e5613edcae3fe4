"""Exact importance against other ways to per-sample gradients: prints a table, writes JSON and a plot.

python -m benchmarks.bench_importance --model transformer
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

from benchmarks import gradients, importance
from benchmarks.files import OTHER, OWN, bars, machine, place, times, write
from benchmarks.networks import NETWORKS


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Left: time of one batch by form. Right: memory at its peak."""
    rows = result["forms"]
    measured = [row for row in rows if row["memory"] is not None]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
    bars(
        left,
        [row["name"] for row in rows],
        [{key: 1e3 * value for key, value in row["seconds"].items()} for row in rows],
        [times(row["to_batch"]["median"]) for row in rows],
        _colors(rows),
    )
    left.set_xlabel("milliseconds a batch, and times the batch approximation")
    bars(
        right,
        [row["name"] for row in measured],
        [{"median": row["memory"] / 1e6} for row in measured],
        [times(row["memory_to_training"]) for row in measured],
        _colors(measured),
    )
    right.set_xlabel("megabytes at the peak, and times forward + backward")
    figure.suptitle(
        f"{result['model']}, {result['parameters']:,} parameters, batch of "
        f"{' x '.join(map(str, result['shape']))}, {place(result)}; this library in blue",
        fontsize=11,
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _colors(rows: list[Mapping[str, Any]]) -> list[str]:
    return [OWN if row["name"] == gradients.OWN else OTHER for row in rows]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=[*NETWORKS], default="mlp")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", type=int, help="default: 512, 128, 32 or 32")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/...")
    parser.add_argument("--plot", type=Path, help="default: beside the JSON")
    arguments = parser.parse_args()

    measured = importance.run(
        arguments.model, arguments.device, arguments.samples, arguments.repeats
    )
    result = {"machine": machine(), **measured}
    print(importance.table(result))
    write(result, "importance", plot, arguments.json, arguments.plot)


if __name__ == "__main__":
    main()
