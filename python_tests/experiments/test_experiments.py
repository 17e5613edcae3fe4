"""Experiments: what is measured is kept at once, lam is chosen as told, pages show what is there."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments import EXPERIMENTS, Experiment, Page, Results, automatic, reproduce
from experiments.adaptivity import PARTS
from experiments.compositions import (
    ATTRIBUTES,
    GLYPH,
    RELATIONS,
    SIDE,
    batches_of_facts,
    paint,
)
from experiments.consistency import toy
from experiments.embedding import Embedding, RankingEWC, ranks, rivals, shortfall
from experiments.facts import glyphs as glyphs_of
from experiments.facts import scores
from experiments.learned import GRID, fewer, trained
from experiments.loops import SquaredGradients
from experiments.official_demo import Reestimated, paced
from experiments.regression import VARIANTS, Arm
from experiments.task_free import Problem, Stream, arms, stream_of
from mas_ext import models
from mas_ext.comparison.cells import Cell, Found
from mas_ext.comparison.options import Config
from mas_ext.failures import Diverged, Vanished
from mas_ext.methods import Method, create
from mas_ext.methods.method import Training
from mas_ext.scenarios import Scenario
from mas_ext.trainer import Trainer
from mas_ext.training.run import Result

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Squares(Experiment):
    """x -> x^2; the last cell is by what was found before."""

    title = "Squares"
    count: int = 3
    unit: str = "m"
    stop_at: int | None = None

    def quick(self) -> Squares:
        return replace(self, count=1)

    def protocol(self) -> dict[str, Any]:
        return {"unit": self.unit}

    def plan(self, results: Results) -> Iterator[Cell]:
        for x in range(self.count):
            yield {"x": x}
        yield {"x": 10 * results[{"x": self.count - 1}]["y"]}

    def measure(self, cell: Cell) -> Found:
        if cell["x"] == self.stop_at:
            raise KeyboardInterrupt
        return {"y": cell["x"] ** 2, "undefined": float("nan")}

    def show(self, results: Results) -> Page:
        return Page(" ".join(str(found["y"]) for _, found in results.where()))


weakened = pytest.mark.filterwarnings("ignore:consolidate. task . is held with:RuntimeWarning")


def cells(path: Path) -> list[tuple[Any, Any]]:
    return [(e["cell"], e["found"]) for e in json.loads(path.read_text())["cells"]]


def test_what_is_found_is_kept_and_not_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "squares.json"
    with pytest.raises(KeyboardInterrupt):
        reproduce(Squares(stop_at=2), "squares", tmp_path)
    assert cells(path) == [({"x": x}, {"y": x * x, "undefined": None}) for x in (0, 1)]

    assert reproduce(Squares(), "squares", tmp_path).text == "0 1 4 1600"
    before = path.read_bytes()
    # Every cell is known: nothing would be measured, not even the one that can't be.
    assert reproduce(Squares(stop_at=2), "squares", tmp_path).text == "0 1 4 1600"
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["squares.json"]

    # What is asked for beyond it is added.
    more = reproduce(Squares(count=5), "squares", tmp_path).text
    assert more == "0 1 4 1600 9 16 25600"


def test_where_and_when(tmp_path: Path) -> None:
    reproduce(Squares(), "squares", tmp_path)
    content = json.loads((tmp_path / "squares.json").read_text())
    (machine,) = content["machines"]
    assert machine["threads"] >= 1
    assert machine["torch"]
    assert "started" not in machine
    assert {entry["machine"] for entry in content["cells"]} == {0}

    # Measured elsewhere: what comes now is told apart.
    content["machines"][0]["cpu"] = "another"
    (tmp_path / "squares.json").write_text(json.dumps(content))
    reproduce(Squares(count=7), "squares", tmp_path)
    content = json.loads((tmp_path / "squares.json").read_text())
    assert [entry["machine"] for entry in content["cells"]] == [0] * 4 + [1] * 5
    assert content["machines"][0]["cpu"] == "another" != content["machines"][1]["cpu"]


def test_results_of_another_protocol_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    reproduce(Squares(), "squares", tmp_path)
    with pytest.raises(ValueError, match=r"protocol \{'unit': 'm'\}, expected \{'unit': 'km'\}"):
        reproduce(Squares(unit="km"), "squares", tmp_path)
    (tmp_path / "squares.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        reproduce(Squares(), "squares", tmp_path)


def test_where(tmp_path: Path) -> None:
    results = Results(tmp_path / "x.json", {})
    for a, b in ((1, None), (1, 2), (2, 2)):
        results.add({"a": a, "b": b}, {"sum": (a, b)}, 0.5)
    assert results.where(a=1, b=None) == [({"a": 1, "b": None}, {"sum": [1, None]})]
    assert [found["sum"] for _, found in results.where(b=2)] == [[1, 2], [2, 2]]
    assert results.where(c=None) == []
    assert {"b": 2, "a": 1} in results
    assert {"a": 2, "b": None} not in results


def test_by_seed(tmp_path: Path) -> None:
    results = Results(tmp_path / "x.json", {})
    for seed in (3, 1):
        results.add({"lam": 1.0, "seed": seed}, {"error": seed / 2}, 0.5)
    results.add({"lam": 1.0, "seed": 2}, {"diverged": "nan"}, 0.5)
    results.add({"lam": 2.0, "seed": 2}, {"error": 7.0}, 0.5)
    assert results.by_seed(lam=1.0) == {3: {"error": 1.5}, 1: {"error": 0.5}}


class Failing(Method):
    """Fails at the end of its first task."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def end_task(self, training: Training) -> None:
        raise self.error


