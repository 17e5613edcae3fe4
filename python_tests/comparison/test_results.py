"""What is read from a run's directory: a small one with known numbers, whole, unfinished and damaged."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mas_ext.comparison.directory import check_shape, write_json
from mas_ext.comparison.options import Config
from mas_ext.comparison.results import (
    Findings,
    confusion_shares,
    importance_by_layer,
    over_seeds,
    shares,
)
from mas_ext.state import files as checkpoint
from mas_ext.state.replacing import write

# accuracy[t, k] by method and seed, None where nothing was measured. mas diverged with seed 1 in task 1 and
# is on its way with seed 2; joint has not begun with seed 1.
ACCURACY: dict[tuple[str, int], list[list[float | None]]] = {
    ("finetune", 0): [[0.9, None], [0.5, 0.8]],
    ("finetune", 1): [[0.8, None], [0.4, 0.7]],
    ("finetune", 2): [[1.0, None], [0.9, 0.6]],
    ("mas", 0): [[0.9, None], [0.85, 0.7]],
    ("mas", 1): [[0.7, None]],
    ("mas", 2): [[0.6, None]],
    ("joint", 0): [[0.95, None], [0.96, 0.94]],
    ("joint", 2): [[0.97, None]],
}
WHY = "loss: got nan <here> & now"
LAM = {
    "mas": {
        "candidates": [
            {"lam": 0.5, "validation_accuracy": [0.9], "mean": 0.9},
            {"lam": 2.0, "validation_accuracy": [0.8], "mean": 0.8},
            {"lam": 9.0, "validation_accuracy": [None], "mean": None},
        ],
        "chosen": 0.5,
    }
}
# What classes were taken for with two seeds of fine-tuning: task, class, predicted task and class, samples.
TAKEN = {
    0: [
        (0, 0, 0, 0, 8),
        (0, 0, 0, 1, 2),
        (0, 1, 0, 1, 10),
        (1, 2, 1, 2, 10),
        (1, 3, 1, 2, 1),
        (1, 3, 1, 3, 9),
    ],
    1: [(0, 0, 0, 0, 5), (0, 1, 0, 0, 4), (0, 1, 0, 1, 6), (1, 2, 1, 2, 10), (1, 3, 1, 3, 10)],
}
# Of 2 x 3 + 2 parameters of importance 1 and 2, and of 2 x 2 of importance 3.
OMEGA = {
    "omega.backbone.1.weight": torch.ones(1, 2, 3),
    "omega.backbone.1.bias": torch.full((1, 2), 2.0),
    "omega.backbone.3.weight": torch.full((1, 2, 2), 3.0),
    "anchor.backbone.3.weight": torch.full((1, 2, 2), 99.0),
}


def result(accuracy: list[list[Any]], seed: int, **more: Any) -> dict[str, Any]:
    """As sweep.train gives it; numbers that are read and not computed need not fit together."""
    return {
        "tasks": ["0/1", "2/3"],
        "average_accuracy": (accuracy[1][0] + accuracy[1][1]) / 2,
        "forgetting": accuracy[0][0] - accuracy[1][0],
        "backward_transfer": accuracy[1][0] - accuracy[0][0],
        "forward_transfer": None,
        "intransigence": 0.01 * (seed + 1),
        "validation_accuracy": None,
        "step_seconds": [0.002, 0.004],
        "border_seconds": [0.1, 0.1],
        "held_bytes": [0.0, 3e6],
        **more,
    }


def make(folder: Path) -> Path:
    """The directory of a run that was stopped."""
    folder.mkdir()
    values = {
        "methods": {"finetune": {}, "mas": {"lam": [0.5, 2.0, 9.0]}, "joint": {}},
        "seeds": 3,
        "data": "<script>alert(1)</script>",
    }
    write(folder / "config.toml", Config.read(values).toml())
    write_json(folder / "environment.json", [{"started": "then", "cpu": "A & B", "gpu": None}])
    write_json(folder / "lam.json", LAM)
    lines: list[dict[str, Any]] = []
    for (method, seed), accuracy in ACCURACY.items():
        same = {"method": method, "seed": seed, "lam": None, "purpose": "final"}
        lines.append(
            {**same, "task": 0, "epoch": 1, "loss": 1.0, "validation": None, "seconds": 1.0}
        )
        for task, row in enumerate(accuracy):
            times = {"step_seconds": 0.002 * (task + 1), "held_bytes": 3e6 * task}
            lines.append({**same, "task": task, "epoch": None, "accuracy": row, **times})
        job = folder / f"{method}-seed{seed}"
        job.mkdir()
        if len(accuracy) == 2:
            write_json(job / "result.json", result(accuracy, seed))
        if method == "finetune" and seed in TAKEN:
            titles = "task,class,predicted task,predicted class,count"
            rows = [",".join(map(str, row)) for row in TAKEN[seed]]
            write(job / "confusion.csv", "\n".join([titles, *rows]) + "\n")
        state = {"penalty": OMEGA} if method == "mas" else {}
        checkpoint.save(checkpoint.pack({"method": state}), job / "checkpoint.safetensors")
    write_json(folder / "mas-seed1" / "result.json", {"diverged": WHY})
    choosing = {**lines[1], "purpose": "choose", "seed": 0, "accuracy": [0.1, None]}
    torn = json.dumps(choosing)[:20]
    text = "".join(json.dumps(line) + "\n" for line in [*lines, choosing]) + torn
    (folder / "metrics.jsonl").write_text(text)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make(tmp_path / "run")


def test_everything_is_read(run: Path) -> None:
    found = Findings.read(run)
    assert list(found.learned) == ["finetune", "mas", "joint"]
    assert found.tasks == ["0/1", "2/3"]
    assert found.grid == {"mas": (0.5, {0.5: 0.9, 2.0: 0.8, 9.0: None})}
    assert [found.lam(name) for name in found.learned] == [None, 0.5, None]
    assert found.starts == [{"started": "then", "cpu": "A & B", "gpu": None}]
    for (method, seed), rows in ACCURACY.items():
        one = found.learned[method][seed]
        assert (one.method, one.seed, one.tasks) == (method, seed, len(rows))
        whole = np.array([*rows, [None, None]][:2], dtype=float)
        np.testing.assert_array_equal(one.accuracy.numpy(), whole)
        held, seconds = np.array([[0.0, 3e6], [0.002, 0.004]])
        held[len(rows) :] = seconds[len(rows) :] = np.nan
        np.testing.assert_array_equal(one.held_bytes.numpy(), held)
        np.testing.assert_array_equal(one.step_seconds.numpy(), seconds)
        average = [whole[0, 0], whole[1].mean()]
        np.testing.assert_allclose(one.average.numpy(), average, rtol=1e-15)
    states = [
        [(e.found is not None, e.diverged) for e in seeds] for seeds in found.learned.values()
    ]
    assert states == [
        [(True, None)] * 3,
        [(True, None), (True, WHY), (False, None)],
        [(True, None), (False, None), (False, None)],
    ]
    assert found.learned["joint"][1].tasks == 0


def test_means_over_seeds(run: Path) -> None:
    """Those that are on their way are left out where they have not come; what diverged ends the mean."""
    learned = Findings.read(run).learned
    mean, half = over_seeds(learned["finetune"], lambda one: one.accuracy)
    each = np.array([ACCURACY["finetune", n] for n in range(3)], dtype=float)
    np.testing.assert_allclose(mean, each.mean(0), rtol=1e-15)
    # Student's quantile for two degrees of freedom: 4.302653.
    np.testing.assert_allclose(half, 4.302653 * each.std(0, ddof=1) / math.sqrt(3), rtol=1e-6)

    mean, half = over_seeds(learned["mas"], lambda one: one.accuracy)
    np.testing.assert_allclose(
        mean, [[(0.9 + 0.7 + 0.6) / 3, np.nan], [np.nan, np.nan]], rtol=1e-15
    )
    mean, half = over_seeds(learned["joint"], lambda one: one.accuracy)
    np.testing.assert_allclose(mean, [[0.96, np.nan], [0.96, 0.94]], rtol=1e-15)
    np.testing.assert_array_equal(half.isnan(), [[False, True], [True, True]])


def test_confusion(run: Path) -> None:
    """Mean over seeds of shares of a class, which may have other numbers of samples."""
    found = Findings.read(run)
    seeds = found.learned["finetune"]
    assert [[tuple(line) for line in each.confusion()] for each in seeds] == [
        TAKEN[0],
        TAKEN[1],
        [],
    ]
    places, by_method = confusion_shares(found)
    assert places == [(0, 0), (0, 1), (1, 2), (1, 3)]
    assert list(by_method) == ["finetune"]
    right = [
        [90, 10, None, None],
        [20, 80, None, None],
        [None, None, 100, 0],
        [None, None, 5, 95],
    ]
    np.testing.assert_allclose(by_method["finetune"], np.array(right, dtype=float), rtol=1e-14)


def test_confusion_of_heads_side_by_side(run: Path) -> None:
    """Any class may be taken for that of any task, and an output may have no class."""
    config = Config.read({"methods": ["finetune"], "setting": "class", "seeds": 3})
    write(run / "config.toml", config.toml())
    (run / "lam.json").unlink()  # of a method that is no longer there
    lines = ["0,7,0,7,1", "0,7,1,7,2", "0,7,1,,1", "1,7,1,7,3", "1,8,0,7,1"]
    write(run / "finetune-seed1" / "confusion.csv", "\n".join(["a,b,c,d,e", *lines]) + "\n")
    (run / "finetune-seed0" / "confusion.csv").unlink()
    places, by_method = confusion_shares(Findings.read(run))
    assert places == [(0, 7), (1, 7), (1, 8), (1, None)]
    right = [[25, 50, 0, 25], [0, 100, 0, 0], [100, 0, 0, 0], [None] * 4]
    np.testing.assert_allclose(by_method["finetune"], np.array(right, dtype=float), rtol=1e-14)


def test_importance_by_layer(run: Path) -> None:
    mas = Findings.read(run).learned["mas"]
    assert mas[0].layers() == {"backbone.1": (10.0, 8), "backbone.3": (12.0, 4)}
    assert shares(mas) == {
        "backbone.1": pytest.approx((10 / 22, (10 / 8) / (22 / 12))),
        "backbone.3": pytest.approx((12 / 22, 3 / (22 / 12))),
    }
    # IMM's transfer pulls, and is no importance; two rows are two tasks.
    rows = torch.tensor([[1.0, 2.0], [0.0, 4.0]])
    state = {"transfer": {"penalty": OMEGA}, "merging": {"penalty": {"omega.a.weight": rows}}}
    assert importance_by_layer(state) == {"a": (7.0, 2)}
    assert importance_by_layer({"teacher": {}}) == {}


def test_importance_is_of_what_counts(run: Path) -> None:
    """Seeds count alike, however large their importance; what diverged and nothing at all don't."""
    nothing = {name: torch.zeros_like(t) for name, t in OMEGA.items()}
    large = {name: 1e6 * t for name, t in OMEGA.items() if not name.endswith("bias")}
    for seed, omega in ((0, large), (1, {"omega.x.weight": torch.ones(1, 1)}), (2, nothing)):
        path = run / f"mas-seed{seed}" / "checkpoint.safetensors"
        checkpoint.save(checkpoint.pack({"method": {"penalty": omega}}), path)
    assert shares(Findings.read(run).learned["mas"]) == {
        "backbone.1": pytest.approx((6 / 18, 1 / 1.8)),
        "backbone.3": pytest.approx((12 / 18, 3 / 1.8)),
    }


