"""Comparisons: what is found is right and kept, and a run that was killed goes on to the same bits."""

import csv
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from times import TIMES

from mas_ext import cli, models
from mas_ext.comparison.directory import read_confusion
from mas_ext.comparison.options import Config
from mas_ext.comparison.sweep import run
from mas_ext.failures import Diverged, Vanished
from mas_ext.methods import METHODS
from mas_ext.methods.method import Method, Training
from mas_ext.scenarios import datasets as data
from mas_ext.state import files as checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {"tasks": 2, "hidden": [16], "epochs": 2, "lr": 0.01}
CHOICE = {**SMALL, "methods": {"finetune": {}, "mas": {"lam": [0.5, 20.0]}}, "seeds": 2}


def rows(path: Path) -> np.ndarray[Any, Any]:
    with open(path) as file:
        return np.array([[float(x or "nan") for x in row] for row in csv.reader(file)])


def result(out: Path, job: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / job / "result.json").read_text())
    return found


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def choice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped, in which lam is chosen."""
    out = tmp_path_factory.mktemp("runs") / "choice"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run(Config.read(CHOICE), out)
    torch.set_num_threads(threads)
    return out


def test_the_network_in_the_checkpoint_has_the_accuracy_in_the_table(choice: Path) -> None:
    train, test = data.load_dataset("digits")
    images = (test.x - train.x.mean()) / train.x.std(correction=0)
    for job in ("mas-seed0", "mas-seed1", "finetune-seed1"):
        state = checkpoint.unpack(checkpoint.load(choice / job / "checkpoint.safetensors"))["model"]
        model = models.mlp((1, 8, 8), (16,))
        for _ in range(2):
            model.add_head(5)
        model.load_state_dict(state)
        last = rows(choice / job / "accuracy.csv")[-1]
        for k, classes in enumerate((range(5), range(5, 10))):
            of_task = torch.isin(test.y, torch.tensor(classes))
            with torch.no_grad():
                told = model(images[of_task], k).argmax(1) + classes[0]
            assert last[k] == (told == test.y[of_task]).double().mean()


def test_results(choice: Path) -> None:
    for job in ("finetune-seed0", "mas-seed1"):
        accuracy, found = rows(choice / job / "accuracy.csv"), result(choice, job)
        assert accuracy.shape == (2, 2)
        assert math.isnan(accuracy[0, 1])
        method, seed = job.split("-seed")
        assert (found["method"], found["seed"], found["purpose"]) == (method, int(seed), "final")
        assert found["tasks"] == ["0-4", "5-9"]
        assert found["average_accuracy"] == pytest.approx((accuracy[1, 0] + accuracy[1, 1]) / 2)
        assert found["forgetting"] == pytest.approx(accuracy[0, 0] - accuracy[1, 0])
        assert found["backward_transfer"] == pytest.approx(accuracy[1, 0] - accuracy[0, 0])
        assert found["forward_transfer"] is found["intransigence"] is None
        assert found["validation_accuracy"] is None
        assert min(found["step_seconds"]) > 0
    # Of the backbone's 64 x 16 + 16 parameters, in float32: their importance and their anchor.
    assert result(choice, "mas-seed0")["held_bytes"][-1] == pytest.approx(2 * 4 * 1040, rel=0.2)
    assert result(choice, "finetune-seed0")["held_bytes"] == [0, 0]


def test_confusion_is_that_of_the_accuracy(choice: Path) -> None:
    """Every test sample is in it, and those that are right are what the accuracy says."""
    scenario = Config.read(CHOICE).make_scenario(0)
    for job in ("finetune-seed0", "mas-seed1"):
        lines = read_confusion(choice / job / "confusion.csv")
        for k, task in enumerate(scenario.tasks):
            own = [line for line in lines if line.task == k]
            assert {line.predicted_task for line in own} == {k}
            count = len(task.test)  # type: ignore[arg-type]
            assert sum(line.samples for line in own) == count
            right = sum(line.samples for line in own if line.true == line.predicted)
            assert right / count == rows(choice / job / "accuracy.csv")[-1, k]
            for label in task.classes:
                of_class = sum(line.samples for line in own if line.true == label)
                assert of_class == int((task.test.y == label).sum())  # type: ignore[attr-defined]
    assert not list(choice.glob("choosing/*/confusion.csv"))


def test_metrics_are_complete(choice: Path) -> None:
    found = lines(choice)
    jobs = [("mas", 2, lam, "choose") for lam in (0.5, 20.0)]
    chosen = json.loads((choice / "lam.json").read_text())["mas"]["chosen"]
    for seed in (0, 1):
        jobs += [("finetune", seed, None, "final"), ("mas", seed, chosen, "final")]
    places = [(task, epoch) for task in (0, 1) for epoch in (1, 2, None)]
    keys = ("method", "seed", "lam", "purpose", "task", "epoch")
    got = [tuple(line[key] for key in keys) for line in found]
    assert got == [(*job, *place) for job in jobs for place in places]
    for line in found:
        if line["epoch"] is not None:
            assert line["loss"] > 0
            assert line["seconds"] > 0
            assert (line["validation"] is None) == (line["purpose"] == "final")
        elif line["purpose"] == "final":
            accuracy = rows(choice / f"{line['method']}-seed{line['seed']}" / "accuracy.csv")
            row = [math.nan if x is None else x for x in line["accuracy"]]
            assert np.array_equal(row, accuracy[line["task"]], equal_nan=True)


def test_lam_is_chosen_on_validation_data(choice: Path) -> None:
    grid = json.loads((choice / "lam.json").read_text())["mas"]
    assert [each["lam"] for each in grid["candidates"]] == [0.5, 20.0]
    for each in grid["candidates"]:
        folder = f"choosing/mas-lam{each['lam']}-seed2"
        assert not (choice / folder / "checkpoint.safetensors").exists()
        assert each["validation_accuracy"] == [result(choice, folder)["validation_accuracy"]]
        of_lam = [x for x in lines(choice) if (x["lam"], x["purpose"]) == (each["lam"], "choose")]
        assert each["mean"] == pytest.approx(np.mean(of_lam[-1]["validation"]))
    best = max(grid["candidates"], key=lambda each: each["mean"])
    assert grid["chosen"] == best["lam"] == result(choice, "mas-seed0")["lam"]


def test_table(choice: Path) -> None:
    text = (choice / "table.md").read_text()
    head, _, *body = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    assert head == [
        "method",
        "lam",
        "average accuracy, %",
        "forgetting, %",
        "ms per step",
        "MB held",
    ]
    assert [row[0] for row in body] == ["finetune", "mas"]
    assert [row[1] for row in body] == ["-", f"{result(choice, 'mas-seed0')['lam']:g}"]
    for row in body:
        for cell, name in ((row[2], "average_accuracy"), (row[3], "forgetting")):
            a, b = (100 * result(choice, f"{row[0]}-seed{seed}")[name] for seed in (0, 1))
            assert list(map(float, cell.split(", "))) == pytest.approx([a, b], abs=0.06)
    assert "Accuracy on all tasks after the last one, and forgetting: of each of 2 seeds." in text
    assert "2 seeds do not tell which is better." in text
    assert "mas: lam was chosen on validation data (average accuracy, %) from 0.5 (" in text


def test_joint_and_domain(tmp_path: Path) -> None:
    values = {**SMALL, "methods": ["finetune", "joint"], "setting": "domain", "validation": 0.2}
    config = Config.read({**values, "lam": [1, 2]})
    run(config, tmp_path / "run")
    found = result(tmp_path / "run", "finetune-seed0")
    accuracy = rows(tmp_path / "run" / "finetune-seed0" / "accuracy.csv")
    joint = rows(tmp_path / "run" / "joint-seed0" / "accuracy.csv")
    assert found["intransigence"] == pytest.approx(np.mean(np.diag(joint) - np.diag(accuracy)))
    assert result(tmp_path / "run", "joint-seed0")["intransigence"] is None
    assert 0 < found["validation_accuracy"] <= 1

    # The network before any training, by the same seed: heads are the first that is drawn from it.
    scenario = config.make_scenario(0)
    model = config.network(scenario, 0)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model.add_head(5)
    test = scenario.tasks[1].test
    x, y = zip(*(test[i] for i in range(len(test))), strict=True)
    with torch.no_grad():
        untrained = (model(torch.stack(x), 0).argmax(1) + 5 == torch.stack(y)).double().mean()
    assert found["forward_transfer"] == pytest.approx(accuracy[0, 1] - float(untrained))
    assert not (tmp_path / "run" / "lam.json").exists()


# -- trainings that end badly ----------------------------------------------------------------------------


def test_what_diverges_does_not_end_the_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The gradient form with SGD and a huge lam ends in NaN when the second task begins to move."""
    methods = {
        "mas": {"lam": [1e30, 0.01]},
        "mas-alpha": {"lam": [1e30, 1e31]},
        "local-mas": {"lam": 1e30},
        "finetune": {},
    }
    values = {**SMALL, "methods": methods, "optimizer": "sgd", "lr": 0.05}
    text = run(Config.read(values), tmp_path / "run")
    grid = json.loads((tmp_path / "run" / "lam.json").read_text())
    assert [each["mean"] is None for each in grid["mas"]["candidates"]] == [True, False]
    assert grid["mas"]["chosen"] == 0.01
    assert grid["mas-alpha"]["chosen"] is None
    assert not (tmp_path / "run" / "mas-alpha-seed0").exists()

    body = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert [line.split("|")[3].strip() for line in body[1:3]] == 2 * ["diverged, 1 of 1 seeds"]
    assert float(body[0].split("|")[3]) > 50
    assert float(body[3].split("|")[3]) > 50
    assert "1e+30 (diverged), 0.01 (" in text
    assert "mas-alpha diverged: with every lam" in text
    assert "local-mas diverged: loss: got nan in epoch" in text
    assert "local-mas seed 0: diverged, loss: got nan" in capsys.readouterr().err
    assert result(tmp_path / "run", "local-mas-seed0")["diverged"].startswith("loss: got nan")
    kept = rows(tmp_path / "run" / "local-mas-seed0" / "accuracy.csv")
    assert np.isfinite(kept[0, 0])
    assert np.isnan(kept[1]).all()

    again = run(Config.read(values), tmp_path / "run", resume=True)
    assert again == text


