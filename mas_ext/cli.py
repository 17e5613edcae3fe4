"""The command line: mas-ext demo | info | bench."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from mas_ext.data import DATASETS
from mas_ext.names import hint

COMMANDS = {
    "demo": "learn five tasks of handwritten digits with and without MAS, and draw the accuracies",
    "info": "show which backend is in use and why, versions, threads and GPU",
    "bench": "measure the penalty against other ways of computing it",
}

# What a user can put right; anything else is a bug and keeps its traceback.
EXPECTED = (ValueError, OSError, ImportError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 1 if the command failed, 130 if interrupted.

    Raises SystemExit with 0 after --help and with 2 for arguments that are not understood.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    parser = build_parser()
    command = next((word for word in words if not word.startswith("-")), None)
    if command is not None and command not in COMMANDS:
        parser.error(f"unknown command {command!r}, {hint(command, COMMANDS)}")
    arguments = parser.parse_args(words)

    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        print("mas-ext: interrupted", file=sys.stderr)
        return 130
    except EXPECTED as error:
        if "debug" in arguments:
            traceback.print_exc()
        else:
            message = " ".join(str(error).split())
            print(f"mas-ext: error: {message} (--debug shows where)", file=sys.stderr)
        return 1
    return 0


class Parser(argparse.ArgumentParser):
    """Tells of a mistake in one line, instead of after the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"mas-ext: error: {message} (see {self.prog} --help)\n")


def build_parser() -> Parser:
    """The parser of all commands; ``run`` in its result is the function of the one given."""
    debug = Parser(add_help=False)
    debug.add_argument(
        "--debug",
        action="store_true",
        # Not False, which after a --debug before the command would overwrite it.
        default=argparse.SUPPRESS,
        help="show the whole traceback of an error",
    )
    parser = Parser(
        prog="mas-ext",
        description="Continual learning with Memory Aware Synapses on fused kernels.",
        epilog="To start with: mas-ext demo",
        parents=[debug],
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add = {
        name: commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            parents=[debug],
        )
        for name, text in COMMANDS.items()
    }

    add["demo"].set_defaults(run=run_demo)
    demo = add["demo"].add_argument
    demo("--dataset", choices=DATASETS, default="digits", help="default: digits")
    demo("--data", metavar="DIR", help="where they are; default: $MAS_EXT_DATA, ./data, ~/data")
    demo("--out", metavar="FILE", default="mas-ext-demo.png", help="figure; default: %(default)s")
    demo("--seed", metavar="N", type=int, default=0, help="default: %(default)s")
    demo("--epochs", metavar="N", type=int, help="per task; default: what suits the data set")

    add["info"].set_defaults(run=run_info)

    add["bench"].set_defaults(run=run_bench)
    bench = add["bench"].add_argument
    models = "mlp, resnet18, vit_b or gpt2"
    bench("--model", metavar="NAME", default="mlp", help=f"{models}; default: %(default)s")
    bench("--device", default="cpu", help="default: %(default)s")
    bench("--dtype", default="float32", help="of the parameters; default: %(default)s")
    bench("--tasks", metavar="T", type=int, nargs="+", default=[1, 10], help="default: 1 10")
    bench("--repeats", metavar="N", type=int, default=11, help="default: %(default)s")
    return parser


def run_demo(arguments: argparse.Namespace) -> None:
    """Progress on stderr, then the table and the figure's path."""
    from mas_ext import demo

    result = demo.run_demo(
        arguments.dataset, arguments.data, arguments.out, arguments.seed, arguments.epochs
    )
    print(f"\n{result.table()}\n\nlearned in {result.seconds:.0f} s; figure: {result.figure}")


def run_info(arguments: argparse.Namespace) -> None:
    """One fact a line."""
    from mas_ext.info import info

    facts = info()
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


def run_bench(arguments: argparse.Namespace) -> None:
    """A table of the times."""
    from mas_ext import benchmark

    result = benchmark.run(
        model=arguments.model,
        device=arguments.device,
        dtype=arguments.dtype,
        tasks=arguments.tasks,
        repeats=arguments.repeats,
    )
    print(benchmark.table(result))
