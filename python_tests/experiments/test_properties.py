"""The table of properties: what is measured of a method, and which rule says yes or no."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments import EXPERIMENTS, Results
from experiments.evidence import PROPERTIES, flat, take_from
from mas_ext import models
from mas_ext.failures import Diverged, Vanished
from mas_ext.methods import Method, create
from mas_ext.methods.method import Training

pytestmark = pytest.mark.usefixtures("one_thread")


def measured(key: str, method: str) -> Any:
    each = PROPERTIES[key]
    return each.measure(lambda: each.make(method, None), 0)


def test_memory() -> None:
    """Two numbers a parameter below the heads for MAS; EBLL keeps more codes with every task."""
    below = 64 * 100 + 100 + 100 * 100 + 100
    held = measured("memory", "mas")["held"].tolist()
    assert held == pytest.approx([8 * below] * 5, rel=0.01)
    assert PROPERTIES["memory"].holds([{"held": held}], {})
    growing = measured("memory", "ebll")["held"].tolist()
    # A head of 2 x 101 numbers in the teacher, and a code of 50 of 100 features.
    assert growing[4] - growing[1] == 3 * 4 * (2 * 101 + 50 * 101)
    assert not PROPERTIES["memory"].holds([{"held": growing}], {})


def test_unlabelled_data() -> None:
    """Importance of MAS moves with the samples alone, that of EWC with labels, LwF keeps nothing of them."""
    expected = {"mas": (True, False), "ewc": (True, True), "lwf": (False, False)}
    for method, moves in expected.items():
        found = measured("unlabelled", method)
        assert (found["samples"] > 0, found["labels"] > 0) == moves, method
        assert PROPERTIES["unlabelled"].holds([found], {}) == (method == "mas")


def test_what_is_kept_is_taken_from_given_samples() -> None:
    """In the first task; later tasks are seen whole."""
    seen = []

    class Watching(Method):
        def end_task(self, training: Training) -> None:
            seen.append([len(x) for x, _ in training.batches(None)])

    model, method = models.mlp((3,), (2,)), Watching()
    take_from(method, torch.randn(40, 3), torch.zeros(40))
    for task in range(2):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
        own = [(torch.randn(7, 3), torch.zeros(7))]
        training = Training(model, optimizer, task, "task", task, lambda n, own=own: own, Any)
        method.end_task(training)
    assert seen == [[32, 8], [7]]


def test_numbers_of_a_state() -> None:
    state = {
        "a": [torch.ones(2), {"b": torch.zeros(1, 2)}],
        "text": torch.ones(9, dtype=torch.uint8),
    }
    assert flat({**state, "n": 3}).tolist() == [1, 1, 0, 0]
    assert flat({}).tolist() == []


def test_rules() -> None:
    """Each on both sides of its border."""
    tuned = {"finetune": [{"kept": 0.2, "error": 3.0}, {"kept": 0.4, "error": 1.0}]}
    for kept, holds in ((0.62, True), (0.58, False)):  # half-way from 0.3 to 0.9
        founds = [{"before": 0.9, "kept": kept, "new": 0.5}]
        assert PROPERTIES["pretrained"].holds(founds, tuned) == holds
    for error, holds in ((0.9, True), (1.1, False)):
        assert PROPERTIES["agnostic"].holds([{"error": error}], tuned) == holds
    gains = [0.01, 0.03, 0.02]
    half = 4.3027 * np.std(gains, ddof=1) / np.sqrt(3)
    for shift, holds in ((half - 0.019, True), (half - 0.021, False)):
        founds = [{"gain": gain + shift} for gain in gains]
        assert PROPERTIES["adaptive"].holds(founds, {}) == holds
    for ratio, holds in ((1.7, True), (1.85, False)):
        own = [{"accuracy": {"a": 0.5 + ratio * x, "b": 0.5}} for x in (0.0, 0.1, 0.3)]
        joint = [{"accuracy": {"a": 0.5, "b": 0.5 + x}} for x in (0.1, 0.3, 0.0)]
        assert PROPERTIES["order"].holds(own, {"joint": joint}) == holds


def test_order() -> None:
    """The tasks in another order for each seed; each has its accuracy under its own name."""
    found = measured("order", "finetune")["accuracy"]
    assert list(found) == ["0/1", "2/3", "4/5", "6/7", "8/9"]
    assert found != PROPERTIES["order"].measure(lambda: create("finetune"), 1)["accuracy"]


def test_adaptive() -> None:
    """SI cannot be told; the gain of MAS is that of the four accuracies."""
    assert measured("adaptive", "si")["gain"] == 0
    assert measured("adaptive", "mas")["gain"] != 0


def test_only_failed_trainings_are_results(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment: Any = EXPERIMENTS["properties"]
    cell = {"property": "memory", "method": "mas", "lam": None, "seed": 0}
    for kind in (Diverged, Vanished, ValueError):

        def fail(make: Any, seed: int, kind: type[Exception] = kind) -> Any:
            raise kind("labels: got 3")

        monkeypatch.setattr(PROPERTIES["memory"], "measure", fail)
        if kind is ValueError:
            with pytest.raises(ValueError, match="labels: got 3"):
                experiment.measure(cell)
        else:
            assert experiment.measure(cell) == {"diverged": "labels: got 3"}


def test_the_table(tmp_path: Path) -> None:
    """The lam with the best mean score decides; bold is what the document has otherwise."""
    experiment: Any = replace(EXPERIMENTS["properties"], methods=("ewc", "mas"), lams=(1.0, 100.0))
    results = Results(tmp_path / "properties.json", experiment.protocol())

    def add(key: str, method: str, lam: float | None, *founds: Any) -> None:
        for seed, found in enumerate(founds):
            cell = {"property": key, "method": method, "lam": lam, "seed": seed}
            results.add(cell, found, 1.0)

    add("agnostic", "finetune", None, {"error": 2.0})
    add("agnostic", "mas", 1.0, {"error": 0.5})
    add("agnostic", "mas", 100.0, {"diverged": "nan"})
    add("agnostic", "ewc", 1.0, {"error": 1.2})
    add("agnostic", "ewc", 100.0, {"error": 1.1})
    for method, labels, more in (("mas", 0.0, 0.0), ("ewc", 0.5, 0.1)):
        add("unlabelled", method, None, {"samples": 0.1, "labels": labels})
        for lam in (1.0, 100.0):
            gains = [{"gain": lam / 1e3 + x + more, "kept": 0.9, "new": 0.9} for x in (0.0, 0.001)]
            add("adaptive", method, lam, *gains)
    page = experiment.show(results).text
    assert (
        "| `mas` |  | yes |  | yes | **no** |  |" in page
    )  # of equal scores the first: not above 0
    assert "| `ewc` |  | **no** |  | no | no |  |" in page
    assert "| `ewc` |  | 110.0 |" in page
    assert "problem agnostic 1, on pretrained 0, unlabelled data 1, adaptive 2" in page


def test_quick_plan() -> None:
    """What is planned can be measured: every cell once; lam only where there is one."""
    quick: Any = EXPERIMENTS["properties"].quick()
    cells = list(quick.plan(Results(Path("none.json"), quick.protocol())))
    assert len(cells) == 2 * (2 + 3 + 3 + 2 + 2 + 4)
    for cell in cells:
        lam = cell["property"] not in ("memory", "unlabelled") and cell["method"] in ("lwf", "mas")
        assert cell["lam"] == (1.0 if lam else None)
