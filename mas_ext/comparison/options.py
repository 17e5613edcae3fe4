"""The options of a comparison: read from a TOML file and the command line, checked before any work."""

from __future__ import annotations

import functools
import inspect
import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mas_ext import models
from mas_ext._arguments import check_count, hint, resolve
from mas_ext.methods import METHODS, Method, create, options, takes
from mas_ext.methods.method import is_cross_entropy
from mas_ext.methods.quadratic import Lam
from mas_ext.models import MakeModel, MultiHead
from mas_ext.scenarios import Scenario, named
from mas_ext.training.settings import CHOOSING_SHARE, LOSSES, NAMED_SCORES, Settings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Added to the seed of a network's first weights: not the random numbers that heads get theirs from.
FIRST_WEIGHTS = 2**32

Purpose = Literal["choose", "final"]


_CALLED = {str: "a word", int: "a whole number", float: "a number", bool: "true or false"}


class Option(NamedTuple):
    """A key of the file, and an option of the command line.

    kind: str, int, float or bool. many: a list of them, separated by commas on the command line; a single value
        is a list of one. word: allowed instead of a list.
    """

    kind: type
    many: bool
    word: str | None

    @classmethod
    def of(cls, field: Any) -> Option:
        """The option for a field of this type, without what no file and no command line has, as functions."""
        parts = get_args(field) if get_origin(field) in (Union, UnionType) else (field,)
        inner = {get_origin(part): get_args(part)[0] for part in parts if get_args(part)}
        lists = [inner[each] for each in (tuple, Sequence, Mapping) if each in inner]
        kind = next((each for each in (*lists, *parts) if each in _CALLED), str)
        return cls(kind, bool(lists), inner.get(Literal) if lists else None)

    def read(self, name: str, value: Any) -> Any:
        """The checked value: lists become tuples, a float may be given as an int, numbers as NumPy's.

        Raises:
            ValueError: the value is of another kind.
        """
        if isinstance(value, str) and value == self.word:
            return value
        if not self.many:
            return self._one(name, value)
        values = value if isinstance(value, (list, tuple, np.ndarray)) else [value]
        return tuple(self._one(name, each) for each in values)

    def parse(self, name: str, text: str) -> Any:
        """The checked value of a word on the command line."""
        if text == self.word:
            return text
        values = [self._converted(word) for word in (text.split(",") if self.many else [text])]
        return self.read(name, values if self.many else values[0])

    def _converted(self, word: str) -> Any:
        try:
            return self.kind(word)
        except ValueError:
            return word

    def _one(self, name: str, value: Any) -> Any:
        number = {int: Integral, float: Real}.get(self.kind)
        if number is not None and isinstance(value, number) and not isinstance(value, bool):
            with suppress(OverflowError):  # an integer that is no float
                value = self.kind(value)
        if type(value) is not self.kind:
            or_word = "" if self.word is None else f" or {self.word!r}"
            raise ValueError(f"{name}: got {value!r}, expected {_CALLED[self.kind]}{or_word}")
        return value


# Scenarios with a learning rate of their own.
_RATES = ", ".join(f"{name} {r.lr:g}" for name, r in named.SCENARIOS.items() if r.lr is not None)

