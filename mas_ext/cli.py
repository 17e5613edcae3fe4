"""The command line: mas-ext demo | run | report | info | bench."""

from __future__ import annotations

import argparse
import functools
import shlex
import sys
import textwrap
import traceback
from collections.abc import Callable, Collection, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from mas_ext._arguments import hint

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

    Raises SystemExit with 0 after --help and --version, and with 2 for arguments that are not understood.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    name = next((word for word in words if not word.startswith("-")), None)
    parser = build_parser([name] if name else [])
    if name == "reproduce":
        parser.error("reproduce is now `python -m experiments`, in a clone of the repository")
    if name is not None and name not in COMMANDS:
        parser.error(f"unknown command {name!r}, {hint(name, COMMANDS)}")
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


class Help(argparse.RawDescriptionHelpFormatter):
    """Help whose lines never break within a name, as mas-alpha."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


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


def build_parser(complete: Collection[str] | None = None) -> Parser:
    """The parser of all commands, with the options of these, by default of all: they import what they name."""
    debug = Parser(add_help=False)
    debug.add_argument(
        "--debug",
        action="store_true",
        # Not False, which after a --debug before the command would overwrite it.
        default=argparse.SUPPRESS,
        help="show the whole traceback of an error",
    )
    shared: Any = {
        "parents": [debug],
        "formatter_class": Help,
        "allow_abbrev": False,
    }
    parser = Parser(
        prog="mas-ext",
        description="Continual learning with Memory Aware Synapses on fused kernels.",
        epilog=EPILOG,
        **shared,
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"mas-ext {version('mas_ext')}",
        help="show the version and exit",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (add_options, text) in COMMANDS.items():
        description = text[0].upper() + text[1:] + "."
        own = commands.add_parser(name, help=text, description=description, **shared)
        if complete is None or name in complete:
            add_options(own)
    return parser


def add_demo(parser: Parser) -> None:
    """The options of `demo`."""
    from mas_ext.scenarios.datasets import DATASETS

    parser.set_defaults(run=do_demo)
    add = parser.add_argument
    add("--dataset", choices=DATASETS, default="digits", help="default: digits")
    add("--data", metavar="DIR", help="where they are; default: $MAS_EXT_DATA, ./data, ~/data")
    add("--out", metavar="FILE", default="mas-ext-demo.png", help="figure; default: %(default)s")
    add("--seed", metavar="N", type=int, default=0, help="default: %(default)s")
    add("--epochs", metavar="N", type=int, help="per task; default: what suits the data set")


def do_demo(arguments: argparse.Namespace) -> None:
    """Progress on stderr, then the table and the figure's path."""
    from mas_ext.comparison.demo import run_demo

    result = run_demo(
        arguments.dataset, arguments.data, arguments.out, arguments.seed, arguments.epochs
    )
    print(f"\n{result.table()}\n\nlearned in {result.seconds:.0f} s; figure: {result.figure}")