def test_a_network_that_collapsed_does_not_end_the_comparison(tmp_path: Path) -> None:
    """At this learning rate no hidden unit answers to any digit: importance is zero, exactly."""
    values = {**SMALL, "methods": ["mas-alpha"], "optimizer": "adam", "lr": 5.0}
    text = run(Config.read(values), tmp_path / "run")
    assert "mas-alpha diverged: importance: got a relative sensitivity of 0, expected" in text


def failing(error: Exception) -> type[Method]:
    """A method that fails at the end of its first task."""

    class Failing(Method):
        def end_task(self, training: Training) -> None:
            raise error

    return Failing


@pytest.mark.parametrize("kind", [Diverged, Vanished])
def test_consolidation_that_fails(
    kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "failing", failing(kind("importance: got nan")))
    text = run(Config.read({**SMALL, "methods": ["failing", "joint"]}), tmp_path / "run")
    assert "failing diverged: importance: got nan" in text
    assert result(tmp_path / "run", "joint-seed0")["average_accuracy"] > 0.5


@pytest.mark.parametrize("kind", [ValueError, FloatingPointError, RuntimeError])
def test_a_bug_in_a_method_is_no_result(
    kind: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "failing", failing(kind("labels: got 3, expected 2")))
    with pytest.raises(kind, match="labels: got 3, expected 2"):
        run(Config.read({**SMALL, "methods": ["failing"]}), tmp_path / "run")
    assert not (tmp_path / "run" / "failing-seed0" / "result.json").exists()
    assert not (tmp_path / "run" / "table.md").exists()


