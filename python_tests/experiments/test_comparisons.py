"""Experiments that compare methods on a scenario: what is learned, and that tables show what was found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_files import write_npz

from experiments import EXPERIMENTS, Results, cifar, reproduce
from experiments.__main__ import RESULTS
from experiments.comparison import Variant
from experiments.learned import fewer
from experiments.manifest import DataError
from mas_ext import models
from mas_ext.scenarios import Scenario, Task, Tensors
from mas_ext.trainer import Trainer


def small(name: str, **changed: Any) -> Any:
    """The quick one with two strengths and an epoch a task."""
    quick: Any = EXPERIMENTS[name].quick()
    settings = replace(quick.base.settings, epochs=changed.pop("epochs", 1))
    base = replace(quick.base, settings=settings)
    return replace(quick, base=base, grid=quick.grid[1:3], **changed)


def final(results: Results, method: str) -> tuple[Any, np.ndarray]:
    """lam and accuracy[t, k] of the only seed."""
    ((cell, found),) = results.where(method=method, purpose="final")
    return cell["lam"], np.array(found["accuracy"], dtype=float)


def row(text: str, method: str) -> list[str]:
    """The cells of a method's row in the first table."""
    line = next(line for line in text.splitlines() if line.startswith(f"| `{method}` |"))
    return line.strip("| ").split(" | ")


@pytest.mark.usefixtures("one_thread")
def test_permuted_mnist(tmp_path: Path) -> None:
    """One head for all tasks; beside what is found stands what was published."""
    experiment = small("permuted-mnist")
    page = reproduce(experiment, "permuted-mnist", tmp_path)
    results = Results(tmp_path / "permuted-mnist.json", experiment.protocol())
    assert {cell["setting"] for cell, _ in results.where()} == {"domain"}
    lam, accuracy = final(results, "si")
    assert accuracy.shape == (2, 2)
    lost = accuracy[0, 0] - accuracy[1, 0]
    expected = [f"{100 * accuracy[-1].mean():.2f}", "96.90", f"{100 * lost:.2f}", f"{lam:.3g}", "1"]
    assert row(page.text, "si")[1:] == expected
    assert row(page.text, "finetune")[2] == "57.40"
    assert row(page.text, "mas")[2] == ""
    ((_, auto),) = results.where(method="si", purpose="auto")
    lams = auto["chosen_lam"]
    assert lams[0] is None
    share, other = (100 * each for each in (auto["average_accuracy"], accuracy[-1].mean()))
    second = page.text.partition('With `lam="auto"`')[2]
    assert row(second, "si")[1:] == [
        f"{share:.2f}",
        f"{other:.2f}",
        f"{share - other:.2f}",
        f"{min(lams[1:]):.2g} to {max(lams[1:]):.2g}",
        "1",
    ]


@pytest.mark.usefixtures("one_thread")
def test_on_pretrained(tmp_path: Path) -> None:
    """No step is taken on the first task, of which all methods know the same; the table has four means."""
    experiment = small("on-pretrained", epochs=[0, 1])
    page = reproduce(experiment, "on-pretrained", tmp_path)
    results = Results(tmp_path / "on-pretrained.json", experiment.protocol())
    assert experiment.network(experiment.scenario(0), 0).keep_statistics
    accuracies = [final(results, method)[1] for method in ("finetune", "mas", "si")]
    assert len({accuracy[0, 0] for accuracy in accuracies}) == 1
    assert accuracies[0][0, 0] > 0.8
    (before, _), (kept, new) = accuracies[1]
    expected = [f"{100 * share:.2f}" for share in (before, kept, new, new)]
    assert row(page.text, "mas")[1:5] == expected


@pytest.mark.usefixtures("one_thread")
def test_stored_results_of_data_sets_are_those_of_the_protocol() -> None:
    """Their scenario had another name when they were measured."""
    experiment = EXPERIMENTS["datasets"]
    results = Results(RESULTS / "datasets.json", experiment.protocol())
    assert len(results.entries) > 50
    assert all(cell in results for cell in experiment.plan(results))


def test_which_data_importance_comes_from() -> None:
    """Old samples, new ones, or noise of each pixel's own mean and deviation; labels are of the old task."""
    experiment: Any = replace(EXPERIMENTS["importance-data"].quick(), samples=300)
    known, new = experiment._tasks(0)
    old = known.tasks[0]
    seen = {
        name: experiment._seen({"data": name, "seed": 0}, known, new) for name in ("old", "new")
    }
    for name, task in (("old", old), ("new", new)):
        images = {x.numpy().tobytes() for x in task.train.x}
        assert all(x.numpy().tobytes() in images for x in seen[name].x)
        assert len(seen[name]) == 300
    noise = experiment._seen({"data": "noise", "seed": 0}, known, new).x
    assert (
        len({x.numpy().tobytes() for x in noise} - {x.numpy().tobytes() for x in seen["old"].x})
        == 300
    )
    x = seen["old"].x
    bound = 4 * x.std(0) / 300**0.5
    assert bool(((noise.mean(0) - x.mean(0)).abs() <= bound).all())
    assert bool(((noise.std(0) - x.std(0)).abs() <= bound).all())
    assert set(seen["new"].y.tolist()) == set(old.classes)