# Help for the command line: what is compared, the fields of `Config`; how it is trained, those of `Settings`.
WHAT = {
    "scenario": f"tasks to learn: {', '.join(named.SCENARIOS)}; or module:function, (folder, tasks, seed) -> "
    "Scenario",
    "data": "folder of the data sets; default: $MAS_EXT_DATA, ./data, ~/data",
    "tasks": "how many tasks; default: what is usual for the scenario",
    "order": "positions of the tasks in another order, or random",
    "model": f"network: {', '.join(models.MODELS)}; or module:function, input's shape -> MultiHead",
    "hidden": "widths of the hidden layers of the mlp; default: 400,400",
    "methods": f"what is compared: {', '.join(METHODS)}; one of an installed package; or module:Class",
    "lam": "strength of all methods that have one; of several, the best on validation data is taken for each "
    "method; auto: chosen for every task after the first, from its data alone, by all methods that can",
    "lam_seeds": "how many seeds lam is chosen with, none of which is one of --seeds",
    "seeds": "how many times everything is learned, with the seeds 0, 1, ...",
    "device": "cpu, cuda, ...",
}
HOW = {
    "setting": "task (one head per task, the task is known when testing), domain (one head) or class (one head "
    "per task, side by side)",
    "optimizer": "sgd, adam or adamw",
    "lr": f"learning rate; of {_RATES}",
    "epochs": "for every task, or one number per task",
    "batch_size": "samples per step",
    "schedule": "of the learning rate within a task: cosine or linear; default: constant",
    "clip": "largest norm of the gradient; default: any",
    "amp": "bfloat16 or float16: mixed precision; default: none",
    "validation": "share of the training data kept for validation; lam is chosen on it, or without it on "
    f"{CHOOSING_SHARE:g} of the training data, kept for that alone",
    "patience": "epochs without a better validation accuracy that end a task; default: any",
    "importance_epochs": "gather importance online in the last so many epochs of a task",
    "keep": "what matters with lam auto, from 0, the new task alone, to 1, the old ones",
    "balanced": "draw all classes equally often",
    "deterministic": "use deterministic algorithms of torch only",
    "task_loss": f"what is minimised: {', '.join(LOSSES)}; or module:function, (output, target) -> number; "
    "default: cross-entropy",
    "score": f"what is reported as accuracy: {', '.join(NAMED_SCORES)}; or module:function, (output, target) "
    "-> number, larger is better; default: accuracy for the cross entropy, else minus the loss",
    "workers": "processes that read data sets that are not in memory",
}

# Where data are and what reads them: a run may go on with others.
FREE = ("data", "workers")


