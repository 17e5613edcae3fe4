"""Runs all benchmarks of time, and makes the pages from them: most of an hour on two quiet cores.

python -m benchmarks.all [--anew]

A result that is there already stays: a run that was stopped goes on when it is started again, and --anew
measures everything again. Accuracy over lam (bench_lam.py) depends on no clock and is learned only where it is
missing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

from benchmarks.files import RESULTS

# Seconds after which no further repeat begins; numbers of tasks, as 100 would take large networks minutes.
STEPS = {
    "mlp": (12, [1, 10, 100]),
    "resnet18": (25, [1, 10, 100]),
    "resnet50": (20, [1, 10]),
    "vit_b": (30, [1, 10]),
    "gpt2": (30, [1, 10]),
}
# Batches that keep a GPU busy; those that the benchmarks have by themselves are for a CPU.
GPU_SAMPLES = {
    "importance": {"mlp": 1024, "cnn": 256, "transformer": 64, "resnet18": 128},
    "step": {"mlp": 128, "resnet18": 256, "resnet50": 64, "vit_b": 32, "gpt2": 16},
}
PENALTIES = {"mlp": [], "resnet18": [], "gpt2": ["--tasks", "1", "10", "--repeats", "7"]}


def jobs(device: str, quick: bool) -> Iterator[tuple[str, list[str]]]:
    """The name of each result, and the command that makes it."""
    where = device.replace(":", "")
    few = ["--repeats", "3"]
    for model, options in PENALTIES.items():
        command = ["bench_penalty", "--model", model, "--device", device, *options]
        yield f"penalty_{model}_{where}", [*command, *(few if quick else [])]
    for model in ("mlp", "cnn", "transformer", "resnet18"):
        command = ["bench_importance", "--model", model, "--device", device]
        command += _samples(device, "importance", model)
        yield f"importance_{model}_{where}", [*command, "--repeats", "3" if quick else "7"]
    for model, (limit, tasks) in STEPS.items():
        for optimizer in ("sgd", "adamw"):
            for dtype in ("float32", "bfloat16"):
                command = ["bench_step", "--model", model, "--device", device]
                command += ["--optimizer", optimizer, "--dtype", dtype]
                command += _samples(device, "step", model)
                command += ["--tasks", *map(str, tasks[:1] if quick else tasks)]
                command += ["--limit", "0" if quick else str(limit)]
                yield f"step_{optimizer}_{dtype}_{model}_{where}", command


def _samples(device: str, what: str, model: str) -> list[str]:
    return [] if device == "cpu" else ["--samples", str(GPU_SAMPLES[what][model])]


def main() -> None:
    """Run what is missing, and say what could not be measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--anew", action="store_true", help="measure again what is there")
    parser.add_argument("--quick", action="store_true", help="as few repeats as can be: a trial")
    parser.add_argument("--out", type=Path, default=RESULTS, help="pages are made from the default")
    parser.add_argument("--data", help="folder of MNIST, where accuracy over lam is missing")
    arguments = parser.parse_args()
    wanted, failed, begin = [*jobs(arguments.device, arguments.quick)], [], perf_counter()
    if arguments.anew:
        for name, _ in wanted:
            (arguments.out / f"{name}.json").unlink(missing_ok=True)
    for i, (name, (script, *options)) in enumerate(wanted, start=1):
        path = arguments.out / f"{name}.json"
        if path.exists():
            continue
        print(
            f"\n== {i} of {len(wanted)}, after {perf_counter() - begin:.0f} s: {name}", flush=True
        )
        if not _ran([script, *options, "--json", str(path)]):
            failed.append(name)
    if arguments.out == RESULTS:
        data = ["--data", arguments.data] if arguments.data else []
        pages = [["bench_lam", *data], ["performance"], ["readme"]]
        failed += [command[0] for command in pages if not _ran(command)]
    print(
        f"\n{perf_counter() - begin:.0f} s; not measured or written: {', '.join(failed) or 'nothing'}"
    )
    sys.exit(bool(failed))


def _ran(command: list[str]) -> bool:
    return (
        subprocess.run([sys.executable, "-m", f"benchmarks.{command[0]}", *command[1:]]).returncode
        == 0
    )


if __name__ == "__main__":
    main()