def test_a_bug_in_a_method_is_an_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(METHODS, "failing", failing(ValueError("labels: got 3, expected 2")))
    words = ["--methods", "failing", "--tasks", "2", "--hidden", "16", "--epochs", "1"]
    assert cli.main(["run", "--out", str(tmp_path / "run"), *words]) == 1
    assert "mas-ext: error: labels: got 3, expected 2" in capsys.readouterr().err


# -- before any work ---------------------------------------------------------------------------------------


class NeedsSgd(Method):
    def begin_task(self, training: Training) -> None:
        if not isinstance(training.optimizer, torch.optim.SGD):
            raise ValueError("optimizer: got another, expected SGD")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"methods": ["needs-sgd"]}, "needs-sgd: optimizer: got another, expected SGD"),
        ({"methods": {"mas": {"mode": "proximl"}}}, "mas: mode: .*proximl"),
        ({"methods": {"mas": {"merge": "som"}}}, "mas: merge: .*som"),
        ({"epochs": [1, 2, 3]}, "epochs: got 3 numbers, expected one for each of 2 tasks"),
        ({"tasks": 3}, "tasks: got 3, expected a divisor of the number of classes, 10"),
        ({"order": [0, 2]}, r"order: got \[0, 2\], expected each of 0 to 1 once"),
        (
            {"validation": 0.001},
            "validation: got 0.001 of the [0-9]+ samples of task '0-4', which is",
        ),
        ({"model": "alexnet", "hidden": None}, "with sides of at least 20"),
    ],
)
def test_refused_before_anything_is_written(
    values: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "needs-sgd", NeedsSgd)
    given = {name: v for name, v in {**SMALL, **values}.items() if v is not None}
    with pytest.raises(ValueError, match=message):
        run(Config.read(given), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_directories_that_cannot_be_used(choice: Path, tmp_path: Path) -> None:
    before = (choice / "environment.json").read_bytes()
    with pytest.raises(FileExistsError, match="resume=True, goes on with it"):
        run(Config.read(CHOICE), choice)
    with pytest.raises(ValueError, match="is another run: seeds was 2 and is 3"):
        run(Config.read({**CHOICE, "seeds": 3}), choice, resume=True)
    with pytest.raises(FileNotFoundError, match="where no run has begun"):
        run(Config.read(CHOICE), tmp_path / "run", resume=True)
    assert (choice / "environment.json").read_bytes() == before


def test_a_checkpoint_of_another_run_is_no_divergence(tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = Config.read({**SMALL, "methods": {"finetune": {}}})
    run(config, out)
    (out / "finetune-seed0" / "result.json").unlink()
    path = out / "finetune-seed0" / "checkpoint.safetensors"
    state = checkpoint.unpack(checkpoint.load(path))
    state["run"]["lr"] = 0.5
    checkpoint.save(checkpoint.pack(state), path)
    with pytest.raises(ValueError, match=r"got a run with lr 0\.5, expected 0\.01"):
        run(config, out, resume=True)
    assert not (out / "finetune-seed0" / "result.json").exists()


def test_a_damaged_checkpoint_is_no_divergence(tmp_path: Path) -> None:
    config = Config.read({**SMALL, "methods": ["finetune"]})
    run(config, tmp_path)
    (tmp_path / "finetune-seed0" / "result.json").unlink()
    path = tmp_path / "finetune-seed0" / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"checkpoint.safetensors: got a damaged file"):
        run(config, tmp_path, resume=True)
    assert not (tmp_path / "finetune-seed0" / "result.json").exists()


# -- events --------------------------------------------------------------------------------------------------


def test_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: dict[str, list[tuple[str, float, int]]] = {}

    class Writer:
        def __init__(self, folder: str) -> None:
            self.seen = written.setdefault(os.path.relpath(folder, tmp_path), [])

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            self.seen.append((tag, value, step))

        def flush(self) -> None:
            pass

        def close(self) -> None:
            self.seen.append(("closed", 0.0, 0))

    fake = SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    config = Config.read({**SMALL, "methods": ["finetune"], "validation": 0.2})
    run(config, tmp_path / "run", tensorboard=True)
    seen = written["run/tensorboard/finetune-seed0"]
    task = ["accuracy/average", "accuracy/task 0"]
    epochs = [[("loss", n), ("validation", n)] for n in (1, 2, 3, 4)]
    assert [(tag, step) for tag, _, step in seen] == [
        *epochs[0],
        *epochs[1],
        *((tag, 2) for tag in task),
        *epochs[2],
        *epochs[3],
        *((tag, 4) for tag in [*task, "accuracy/task 1"]),
        ("closed", 0),
    ]
    accuracy = rows(tmp_path / "run" / "finetune-seed0" / "accuracy.csv")
    assert [value for _, value, _ in seen[4:6]] == [accuracy[0, 0], accuracy[0, 0]]
    assert [value for _, value, _ in seen[-4:-1]] == [accuracy[1].mean(), *accuracy[1]]
    assert [value for tag, value, _ in seen if tag == "loss"] == [
        line["loss"] for line in lines(tmp_path / "run") if line["epoch"] is not None
    ]


def test_runs_of_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same scalars as TensorBoard's; a training that was finished is not told of again."""
    logged: dict[str, list[Any]] = {}

    class Run:
        def __init__(self, project: str, name: str, dir: str) -> None:
            assert (project, dir) == ("digits", str(tmp_path / "digits"))
            self.seen = logged.setdefault(name, [])

        def log(self, values: dict[str, float], step: int) -> None:
            self.seen.append((*values.items(), step))

        def finish(self) -> None:
            self.seen.append("finished")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=Run))
    config = Config.read({**SMALL, "methods": {"mas": {"lam": [0.5, 2.0]}}, "epochs": 1})
    (tmp_path / "config.toml").write_text(config.toml())
    words = ["--config", str(tmp_path / "config.toml"), "--out", str(tmp_path / "digits")]
    assert cli.main(["run", "--wandb", *words]) == 0
    assert list(logged) == ["choosing/mas-lam0.5-seed1", "choosing/mas-lam2.0-seed1", "mas-seed0"]
    accuracy = rows(tmp_path / "digits" / "mas-seed0" / "accuracy.csv")
    losses = [
        x["loss"] for x in lines(tmp_path / "digits") if x["epoch"] and x["purpose"] == "final"
    ]
    assert logged["mas-seed0"] == [
        (("loss", losses[0]), 1),
        (("accuracy/average", accuracy[0, 0]), 1),
        (("accuracy/task 0", accuracy[0, 0]), 1),
        (("loss", losses[1]), 2),
        (("accuracy/average", accuracy[1].mean()), 2),
        (("accuracy/task 0", accuracy[1, 0]), 2),
        (("accuracy/task 1", accuracy[1, 1]), 2),
        "finished",
    ]
    run(config, tmp_path / "digits", resume=True, wandb=True)
    assert all(seen.count("finished") == 1 for seen in logged.values())
    # What was killed before its checkpoint was written repeats what it has told.
    for name in ("result.json", "checkpoint.safetensors"):
        (tmp_path / "digits" / "mas-seed0" / name).unlink()
    before = [*logged["mas-seed0"]]
    run(config, tmp_path / "digits", resume=True, wandb=True)
    assert logged["mas-seed0"] == [*before, "finished"]


