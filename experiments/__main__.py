"""Measures what is missing of the experiments and shows what was found: python -m experiments."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.files import fill
from experiments import EXPERIMENTS, Results, draw, reproduce
from experiments.manifest import DataError

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"

# Pages beside RESULTS.md that have the table of an experiment.
OTHER_PAGES = {"on-pretrained": "why.md", "importance-data": "how-to/production.md"}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 without the data that are needed, 130 if interrupted."""
    arguments = parsed(argv)
    try:
        if arguments.page:
            write_page(ROOT / "docs")
        else:
            run_experiments(arguments)
    except KeyboardInterrupt:
        return 130
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """What the command line says."""
    listed = "\n".join(f"  {name:<16}{each.title}" for name, each in EXPERIMENTS.items())
    parser = argparse.ArgumentParser(
        prog="python -m experiments",
        description="Measure what is missing in DIR/NAME.json, and show what was found.",
        epilog=f"experiments:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("names", metavar="NAME", nargs="*", choices=[*EXPERIMENTS, []], help="default: all")
    add("--quick", action="store_true", help="a small one, in a few minutes")
    add("--seeds", metavar="N", type=int, help="how often everything is measured; default: 10")
    add("--data", metavar="DIR", help="where data sets are; default: $MAS_EXT_DATA, ./data, ~/data")
    default = "experiments/results, with --quick out/experiments"
    add("--out", metavar="DIR", help=f"for results and pictures; default: {default}")
    add("--page", action="store_true", help="only write docs/RESULTS.md from experiments/results")
    return parser.parse_args(argv)


def run_experiments(arguments: argparse.Namespace) -> None:
    """Progress on stderr, then what was found, experiment by experiment."""
    out = Path(arguments.out or ("out/experiments" if arguments.quick else RESULTS))
    for name in arguments.names or EXPERIMENTS:
        experiment = replace(EXPERIMENTS[name], data=arguments.data)
        experiment = experiment.quick() if arguments.quick else experiment
        experiment = replace(experiment, seeds=arguments.seeds or experiment.seeds)
        page = reproduce(experiment, name, out)
        print(f"# {experiment.title}\n\n{page.text}\n\nall that was found: {out}", flush=True)


def write_page(docs: Path) -> None:
    """Replace the tables and pictures of RESULTS.md by those of what was found so far."""
    pictures = docs / "results"
    pictures.mkdir(exist_ok=True)
    parts = {}
    for name, experiment in EXPERIMENTS.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            page = draw(experiment, Results(path, experiment.protocol()), pictures)
            parts[name] = page.text.replace(f"]({name}", f"](results/{name}")
        else:
            parts[name] = "Not measured yet."
    fill(docs / "RESULTS.md", parts)
    for name, document in OTHER_PAGES.items():
        if name in parts:
            fill(docs / document, {name: parts[name].partition("\n\n![")[0]})


if __name__ == "__main__":
    raise SystemExit(main())
