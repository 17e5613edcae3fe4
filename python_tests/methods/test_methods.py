"""Every method in every setting, on digits; and methods by name."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import naive_training

from mas_ext import methods, models
from mas_ext.scenarios import named as catalogue
from mas_ext.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

SEEN = {"task": 0.04, "domain": 0.15, "class": 0.1}


@functools.cache
def learned(name: str, setting: methods.Setting) -> torch.Tensor:
    """accuracy[t, k] on the digits 0 to 4 and 5 to 9."""
    scenario = catalogue.make_scenario("split-digits", tasks=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = models.mlp(scenario.shape, (64, 64))
    trainer = Trainer(model, name, setting=setting, epochs=4, batch_size=32, lr=3e-3)
    return trainer.fit(scenario).accuracy


weakened = pytest.mark.filterwarnings("ignore:consolidate. task 0 is held with:RuntimeWarning")


@weakened
@pytest.mark.parametrize("setting", methods.SETTINGS)
@pytest.mark.parametrize("name", [name for name in methods.METHODS if name != "finetune"])
def test_keeps_more_than_fine_tuning_and_learns_what_is_new(
    name: str, setting: methods.Setting
) -> None:
    free, held = learned("finetune", setting), learned(name, setting)
    assert held[0, 0] == free[0, 0] > 0.95
    assert free[1, 1] > 0.9
    assert held[1, 0] > free[1, 0] + SEEN[setting]
    assert held[1, 1] > 0.4  # by chance: 0.2


@weakened
def test_joint_training_is_the_upper_bound() -> None:
    for setting in methods.SETTINGS:
        best = max(learned(name, setting)[1].mean() for name in methods.METHODS)
        assert learned("joint", setting)[1].mean() > best - 0.01


def ends(method: methods.Method, seed: int, setting: str) -> list[dict[str, torch.Tensor]]:
    """The weights after each task."""
    learning = naive_training.start(method, setting, seed, epochs=1)
    found = []
    for _ in naive_training.steps(learning):
        if not learning.inside:
            found.append(naive_training.weights(learning.model))
    return found


@pytest.mark.parametrize("setting", methods.SETTINGS)
@pytest.mark.parametrize("name", methods.METHODS)
def test_a_method_begins_anew_with_another_model(name: str, setting: str) -> None:
    method = methods.create(name)
    ends(method, 1, setting)
    used, fresh = (ends(each, 2, setting) for each in (method, methods.create(name)))
    assert len(used) == naive_training.TASKS
    for got, right in zip(used, fresh, strict=True):
        for weight, t in right.items():
            assert torch.equal(got[weight], t), weight


# Where the defaults would take long, or all samples.
SMALL: dict[str, dict[str, Any]] = {"ebll": {"epochs": 3, "code": 2}, "replay": {"samples": 6}}


@pytest.mark.parametrize("setting", methods.SETTINGS)
@pytest.mark.parametrize("name", methods.METHODS)
def test_a_stopped_run_goes_on_to_the_same_bits(name: str, setting: str) -> None:
    """From the end of a task, from within one, and where importance is gathered online."""
    for after, observing in ((7, 0), (11, 0), (12, 1)):
        naive_training.resumed(
            lambda: methods.create(name, **SMALL.get(name, {})),
            setting,
            after,
            importance_epochs=observing,
        )


OTHER = {
    "lam": 7.0,
    "importance": "local",
    "objective": "l1",
    "merge": "decay",
    "anchor": "own",
    "alpha_sum": "lam",
    "mode": "proximal",
    "max_samples": 3,
    "labels": "predicted",
    "gamma": 0.5,
    "xi": 0.5,
    "alpha": (1.0, 2.0),
    "dropout": 0.5,
    "temperature": 3.0,
    "warm_up": 2,
    "code": 5,
    "reconstruction": 1.0,
    "epochs": 5,
    "lr": 0.5,
    "distance": "squared",
    "at_most": 0.5,
    "interval": 3,
    "eps": 0.5,
    "samples": 7,
    "distillation": 0.5,
}


@pytest.mark.parametrize("name", methods.METHODS)
def test_what_a_method_was_made_with_is_in_its_options(name: str) -> None:
    own = methods.create(name).options()
    assert own == methods.create(name).options()
    for option, default in methods.options(name).items():
        assert getattr(methods.create(name), option) == default
        special = {
            ("ebll", "alpha"): 0.5,
            ("rwalk", "alpha"): 0.5,
            ("local-mas", "importance"): "exact",
            ("ewc-dr", "importance"): "batch",
        }
        special |= {(own_anchors, "anchor"): "latest" for own_anchors in ("mas-own", "mas-alpha")}
        value = special.get((name, option), OTHER[option])
        assert methods.create(name, **{option: value}).options() != own, option


def test_methods_by_name() -> None:
    assert methods.options("online-ewc")["gamma"] == 1.0
    defaults = {name: methods.options(name)["lam"] for name in ("mas", "ewc", "si", "lwf")}
    assert defaults == {"mas": 1.0, "ewc": 400.0, "si": 1.0, "lwf": 1.0}
    method = methods.create("mas-alpha", lam=3.0)
    assert isinstance(method, methods.MAS)
    assert method.lam == 3.0
    with pytest.raises(ValueError, match="method: got 'mas-alfa', did you mean 'mas-alpha'"):
        methods.create("mas-alfa")
    with pytest.raises(ValueError, match="method: got 'xyz', choose from finetune, joint, mas"):
        methods.options("xyz")
    with pytest.raises(
        ValueError, match="lam: method 'finetune' has no such option, expected none"
    ):
        methods.create("finetune", lam=1.0)


class Own(methods.Method):
    """It does nothing."""


def nothing() -> None:
    """No method at all."""


def test_methods_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "_OWN", {})
    methods.register("own", Own)
    assert type(methods.create("own")) is Own
    # Defined anew, as in notebooks.
    methods.register("own", functools.partial(methods.MAS, lam=3.0))
    assert methods.options("own")["lam"] == 3.0
    assert type(methods.create(f"{__name__}:Own")) is Own
    for name, message in (
        ("mas", "a method of mas_ext, expected another name"),
        ("a b", "expected letters, digits, - and _"),
        ("", "expected letters, digits, - and _"),
    ):
        with pytest.raises(ValueError, match=message):
            methods.register(name, Own)
    with pytest.raises(ValueError, match="method: got 3, expected a subclass of Method"):
        methods.register("three", 3)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"method: got NoneType from '.*:nothing', expected a Meth"
    ):
        methods.create(f"{__name__}:nothing")
    with pytest.raises(ValueError, match="method: got 'owm', did you mean 'own'"):
        methods.create("owm")


def test_methods_of_an_installed_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    points = "[mas_ext.methods]\ntheirs = theirs_package:Theirs\nmas = theirs_package:Theirs\n"
    (info / "entry_points.txt").write_text(points)
    (tmp_path / "theirs_package.py").write_text(
        "from mas_ext.methods.method import Method\n\n\nclass Theirs(Method):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    methods._installed.cache_clear()
    try:
        assert type(methods.create("theirs")).__module__ == "theirs_package"
        assert isinstance(methods.create("mas"), methods.MAS)
    finally:
        methods._installed.cache_clear()


class Made:
    """It is called like a function."""

    def __call__(self, part: float = 1.0) -> methods.Method:
        return Own()


def test_types_that_cannot_be_told_are_no_types(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(part: Hidden | None = None) -> methods.Method:  # type: ignore[name-defined]  # noqa: F821
        return Own()

    monkeypatch.setattr(methods, "_OWN", {})
    for name, method in (("made", made), ("called", Made())):
        methods.register(name, method)
        assert type(methods.create(name, part=3)) is Own
        assert not methods.takes(name, "part", "auto")


def test_what_is_registered_goes_before_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "_OWN", {})
    monkeypatch.setattr(methods, "_installed", lambda: {"own": nothing})
    methods.register("own", Own)
    assert type(methods.create("own")) is Own
