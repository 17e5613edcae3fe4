"""Compares all methods as split-mnist.toml says; every seed and every lam that was tried is kept as JSON.

python benchmarks/bench_methods.py --out runs/split-mnist [--resume]

MNIST is looked for in $MAS_EXT_DATA, ./data and ~/data.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from common import RESULTS, machine

from mas_ext import config, record, runs

PROTOCOL = Path(__file__).with_name("split-mnist.toml")


def collected(out: Path) -> dict[str, Any]:
    """What stands in a run's directory, but for its checkpoints."""
    jobs = []
    for path in sorted(out.glob(f"**/{record.RESULT}")):
        job = json.loads(path.read_text(encoding="utf-8"))
        matrix = path.with_name(record.ACCURACY)
        lines = matrix.read_text(encoding="utf-8").splitlines() if matrix.exists() else []
        accuracy = [[float(cell) if cell else None for cell in line.split(",")] for line in lines]
        jobs.append({**job, "accuracy": accuracy})
    environment = json.loads((out / record.ENVIRONMENT).read_text(encoding="utf-8"))
    return {
        "config": (out / record.CONFIG).read_text(encoding="utf-8"),
        "machine": {**machine(), "date": environment[-1]["started"][:10]},
        "threads": environment[-1]["threads"],
        "lam": json.loads((out / record.LAM).read_text(encoding="utf-8")),
        "jobs": jobs,
    }


def main() -> None:
    """Run it, or what is left of it, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the run")
    parser.add_argument("--resume", action="store_true", help="go on with the run that is there")
    arguments = parser.parse_args()
    print(runs.run(config.read(config.load(PROTOCOL)), arguments.out, resume=arguments.resume))
    path = RESULTS / "methods_split-mnist.json"
    path.write_text(json.dumps(collected(arguments.out), indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
