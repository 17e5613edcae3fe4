"""Comparisons in Python: every training is a Trainer's; scenarios, networks and methods of one's own."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mas_ext import Trainer, methods, models
from mas_ext.comparison.compare import compare
from mas_ext.comparison.directory import Directory
from mas_ext.comparison.options import FIRST_WEIGHTS
from mas_ext.comparison.report import report
from mas_ext.comparison.results import Findings, confusion_shares
from mas_ext.comparison.tables import notes
from mas_ext.methods.method import Method, Training
from mas_ext.scenarios import Scenario, Tensors, from_datasets

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(eq=False)
class Halved(Method):
    """A part of the loss."""

    part: float = 0.5

    def loss(self, training: Training, x: Tensor, y: Tensor) -> Tensor:
        return self.part * super().loss(training, x, y)


@pytest.fixture(autouse=True)
def _own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "_OWN", {})
    methods.register("halved", Halved)


def clusters(seed: int) -> Scenario:
    generator = torch.Generator().manual_seed(seed)

    def data(first: int) -> Tensors:
        y = torch.arange(40) % 2
        x = torch.randn(40, 3, generator=generator) + 2 * y[:, None]
        return Tensors(x, y + first)

    return from_datasets([(data(k), data(k)) for k in (0, 2)], ["one", "two"])


def network(shape: Sequence[int]) -> models.MultiHead:
    assert tuple(shape) == (3,)
    return models.MultiHead(nn.Sequential(nn.Linear(3, 8), nn.Tanh()), 8)


def by_hand(method: Method, seed: int, **settings: Any) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(seed + FIRST_WEIGHTS)
        model = network([3])
    return Trainer(model, method, seed=seed, **settings).fit(clusters(seed)).accuracy


def test_every_training_is_the_one_of_a_trainer(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"epochs": 4, "batch_size": 8, "lr": 0.01, "setting": "class"}
    given: dict[str, dict[str, Any]] = {
        "finetune": {},
        "mas": {"lam": 0.3},
        "halved": {"part": 0.1},
    }
    found = compare(clusters, network, given, seeds=2, out=tmp_path / "run", **settings)
    assert list(found.learned) == ["finetune", "mas", "halved"]
    assert found.tasks == ["one", "two"]
    distinct = set()
    for name, options in given.items():
        for seed in range(2):
            right = by_hand(methods.create(name, **options), seed, **settings)
            got = found.learned[name][seed].accuracy
            assert torch.equal(got.nan_to_num(9), right.nan_to_num(9)), (name, seed)
            distinct.add(tuple(right.nan_to_num(9).flatten().tolist()))
    assert len(distinct) > 3  # of six
    assert (found.lam("mas"), found.lam("halved")) == (0.3, None)
    assert str(found) == (tmp_path / "run" / "table.md").read_text()
    assert "| halved" in str(found)


def test_functions_are_kept_by_what_they_are_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def root(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target).sqrt()

    run = tmp_path / "run"
    compare(clusters, network, ["halved"], 1, out=run, epochs=1, task_loss=root, score="accuracy")
    values = Directory(run).values()
    assert values["scenario"] == f"{__name__}.clusters"
    assert values["model"] == f"{__name__}.network"
    assert values["task_loss"].endswith(".root")
    # A page is made where nothing of it can be imported.
    monkeypatch.setattr(methods, "_OWN", {})
    text = report(run)[0].read_text()
    assert f"{__name__}.clusters" in text
    assert "of the score accuracy." in text
    with pytest.raises(ValueError, match=r"config.toml: task_loss: got '.*\.root'"):
        Directory(run).config()


def test_a_scenario_itself_and_a_loss_that_is_a_cross_entropy(tmp_path: Path) -> None:
    smooth = nn.CrossEntropyLoss(label_smoothing=0.1)
    found = compare(clusters(0), network, ["finetune"], 1, out=tmp_path / "a", task_loss=smooth)
    assert found.values["scenario"] == "a Scenario"
    assert found.values["score"] == "accuracy"
    assert 0 <= found.finished("finetune")[0]["average_accuracy"] <= 1


def test_going_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = compare(clusters, network, ["finetune", "halved"], 1, out=run, epochs=1)
    (run / "halved-seed0" / "result.json").unlink()
    again = compare(clusters, network, ["finetune", "halved"], 1, out=run, epochs=1, resume=True)
    for name in ("finetune", "halved"):
        assert (
            first.finished(name)[0]["average_accuracy"]
            == again.finished(name)[0]["average_accuracy"]
        )
    assert len(again.starts) == 2
    with pytest.raises(
        FileExistsError,
        match="which is a run already; --resume, in Python resume=True, goes on with it",
    ):
        compare(clusters, network, ["finetune", "halved"], 1, out=run, epochs=1)
    with pytest.raises(ValueError, match="is another run: seeds was 1 and is 2"):
        compare(clusters, network, ["finetune", "halved"], 2, out=run, epochs=1, resume=True)
    with pytest.raises(FileNotFoundError, match="no run has begun"):
        compare(clusters, network, ["finetune"], 1, out=tmp_path / "other", resume=True)


def test_lam_is_chosen_for_each_method(tmp_path: Path) -> None:
    found = compare(
        clusters, network, ["mas", "finetune"], 1, [1e-3, 1e3], out=tmp_path / "run", lam_seeds=2
    )
    assert set(found.grid["mas"].means) == {1e-3, 1e3}
    assert found.lam("mas") in (1e-3, 1e3)
    assert "lam was chosen on validation data" in str(found)


class Other(Halved):
    """Found by module and name."""


def test_a_method_by_module_and_class(tmp_path: Path) -> None:
    name = f"{__name__}:Other"
    found = compare(clusters, network, ["halved", name], 1, out=tmp_path / "run", epochs=2)
    a, b = found.finished("halved"), found.finished(name)
    assert a[0]["average_accuracy"] == b[0]["average_accuracy"]
    assert (tmp_path / "run" / f"{__name__}.Other-seed0" / "result.json").exists()
    assert list(Findings.read(tmp_path / "run").learned) == ["halved", name]


def test_what_cannot_be_used_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(TypeError, match=r"options: got 'epoch', did you mean 'epochs'\?"):
        compare(clusters, network, out=out, epoch=1)
    with pytest.raises(TypeError, match="options: got 'seed'"):
        compare(clusters, network, out=out, seed=1)
    with pytest.raises(ValueError, match="model: got a MultiHead, expected a function"):
        compare(clusters, network([3]), out=out)
    with pytest.raises(ValueError, match="scenario: got int, expected a name or a function"):
        compare(3, network, out=out)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"scenario: got list from .*, expected a Scenario"):
        compare(lambda seed: [], network, out=out)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match="method: got 'halve', did you mean 'halved'"):
        compare(clusters, network, ["halve"], out=out)
    with pytest.raises(ValueError, match=r"methods: got .*Halved.*, expected a word"):
        compare(clusters, network, [Halved], out=out)  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"methods: got .*Halved.*, expected a word"):
        compare(clusters, network, {Halved: {}}, out=out)  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"seeds: got \[0, 1\], expected a whole number"):
        compare(clusters, network, seeds=[0, 1], out=out)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="method: got 'math:pi', float, expected a function"):
        compare(clusters, network, ["math:pi"], out=out)
    assert not out.exists()


def test_a_network_that_another_training_has_is_refused(tmp_path: Path) -> None:
    once, out = network([3]), tmp_path / "run"
    with pytest.raises(ValueError, match="model: got the same parameters twice, expected new ones"):
        compare(clusters, lambda shape: once, ["finetune"], 1, out=out)
    body = once.backbone
    with pytest.raises(ValueError, match="model: got the same parameters twice"):
        compare(clusters, lambda shape: models.MultiHead(body, 8), ["finetune"], 1, out=out)
    assert not out.exists()
    for parameter in body.parameters():
        parameter.requires_grad_(False)
    compare(clusters, lambda shape: models.MultiHead(body, 8), ["finetune"], 1, out=out, epochs=1)


@dataclass(eq=False)
class Unsaved(Method):
    """What it keeps is of any type."""

    kept: Any = None

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.kept}


def test_a_state_that_cannot_be_saved_is_refused_before_training(tmp_path: Path) -> None:
    methods.register("unsaved", Unsaved)
    out = tmp_path / "run"
    with pytest.raises(ValueError, match=r"unsaved: state, .*: got set, which can't be saved"):
        compare(clusters, network, {"unsaved": {"kept": {1}}}, 1, out=out)
    assert not out.exists()
    compare(clusters, network, {"unsaved": {"kept": {"a": [1]}}}, 1, out=out, epochs=1)


def test_a_relative_path_stays_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = compare(clusters, network, ["finetune"], 1, out="run", epochs=1)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert "| finetune" in str(found)


def test_an_order_that_depends_on_the_seed(tmp_path: Path) -> None:
    def turned(seed: int) -> Scenario:
        return clusters(seed).reordered([seed, 1 - seed])

    run = tmp_path / "run"
    found = compare(turned, network, ["finetune"], 2, out=run, epochs=1)
    assert found.tasks == ["", ""]
    report(run, formats=["csv"])
    titles = {
        name: (run / "accuracy" / f"finetune{name}.csv").read_text().splitlines()[0]
        for name in ("", "-seed0", "-seed1")
    }
    assert titles == {
        "": "accuracy in %,task 1,task 2",
        "-seed0": "accuracy in %,one,two",
        "-seed1": "accuracy in %,two,one",
    }
    _, *rows = csv.reader((run / "confusion.csv").read_text().splitlines())
    assert {(row[2], row[3]) for row in rows} == {
        ("one", "0"),
        ("one", "1"),
        ("two", "2"),
        ("two", "3"),
    }
    places, shares = confusion_shares(found)
    assert [place[1] for place in places] == [0, 1, 2, 3] * 2
    assert shares["finetune"].nansum(1).tolist() == pytest.approx([100.0] * 8)


def test_as_many_tasks_with_every_seed(tmp_path: Path) -> None:
    def growing(seed: int) -> Scenario:
        return Scenario(clusters(seed).tasks[: 1 + seed])

    with pytest.raises(ValueError, match="scenario: got 2 tasks with seed 1, expected 1 as with"):
        compare(growing, network, ["finetune"], 2, out=tmp_path / "run", epochs=1)


def test_what_a_list_of_lam_is_not_for_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compare(clusters, network, ["mas", "halved"], 1, out=tmp_path / "a", epochs=1)
    assert "no lam" not in capsys.readouterr().err
    compare(clusters, network, ["mas", "halved"], 1, 0.1, out=tmp_path / "b", epochs=1)
    assert "no lam, so what was given is not for them: halved" in capsys.readouterr().err


@dataclass(eq=False)
class Small(Method):
    """Only of some use with a small lam."""

    lam: float = 0.1

    def begin_task(self, training: Training) -> None:
        if self.lam > 1:
            raise ValueError(f"lam: got {self.lam}, expected at most 1")


def test_every_lam_is_tried_before_training(tmp_path: Path) -> None:
    methods.register("small", Small)
    with pytest.raises(ValueError, match=r"small: lam: got 2.0, expected at most 1"):
        compare(clusters, network, ["small"], 1, [0.5, 2.0], out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_joint_training_that_diverges_is_none_to_compare_with(tmp_path: Path) -> None:
    def lost(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target) * float("nan")

    found = compare(
        clusters,
        network,
        ["joint", "finetune"],
        1,
        out=tmp_path / "run",
        task_loss=lost,
        setting="domain",
    )
    assert [found.diverged(name) for name in ("joint", "finetune")] == [1, 1]


def test_random_numbers_of_the_caller_stay_as_they_were(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    compare(clusters, network, ["finetune", "replay"], 1, out=tmp_path / "run", epochs=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_too_few_samples_to_choose_lam_on(tmp_path: Path) -> None:
    x, y, out = torch.randn(8, 3), torch.arange(8) % 2, tmp_path / "run"
    few = from_datasets([(Tensors(x, y), Tensors(x, y))])
    for lam in ("auto", [0.1, 1.0]):
        with pytest.raises(ValueError, match=r"validation: got 0.1 of the 8 samples of task '0'"):
            compare(few, network, ["mas"], 1, lam, out=out)  # type: ignore[arg-type]
    compare(few, network, ["mas"], 1, 1.0, out=out, epochs=1)


def test_a_method_that_diverged_with_a_seed_is_not_weighed_by_the_others(tmp_path: Path) -> None:
    names = ["finetune", "halved", "replay"]
    found = compare(clusters, network, names, 3, out=tmp_path / "run", epochs=1)
    assert "halved" in next(note for note in notes(found) if "overlap" in note)
    *others, last = found.learned["halved"]
    lost = replace(last, found={"diverged": "why"})
    found = replace(found, learned={**found.learned, "halved": [*others, lost]})
    assert "halved" not in next(note for note in notes(found) if "overlap" in note)