def test_a_run_of_another_machine(run: Path) -> None:
    text = (run / "config.toml").read_text()
    assert 'device = "cpu"' in text
    (run / "config.toml").write_text(text.replace('device = "cpu"', 'device = "cuda:7"'))
    assert Findings.read(run).values["device"] == "cuda:7"


def test_a_run_that_has_only_begun(run: Path) -> None:
    for path in (*run.glob("*/*"), run / "metrics.jsonl", run / "lam.json"):
        path.unlink()
    found = Findings.read(run)
    assert (found.tasks, found.grid, found.lam("mas")) == ([], {}, None)
    assert {one.tasks for seeds in found.learned.values() for one in seeds} == {0}


def test_every_lam_diverged(run: Path) -> None:
    lost = {"candidates": [{"lam": 2.0, "mean": None}, {"lam": 9.0, "mean": None}], "chosen": None}
    write_json(run / "lam.json", {"mas": lost})
    found = Findings.read(run)
    assert found.lam("mas") is None
    assert [one.diverged for one in found.learned["mas"]] == ["with every lam"] * 3


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def other(content: str) -> Callable[[Path], Any]:
    return lambda path: path.write_text(content)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("config.toml", other("methods = ")),
        ("config.toml", other("seedz = 1")),
        ("environment.json", cut),
        ("environment.json", other("[3]")),
        ("lam.json", other("[]")),
        ("lam.json", other('{"mas": {"chosen": 1}}')),
        ("metrics.jsonl", other("{}\n")),
        ("metrics.jsonl", other("\x00\n")),
        ("metrics.jsonl", lambda path: path.write_bytes(b"\xff\xfe\n")),
        ("finetune-seed1/result.json", cut),
        ("finetune-seed1/result.json", other("{}")),
        ("finetune-seed1/result.json", other("7")),
        ("finetune-seed1/confusion.csv", other("")),
        ("finetune-seed1/confusion.csv", other("task\n0,1\n")),
        ("finetune-seed1/confusion.csv", other("task\n0,1,0,x,3\n")),
        ("mas-seed0/checkpoint.safetensors", cut),
        ("mas-seed0/checkpoint.safetensors", lambda path: path.write_bytes(b"")),
    ],
)
def test_damaged_files(run: Path, name: str, damage: Callable[[Path], Any]) -> None:
    damage(run / name)

    def read() -> None:
        found = Findings.read(run)
        shares(found.learned["mas"])
        confusion_shares(found)

    with pytest.raises(ValueError, match=str(run / name)):
        read()


def test_no_run(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for path in (tmp_path, tmp_path / "nothing", file):
        with pytest.raises(FileNotFoundError, match=f"run: got '{path}', where no run has begun"):
            Findings.read(path)


@pytest.mark.parametrize("value", [10**400, -(10**400), math.inf, math.nan, True, "1", None])
def test_what_is_no_finite_number_has_no_floats_shape(value: Any) -> None:
    check_shape([1, 2.5, 10**300], [float])
    with pytest.raises(ValueError, match=r"got .*, expected what a run writes"):
        check_shape([value], [float])
