"""Configurations: what is read, what is refused and how, and that a file gives back what was written."""

import math
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mas_ext import methods
from mas_ext.comparison.options import HOW, OPTIONS, WHAT, Config, differences, merged, read_toml
from mas_ext.training.settings import Settings

EVERYTHING: dict[str, Any] = {
    "scenario": "permuted-mnist",
    "data": 'a "quoted" \\ folder\tcalled \x7f ö',
    "tasks": 3,
    "order": [2, 0, 1],
    "model": "mlp",
    "hidden": [30, 20],
    "methods": {"joint": {}, "mas": {"lam": [0.5, 2], "mode": "proximal", "max_samples": 7}},
    "lam": [1e-05, 1.0, 1e16],
    "lam_seeds": 2,
    "seeds": 4,
    "device": "cpu",
    "setting": "domain",
    "optimizer": "sgd",
    "lr": 0.05,
    "epochs": [1, 0, 2],
    "batch_size": 7,
    "schedule": "cosine",
    "clip": 2.0,
    "amp": "bfloat16",
    "validation": 0.25,
    "patience": 2,
    "importance_epochs": 0,
    "keep": 0.25,
    "balanced": True,
    "deterministic": True,
    "task_loss": "smooth-l1",
    "score": "torch.nn.functional:l1_loss",
    "workers": 1,
}


AUTO = {"methods": {"mas": {}, "lwf": {"lam": 1.0}}, "lam": "auto"}


class Plain(methods.Method):
    """Its lam has a default, and no type."""

    def __init__(self, lam=2.0) -> None:  # type: ignore[no-untyped-def]
        self.lam = lam


@dataclass(eq=False)
class Needs(methods.Method):
    """Its lam has a type, and no default."""

    lam: float


@dataclass(eq=False)
class Anything(methods.Method):
    """Its option may be anything."""

    given: Any


@pytest.fixture(autouse=True)
def _own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "_OWN", {})


def test_every_field_has_a_key() -> None:
    own = {field.name for field in fields(Config)} - {"settings"}
    assert set(WHAT) == own
    assert {"seed", *HOW} == {field.name for field in fields(Settings)}
    assert set(EVERYTHING) == set(OPTIONS)


def test_every_value_arrives() -> None:
    found = Config.read(EVERYTHING)
    for name, value in EVERYTHING.items():
        got = getattr(found.settings if name in HOW else found, name)
        assert (list(got) if isinstance(value, list) else got) == value, name
        assert type(got) is (tuple if isinstance(value, list) else type(value)), name


def test_nothing_given() -> None:
    found = Config.read({})
    assert found == Config(settings=Settings(lr=0.01))
    assert Config.read({"lr": 0.5}).settings.lr == 0.5
    assert Config.read({"scenario": "split-mnist"}).settings == Settings()
    assert list(found.methods) == ["finetune", "mas", "mas-alpha", "joint"]


@pytest.mark.parametrize("values", [EVERYTHING, {}, {"order": "random", "clip": math.inf}, AUTO])
def test_a_file_gives_back_what_was_written(values: dict[str, Any], tmp_path: Path) -> None:
    written = Config.read(values)
    path = tmp_path / "config.toml"
    path.write_text(written.toml(), encoding="utf-8")
    assert Config.read(read_toml(path)) == written
    assert differences(written.values(), read_toml(path)) == []