def test_events_without_their_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ModuleNotFoundError, match=r"run: pip install tensorboard"):
        run(Config(), tmp_path / "run", tensorboard=True)
    with pytest.raises(ModuleNotFoundError, match=r"run: pip install wandb"):
        run(Config(), tmp_path / "run", wandb=True)
    assert not (tmp_path / "run").exists()


# -- stopping and going on -------------------------------------------------------------------------------

# Runs a command with one thread that sends itself a signal at an exact moment: after so many steps, or before
# so many files of a name are complete.
STOPPED = """
import os, signal, sys
import torch
from mas_ext import cli
from mas_ext.training import run as learning

moment, count, signum = sys.argv[1], int(sys.argv[2]), getattr(signal, sys.argv[3])
seen = 0

def stop_at(now):
    global seen
    seen += now == moment
    if now == moment and seen == count:
        os.kill(os.getpid(), signum)

steps, replace = learning.Learning.steps, os.replace

def stopped_steps(self):
    for _ in steps(self):
        stop_at("step")
        yield

def stopped_replace(source, target, **more):
    stop_at(os.path.basename(target))
    replace(source, target, **more)

learning.Learning.steps, os.replace = stopped_steps, stopped_replace
torch.set_num_threads(1)
raise SystemExit(cli.main(sys.argv[4:]))
"""