@pytest.mark.usefixtures("one_thread")
def test_importance_data(tmp_path: Path) -> None:
    """The table has the old and the new task after both, by data, statistics and lam."""
    experiment: Any = replace(EXPERIMENTS["importance-data"].quick(), lams=(100.0,))
    page = reproduce(experiment, "importance-data", tmp_path)
    results = Results(tmp_path / "importance-data.json", experiment.protocol())
    ends = {}
    for cell, found in results.where():
        ends[cell["data"], cell["statistics"]] = [100 * x for x in found["accuracy"][-1]]
    assert len(ends) == 6
    for (data, _), name in (
        ((None, True), "no penalty"),
        (("old", True), "images of the old task"),
    ):
        old, learned = ends[data, True]
        line = f"| {name} | as they were | {'100' if data else ''} | {old:.1f} | {learned:.1f} |"
        assert line in page.text
    assert ends["old", True][0] > ends[None, True][0] + 5
    assert ends["old", True] == ends["old", False]  # an MLP has no statistics


def test_datasets(tmp_path: Path) -> None:
    """Every task has its column: accuracy after the last one, and its change since the task was new."""
    experiment = small("datasets")
    page = reproduce(experiment, "datasets", tmp_path)
    results = Results(tmp_path / "datasets.json", experiment.protocol())
    _, accuracy = final(results, "lwf")
    cells = [
        f"{100 * last:.1f} ({100 * (last - new):+.1f})"
        for last, new in zip(accuracy[-1], np.diag(accuracy), strict=True)
    ]
    assert row(page.text, "lwf")[3:8] == cells
    for name in page.figures:
        assert (tmp_path / name).read_bytes().startswith(b"<?xml")


@pytest.mark.usefixtures("one_thread")
def test_class_incremental(tmp_path: Path) -> None:
    """All methods begin with one network; tasks count by their classes, and lam is chosen so."""
    quick: Any = EXPERIMENTS["class-incremental"].quick()
    few = [v for v in quick.variants if v.method in ("finetune", "mas")]
    experiment = replace(quick, variants=few, pretraining=2)
    page = reproduce(experiment, "class-incremental", tmp_path)
    results = Results(tmp_path / "class-incremental.json", experiment.protocol())
    groups = [set(task.classes) for task in experiment.scenario(0).tasks]
    assert [len(group) for group in groups] == [6, 2, 2]
    assert set.union(*groups) == set(range(10))
    assert groups != [set(task.classes) for task in experiment.scenario(1).tasks]
    (_, free), (lam, held) = (final(results, method) for method in ("finetune", "mas"))
    assert free[0, 0] == held[0, 0] > 0.5
    by_class = [
        held[0, 0],
        (6 * held[1, 0] + 2 * held[1, 1]) / 8,
        (6 * held[2, 0] + 2 * held[2, 1] + 2 * held[2, 2]) / 10,
    ]
    ((_, found),) = results.where(method="mas", purpose="final")
    assert found["by_class"] == pytest.approx(by_class)
    expected = [by_class[-1], np.mean(by_class), held[0, 0], held[2, 0], np.diag(held)[1:].mean()]
    assert row(page.text, "mas")[1:6] == [f"{100 * share:.2f}" for share in expected]
    tried = {
        cell["lam"]: found["validation_by_class"]
        for cell, found in results.where(method="mas", purpose="choose")
    }
    assert tried[lam] == max(tried.values())
    assert {0.01, 0.1, 1.0} <= set(tried)


def test_old_heads_learn_nothing_from_new_classes() -> None:
    """The loss is over the new classes alone: the first head is as it was, and the network is not."""
    experiment: Any = EXPERIMENTS["class-incremental"].quick()
    scenario = experiment.scenario(0)
    settings = replace(experiment.base.settings, setting="class", epochs=1)
    model = experiment.pretrained(scenario, settings)
    before = {name: p.clone() for name, p in model.named_parameters()}
    cell = experiment.cell("class", Variant("finetune"), 0, None)
    later = {**vars(settings), "epochs": [0, 1, 1]}
    Trainer(model, experiment.method(cell), **later).fit(scenario)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[n], before[n]) for n in ("heads.0.weight", "heads.0.bias"))
    assert not torch.equal(after["backbone.conv1.weight"], before["backbone.conv1.weight"])