RUN_EXAMPLES = """\
examples:
  mas-ext run --out runs/digits
      The defaults: fine-tuning, MAS, MAS-alpha and joint training on five tasks of two digits each.
  mas-ext run --scenario split-mnist --methods finetune,mas,joint --seeds 3 --out runs/mnist
  mas-ext run --methods mas,mas-alpha --lam 0.1,1,10 --out runs/lam
      Each method with its best lam on validation data.
  mas-ext run --config digits.toml --epochs 8 --out runs/long
      All from a file, but for the epochs.
  mas-ext run --scenario arms:make --model arms:policy --task-loss mse --setting domain --out runs/arms
      A regression of one's own: functions of the module arms.py, here or installed.
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
    """The options of `run`: where everything is written, and one for each key of a configuration."""
    from mas_ext.comparison.options import HOW, OPTIONS, WHAT, Config

    parser.set_defaults(run=do_run)
    parser.epilog = RUN_EXAMPLES
    add = parser.add_argument_group("where from, where to").add_argument
    add("--config", metavar="FILE", help="TOML file; options given here take precedence over it")
    add("--out", metavar="DIR", required=True, help="new directory for all that is found")
    add("--resume", action="store_true", help="go on with the run in --out, which stays what it is")
    add("--tensorboard", action="store_true", help="write TensorBoard events, too")
    add(
        "--wandb", action="store_true", help="log to Weights & Biases, too, as a project called DIR"
    )

    defaults = Config().values()
    for title, texts in (("what is compared", WHAT), ("how it is trained", HOW)):
        group = parser.add_argument_group(title)
        for name, text in texts.items():
            flag, option = f"--{name.replace('_', '-')}", OPTIONS[name]
            how: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
            if option.kind is not bool:
                if name in defaults:
                    default = defaults[name]
                    each = default if isinstance(default, (list, dict)) else [default]
                    text += f"; default: {','.join(map(str, each))}"
                metavar = {str: "NAME", int: "N", float: "X"}[option.kind] + ",..." * option.many
                parse = functools.partial(_parse, option.parse, name)
                how = {"metavar": metavar, "type": parse}
            group.add_argument(flag, default=argparse.SUPPRESS, help=text, **how)


def _parse(parse: Callable[[str, str], Any], name: str, text: str) -> Any:
    """Parse the value of an option; errors are of the type that argparse reports."""
    try:
        return parse(name, text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix(f"{name}: ")) from error


def do_run(arguments: argparse.Namespace) -> None:
    """Progress on stderr, then the table and the directory."""
    from mas_ext.comparison import sweep
    from mas_ext.comparison.directory import CONFIG, Directory
    from mas_ext.comparison.options import OPTIONS, Config, merged, read_toml

    sys.path.insert(0, "")  # modules in the working directory are found, as by python -m
    out = Path(arguments.out)
    values = Directory(out).config().values() if arguments.resume else {}
    if arguments.config is not None:
        values = merged(values, read_toml(arguments.config))
    given = {name: value for name, value in vars(arguments).items() if name in OPTIONS}
    config = Config.read(merged(values, given))
    try:
        table = sweep.run(
            config,
            out,
            resume=arguments.resume,
            tensorboard=arguments.tensorboard,
            wandb=arguments.wandb,
        )
    except KeyboardInterrupt:
        if (out / CONFIG).exists():
            print(f"to go on: mas-ext run --out {shlex.quote(str(out))} --resume", file=sys.stderr)
        raise
    print(f"{table}\nall that was found: {out}")


def add_report(parser: Parser) -> None:
    """The options of `report`."""
    from mas_ext.comparison.charts import KINDS
    from mas_ext.comparison.report import FORMATS

    parser.set_defaults(run=do_report)
    parser.add_argument(
        "directory", metavar="RUN", help="the directory that --out of mas-ext run was"
    )
    add = parser.add_argument
    add("--out", metavar="DIR", help="where to write; default: RUN")
    formats, kinds = (functools.partial(_several, choices) for choices in (FORMATS, KINDS))
    text = f"{', '.join(FORMATS)}; several with commas between them; default: html"
    add("--format", metavar="NAME,...", type=formats, default=["html"], help=text)
    text = f"pictures as {', '.join(KINDS)}; default: png with html, else none"
    add("--pictures", metavar="NAME,...", type=kinds, help=text)


def _several(choices: Collection[str], text: str) -> list[str]:
    """Names with commas between them; errors are of the type that argparse reports."""
    names = text.split(",")
    for name in names:
        if name not in choices:
            raise argparse.ArgumentTypeError(f"got {name!r}, {hint(name, choices)}")
    return names


def do_report(arguments: argparse.Namespace) -> None:
    """The paths of what was written."""
    from mas_ext.comparison import report

    given = arguments
    for path in report.report(given.directory, given.out, given.format, given.pictures):
        print(f"report: {path}")


def add_info(parser: Parser) -> None:
    """No options."""
    parser.set_defaults(run=do_info)


def do_info(arguments: argparse.Namespace) -> None:
    """What runs on this machine, in words."""
    from mas_ext.info import info

    facts = info()
    compiled = facts["backend"] == "native"
    threads, instructions = facts["threads"], facts["cpu_instruction_set"]
    cuda, built_for = facts["torch_cuda"], facts["cuda_architectures"]
    lines = {
        "kernels": "compiled" if compiled else "plain PyTorch, the reference: right, and slower",
        "CPU": f"{threads} thread{'s' * (threads > 1)}"
        + (f", instruction set {instructions}" if instructions else ""),
        "GPU": facts["gpu"] or "none",
        "CUDA kernels": f"built for {built_for}" if facts["cuda_kernels"] else "none",
        "what hinders": "; ".join(facts["why_not"]) or "nothing",
        "versions": f"mas_ext {facts['mas_ext']}, torch {facts['torch']} "
        f"({f'CUDA {cuda}' if cuda else 'without CUDA'}), Python {facts['python']}",
        "platform": facts["platform"],
    }
    for label, text in lines.items():
        print(f"{label + ':':14}{text}")


def add_bench(parser: Parser) -> None:
    """The options of `bench`."""
    parser.set_defaults(run=do_bench)
    parser.epilog = "More, as torch.compile: python -m benchmarks.penalty in the repository."
    add = parser.add_argument
    models = "mlp, resnet18, vit_b or gpt2"
    add("--model", metavar="NAME", default="mlp", help=f"{models}; default: %(default)s")
    add("--device", default="cpu", help="default: %(default)s")
    add("--dtype", default="float32", help="of the parameters; default: %(default)s")
    add("--tasks", metavar="T", type=int, nargs="+", default=[1, 10], help="default: 1 10")
    add("--repeats", metavar="N", type=int, default=11, help="default: %(default)s")


def do_bench(arguments: argparse.Namespace) -> None:
    """A table of the times."""
    from mas_ext.comparison.bench import bench

    given = arguments
    print(bench(given.model, given.device, given.dtype, given.tasks, given.repeats))


# By command: what adds its options, and its help.
COMMANDS: dict[str, tuple[Callable[[Parser], None], str]] = {
    "demo": (
        add_demo,
        "learn five tasks of handwritten digits with and without MAS, and draw the accuracies",
    ),
    "run": (add_run, "compare methods on one protocol, with all that is found kept in a directory"),
    "report": (add_report, "show what a run found as a page with pictures, also while it goes on"),
    "info": (add_info, "show which backend is in use and why, versions, threads and GPU"),
    "bench": (add_bench, "measure the penalty against other ways of computing it"),
}
