"""Whole training steps with and without the penalty: prints a table, writes JSON.

python -m benchmarks.bench_step --model resnet18 --optimizer adamw --dtype bfloat16

ResNet-50, ViT-B/16 and GPT-2 need transformers; Avalanche's plugin takes part where avalanche-lib is installed.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from benchmarks import step
from benchmarks.files import machine, save
from benchmarks.workloads import WORKLOADS
from mas_ext.training.settings import OPTIMIZERS


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mlp", choices=WORKLOADS)
    parser.add_argument("--optimizer", default="sgd", choices=OPTIMIZERS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=step.DTYPES)
    parser.add_argument("--tasks", type=int, nargs="+", metavar="T", default=[1, 10, 100])
    parser.add_argument("--samples", type=int, help="in the batch; default: few, for a CPU")
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--limit", type=float, default=math.inf, metavar="SECONDS")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/step_...json")
    given = vars(parser.parse_args())
    path = given.pop("json")
    result = {"machine": machine(), **step.run(**given)}
    print(step.table(result))
    save(result, f"step_{given['optimizer']}_{given['dtype']}", path)


if __name__ == "__main__":
    main()