def test_methods_of_class_incremental() -> None:
    """EWC and EWC-DR are one method with other labels and another limit; importance is of 1,000 samples."""
    experiment: Any = EXPERIMENTS["class-incremental"]
    found = {}
    for variant in experiment.variants:
        made = experiment.method(
            experiment.cell("class", variant, 0, None if variant.method == "finetune" else 3.0)
        )
        found[variant.method] = made.options()
    for name in ("ewc", "ewc-dr"):
        batch = found[f"{name}, by batch"]
        assert batch == {**found[name], "importance": "batch"}
        assert (batch["max_samples"], batch["mode"], batch["lam"]) == (1000, "proximal", 1.5)
    assert (found["ewc"]["labels"], found["ewc"]["at_most"]) == ("true", None)
    assert (found["ewc-dr"]["labels"], found["ewc-dr"]["at_most"]) == ("reversed", 1e-4)
    assert found["mas, by batch"] == {**found["mas"], "importance": "batch"}
    assert found["lwf"]["lam"] == found["mas"]["lam"] == 3.0


def test_importance_is_taken_from_as_many_samples_as_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a method has the option, and nowhere else."""
    made = {}

    def create(name: str, **given: Any) -> None:
        made[name] = given

    monkeypatch.setattr("experiments.comparison.create", create)
    monkeypatch.setattr("experiments.comparison.train", lambda *given: {})
    experiment = replace(small("datasets"), max_samples=7)
    for variant in (Variant("mas", {"mode": "proximal"}), Variant("si"), Variant("finetune")):
        experiment.measure(
            experiment.cell("task", variant, 0, 2.0 if variant.method == "mas" else None)
        )
    expected = {"mode": "proximal", "lam": 2.0, "max_samples": 7}
    assert made == {"mas": expected, "si": {}, "finetune": {}}
    assert experiment.protocol()["max_samples"] == 7


def test_fewer_samples() -> None:
    """Of each task, drawn by the seed, each once, with their labels."""
    parts = [Tensors(torch.arange(n).float()[:, None], torch.arange(n)) for n in (9, 9)]
    scenario = Scenario((Task("a", *parts, tuple(range(9))),) * 2, "twice")
    found = fewer(scenario, 4, 20, seed=3)
    assert found.name == "twice"
    for task in found.tasks:
        x, y = task.train.batch(torch.arange(4))
        assert x[:, 0].tolist() == y.tolist()
        assert len(set(y.tolist())) == 4
        assert (len(task.train), len(task.test)) == (4, 9)
    drawn = [
        task.train.y.tolist() for each in (3, 4) for task in fewer(scenario, 4, seed=each).tasks
    ]
    assert drawn[0] != drawn[1]
    assert drawn[0] != drawn[2]
    assert found.tasks[0].train.y.tolist() == drawn[0]
    assert fewer(scenario, 4).tasks[0].test is parts[1]


def test_a_network_that_knows_cifar10(tmp_path: Path) -> None:
    """Weights by the names of a published file, the head among them; images as that network saw them."""
    torch.manual_seed(0)
    known = models.resnet20((3, 32, 32))
    known.add_head(10)
    with torch.no_grad():
        for tensor in known.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.1, 0.2)
    state = {
        "module." + name.replace("backbone.", "").replace("heads.0", "linear"): tensor
        for name, tensor in known.state_dict().items()
    }
    torch.save({"state_dict": state, "best_prec1": 0.0}, tmp_path / "resnet20_cifar10.th")
    write_npz(tmp_path / "cifar10_test1k.npz", 32, 32, 3, classes=10)
    write_npz(tmp_path / "cifar100_subset.npz", 32, 32, 3, classes=20)

    images = np.load(tmp_path / "cifar10_test1k.npz")["x_test"].transpose(0, 3, 1, 2) / 255
    mean, deviation = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    seen = (images - np.reshape(mean, (3, 1, 1))) / np.reshape(deviation, (3, 1, 1))
    x, y = cifar.unseen(str(tmp_path)).batch(torch.arange(10))
    np.testing.assert_allclose(x.numpy(), seen, atol=1e-5)
    assert y.tolist() == list(range(10))
    network = cifar.trained(str(tmp_path))
    torch.testing.assert_close(network.eval()(x, 0), known.eval()(x, 0))

    pixels, features = cifar.groups(str(tmp_path)), cifar.features(str(tmp_path))
    assert [task.classes for task in features.tasks] == [(2 * t, 2 * t + 1) for t in range(10)]
    for group, task in zip(pixels.tasks, features.tasks, strict=True):
        expected = known.backbone(group.train.batch(torch.arange(4))[0])
        torch.testing.assert_close(task.train.x, expected, rtol=1e-4, atol=1e-4)


def test_no_data(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"resnet20_cifar10\.th is not in .*; it is from https://"):
        cifar.trained(str(tmp_path))