def test_a_file_as_people_write_it(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(
        'scenario = "split-digits"\nepochs = 3\nlam = 10\nlr = 1\n[methods.finetune]\n[methods.mas-alpha]\n'
        "lam = [1, 2.5]\n"
    )
    found = Config.read(read_toml(path))
    assert (found.settings.epochs, found.settings.lr, found.lam) == (3, 1.0, (10.0,))
    assert found.methods == {"finetune": {}, "mas-alpha": {"lam": [1, 2.5]}}
    path.write_text('methods = ["mas", "joint"]\nepochs = [3]')
    assert Config.read(read_toml(path)).methods == {"mas": {}, "joint": {}}
    assert Config.read(read_toml(path)).settings.epochs == 3


def test_no_toml(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    for content in (b"lr = ", b"lr = 1\nlr = 2", b"data = '\xff'"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"config\.toml: expected TOML \("):
            read_toml(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epoch": 3}, r"epoch: there is no such key, did you mean 'epochs'\?"),
        ({"seed": 3}, r"seed: there is no such key, did you mean 'seeds'\?"),
        ({"scenario": "split-mnits"}, r"scenario: got 'split-mnits', did you mean 'split-mnist'\?"),
        ({"model": "resnet19"}, r"model: got 'resnet19', did you mean 'resnet"),
        ({"methods": ["mas", "join"]}, r"'join', did you mean 'joint'\?"),
        ({"methods": ["mas", "mas"]}, r"methods: got \['mas', 'mas'\], expected each name once"),
        ({"methods": []}, "methods: got none, expected some of finetune"),
        (
            {"methods": {"mas": 3}},
            r"methods.mas: got 3, expected a table of options: \[methods.mas\]",
        ),
        (
            {"methods": {"mas": {"lamda": 3}}},
            "lamda: method 'mas' has no such option, expected one of",
        ),
        ({"methods": {"finetune": {"lam": 3}}}, "lam: method 'finetune' has no such option"),
        ({"methods": {"mas": {"lam": "x"}}}, "methods.mas.lam: got 'x', expected a number"),
        (
            {"methods": {"mas": {"lam": [1, -1]}}},
            r"methods.mas.lam: got \[1.0, -1.0\], expected finite",
        ),
        ({"lam": [1, 1]}, r"lam: got \[1.0, 1.0\], expected each number once"),
        ({"lam": math.inf}, r"lam: got \[inf\], expected finite numbers from 0 up"),
        ({"lam": 10**400}, "lam: got 10000.*, expected a number"),
        ({"keep": 2}, "keep: got 2.0, expected a number from 0 to 1"),
        ({"methods": {"ebll": {"lam": "auto"}}}, "lam: got 'auto', expected float"),
        ({"lr": "fast"}, "lr: got 'fast', expected a number"),
        ({"lr": True}, "lr: got True, expected a number"),
        ({"lr": [1.0]}, r"lr: got \[1.0\], expected a number"),
        ({"lr": -1}, "lr: got -1.0, expected a finite number above 0"),
        ({"epochs": 1.5}, "epochs: got 1.5, expected a whole number"),
        ({"epochs": []}, "epochs: got .*, expected integers of at least 0 for every task"),
        ({"balanced": 1}, "balanced: got 1, expected true or false"),
        ({"data": 1}, "data: got 1, expected a word"),
        ({"order": "rndm"}, "order: got 'rndm', expected a whole number or 'random'"),
        ({"seeds": 0}, "seeds: got 0, expected a whole number from 1 up"),
        ({"tasks": 0}, "tasks: got 0, expected a whole number from 1 up"),
        ({"lam_seeds": -1}, "lam_seeds: got -1, expected a whole number from 1 up"),
        ({"hidden": [3, 0]}, r"hidden: got \[3, 0\] for mlp, expected widths"),
        ({"model": "cnn", "hidden": [3]}, r"hidden: got \[3\] for cnn, expected widths of an mlp"),
        ({"device": "gpu"}, "device: got 'gpu', expected one that is here"),
        ({"setting": "tsk"}, "setting: got 'tsk', expected one of"),
        ({"patience": 1}, "patience: got 1 with validation=0.0"),
    ],
)
def test_what_cannot_be_used(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Config.read(values)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("methods", "mas,joint", ("mas", "joint")),
        ("lam", "1,1e-3", (1.0, 0.001)),
        ("lam", "auto", "auto"),
        ("epochs", "4", (4,)),
        ("order", "random", "random"),
        ("order", "1,0", (1, 0)),
        ("lr", "1", 1.0),
        ("tasks", "7", 7),
        ("scenario", "a,b", "a,b"),
    ],
)
def test_words_of_the_command_line(name: str, text: str, value: Any) -> None:
    got = OPTIONS[name].parse(name, text)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("epochs", "many", "epochs: got 'many', expected a whole number"),
        ("epochs", "4,", "epochs: got '', expected a whole number"),
        ("lam", "1;2", "lam: got '1;2', expected a number"),
        ("order", "1,random", "order: got 'random', expected a whole number or 'random'"),
    ],
)
def test_words_that_are_no_values(name: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OPTIONS[name].parse(name, text)


def test_which_lam() -> None:
    """A method's own, else everybody's, else its default; methods without lam have none."""
    methods = {"finetune": {}, "mas": {"lam": 3}, "mas-alpha": {"lam": [4, 5]}, "local-mas": {}}
    found = Config.read({"methods": methods, "lam": [7, 8]})
    assert [found.lams(name) for name in methods] == [(), (3.0,), (4.0, 5.0), (7.0, 8.0)]
    assert Config.read({"methods": ["mas"], "lam": []}).lams("mas") == (1.0,)
    automatic = Config.read({"methods": ["mas", "lwf", "joint"]})
    assert [automatic.lams(name) for name in automatic.methods] == [("auto",), (1.0,), ()]
    created = found.create("mas-alpha", 5.0)
    assert vars(created)["lam"] == 5.0
    assert type(found.create("finetune", None)).__name__ == "Finetune"


def test_lam_that_is_chosen_before_each_task() -> None:
    methods = {"finetune": {}, "mas": {"lam": "auto"}, "si": {}, "lwf": {"lam": 2}}
    found = Config.read({"methods": methods, "lam": []})
    assert [found.lams(name) for name in methods] == [(), ("auto",), (1.0,), (2.0,)]
    assert found.automatic
    assert found.values()["keep"] == 0.5
    assert found.tried() == []
    everybody = Config.read({"methods": ["mas", "si"], "lam": "auto"})
    assert [everybody.lams(name) for name in ("mas", "si")] == [("auto",)] * 2
    assert Config().automatic
    alone = Config.read({"lam": 2})
    assert not alone.automatic
    assert "keep" not in alone.values()


def test_merge() -> None:
    """What is given goes first; methods that are only named keep the options that they had."""
    file = {"lr": 1.0, "seeds": 2, "methods": {"mas": {"lam": 3}, "joint": {}}}
    given = {"seeds": 5, "methods": ("local-mas", "mas")}
    assert merged(file, given) == {
        "lr": 1.0,
        "seeds": 5,
        "methods": {"local-mas": {}, "mas": {"lam": 3}},
    }
    assert merged(file, {"methods": {"mas": {}}})["methods"] == {"mas": {}}
    assert merged({}, given) == given
    assert merged(file, {}) == file


def test_differences() -> None:
    old = Config.read({"seeds": 3, "data": "here", "methods": {"mas": {"lam": 1}}})
    new = Config.read({"seeds": 4, "data": "there", "workers": 1, "tasks": 5, "methods": ["mas"]})
    assert differences(old.values(), new.values()) == [
        "tasks was not given and is 5",
        "methods was {'mas': {'lam': 1}} and is {'mas': {}}",
        "seeds was 3 and is 4",
    ]


def test_the_same_network_for_all_methods_another_for_every_seed() -> None:
    comparison = Config(hidden=(20,))
    scenario = comparison.make_scenario(0)
    first, again, other = (comparison.network(scenario, seed) for seed in (0, 0, 1))
    assert torch.equal(first.backbone[1].weight, again.backbone[1].weight)
    assert not torch.equal(first.backbone[1].weight, other.backbone[1].weight)


def test_data_for_validation_where_lam_is_chosen() -> None:
    assert Config().training(3, "final") == Settings(seed=3)
    assert Config().training(3, "choose") == Settings(seed=3, validation=0.1)
    own = Config(settings=Settings(validation=0.3, lr=0.5))
    assert own.training(1, "choose") == own.training(1, "final")
    assert own.training(1, "choose") == Settings(seed=1, validation=0.3, lr=0.5)


def test_options_of_any_type_are_kept_in_a_file(tmp_path: Path) -> None:
    class Kind(Enum):
        ONE = 1

    given = {
        "a": {"b c": [1, {"d": None}], "e": {}},
        "pair": (0.1, np.float64(0.25)),
        "count": np.int64(3),
        "on": True,
        "weights": torch.ones(2),
        "of": Kind.ONE,
        "loss": F.mse_loss,
        "nothing": None,
    }
    told = {
        "a": {"b c": [1, {"d": "None"}], "e": {}},
        "pair": [0.1, 0.25],
        "count": 3,
        "on": True,
        "weights": "tensor([1., 1.])",
        "of": "Kind.ONE",
        "loss": "torch.nn.functional.mse_loss",
        "nothing": "None",
    }
    methods.register("any", Anything)
    found = Config(methods={"any": {"given": given}, "mas": {"lam": (0.5, 2.0)}})
    assert found.values()["methods"] == {"any": {"given": told}, "mas": {"lam": [0.5, 2.0]}}
    path = tmp_path / "config.toml"
    path.write_text(found.toml(), encoding="utf-8")
    assert differences(read_toml(path), found.values()) == []
    as_it_is = Config(methods={"lwf": {"distance": None}, "mas": {"lam": None, "mode": None}})
    assert as_it_is.values()["methods"] == {"lwf": {}, "mas": {}}
    assert Config(methods={"any": {"given": None}}).values()["methods"] == {
        "any": {"given": "None"}
    }


def test_numbers_of_numpy() -> None:
    found = Config.read({"lam": np.array([1.0, 2.0]), "lr": np.float32(0.5), "seeds": np.int64(2)})
    assert (found.lam, found.settings.lr, found.seeds) == ((1.0, 2.0), 0.5, 2)
    assert type(found.lam[0]) is type(found.settings.lr) is float
    assert type(found.seeds) is int
    for value in (np.bool_(True), np.float64(1.5)):
        with pytest.raises(ValueError, match=r"seeds: got .*, expected a whole number"):
            Config.read({"seeds": value})
    own = Config(settings=Settings(lr=np.float64(0.5)))
    assert own.values()["lr"] == 0.5
    assert "lr = 0.5" in own.toml().splitlines()


def test_auto_is_for_methods_that_say_so_alone() -> None:
    methods.register("plain", Plain)
    methods.register("made", lambda lam=3.0: Plain(lam))
    methods.register("needs", Needs)
    found = Config.read({"methods": {"plain": {}, "made": {}, "needs": {"lam": 4.0}}})
    assert [found.lams(name) for name in found.methods] == [(2.0,), (3.0,), (4.0,)]
    assert not found.automatic
    with pytest.raises(ValueError, match=r"methods.needs: .* required positional argument: 'lam'"):
        Config.read({"methods": ["needs"]})


@pytest.mark.parametrize(("name", "value"), [("tasks", 2), ("order", (1, 0)), ("data", "here")])
def test_what_is_for_scenarios_by_name(name: str, value: Any) -> None:
    def own(seed: int) -> Any:
        raise AssertionError

    with pytest.raises(ValueError, match=rf"{name}: got .* for .*own, expected it only with a"):
        Config(scenario=own, **{name: value})
