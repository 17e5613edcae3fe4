"""Runs all benchmarks of time, and makes the pages from them: most of an hour on two quiet cores.

python -m benchmarks.all [--anew] [--only importance]

A result that is there already stays: a run that was stopped goes on when it is started again, and --anew
measures everything again. Accuracy over lam (lam.py) depends on no clock and is learned only where it is
missing.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

from benchmarks.files import RESULTS
from benchmarks.networks import IMPORTANCE
from mas_ext.comparison.bench import DEVICES

PENALTIES = {"mlp": [], "resnet18": [], "gpt2": ["--tasks", "1", "10", "--repeats", "7"]}
# 100 tasks would take large networks minutes.
STEPS = {
    "mlp": ["--tasks", "1", "10", "100", "--repeats", "31"],
    "resnet18": ["--tasks", "1", "10", "100", "--repeats", "9"],
    "resnet50": ["--tasks", "1", "10", "--repeats", "9"],
    "vit_b": ["--tasks", "1", "10", "--repeats", "5"],
    "gpt2": ["--tasks", "1", "10", "--repeats", "5"],
}


def jobs(device: str, quick: bool) -> Iterator[tuple[str, list[str]]]:
    """The name of each result, and the command that makes it."""
    few = ["--device", device, *(["--repeats", "3"] if quick else [])]
    one_task = ["--tasks", "1"] if quick else []
    for model, options in PENALTIES.items():
        yield f"penalty_{model}_{device}", ["penalty", "--model", model, *options, *few]
    for model in IMPORTANCE:
        command = ["importance", "--model", model, "--repeats", "7", *few]
        yield f"importance_{model}_{device}", command
    for (model, options), optimizer, dtype in itertools.product(
        STEPS.items(), ("sgd", "adamw"), ("float32", "bfloat16")
    ):
        command = ["step", "--model", model, "--optimizer", optimizer, "--dtype", dtype]
        yield f"step_{optimizer}_{dtype}_{model}_{device}", [*command, *options, *few, *one_task]


def main() -> None:
    """Run what is missing, and say what could not be measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=DEVICES)
    parser.add_argument("--anew", action="store_true", help="measure again what is there")
    parser.add_argument(
        "--only", choices=("penalty", "importance", "step"), help="this benchmark alone"
    )
    parser.add_argument("--quick", action="store_true", help="as few repeats as can be: a trial")
    parser.add_argument("--out", type=Path, default=RESULTS, help="pages are made from the default")
    parser.add_argument("--data", help="folder of MNIST, where accuracy over lam is missing")
    arguments = parser.parse_args()
    wanted = [
        (name, command)
        for name, command in jobs(arguments.device, arguments.quick)
        if arguments.only in (None, command[0])
    ]
    failed, begin = [], perf_counter()
    if arguments.anew:
        for name, _ in wanted:
            (arguments.out / f"{name}.json").unlink(missing_ok=True)
    for i, (name, (script, *options)) in enumerate(wanted, start=1):
        path = arguments.out / f"{name}.json"
        if path.exists():
            continue
        spent = perf_counter() - begin
        print(f"\n== {i} of {len(wanted)}, after {spent:.0f} s: {name}", flush=True)
        if not _ran([script, *options, "--json", str(path)]):
            failed.append(name)
    if arguments.out == RESULTS:
        data = ["--data", arguments.data] if arguments.data else []
        pages = [["lam", *data], ["performance"], ["readme"]]
        failed += [command[0] for command in pages if not _ran(command)]
    missing = ", ".join(failed) or "nothing"
    print(f"\n{perf_counter() - begin:.0f} s; not measured or written: {missing}")
    sys.exit(bool(failed))


def _ran(command: list[str]) -> bool:
    words = [sys.executable, "-m", f"benchmarks.{command[0]}", *command[1:]]
    return subprocess.run(words).returncode == 0


if __name__ == "__main__":
    main()