def test_only_failed_trainings_are_results() -> None:
    config = Config.read({"tasks": 2, "hidden": [4], "epochs": 1})
    scenario = config.make_scenario(0)
    for kind in (Diverged, Vanished):
        found = trained(config, scenario, Failing(kind("importance: got nan")), 0)
        assert found == {"diverged": "importance: got nan"}
    with pytest.raises(ValueError, match="labels: got 3"):
        trained(config, scenario, Failing(ValueError("labels: got 3")), 0)


@pytest.mark.usefixtures("one_thread")
def test_split_mnist(tmp_path: Path) -> None:
    """Both forms of MAS and joint training on the digits: cells, tables and pictures."""
    quick: Any = EXPERIMENTS["split-mnist"].quick()
    few = [v for v in quick.variants if v.method in ("joint", "mas")]
    small = replace(
        quick,
        variants=few,
        grid=GRID[:3],
        base=replace(quick.base, hidden=(20,), settings=replace(quick.base.settings, epochs=1)),
    )
    page = reproduce(small, "split-mnist", tmp_path)
    results = Results(tmp_path / "split-mnist.json", small.protocol())
    choosing, final = results.where(purpose="choose"), results.where(purpose="final")
    assert {cell["seed"] for cell, _ in choosing}.isdisjoint(cell["seed"] for cell, _ in final)
    assert len(final) == 3 * 3

    for setting in ("task", "domain", "class"):
        scores = {
            cell["lam"]: found["validation_accuracy"]
            for cell, found in results.where(setting=setting)
            if cell["purpose"] == "choose"
        }
        lams = {
            cell["lam"] for cell, _ in results.where(setting=setting, method="mas", purpose="final")
        }
        (lam,) = lams
        assert scores[lam] == max(scores.values())
    found = results.where(setting="domain", method="mas", options={"mode": "proximal"})
    ((_, each),) = found
    (row,) = [
        line
        for line in page.text.split("**Domain")[1].split("**")[1].splitlines()
        if "proximal` |" in line
    ]
    assert row.startswith(f"| `mas, proximal` | {100 * each['average_accuracy']:.2f} |  |")
    assert row.endswith(" | 1 |")
    assert "| `joint` |" in page.text
    assert "98.59" in page.text
    for name in page.figures:
        assert f"]({name})" in page.text
        assert (tmp_path / name).read_bytes().startswith(b"<?xml")


def matrix(rows: list[list[float]]) -> Any:
    return np.array(rows, dtype=float)


@pytest.mark.usefixtures("one_thread")
def test_official_demo(tmp_path: Path) -> None:
    """Every variant on pairs of digits; the figures are those of its matrices."""
    quick: Any = EXPERIMENTS["official-demo"].quick()
    base = replace(quick.base, hidden=(20,), settings=replace(quick.base.settings, epochs=[1] * 5))
    quick = replace(quick, base=base)
    tasks = quick.scenario().tasks
    assert [task.name for task in tasks] == ["1/2", "3/4", "5/6", "7/8", "9/0"]
    assert [sorted({int(y) for _, y in task.test}) for task in tasks][4] == [0, 9]
    page = reproduce(quick, "official-demo", tmp_path)
    results = Results(tmp_path / "official-demo.json", quick.protocol())
    ((_, found),) = results.where(omega="accumulated", importance="batch", later_lr=1e-2)
    accuracy = matrix(found["accuracy"])
    lost = np.mean(np.diag(accuracy) - accuracy[-1])
    row = f"| accumulated, batch | 0.01 | {100 * accuracy[-1].mean():.2f} |  | {100 * lost:.3f} |  | 1 |"
    assert row in page.text
    theirs = [line for line in page.text.splitlines() if "99.27" in line]
    assert theirs[0].startswith("| re-estimated, batch | 0.01 |")


def test_later_tasks_have_a_learning_rate_of_their_own() -> None:
    make, rates = paced(0.25), []
    for _ in range(3):
        optimizer = make([torch.nn.Parameter(torch.ones(1))], 0.5)
        rates += [group["lr"] for group in optimizer.param_groups]
        assert optimizer.param_groups[0]["momentum"] == 0.9
    assert rates == [0.5, 0.25, 0.25]


def test_reestimated_importance_is_of_all_tasks_at_the_present_weights() -> None:
    torch.manual_seed(0)
    model = models.mlp((3,), (4,))
    data = [(torch.randn(5, 3), torch.arange(5) % 2) for _ in range(2)]
    method = Reestimated()
    for task in range(2):
        model.add_head(2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        parts = (*[model, optimizer, task, "task", task], lambda n, task=task: [data[task]])
        training = Training(*parts, lambda p: torch.optim.SGD(p, lr=0.5))
        method.begin_task(training)
        with torch.no_grad():
            model.backbone[1].weight.add_(0.1)
        method.end_task(training)
    expected = torch.zeros(4, 3)
    for head, (x, _) in enumerate(data):
        for each in x:
            model.zero_grad()
            model(each[None], head).square().sum().backward()
            expected += model.backbone[1].weight.grad.abs() / len(x)
    assert method.penalty is not None
    torch.testing.assert_close(
        method.penalty.omega["backbone.1.weight"].float(), expected, rtol=1e-5, atol=1e-6
    )


@pytest.mark.usefixtures("one_thread")
def test_exactness(tmp_path: Path) -> None:
    """A batch of one is exact; the share of importance falls with the batch; lam by importance."""
    quick: Any = EXPERIMENTS["exactness"].quick()
    base = replace(quick.base, hidden=(10,), settings=replace(quick.base.settings, epochs=1))
    quick = replace(quick, base=base, grid=GRID[:3], samples=100, measured=40)
    assert [len(task.train) for task in quick.scenario(0).tasks] == [100, 100]
    page = reproduce(quick, "exactness", tmp_path)
    results = Results(tmp_path / "exactness.json", quick.protocol())
    ((_, found),) = results.where(part="estimates")
    rows = found["estimators"]
    assert rows["batch of 1"]["rank_correlation"] == pytest.approx(1, abs=1e-6)
    assert rows["batch of 1"]["kept"] == pytest.approx(1, abs=1e-6)
    kept = [rows[f"batch of {n}"]["kept"] for n in (1, 2, 5, 10, 20)]
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] < 0.99
    assert f"| batch of 20 | {rows['batch of 20']['rank_correlation']:.3f} |" in page.text
    for name in ("exact", "fine-tuning"):
        found = results[quick.final(name, 0, quick.lam(results, name))]
        assert f"| {name} | {100 * found['average_accuracy']:.2f} |" in page.text
    exact, batch = (
        100 * results[quick.final(name, 0, 0.1)]["average_accuracy"] for name in ("exact", "batch")
    )
    assert f"| 0.1 | {exact:.2f} | {batch:.2f} | {exact - batch:.2f} | 1 |" in page.text