@dataclass(frozen=True)
class Config:
    """What is compared, and how it is trained; the fields are the keys of the file, see WHAT.

    scenario: by name, or itself, or a function seed -> Scenario.
    model: by name, or a function shape -> MultiHead.
    methods: options by name; "lam" among them may be a list, and takes precedence over `lam`.
    lam: of all methods; none: each method's own default, as of those that can't choose with "auto".
    settings: see HOW; its seed is not used.

    Raises:
        ValueError: a value that can't be used.
    """

    scenario: str | Scenario | Callable[[int], Scenario] = "split-digits"
    data: str | None = None
    tasks: int | None = None
    order: tuple[int, ...] | Literal["random"] | None = None
    model: str | MakeModel = "mlp"
    hidden: tuple[int, ...] | None = None
    methods: Mapping[str, Mapping[str, Any]] = field(
        default_factory=lambda: {"finetune": {}, "mas": {}, "mas-alpha": {}, "joint": {}}
    )
    lam: tuple[float, ...] | Literal["auto"] = "auto"
    lam_seeds: int = 1
    seeds: int = 1
    device: str = "cpu"
    settings: Settings = field(default_factory=Settings)

    def __post_init__(self) -> None:
        """Check everything that can be checked without data."""
        known_model = functools.partial(resolve, "model", known=models.MODELS)
        for name, find in (("scenario", named.known_scenario), ("model", known_model)):
            value = getattr(self, name)
            if isinstance(value, str):
                find(value)
            elif not callable(value) and not isinstance(value, Scenario):
                raise ValueError(
                    f"{name}: got {type(value).__name__}, expected a name or a function"
                )
        if isinstance(self.model, nn.Module):
            raise ValueError(
                f"model: got a {type(self.model).__name__}, expected a function that makes one, since every "
                "training begins with a new one"
            )
        for name in ("tasks", "seeds", "lam_seeds"):
            if getattr(self, name) is not None:
                check_count(getattr(self, name), name)
        for name in ("data", "tasks", "order"):
            if getattr(self, name) is not None and not isinstance(self.scenario, str):
                raise ValueError(
                    f"{name}: got {_told(getattr(self, name))!r} for {_told(self.scenario)}, expected it only "
                    "with a scenario by name"
                )
        if self.hidden is not None and (self.model != "mlp" or min(self.hidden, default=0) < 1):
            raise ValueError(
                f"hidden: got {list(self.hidden)} for {_told(self.model)}, expected widths of an mlp's layers"
            )
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"device: got {self.device!r}, expected one that is here ({str(error).splitlines()[0]})"
            ) from error
        if not self.methods:
            raise ValueError(f"methods: got none, expected some of {', '.join(METHODS)}")
        _read_lams("lam", self.lam)
        for method in self.methods:
            for lam in self.lams(method) or [None]:
                try:
                    self.create(method, lam)
                except TypeError as error:
                    raise ValueError(f"methods.{method}: {error}") from error

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Config:
        """The configuration with these values, by the names in OPTIONS; the others have their defaults.

        A scenario of a name with a learning rate of its own is learned with that, unless another one is given.

        Raises:
            ValueError: an unknown name, or a value that can't be used.
        """
        what: dict[str, Any] = {}
        how: dict[str, Any] = {}
        for name, value in values.items():
            if name not in OPTIONS:
                raise ValueError(f"{name}: there is no such key, {hint(name, OPTIONS)}")
            if name == "methods":
                value = tables_of(value)
            elif name not in ("scenario", "model") and value is not None and not callable(value):
                value = OPTIONS[name].read(name, value)
            (how if name in HOW else what)[name] = value
        if len(how.get("epochs", ())) == 1:
            (how["epochs"],) = how["epochs"]
        scenario = what.get("scenario", cls.scenario)
        recipe = named.SCENARIOS.get(scenario) if isinstance(scenario, str) else None
        usual = {} if recipe is None or recipe.lr is None else {"lr": recipe.lr}
        return cls(**what, settings=Settings(**{**usual, **how}))

    def values(self) -> dict[str, Any]:
        """All keys that have a value, as in a file, and what has no name there by what it is called in Python.

        keep only with lam "auto", or if it is not the default.
        """
        found: dict[str, Any] = {}
        for name in OPTIONS:
            value = getattr(self.settings if name in HOW else self, name)
            told = name != "keep" or value != Settings.keep or self.automatic
            usual = (
                value is None or value is F.cross_entropy or (type(value) is tuple and not value)
            )
            if (not usual or name == "lam") and told:
                found[name] = _told(value)
        if "task_loss" in found and is_cross_entropy(self.settings.loss_function):
            found.setdefault("score", "accuracy")
        found["methods"] = {name: _spelled_out(name, given) for name, given in self.methods.items()}
        return found

    def toml(self) -> str:
        """The configuration as TOML, with all defaults."""
        values = self.values()
        tables = values.pop("methods")
        lines = [f"{name} = {_toml(value)}" for name, value in values.items()]
        for method, given in tables.items():
            name = method if re.fullmatch("[A-Za-z0-9_-]+", method) else _toml(method)
            lines += ["", f"[methods.{name}]"]
            lines += [f"{name} = {_toml(value)}" for name, value in given.items()]
        return "\n".join(lines) + "\n"

    def lams(self, method: str) -> tuple[Lam, ...]:
        """The strengths that a method is tried with: its own, else `lam`, else its default.

        Empty for a method without lam, and for one without a default that is given none.
        """
        known = options(method)
        if "lam" not in known:
            return ()
        own = self.methods[method].get("lam")
        if own is None:
            can = self.lam != "auto" or takes(method, "lam", "auto")
            usual = () if known["lam"] is inspect.Parameter.empty else (known["lam"],)
            return (_read_lams("lam", self.lam) if can else ()) or usual
        return _read_lams(f"methods.{method}.lam", own)

    @property
    def automatic(self) -> bool:
        """Whether there is a method that lam is chosen for before each task."""
        return any("auto" in self.lams(name) for name in self.methods)

    def tried(self) -> list[str]:
        """The methods with several lam to choose from."""
        return [name for name in self.methods if len(self.lams(name)) > 1]

    def create(self, method: str, lam: Lam | None) -> Method:
        """A new method with its options and this lam, None for a method without lam."""
        given = {**self.methods[method]}
        if lam is not None:
            given["lam"] = lam
        return create(method, **given)

    def make_scenario(self, seed: int) -> Scenario:
        """The scenario, whose random parts the seed decides."""
        if isinstance(self.scenario, Scenario):
            return self.scenario
        if isinstance(self.scenario, str):
            return named.make_scenario(self.scenario, self.data, self.tasks, self.order, seed)
        scenario = self.scenario(seed)
        if not isinstance(scenario, Scenario):
            raise ValueError(
                f"scenario: got {type(scenario).__name__} from {_told(self.scenario)}, expected a Scenario"
            )
        return scenario

    def network(self, scenario: Scenario, seed: int) -> MultiHead:
        """The network with its first weights, which are the same for all methods."""
        with torch.random.fork_rng([]):
            torch.manual_seed(seed + FIRST_WEIGHTS)
            if self.hidden is not None:
                return models.mlp(scenario.shape, self.hidden)
            return models.build(self.model, scenario.shape)

    def training(self, seed: int, purpose: Purpose) -> Settings:
        """How the scenario is learned; there are always validation data to choose lam on."""
        settings = self.settings
        share = settings.validation or (CHOOSING_SHARE if purpose == "choose" else 0.0)
        return replace(settings, seed=seed, validation=share)