def stopped(moment: str, count: int, by: str, out: Path) -> "subprocess.CompletedProcess[str]":
    file = out.with_name("config.toml")
    file.write_text(Config.read(CHOICE).toml())
    words = [moment, str(count), by, "run", "--config", str(file), "--out", str(out)]
    return subprocess.run(
        [sys.executable, "-c", STOPPED, *words], capture_output=True, text=True, check=False
    )


def timeless(found: Any) -> Any:
    """Without what differs between two runs of the same."""
    if isinstance(found, dict):
        return {k: timeless(v) for k, v in found.items() if "seconds" not in k}
    return [timeless(each) for each in found] if isinstance(found, list) else found


def assert_same(out: Path, reference: Path) -> None:
    files = [path.relative_to(reference) for path in reference.rglob("*") if path.is_file()]
    assert {path.relative_to(out) for path in out.rglob("*") if path.is_file()} == set(files)
    for file in files:
        got, expected = out / file, reference / file
        if file.suffix == ".csv" or file.name == "config.toml":
            assert got.read_bytes() == expected.read_bytes(), file
        elif file.suffix == ".safetensors":
            a, b = (checkpoint.unpack(checkpoint.load(each)) for each in (got, expected))
            for part in ("model", "method", "random", "heads"):
                a_part, b_part = (checkpoint.pack(each[part]) for each in (a, b))
                assert a_part.keys() == b_part.keys()
                assert all(torch.equal(a_part[name], b_part[name]) for name in a_part), (file, part)
        elif file.name in ("result.json", "lam.json"):
            a, b = (timeless(json.loads(each.read_text())) for each in (got, expected))
            assert a == b, file
    assert timeless(lines(out)) == timeless(lines(reference))