@weakened
def test_toy_of_consistency() -> None:
    """MAS holds the task with large outputs, MAS-alpha both; alphas are those of equal total importance."""
    errors = {
        method: np.array(
            [toy((1.0, 10.0, 1.0), method, 0.1, s, 150)["error"][-1] for s in range(2)]
        )
        for method in ("mas", "mas-alpha")
    }
    small, large = ({m: e[:, k].mean() for m, e in errors.items()} for k in (0, 1))
    assert small["mas-alpha"] < small["mas"]
    assert large["mas"] < large["mas-alpha"]
    found = toy((1.0, 10.0, 1.0), "mas-alpha", 0.1, 0, 5)
    assert float(torch.as_tensor(found["alpha"]).sum()) == pytest.approx(0.3)


@weakened
@pytest.mark.usefixtures("one_thread")
def test_consistency(tmp_path: Path) -> None:
    """Gap and forgetting of the table are those of the matrices."""
    quick: Any = replace(EXPERIMENTS["consistency"].quick(), lams=(0.1,), toy_steps=5)
    page = reproduce(quick, "consistency", tmp_path)
    results = Results(tmp_path / "consistency.json", quick.protocol())
    runs = results.where(method="mas-alpha", protocol="split-mnist")
    assert [len(found["alpha"]) for _, found in runs] == [5, 5]
    assert sum(runs[0][1]["alpha"]) == pytest.approx(5)
    orders = [found["order"] for _, found in runs]
    assert all(sorted(order) == list(range(5)) for order in orders)
    assert orders[0] != orders[1]
    alone = {cell["seed"]: found["alone"] for cell, found in results.where(method="alone")}
    accuracy = [(alone[cell["seed"]], matrix(found["accuracy"])) for cell, found in runs]
    gap = np.mean([np.mean(a - m[-1]) for a, m in accuracy])
    lost = np.mean([np.mean((np.diag(m) - m[-1])[:-1]) for _, m in accuracy])
    (row,) = [line for line in page.text.splitlines() if line.startswith("| `mas-alpha`, lam 1 |")]
    assert f"| {100 * gap:.3f} ±" in row
    assert "alpha" not in results.where(method="mas-own", protocol="split-mnist")[0][1]
    others = results.where(method="mas", protocol="split-mnist")
    ahead = [
        a["average_accuracy"] - b["average_accuracy"]
        for (_, a), (_, b) in zip(runs, others, strict=True)
    ]
    assert f"| {100 * np.mean(ahead):.2f} ±" in row
    assert f"| {100 * lost:.2f} ±" in row