OPTIONS: dict[str, Option] = {
    name: Option.of(get_type_hints(owner)[name])
    for owner, names in ((Config, WHAT), (Settings, HOW))
    for name in names
}


def _read_lams(name: str, value: Any) -> tuple[Lam, ...]:
    """The strengths to try, or "auto" alone."""
    lams = OPTIONS["lam"].read(name, value)
    if lams == "auto":
        return ("auto",)
    if not all(math.isfinite(lam) and lam >= 0 for lam in lams):
        raise ValueError(f"{name}: got {list(lams)}, expected finite numbers from 0 up")
    if len(set(lams)) < len(lams):
        raise ValueError(f"{name}: got {list(lams)}, expected each number once")
    return tuple(lams)


def tables_of(value: Any) -> dict[str, dict[str, Any]]:
    """Options by method, from such tables or from names alone.

    Raises:
        ValueError: what is neither, or a name twice.
    """
    if isinstance(value, Mapping):
        for name, given in value.items():
            if not isinstance(given, Mapping):
                raise ValueError(
                    f"methods.{name}: got {given!r}, expected a table of options: [methods.{name}]"
                )
        OPTIONS["methods"].read("methods", [*value])
        return {name: dict(given) for name, given in value.items()}
    names = OPTIONS["methods"].read("methods", value)
    if len(set(names)) < len(names):
        raise ValueError(f"methods: got {list(names)}, expected each name once")
    return {name: {} for name in names}


def _spelled_out(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options given, but for None where that is as good as nothing; a merge with its anchor.

    A merge without one is of before they were two choices.
    """
    usual = {**options(method), "lam": None}
    anchor = {"anchor": usual["anchor"]} if "merge" in given else {}
    told = {n: _told(v) for n, v in given.items() if v is not None or usual[n] is not None}
    return {**anchor, **told}


def merged(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The values, replaced by those given; methods that are given by name keep their options."""
    found = {**values, **given}
    if "methods" in values and not isinstance(given.get("methods", {}), Mapping):
        tables = tables_of(values["methods"])
        found["methods"] = {name: tables.get(name, {}) for name in tables_of(given["methods"])}
    return found


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between the values of two runs, in words, except where data are and what reads them."""
    defaults = Config().values()
    before, after = {**defaults, **old}, {**defaults, **new}
    return [
        f"{name} was {before.get(name, 'not given')} and is {after.get(name, 'not given')}"
        for name in OPTIONS
        if name not in FREE and before.get(name) != after.get(name)
    ]


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The values in a TOML file, not yet checked.

    Raises:
        OSError: it can't be read.
        ValueError: it is no TOML.
    """
    try:
        values: dict[str, Any] = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected TOML ({error})") from error
    return values


def _told(value: Any) -> Any:
    """A value as a file has it; a function, or a scenario without a name, is told by what it is called.

    What a file can't have, as None or a tensor among a method's options, is told in words.
    """
    if isinstance(value, Scenario):
        return value.name or "a Scenario"
    if callable(value):
        return f"{value.__module__}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    if isinstance(value, Mapping):
        return {str(name): _told(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_told(each) for each in value]
    if isinstance(value, (bool, str)):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else str(value)


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_toml(name)} = {_toml(each)}' for name, each in value.items())}}}"
    if isinstance(value, str):
        # JSON escapes as TOML does, but for this character, which TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value)
