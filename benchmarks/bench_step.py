"""Whole training steps with and without the penalty: prints a table, writes JSON and a plot.

python benchmarks/bench_step.py --model resnet18
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import OTHER, OWN, bars, machine, place, write
from matplotlib import pyplot as plt

from mas_ext.benchmarks import step
from mas_ext.settings import OPTIMIZERS


def plot(result: Mapping[str, Any], path: Path) -> None:
    """By which share a step is longer with each form."""
    rows = [row for row in result["forms"] if row["name"] != step.PLAIN]
    figure, axes = plt.subplots(figsize=(8, 0.5 * len(rows) + 1.4), layout="constrained")
    extras = [{key: 100 * share for key, share in row["extra"].items()} for row in rows]
    bars(
        axes,
        [f"{row['name']}, {row['tasks']} task{'s'[: row['tasks'] > 1]}" for row in rows],
        extras,
        [f"{extra['median']:.1f} %" for extra in extras],
        [OTHER if row["name"] == step.EAGER else OWN for row in rows],
    )
    axes.set_xlabel("% by which a training step is longer than without a penalty")
    axes.set_title(
        f"{result['model']}, {result['optimizer']}, batch {tuple(result['shape'])}, {place(result)}",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mlp", choices=step.NETWORKS)
    parser.add_argument("--optimizer", default="sgd", choices=OPTIMIZERS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--json", type=Path, help="by default benchmarks/results/step_...json")
    parser.add_argument("--plot", type=Path, help="by default beside the JSON")
    arguments = parser.parse_args()
    result = step.run(
        arguments.model, arguments.optimizer, arguments.device, arguments.tasks, arguments.repeats
    )
    print(step.table(result))
    named = {**result, "machine": machine()}
    write(named, f"step_{arguments.optimizer}", plot, arguments.json, arguments.plot)


if __name__ == "__main__":
    main()