@pytest.mark.parametrize(
    ("moment", "count"),
    [
        ("step", 3),  # while lam is chosen, in the first epoch: there is no checkpoint yet
        ("step", 86),  # in the middle of an epoch of the second task with MAS
        ("checkpoint.safetensors", 16),  # after the callbacks, before the checkpoint
        ("accuracy.csv", 5),  # in the callback of a task's end
        ("result.json", 4),  # all learned, nothing said
    ],
)
def test_a_killed_run_goes_on_to_the_same_bits(
    moment: str, count: int, choice: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert stopped(moment, count, "SIGKILL", out).returncode == -9
    finished = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    assert not (out / "table.md").exists()
    run(Config.read(CHOICE), out, resume=True)
    assert_same(out, choice)
    assert len(json.loads((out / "environment.json").read_text())) == 2
    for path, time in finished.items():
        assert path.stat().st_mtime_ns == time


# For each number that it reads, a process that goes on with the run and kills itself at so many events: steps,
# and what it does to files. 0: never.
MANY_LIVES = """
import os, shutil, signal, sys
from pathlib import Path
import torch
from mas_ext.comparison.options import Config, read_toml
from mas_ext.comparison.sweep import run
from mas_ext.training.run import Learning

torch.set_num_threads(1)
config, left = Config.read(read_toml(sys.argv[1])), 0
config.make_scenario(0)  # what is imported on the way need not be in every life
torch.optim.SGD([torch.zeros(1)])

def counted(real):
    def call(*args, **named):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **named)
    return call

Learning._step = counted(Learning._step)
for module, names in ((os, "replace fsync open"), (Path, "mkdir replace"), (shutil, "rmtree")):
    for name in names.split():
        setattr(module, name, counted(getattr(module, name)))
print("ready", flush=True)
for line in sys.stdin:
    out, left = line.split()[0], int(line.split()[1])
    child = os.fork()
    if child == 0:
        sys.stderr = open(os.devnull, "w")
        run(config, out, resume=os.path.exists(out))
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""
# Enough to be killed in any of the files; `make long` kills 500 times.
KILLS = 3 + 13 * (TIMES - 1)


def test_a_run_killed_many_times_loses_nothing_and_does_nothing_twice(
    choice: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.toml").write_text(Config.read(CHOICE).toml())
    draw, kills, runs = random.Random(0), 0, 0
    command = [sys.executable, "-c", MANY_LIVES, str(tmp_path / "config.toml")]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        while kills < KILLS:
            out, status = tmp_path / f"run{runs}", "9"
            while status != "0":
                events = draw.randint(1, 80) if kills < KILLS else 0
                process.stdin.write(f"{out} {events}\n")
                process.stdin.flush()
                status = process.stdout.readline().strip()
                assert status in ("0", "9")
                kills += status == "9"
            assert_same(out, choice)
            runs += 1
        process.stdin.close()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name[0] != ".") == [
        "config.toml",
        *sorted(f"run{k}" for k in range(runs)),
    ]


def test_ctrl_c_keeps_the_last_step(choice: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = stopped("step", 86, "SIGINT", out)
    assert done.returncode == 130
    assert done.stderr.splitlines()[-2:] == [
        f"to go on: mas-ext run --out {out} --resume",
        "mas-ext: interrupted",
    ]
    newest = max(out.rglob("checkpoint.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    at = checkpoint.unpack(checkpoint.load(newest))["at"]
    assert (newest.parent.name, at["task"], at["epoch"], at["step"]) == ("mas-seed0", 1, 1, 4)
    run(Config.read(CHOICE), out, resume=True)
    assert_same(out, choice)