@pytest.mark.parametrize("arm", [Arm(), Arm(0.7, 0.3, 2.0)])
def test_torques_are_those_of_the_lagrangian(arm: Arm) -> None:
    """d/dt dL/d(dq) - dL/dq with L = kinetic - potential energy, of rods cut into many points."""
    torch.manual_seed(0)
    q, dq, ddq = torch.randn(3, 6, 2, dtype=torch.float64)
    n = 400
    along = (torch.arange(n, dtype=torch.float64) + 0.5) / n

    def lagrangian(q: Tensor, dq: Tensor) -> Tensor:
        def point(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
            """Height and squared velocity of what is so far along both segments."""
            angle, turn = q[0] + q[1], dq[0] + dq[1]
            x = -first * q[0].sin() * dq[0] - second * angle.sin() * turn
            y = first * q[0].cos() * dq[0] + second * angle.cos() * turn
            return first * q[0].sin() + second * angle.sin(), x**2 + y**2

        whole = torch.ones(1, dtype=torch.float64)
        total = torch.zeros((), dtype=torch.float64)
        for mass, first, second in (
            (1.5 * arm.upper / n, along * arm.upper, 0 * along),
            (1.5 * arm.lower / n, arm.upper + 0 * along, along * arm.lower),
            (arm.payload, arm.upper * whole, arm.lower * whole),
        ):
            height, speed = point(first, second)
            total = total + mass * (speed / 2 - 9.81 * height).sum()
        return total

    jacobian = torch.func.jacrev(lagrangian, 1)
    for i in range(len(q)):
        mass = torch.func.jacrev(jacobian, 1)(q[i], dq[i])
        other = torch.func.jacrev(jacobian, 0)(q[i], dq[i])
        expected = mass @ ddq[i] + other @ dq[i] - torch.func.jacrev(lagrangian, 0)(q[i], dq[i])
        found = arm.torques(q[i : i + 1], dq[i : i + 1], ddq[i : i + 1])[0]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_fisher_information_of_normal_outputs() -> None:
    torch.manual_seed(0)
    model = models.mlp((3,), (4,))
    model.add_head(2)
    x = torch.randn(7, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    parts = (model, optimizer, 0, "task", 0, lambda n: [(x[:4], x[:4]), (x[4:], x[4:])])
    make = partial(torch.optim.SGD, lr=0.5)
    training = Training(*parts, make, task_loss=F.mse_loss)
    method, other = SquaredGradients(lam=3.0), create("ewc", lam=3.0, labels="normal")
    for each in (method, other):
        each.begin_task(training)
        each.end_task(training)
    expected = torch.zeros(4, 3)
    for each in x:
        for c in range(2):
            model.zero_grad()
            model(each[None], 0)[0, c].backward()
            expected += model.backbone[1].weight.grad.square() / len(x)
    assert method.penalty is not None
    torch.testing.assert_close(
        method.penalty.omega["backbone.1.weight"].float(), expected, rtol=1e-5, atol=1e-7
    )
    assert method.penalty.lam == other.penalty.lam == 1.5
    assert set(method.penalty.omega) == {"backbone.1.weight", "backbone.1.bias"}
    for name, omega in other.penalty.omega.items():
        torch.testing.assert_close(omega, method.penalty.omega[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["finetune", "lwf", "ebll", "imm-mean", "imm-mode", "mas", "si"])
def test_the_loss_of_regression(name: str) -> None:
    """The mean of all squared errors, on the first task alone."""
    torch.manual_seed(0)
    model = models.mlp((3,), (4,))
    model.add_head(2)
    x, y = torch.randn(5, 3), torch.randn(5, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    parts = (model, optimizer, 0, "task", 0, lambda n: [(x, y)])
    make = partial(torch.optim.SGD, lr=0.5)
    training = Training(*parts, make, task_loss=F.mse_loss)
    method = VARIANTS[name].make()
    method.begin_task(training)
    expected = sum((model(a[None], 0)[0] - b).square().sum() for a, b in zip(x, y, strict=True))
    torch.testing.assert_close(method.loss(training, x, y), expected / 10)


def test_a_regression_that_diverges_is_told() -> None:
    quick: Any = replace(EXPERIMENTS["regression"].quick(), epochs=1, lr=1e30)
    cell = {"method": "finetune", "lam": None, "seed": 0, "purpose": "final"}
    before = torch.get_rng_state()
    assert quick.measure(cell)["diverged"].startswith("loss: got nan in task 0")
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(Diverged):
        quick.learn(create("finetune"))


def test_seeds_that_diverged_are_left_out(tmp_path: Path) -> None:
    experiment: Any = EXPERIMENTS["regression"].quick()
    results = Results(tmp_path / "regression.json", experiment.protocol())
    for seed, found in enumerate(({"diverged": "nan"}, {"error": [[0.5]]})):
        cell = {"method": "finetune", "lam": None, "seed": seed, "purpose": "final"}
        results.add(cell, found, 1.0)
    assert experiment.finals(results, "finetune") == (None, [{"error": [[0.5]]}])


def test_facts_leave_out_the_seed_that_sizes_were_settled_with(tmp_path: Path) -> None:
    experiment: Any = replace(EXPERIMENTS["facts"].quick(), seeds=2)
    results = Results(tmp_path / "facts.json", experiment.protocol())
    seeds = set()
    for cell in experiment.plan(results):
        seeds.add(cell["seed"])
        results.add(cell, {"validation_map": 0.5}, 1.0)
    assert seeds == {1, 2, 1000}


@pytest.mark.usefixtures("one_thread")
def test_regression(tmp_path: Path) -> None:
    """Every method learns all arms; joint training knows all of them, fine-tuning forgets the first."""
    quick: Any = replace(EXPERIMENTS["regression"].quick(), epochs=8, lr=0.01, grid=GRID[3:6])
    page = reproduce(quick, "regression", tmp_path)
    results = Results(tmp_path / "regression.json", quick.protocol())
    last = {
        cell["method"]: np.mean(found["error"][-1])
        for cell, found in results.where(purpose="final")
    }
    assert last["joint"] < last["mas"] < last["finetune"]
    auto = {c["method"]: f for c, f in results.where(purpose="auto")}
    assert set(auto) == {"mas", "mas-alpha", "ewc", "si"}
    second = page.text.partition('With `lam="auto"`')[2]
    for name, found in auto.items():
        assert len(found["chosen_lam"]) == 4
        own, other = 100 * np.mean(found["error"][-1]), 100 * last[name]
        assert f"| `{name}` | {own:.2f} | {other:.2f} | {own - other:.2f} |" in second
    for name, error in last.items():
        assert f"| `{name}` | {100 * error:.2f} |" in page.text
    scores = {
        c["lam"]: f["validation_explained"] for c, f in results.where(purpose="choose", method="si")
    }
    ((cell, _),) = results.where(purpose="final", method="si")
    assert scores[cell["lam"]] == max(scores.values())


def test_automatic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table has what was chosen beside the best of the grid, and units are those of a plain loop."""
    problem = automatic.PROBLEMS["arms"](None, 0)
    tasks = fewer(Scenario(problem.scenario.tasks[:3]), 200, 100).tasks
    settings = replace(problem.settings, epochs=4, lr=0.01)

    def small(folder: Any, seed: int) -> automatic.Problem:
        return automatic.Problem(Scenario(tasks), copy.deepcopy(problem.network), settings)

    monkeypatch.setitem(automatic.PROBLEMS, "arms", small)
    quick: Any = replace(EXPERIMENTS["automatic"].quick(), grids={"mas": (0.1, 1.0, 10.0)})
    page = reproduce(quick, "automatic", tmp_path)
    results = Results(tmp_path / "automatic.json", quick.protocol())
    by_lam = {c["lam"]: f for c, f in results.where(method="mas")}
    found, unit = by_lam.pop("auto"), by_lam.pop("unit")
    assert set(by_lam) >= {0.1, 1.0, 10.0}
    best = max(by_lam, key=lambda lam: by_lam[lam]["average_accuracy"])
    assert len(found["chosen_lam"]) == 3
    row = next(line for line in page.text.splitlines() if line.startswith("| arms |")).split("|")
    assert float(row[3]) == pytest.approx(100 * found["average_accuracy"], abs=0.051)
    assert float(row[4]) == pytest.approx(100 * by_lam[best]["average_accuracy"], abs=0.051)
    assert float(row[6]) == best
    assert float(row[7]) == pytest.approx(best * unit["energy"] / unit["loss"], rel=0.01)
    assert float(row[8]) == pytest.approx(best / found["chosen_lam"][-1], rel=0.01)
    assert unit["loss"] > 0
    learner, method = small(None, 0), create("mas", lam=1e-12, mode="proximal", max_samples=300)
    kept = []

    def keep(news: Any) -> None:
        if isinstance(news, Result):
            omega = {name: w.clone() for name, w in method.penalty.omega.items()}
            kept.append((omega, copy.deepcopy(learner.network.state_dict())))

    learned = replace(settings, validation=0.1)
    Trainer(learner.network, method, callbacks=[keep], **vars(learned)).fit(Scenario(tasks[:2]))
    (omega, before), (_, after) = kept
    moved = {name: (after[name] - before[name]).double() for name in omega}
    energy = sum(float((w.double() * moved[name] ** 2).sum()) for name, w in omega.items())
    assert unit["energy"] == pytest.approx(energy, rel=1e-4)


def test_spread_of_lam(tmp_path: Path) -> None:
    """The best lam, and the nearest of those within half a point, of all ways to take one of each problem."""
    experiment: Any = replace(EXPERIMENTS["automatic"], seeds=1, methods=("online-ewc",))
    results = Results(tmp_path / "automatic.json", experiment.protocol())
    tried = {
        "arms": {2e3: 0.7, 2e2: 0.5, 2e4: 0.9, 2e5: 0.6},
        "data sets": {2e3: 0.401, 2e2: 0.2, 2e4: 0.403, 2e5: 0.4},
    }
    per_loss, last = {"arms": 1e-2, "data sets": 1e-4}, {"arms": 1e5, "data sets": 1e2}
    for problem, found in tried.items():
        cell = {"problem": problem, "method": "online-ewc", "seed": 0}
        results.add({**cell, "lam": "unit"}, {"energy": per_loss[problem], "loss": 1.0}, 0.0)
        chose = {"average_accuracy": 0.3, "chosen_lam": [None, 7.0, last[problem]]}
        results.add({**cell, "lam": "auto"}, chose, 0.0)
        results.add({**cell, "method": "finetune", "lam": None}, {"average_accuracy": 0.2}, 0.0)
        results.add({**cell, "lam": 2e7}, {"diverged": True}, 0.0)
        for lam, accuracy in found.items():
            results.add({**cell, "lam": lam}, {"average_accuracy": accuracy}, 0.0)
    experiment = replace(experiment, grids={"online-ewc": (1.0, 2e3)})
    text = experiment.show(results).text
    words = []
    for points in (0, 0.5):
        sets = {
            problem: [
                lam / 2 for lam, a in found.items() if a >= max(found.values()) - points / 100
            ]
            for problem, found in tried.items()
        }
        spans = [
            min(
                abs(math.log10(a * units["arms"] / b / units["data sets"]))
                for a in sets["arms"]
                for b in sets["data sets"]
            )
            for units in (
                {"arms": 1.0, "data sets": 1.0},
                per_loss,
                {problem: 1 / lam for problem, lam in last.items()},
            )
        ]
        raw, loss, choice = spans
        words.append(
            f"{raw:.1f} decades, in units of the loss {loss:.1f}, in units of the last choice {choice:.1f}"
        )
    assert words == [
        "0.0 decades, in units of the loss 2.0, in units of the last choice 3.0",
        "0.0 decades, in units of the loss 1.0, in units of the last choice 2.0",
    ]
    assert f"The best lam spans {words[0]}; one within half a point of it {words[1]}." in text


def test_parts() -> None:
    """A bar that leans to the right is slanted; the part is inverted; two digits."""
    x = torch.zeros(3, 1, 5, 5)
    for row in range(5):
        x[0, 0, row, 2] = x[1, 0, row, 4 - row] = x[2, 0, row, row] = 1  # | / \
    y, generator = torch.tensor([0, 1, 2]), torch.Generator().manual_seed(0)
    assert PARTS["slanted"](x, y, generator).part.tolist() == [False, True, False]

    x, y = torch.rand(50, 1, 4, 4), torch.arange(50) % 10
    found = PARTS["two classes"](x, y, generator)
    assert len(found.y[found.part].unique()) == 2
    assert int(found.part.sum()) == 10
    found = PARTS["inverted"](x, y, generator)
    assert 10 < int(found.part.sum()) < 40
    assert torch.equal(found.x[found.part], 1 - x[found.part])
    assert torch.equal(found.x[~found.part], x[~found.part])


@pytest.mark.usefixtures("one_thread")
def test_adaptivity(tmp_path: Path) -> None:
    """All sources begin at the same accuracy and have the same strength; the table has what was found."""
    quick: Any = EXPERIMENTS["adaptivity"].quick()
    page = reproduce(quick, "adaptivity", tmp_path)
    results = Results(tmp_path / "adaptivity.json", quick.protocol())
    ((_, found),) = results.where(part="slanted")
    names = [(each["source"], each["lam"]) for each in found["variants"]]
    assert names == [(None, 0), ("training data", 1), ("test data", 1), ("part", 1)]
    words = page.text.split("**slanted**")[1].partition("**inverted**")[0]
    last = found["variants"][-1]
    cells = [*found["before"].values(), *last["after"].values(), last["new"]]
    assert f"| part, lam 1 | {' | '.join(f'{100 * x:.2f}' for x in cells)} | 1 |" in words
    training, test = found["variants"][1:3]
    lost = 100 * (test["after"]["rest"] - training["after"]["rest"])
    assert f"| test data | rest kept | {lost:.2f} |" in words
    assert f"| part | new task | {100 * (last['new'] - training['new']):.2f} |" in words


def test_images_for_importance_and_for_testing_are_apart() -> None:
    quick: Any = EXPERIMENTS["adaptivity"].quick()
    first, _, met, tested = quick.tasks("two classes", 3)
    rows = [{tuple(x.flatten().tolist()) for x in each.x} for each in (first, met, tested)]
    assert abs(len(met.x) - len(tested.x)) <= 1
    assert not rows[0] & rows[1]
    assert not rows[1] & rows[2]
    digits = [set(each.y[each.part].tolist()) for each in (first, met, tested)]
    assert digits[0] == digits[1] == digits[2]
    again = quick.tasks("two classes", 3)
    assert torch.equal(again[3].x, tested.x)


def test_facts_of_two_batches_share_subjects_alone() -> None:
    words = [f"glyph {i}" for i in range(20)]
    batches = batches_of_facts(words, 4, torch.Generator().manual_seed(0))
    assert sum(map(len, batches)) == len({fact for facts in batches for fact in facts}) == 4 * 87
    predicates = [{fact[1] for fact in facts if len(fact) > 1} for facts in batches]
    objects = [{fact[2] for fact in facts if len(fact) == 3} for facts in batches]
    subjects = [{fact[0] for fact in facts} for facts in batches]
    assert set.union(*predicates) == {*ATTRIBUTES, *RELATIONS}
    assert sum(map(len, predicates)) == len(ATTRIBUTES) + len(RELATIONS)
    assert sum(map(len, objects)) == len(set.union(*objects)) == 8
    assert subjects[0] == subjects[1] == subjects[2] == subjects[3]
    assert not subjects[0] & set.union(*objects)


def centre(bright: Tensor) -> tuple[float, float]:
    """Across and down, in half sides from the middle: (SIDE, SIDE)."""
    along = (torch.arange(SIDE) + 0.5) / SIDE * 2 - 1
    share = bright / bright.sum()
    return float((share.sum(0) * along).sum()), float((share.sum(1) * along).sum())


@pytest.mark.parametrize("relation", RELATIONS)
def test_subject_and_object_are_where_the_relation_says(relation: str) -> None:
    """Alone, with the other one black; the smaller of two has a box that the larger one does not enter."""
    white, black = torch.ones(1, 1, GLYPH, GLYPH), torch.zeros(1, 1, GLYPH, GLYPH)
    generator = torch.Generator().manual_seed(0)
    for which, spot in enumerate(RELATIONS[relation]):
        glyphs = {"s": black, "o": black, "so"[which]: white}
        for picture in paint(("s", relation, "o"), 20, glyphs, generator)[:, 0]:
            assert centre(picture) == pytest.approx((spot.across, spot.down), abs=0.13)
            other = RELATIONS[relation][1 - which]
            hole = other.side if (spot.across, spot.down) == (0, 0) == other[:2] else 0.0
            area = (spot.side**2 - (hole**2 if hole < spot.side else 0)) * SIDE**2
            assert float(picture.sum()) == pytest.approx(area, rel=0.1)


def test_relations_mean_what_they_say() -> None:
    for relation, (subject, other) in RELATIONS.items():
        across, down = subject.across - other.across, subject.down - other.down
        assert (across < 0) == ("left" in relation)
        assert (across > 0) == ("right" in relation)
        assert (down < 0) == ("above" in relation)
        assert (down > 0) == ("below" in relation)
        assert (subject.side < other.side) == (relation == "inside")
        assert (subject.side > other.side) == (relation == "around")


def test_attributes_colour_a_subject() -> None:
    glyphs = {"s": torch.ones(1, 1, GLYPH, GLYPH)}
    red = paint(("s", "red"), 5, glyphs, torch.Generator().manual_seed(0))
    white = paint(("s",), 5, glyphs, torch.Generator().manual_seed(0))
    torch.testing.assert_close(red[:, 0], white[:, 0])
    torch.testing.assert_close(red[:, 1:], 0.1 * white[:, 1:])
    striped = paint(("s", "striped"), 1, glyphs, torch.Generator().manual_seed(0))[0, 0]
    assert (striped[SIDE // 2 - 4 : SIDE // 2 + 4, SIDE // 2]).unique().numel() == 2


def test_glyphs_to_learn_to_validate_and_to_test_are_apart() -> None:
    quick: Any = EXPERIMENTS["facts"].quick()
    parts = glyphs_of(quick.digits, quick.data)
    assert list(parts[0]) == list(parts[1]) == list(parts[2]) == list("0123456789")
    rows = [[tuple(x.flatten().tolist()) for g in part.values() for x in g] for part in parts]
    assert sum(map(len, rows)) == 1797
    assert [len(set(a) & set(b)) for a, b in itertools.combinations(rows, 2)] == [0, 0, 0]
    pictures, again = quick.pictures(3), quick.pictures(3)
    for name in ("train", "validation", "test"):
        for (x, y), (other, labels) in zip(
            getattr(pictures, name), getattr(again, name), strict=True
        ):
            assert torch.equal(x, other)
            assert torch.equal(y, labels)
    facts = [fact for own in pictures.facts for fact in own]
    for own, (x, y) in zip(pictures.facts, pictures.train, strict=True):
        assert len(x) == len(y) == quick.images * len(own)
        assert {facts[i] for i in y.tolist()} == set(own)


FACTS = [
    ("a",),
    ("b",),
    ("a", "red"),
    ("b", "red"),
    ("a", "blue"),
    ("a", "on", "c"),
    ("b", "on", "c"),
]


def loss_of_one(similarity: Tensor, y: list[int], i: int) -> Tensor:
    """The ranking loss of sample i of a mini-batch, as it is told."""
    others = {r for r in y if len(FACTS[r]) == len(FACTS[y[i]]) and r != y[i]}
    terms = [(1 - similarity[i, y[i]] + similarity[i, r]).clamp(min=0) for r in others]
    return torch.stack(terms).mean() if terms else 0 * similarity.sum()


def test_ranking_loss() -> None:
    """Against its definition; a fact that is alone in its order has none."""
    order = torch.tensor([len(fact) for fact in FACTS])
    for y in ([2, 3, 4, 2, 0, 1, 5, 5], [0, 2, 5]):
        similarity = torch.randn(len(y), len(FACTS), dtype=torch.float64)
        labels = torch.tensor(y)
        found = shortfall(similarity, labels, rivals(labels, order))
        expected = torch.stack([loss_of_one(similarity, y, i) for i in range(len(y))])
        torch.testing.assert_close(found, expected)
    assert float(found.sum()) == 0


def test_facts_lie_in_the_projection_of_their_order() -> None:
    """Similarity is the product of that projection alone with the fact's words, side by side."""
    torch.manual_seed(0)
    model = Embedding(FACTS, 5)
    x = torch.rand(3, 3, SIDE, SIDE)
    by_order = [model(x, head) for head in range(3)]
    similarity = model.similarity(model(x))
    for i, fact in enumerate(FACTS):
        k = len(fact)
        words = model.facts[i].reshape(6, 5)[k * (k - 1) // 2 :][:k]
        torch.testing.assert_close(words.norm(dim=1), torch.ones(k))
        torch.testing.assert_close(model.facts[i].square().sum(), torch.tensor(float(k)))
        torch.testing.assert_close(similarity[:, i], by_order[k - 1] @ words.flatten())
    # A word is the same in all facts, at any place.
    a = [model.facts[i].reshape(6, 5)[row] for i, row in ((0, 0), (2, 1), (5, 3))]
    assert torch.equal(a[0], a[1])
    assert torch.equal(a[0], a[2])


def test_ranks_map_and_recall() -> None:
    """Against a loop over sorted facts."""
    torch.manual_seed(0)
    own = [FACTS[::2], FACTS[1::2]]
    model = Embedding([fact for facts in own for fact in facts], 5)
    x, y = torch.rand(9, 3, SIDE, SIDE), torch.arange(9) % 7
    similarity = model.similarity(model(x)).detach()
    facts = [fact for each in own for fact in each]

    def place(i: int, among: list[int]) -> int:
        fitting = [f for f in among if len(facts[f]) == len(facts[int(y[i])])]
        best = sorted(fitting, key=lambda f: -float(similarity[i, f]))
        return 1 + best.index(int(y[i]))

    everything, first = list(range(7)), list(range(4))
    rank = [place(i, everything) for i in range(9)]
    in_batch = [place(i, first if int(y[i]) < 4 else [4, 5, 6]) for i in range(9)]
    found = scores(model, own, x, y)
    assert found["mAP"] == pytest.approx(np.mean([1 / r for r in rank]))
    assert found["mAP in its batch"] == pytest.approx(np.mean([1 / r for r in in_batch]))
    assert found["recall at 1"] == pytest.approx(np.mean([r <= 1 for r in rank]))
    # Of more facts than five.
    similarity, y = torch.randn(6, 20), torch.arange(6)
    expected = [1 + int((row > row[k]).sum()) for k, row in enumerate(similarity)]
    assert ranks(similarity, y, torch.ones(6, 20, dtype=torch.bool)).tolist() == expected


def test_squared_gradients_of_the_ranking_loss() -> None:
    torch.manual_seed(0)
    model = Embedding(FACTS, 5)
    x, y = torch.rand(7, 3, SIDE, SIDE), [2, 3, 4, 2, 5, 6, 0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    labels = torch.tensor(y)
    parts = (
        model,
        optimizer,
        0,
        "domain",
        None,
        lambda n: [(x[:4], labels[:4]), (x[4:], labels[4:])],
    )
    training = Training(*parts, lambda p: torch.optim.SGD(p, lr=0.5))
    method = RankingEWC(lam=3.0)
    method.begin_task(training)
    method.end_task(training)
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for i in range(7):
        rows = slice(0, 4) if i < 4 else slice(4, 7)
        model.zero_grad()
        loss_of_one(model.similarity(model(x[rows])), y[rows], i - rows.start).backward()
        for name, p in model.named_parameters():
            expected[name] += p.grad.square() / 7 if p.grad is not None else 0
    assert method.penalty is not None
    assert method.penalty.lam == 1.5
    assert set(method.penalty.omega) == set(expected)
    for name, omega in method.penalty.omega.items():
        torch.testing.assert_close(omega.float(), expected[name], rtol=1e-3, atol=1e-9)


@pytest.mark.usefixtures("one_thread")
def test_facts(tmp_path: Path) -> None:
    """Joint training is better than fine-tuning; the tables' numbers are those of the matrices."""
    quick: Any = EXPERIMENTS["facts"].quick()
    page = reproduce(quick, "facts", tmp_path)
    results = Results(tmp_path / "facts.json", quick.protocol())
    final = {c["method"]: f["scores"] for c, f in results.where(purpose="final")}
    for name, found in final.items():
        m = matrix(found["mAP"])
        lost = np.mean([max(m[k:-1, k]) - m[-1, k] for k in range(3)])
        columns = [*(np.mean(rows[-1]) for rows in found.values()), np.mean(np.diag(m)), lost]
        row = " | ".join(f"{100 * each:.2f}" for each in columns)
        assert f"| `{name}` | {row} |" in page.text
    assert np.mean(final["joint"]["mAP"][-1]) > 1.3 * np.mean(final["finetune"]["mAP"][-1])

    ((_, found),) = results.where(purpose="adaptivity")
    names = [(each["source"], each["lam"]) for each in found["variants"]]
    assert names == [(None, 0), ("all", 0.1), ("half of the subjects", 0.1), ("relations", 0.1)]
    words = page.text.split("**Adaptivity: relations**")[1]
    last = found["variants"][-1]
    cells = [*last["kept"]["relations"], last["new"]]
    assert f"| relations | 0.1 | {' | '.join(f'{100 * x:.2f}' for x in cells)} | 1 |" in words
    other = found["variants"][1]
    more = np.subtract(cells, [*other["kept"]["relations"], other["new"]])
    assert (
        f"| relations, minus all | 0.1 | {' | '.join(f'{100 * x:.2f}' for x in more)} | 1 |"
        in words
    )
    (kind,) = {cell["seed"] for cell, _ in results.where(purpose="choose")}
    assert kind not in {cell["seed"] for cell, _ in results.where(purpose="final")}


@pytest.mark.usefixtures("one_thread")
def test_cost(tmp_path: Path) -> None:
    """Of two tasks: a quadratic method holds omega and anchor of the backbone, LwF a copy of the model."""
    quick: Any = EXPERIMENTS["cost"].quick()
    base = replace(quick.base, hidden=(20,), settings=replace(quick.base.settings, epochs=2))
    page = reproduce(replace(quick, base=base, samples=100), "cost", tmp_path)
    results = Results(tmp_path / "cost.json", replace(quick, base=base, samples=100).protocol())
    held = {cell["method"]: found["held_bytes"] for cell, found in results.where()}
    backbone = 64 * 20 + 20
    assert held["finetune"] == [0] * 5
    assert all(8 * backbone <= each < 8 * backbone + 1000 for each in held["mas"])
    assert held["lwf"][4] >= 4 * (backbone + 4 * 42)
    steps = {cell["method"]: found["step_seconds"] for cell, found in results.where()}
    assert all(len(each) == 5 and min(each) > 0 for each in steps.values())
    mb = f"{held['mas'][4] / 1e6:.2f}"
    (row,) = [line for line in page.text.splitlines() if line.startswith("| `mas` |")]
    assert row.split(" | ")[1:4] == [mb] * 3
    assert row.endswith(f"| {1e3 * np.median(steps['mas']):.1f} |")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_page_shows_what_is_committed(name: str) -> None:
    """Every experiment has its place; its results are of today's protocol, and their table is on the page."""
    page = (ROOT / "docs" / "RESULTS.md").read_text(encoding="utf-8")
    assert page.count(f"<!-- {name} -->\n") == page.count(f"<!-- /{name} -->") == 1
    path = ROOT / "experiments" / "results" / f"{name}.json"
    shown = page.partition(f"<!-- {name} -->\n")[2].partition(f"\n<!-- /{name} -->")[0]
    if path.exists():
        experiment = EXPERIMENTS[name]
        text, figures = experiment.show(Results(path, experiment.protocol()))
        for figure in figures:
            text = text.replace(f"]({figure})", f"](results/{figure})")
            assert (ROOT / "docs" / "results" / figure).exists()
        assert shown == text
    else:
        assert shown == "Not measured yet."


def test_streams_are_mixed_around_their_changes_alone() -> None:
    tasks = [(torch.full((50, 1), float(k)), torch.zeros(50)) for k in range(3)]
    problem = Problem(tasks, [], torch.nn.Identity(), torch.add, float, 40, 0.1)

    def shares(mixed: float) -> np.ndarray:
        return np.array([float(x.mean()) for x, _ in stream_of(problem, (0, 2, 1), 100, mixed)])

    np.testing.assert_array_equal(shares(0.0), np.repeat([0.0, 2.0, 1.0], 100))
    half = shares(0.5)
    np.testing.assert_array_equal(half[:75], 0)
    np.testing.assert_array_equal(half[126:175], 2)
    np.testing.assert_array_equal(half[226:], 1)
    expected = np.linspace(0, 2, 51)[1:]
    assert np.abs(half[76:126] - expected).mean() < 0.2
    assert half[76:100].mean() < 0.7 < 1.3 < half[101:126].mean()
    # Every sample once before any comes again.
    (x, _), *_ = stream_of(
        problem._replace(batch_size=50, learn=[(torch.arange(50.0), tasks[0][1])]), (0,), 1, 0.0
    )
    assert sorted(x.tolist()) == list(range(50))


def test_an_arm_has_outputs_of_its_own() -> None:
    problem = arms()
    (x, _), (other, _) = problem.learn[:2]
    problem.model(x[:4]).square().sum().backward()
    (weight,) = (p for n, p in problem.model.named_parameters() if n == "body.4.weight")
    assert weight.grad is not None
    assert weight.grad[:2].abs().amax(1).min() > 0
    assert weight.grad[2:].abs().max() == 0
    assert problem.model(other[:4]).shape == (4, 2)


@pytest.mark.usefixtures("one_thread")
def test_task_free(tmp_path: Path) -> None:
    """Told and untold boundaries on digits; the page has their difference, and the merges."""
    quick: Any = EXPERIMENTS["task-free"].quick()
    quick = replace(quick, streams=(Stream("split-digits", 120, 1.0),), samples=100)
    page = reproduce(quick, "task-free", tmp_path)
    results = Results(tmp_path / "task-free.json", quick.protocol())
    mean = {
        name: 100 * np.mean(results[quick.cell("split-digits", "sharp", name, 0, 1.0)]["scores"])
        for name in ("fine-tuning", "told", "task-free")
    }
    shown = " | ".join(f"{each:.2f}" for each in mean.values())
    behind = mean["told"] - mean["task-free"]
    assert f"| split-digits | sharp | {shown} | {behind:.2f} |" in page.text
    ((_, found),) = results.where(method="task-free", change="sharp")
    assert found["plateaus"]
    assert all(learned < step for step, learned in found["plateaus"])
    assert len(found["loss"]) == 5 * 120 // 25
    assert (tmp_path / "task-free.svg").read_bytes().startswith(b"<?xml")
