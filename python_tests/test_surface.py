"""All that users and their files rely on is as surface.txt says; `python test_surface.py --write` writes that.

A line is an import path with its signature, an option of the command line, a key of a state or of a file.
"""

from __future__ import annotations

import argparse
import ast
import csv
import dataclasses
import difflib
import importlib
import inspect
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, get_origin

import pytest
import safetensors
import tiny
import torch
from torch import Tensor, nn

import mas_ext
from experiments import Results
from mas_ext import cli, methods

PACKAGE = Path(mas_ext.__file__).parent
STORED = Path(__file__).with_name("surface.txt")

# What users import from where; () for all in __all__.
NAMES = {
    "mas_ext": (),
    "mas_ext.importance": (),
    "mas_ext.penalty": ("FusedMASPenalty",),
    "mas_ext.task_free": ("Plateau",),
    "mas_ext.optim": ("SGD", "AdamW"),
    "mas_ext.compat": (
        *("BatchMeans", "Averaged", "AveragedFromFirst"),
        *("official", "avalanche", "facil", "norm"),
    ),
    "mas_ext.methods.method": ("SETTINGS", "Setting", "Training", "Method"),
    "mas_ext.methods.quadratic": ("Quadratic", "Estimated"),
    "mas_ext.methods": (),
    "mas_ext.trainer": ("Callback", "Epoch", "Result", "Trainer"),
    "mas_ext.training.scalars": ("ScalarWriter", "WandbWriter"),
    "mas_ext.models": (
        *("MultiHead", "with_heads", "load_backbone", "MODELS", "build"),
        *("mlp", "cnn", "alexnet", "resnet18", "resnet20", "resnet32"),
    ),
    "mas_ext.scenarios": (
        "Tensors",
        "Task",
        "Scenario",
        "from_datasets",
        "split",
        "labels",
        "targets",
    ),
    "mas_ext.metrics": (
        *("accuracy", "average_accuracy", "forgetting", "backward_transfer", "forward_transfer"),
        *("intransigence", "single_task_gap", "mean_interval", "interval_text"),
        *("student_quantile", "rank_correlation"),
    ),
    "mas_ext.info": ("info",),
    "mas_ext.cli": ("main",),
}
# Not for users, whatever their names say.
INTERNAL = {"bound", "extra_repr", "join"}
# Other libraries' own, which differ by their versions.
FOREIGN = {"optimizer", "scaler", "schedule"}


