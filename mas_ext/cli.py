"""The command line: mas-ext demo | run | report | reproduce | info | bench."""

from __future__ import annotations

import argparse
import functools
import shlex
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from mas_ext._hints import hint
from mas_ext.compare import options as config
from mas_ext.scenarios.datasets import DATASETS

COMMANDS = {
    "demo": "learn five tasks of handwritten digits with and without MAS, and draw the accuracies",
    "run": "compare methods on one protocol, with all that is found kept in a directory",
    "report": "show what a run found as a page with pictures, also while it goes on",
    "reproduce": "measure again what is said of MAS and of other methods",
    "info": "show which backend is in use and why, versions, threads and GPU",
    "bench": "measure the penalty against other ways of computing it",
}

EPILOG = """\
examples:
  mas-ext demo                       what it is about, in a minute
  mas-ext run --out runs/digits      fine-tuning, MAS, MAS-alpha and joint training compared
  mas-ext report runs/digits         the same as a page with pictures
  mas-ext run --help                 everything that can be compared, and how

exit codes:
  0    done
  1    failed; the line on stderr says why, --debug shows where
  2    arguments that are not understood
  130  interrupted; `run` can go on with --resume

environment:
  MAS_EXT_DATA      folder of the data sets
  OMP_NUM_THREADS   threads on the CPU; for small networks 1 is often fastest
"""

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

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Nothing may be left over: what a subcommand does not know is its own error."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            near = hint(unknown[0], self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(unknown)}, {near}")
        return namespace, unknown


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
        epilog=EPILOG,
        parents=[debug],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add = {
        name: commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            parents=[debug],
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
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

    add_run(add["run"])

    add["report"].set_defaults(run=run_report)
    report = add["report"].add_argument
    report("directory", metavar="RUN", help="the directory that --out of mas-ext run was")
    report("--out", metavar="DIR", help="for report.html and its PNGs; default: RUN")

    add_reproduce(add["reproduce"])

    add["info"].set_defaults(run=run_info)

    add["bench"].set_defaults(run=run_bench)
    add["bench"].epilog = "More, as torch.compile: python -m benchmarks.penalty in the repository."
    bench = add["bench"].add_argument
    models = "mlp, resnet18, vit_b or gpt2"
    bench("--model", metavar="NAME", default="mlp", help=f"{models}; default: %(default)s")
    bench("--device", default="cpu", help="default: %(default)s")
    bench("--dtype", default="float32", help="of the parameters; default: %(default)s")
    bench("--tasks", metavar="T", type=int, nargs="+", default=[1, 10], help="default: 1 10")
    bench("--repeats", metavar="N", type=int, default=11, help="default: %(default)s")
    return parser


RUN_EXAMPLES = """\
examples:
  mas-ext run --out runs/digits
      The defaults: fine-tuning, MAS, MAS-alpha and joint training on five tasks of two digits each.
  mas-ext run --scenario split-mnist --methods finetune,mas,joint --seeds 3 --out runs/mnist
  mas-ext run --methods mas,mas-alpha --lam 0.1,1,10 --out runs/lam
      Each method with its best lam on validation data.
  mas-ext run --config digits.toml --epochs 8 --out runs/long
      All from a file, but for the epochs.
  mas-ext run --out runs/long --resume
      Go on where it was stopped.

file:
  Keys are the long options with _ for -. Methods have tables with options of their own; lam may be a list:
      scenario = "split-mnist"
      seeds = 3
      [methods.finetune]
      [methods.mas]
      lam = [0.1, 1.0]
      mode = "proximal"
"""


def add_run(parser: Parser) -> None:
    """The options of `run`: those of what is written, and one for each key of a configuration."""
    parser.set_defaults(run=run_run)
    parser.epilog = RUN_EXAMPLES
    add = parser.add_argument_group("where from, where to").add_argument
    add("--config", metavar="FILE", help="TOML file; what is given here goes before what is in it")
    add("--out", metavar="DIR", required=True, help="new directory for all that is found")
    add("--resume", action="store_true", help="go on with the run in --out, which stays what it is")
    add("--tensorboard", action="store_true", help="write TensorBoard events, too")

    defaults = config.Config().values()
    for title, keys in (("what is compared", config.WHAT), ("how it is trained", config.HOW)):
        group = parser.add_argument_group(title)
        for name, key in keys.items():
            option, text = f"--{name.replace('_', '-')}", key.help
            if name in defaults and key.kind is not bool:
                default = defaults[name]
                listed = map(str, default) if isinstance(default, (list, dict)) else [str(default)]
                text += f"; default: {','.join(listed)}"
            how: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
            if key.kind is not bool:
                metavar = {str: "NAME", int: "N", float: "X"}[key.kind] + ",..." * key.many
                how = {"metavar": metavar, "type": functools.partial(parse_key, name)}
            group.add_argument(option, default=argparse.SUPPRESS, help=text, **how)


def parse_key(name: str, text: str) -> Any:
    """The value of a configuration's key, as argparse wants it told where it can't be used."""
    try:
        return config.KEYS[name].parse(name, text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix(f"{name}: ")) from error


def run_run(arguments: argparse.Namespace) -> None:
    """Progress on stderr, then the table and the directory."""
    from mas_ext.compare import directory as record
    from mas_ext.compare import sweep as runs

    out = Path(arguments.out)
    values = record.load_config(out).values() if arguments.resume else {}
    if arguments.config is not None:
        values = config.merge(values, config.load(arguments.config))
    given = {name: value for name, value in vars(arguments).items() if name in config.KEYS}
    comparison = config.read(config.merge(values, given))
    try:
        table = runs.run(
            comparison, out, resume=arguments.resume, tensorboard=arguments.tensorboard
        )
    except KeyboardInterrupt:
        if (out / record.CONFIG).exists():
            print(f"to go on: mas-ext run --out {shlex.quote(str(out))} --resume", file=sys.stderr)
        raise
    print(f"{table}\nall that was found: {out}")


def run_report(arguments: argparse.Namespace) -> None:
    """The page's path."""
    from mas_ext.compare.report import report

    print(f"report: {report(arguments.directory, arguments.out)}")


def add_reproduce(parser: Parser) -> None:
    """The options of `reproduce`."""
    from experiments import EXPERIMENTS

    parser.set_defaults(run=run_reproduce)
    parser.description = "Measure what is missing in DIR/NAME.json, and show what was found."
    names = "\n".join(f"  {name:<16}{each.title}" for name, each in EXPERIMENTS.items())
    parser.epilog = f"experiments:\n{names}"
    add = parser.add_argument
    add("names", metavar="NAME", nargs="*", choices=[*EXPERIMENTS, []], help="default: all")
    add("--quick", action="store_true", help="a small one, in a few minutes")
    add("--seeds", metavar="N", type=int, help="how often everything is measured; default: 10")
    add("--data", metavar="DIR", help="where data sets are; default: $MAS_EXT_DATA, ./data, ~/data")
    default = "experiments/results, with --quick out/reproduce"
    add("--out", metavar="DIR", help=f"for results and pictures; default: {default}")


def run_demo(arguments: argparse.Namespace) -> None:
    """Progress on stderr, then the table and the figure's path."""
    from mas_ext.compare import demo

    result = demo.run_demo(
        arguments.dataset, arguments.data, arguments.out, arguments.seed, arguments.epochs
    )
    print(f"\n{result.table()}\n\nlearned in {result.seconds:.0f} s; figure: {result.figure}")


def run_reproduce(arguments: argparse.Namespace) -> None:
    """Progress on stderr, then what was found, experiment by experiment."""
    from experiments import EXPERIMENTS, reproduce

    default = "out/reproduce" if arguments.quick else "experiments/results"
    out = Path(arguments.out or default)
    for name in arguments.names or EXPERIMENTS:
        experiment = replace(EXPERIMENTS[name], data=arguments.data)
        experiment = experiment.quick() if arguments.quick else experiment
        experiment = replace(experiment, seeds=arguments.seeds or experiment.seeds)
        page = reproduce(experiment, name, out)
        print(f"# {experiment.title}\n\n{page.text}\n\nall that was found: {out}", flush=True)


def run_info(arguments: argparse.Namespace) -> None:
    """One fact a line."""
    from mas_ext.info import info

    facts = info()
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


def run_bench(arguments: argparse.Namespace) -> None:
    """A table of the times."""
    from mas_ext.compare.bench import bench

    given = arguments
    print(bench(given.model, given.device, given.dtype, given.tasks, given.repeats))