class Shown:
    """A default as it is written, without addresses."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return getattr(self.value, "__name__", None) or repr(self.value)


def signature(function: Callable[..., Any]) -> str:
    """Names, kinds and defaults of the parameters."""
    empty = inspect.Parameter.empty
    parameters = [
        p.replace(annotation=empty, default=p.default if p.default is empty else Shown(p.default))
        for p in inspect.signature(function).parameters.values()
    ]
    return str(inspect.Signature(parameters))


def describe(path: str, thing: Any, known: dict[Any, str]) -> Iterator[str]:
    """What can be done with a thing that users have under this path; known: what has been described."""
    if inspect.isclass(thing) or inspect.isroutine(thing):
        if thing in known:
            yield f"{path} is {known[thing]}"
            return
        known[thing] = path
        yield path + signature(thing)
    elif isinstance(thing, Mapping):
        yield f"{path}: {', '.join(thing)}"
    else:
        yield f"{path} = {'an alias' if get_origin(thing) is Callable else thing}"
    if not inspect.isclass(thing):
        return
    bases = [base for base in thing.__mro__[1:] if base in known]
    if bases:
        yield f"{path} is a {known[bases[0]]}"
    own = [base for base in thing.__mro__ if base.__module__.split(".")[0] == "mas_ext"]
    fields = {f.name for f in dataclasses.fields(thing)} if dataclasses.is_dataclass(thing) else ()
    for name in sorted({name for base in own for name in vars(base)} - {*fields, *INTERNAL}):
        member = inspect.getattr_static(thing, name)
        inherited = bases and member is inspect.getattr_static(bases[0], name, None)
        if name.startswith("_") or inherited:
            continue
        if isinstance(member, property):
            yield f"{path}.{name}: property{', can be set' if member.fset else ''}"
        elif callable(found := getattr(thing, name)):
            yield f"{path}.{name}{signature(found)}"
        else:
            yield f"{path}.{name} = {found!r}"


def imports() -> Iterator[str]:
    known: dict[Any, str] = {}
    for name, listed in NAMES.items():
        module = importlib.import_module(name)
        for each in listed or sorted(module.__all__):
            yield from describe(f"{name}.{each}", getattr(module, each), known)


def results() -> Iterator[str]:
    """What users get without importing its type."""
    model = nn.Linear(1, 1)
    handle = mas_ext.FusedMASPenalty(model).attach(torch.optim.SGD(model.parameters()))
    trainer = tiny.trainer("mas")
    yield f"what else Trainer takes: {signature(type(trainer.settings))}"
    yield f"what attach returns has {', '.join(name for name in dir(handle) if name[0] != '_')}"
    for thing in (trainer, trainer.method):
        names = sorted(name for name in vars(thing) if name[0] != "_")
        yield f"a {type(thing).__name__} has {', '.join(names)}"
    yield f"what info returns: {', '.join(mas_ext.info())}"


def integrations() -> Iterator[str]:
    """From the source: the libraries that these are for need not be installed."""
    for file in sorted(PACKAGE.glob("integrations/[a-z]*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if not isinstance(node, (ast.ClassDef, ast.FunctionDef)) or node.name[0] == "_":
                continue
            path, functions = f"mas_ext.integrations.{file.stem}.{node.name}", {"": node}
            if isinstance(node, ast.ClassDef):
                yield f"{path}({', '.join(map(ast.unparse, node.bases))})"
                inside = [each for each in node.body if isinstance(each, ast.FunctionDef)]
                functions = {f".{each.name}": each for each in inside}
            for name, function in functions.items():
                if name[:2] != "._" or name in (".__init__", ".__call__"):
                    for argument in ast.walk(function.args):
                        if isinstance(argument, ast.arg):
                            argument.annotation = None
                    yield f"{path}{name}({ast.unparse(function.args)})"


def commands() -> Iterator[str]:
    parser = cli.build_parser()
    (choice,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for command, known in choice.choices.items():
        yield f"mas-ext {command}"
        for action in known._actions:
            # Where the parser leaves them to a function, its help names choices and default.
            named = re.search(r": ([\w-]+(?:, [\w-]+)+)(?:;|$)", action.help or "")
            told = re.search(r"default: (.*)$", action.help or "")
            default = action.default if action.default != argparse.SUPPRESS else None
            facts = {
                "metavar": action.metavar,
                "nargs": action.nargs,
                "required": action.required or None,
                "choices": list(action.choices) if action.choices else named and named[1],
                "default": told and told[1] if default is None else default,
            }
            shown = [f"{name} {value}" for name, value in facts.items() if value is not None]
            name = ", ".join(action.option_strings) or action.dest
            yield f"mas-ext {command} {name}: {'; '.join(shown)}"


def options() -> Iterator[str]:
    for name in methods.METHODS:
        known = [f"{option}={value!r}" for option, value in methods.options(name).items()]
        yield f"method {name}({', '.join(known)})"


def variables() -> Iterator[str]:
    """Environment variables that the package and its kernels read."""
    for folder, kind in ((PACKAGE, "*.py"), (PACKAGE.parent / "csrc", "*.cpp")):
        found = {
            name
            for file in folder.rglob(kind)
            for name in re.findall(r'"(MAS_EXT_\w+)"', file.read_text(encoding="utf-8"))
        }
        yield from sorted(found)


def leaves(path: str, node: Any) -> Iterator[str]:
    """The keys of a state, and dtypes and shapes of its tensors; JSON in a tensor counts as what it says."""
    if isinstance(node, Tensor) and node.dtype == torch.uint8 and node.dim() == 1:
        with suppress(ValueError):
            node = json.loads(bytes(node.tolist()))
    if isinstance(node, Tensor):
        yield f"{path}: {str(node.dtype).removeprefix('torch.')} {tuple(node.shape)}"
    elif isinstance(node, list):
        # Each once: how many there are does not matter.
        yield from dict.fromkeys(leaf for each in node for leaf in leaves(f"{path}/*", each))
    elif isinstance(node, Mapping):
        inside = {key: list(leaves(f"{path}/{key}", value)) for key, value in node.items()}
        inside = {key: [] if key in FOREIGN else found for key, found in inside.items()}
        plain = [key for key, found in inside.items() if not found]
        if plain:
            yield f"{path}: {', '.join(plain)}"
        for found in inside.values():
            yield from found


def penalties() -> Iterator[str]:
    """Their parameter is float32, or float64 where omega is."""
    for merge, anchor, store in tiny.FORMS:
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.uint8):
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            model = nn.Linear(2, 1, bias=False, dtype=wide)
            penalty = tiny.consolidated(
                model, merge=merge, anchor=anchor, store=store, omega_dtype=dtype
            )
            penalty.observe(torch.ones(1, 2, dtype=wide))
            keys = "; ".join(leaf[1:] for leaf in leaves("", penalty.state_dict()))
            yield f"state of a penalty, {merge}, {anchor}, {store}, {dtype}: {keys}"


def files(folder: Path) -> Iterator[str]:
    tiny.consolidated(nn.Linear(2, 1)).save(folder / "penalty")
    with safetensors.safe_open(folder / "penalty", framework="pt") as file:
        yield from leaves("file of a penalty", {n: file.get_tensor(n) for n in file.keys()})  # noqa: SIM118
        metadata = file.metadata()
        yield f"metadata of a penalty: {', '.join(sorted(metadata))}"
        yield from leaves("metadata of a penalty, mas_ext", json.loads(metadata["mas_ext"]))

    for name in methods.METHODS:
        tiny.interrupt(name, folder / name, importance_epochs=1)
        tree = tiny.read_tree(folder / name)
        yield from leaves(f"state of {name}", tree.pop("method"))
        if name == "mas":
            yield from leaves("checkpoint of a trainer", tree)

    Results(folder / "results", {"given": 1}).add({"seed": 0}, {"accuracy": 1.0}, 0.1)
    yield from leaves("results of an experiment", json.loads((folder / "results").read_text()))

    assert tiny.command(*tiny.RUN, "--out", folder / "run") == 0
    assert tiny.command("report", folder / "run") == 0
    for path in sorted(path for path in (folder / "run").rglob("*") if path.is_file()):
        name, text = f"run/{path.relative_to(folder / 'run')}", path.read_bytes()
        yield name
        if path.suffix == ".toml":
            yield from (f"{name}: {line}" for line in text.decode().splitlines() if line)
        elif path.suffix == ".json":
            yield from leaves(name, json.loads(text))
        elif path.suffix == ".jsonl":
            lines = [json.loads(line) for line in text.splitlines()]
            for what, over in (("an epoch", False), ("a task", True)):
                found = [line for line in lines if (line["epoch"] is None) == over]
                yield from leaves(f"{name}, line of {what}", found)
        elif path.suffix == ".csv":
            # Each length once: how many lines there are may differ by machine.
            lengths = dict.fromkeys(len(row) for row in csv.reader(text.decode().splitlines()))
            yield f"{name}: {list(lengths)}"
        elif path.suffix == ".md":
            yield f"{name}: {[cell.strip() for cell in text.decode().splitlines()[0].split('|')]}"


def surface() -> str:
    """All of it."""
    parts = (imports, results, integrations, commands, options, variables, penalties)
    lines = [line for part in parts for line in part()]
    with tempfile.TemporaryDirectory() as folder:
        lines += files(Path(folder))
    return "\n".join(lines) + "\n"


@pytest.mark.usefixtures("one_thread")
def test_the_surface_is_as_it_was() -> None:
    stored, found = (text.splitlines() for text in (STORED.read_text(encoding="utf-8"), surface()))
    changes = [line for line in difflib.ndiff(stored, found) if line[0] in "-+"]
    assert not changes, (
        "where this is meant, `python python_tests/test_surface.py --write` belongs to the same commit:\n"
        + "\n".join(changes)
    )


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python python_tests/test_surface.py --write")
    STORED.write_text(surface(), encoding="utf-8")
