"""Experiments: what is measured is kept at once, lam is chosen as told, pages show what is there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from mas_ext.experiments import EXPERIMENTS, Experiment, Page, Results, reproduce
from mas_ext.experiments.experiment import Cell, Found
from mas_ext.experiments.learned import GRID, choose, chosen


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


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (1e2, [1e-2, 1e0, 1e2, 1e4, 1e6, 1e1, 1e3]),
        (1e1, [1e-2, 1e0, 1e2, 1e4, 1e6, 1e-1, 1e1]),
        (1e6, [1e-2, 1e0, 1e2, 1e4, 1e6, 1e5]),
        (1e-3, [1e-2, 1e0, 1e2, 1e4, 1e6, 1e-3, 1e-1]),
    ],
)
def test_lam_is_the_best_on_validation_data(
    tmp_path: Path, best: float, tried: list[float]
) -> None:
    """With a peak at one value of the grid, of equal ones the smallest; those that diverge never."""
    results, cell = Results(tmp_path / "x.json", {}), {"method": "mas"}
    asked = []
    for needed in choose(results, cell):
        if needed not in results:
            assert chosen(results, cell) is None
            asked.append(needed["lam"])
            steps = abs(GRID.index(needed["lam"]) - GRID.index(best))
            found = {"diverged": "nan"} if steps > 5 else {"validation_accuracy": 1 - steps / 10}
            results.add(needed, found, 0.0)
    assert asked == tried
    assert chosen(results, cell) == best
    assert needed["method"] == "mas"


def test_lam_where_all_diverge(tmp_path: Path) -> None:
    results = Results(tmp_path / "x.json", {})
    for needed in choose(results, {}, grid=GRID[:4]):
        if needed not in results:
            results.add(needed, {"diverged": "nan"}, 0.0)
    assert len(results.entries) == 4
    assert chosen(results, {}, GRID[:4]) is None


@pytest.mark.usefixtures("one_thread")
def test_split_mnist(tmp_path: Path) -> None:
    """Both forms of MAS and joint training on the digits: cells, tables and pictures."""
    quick: Any = EXPERIMENTS["split-mnist"].quick()
    few = [v for v in quick.variants if v.method in ("joint", "mas")]
    small = replace(
        quick,
        variants=few,
        seeds=2,
        choosing_epochs=1,
        grid=GRID[:3],
        base=replace(quick.base, hidden=(20,), settings=replace(quick.base.settings, epochs=1)),
    )
    page = reproduce(small, "split-mnist", tmp_path)
    results = Results(tmp_path / "split-mnist.json", small.protocol())
    choosing, final = results.where(purpose="choose"), results.where(purpose="final")
    assert len(choosing) == 3 * 3
    assert {cell["seed"] for cell, _ in choosing}.isdisjoint(cell["seed"] for cell, _ in final)
    assert len(final) == 3 * 2 * 3

    for setting in ("task", "domain", "class"):
        scores = {
            cell["lam"]: found["validation_accuracy"]
            for cell, found in results.where(setting=setting)
            if cell["purpose"] == "choose"
        }
        lams = {
            cell["lam"] for cell, _ in results.where(setting=setting, method="mas", purpose="final")
        }
        assert lams == {min(lam for lam in scores if scores[lam] == max(scores.values()))}
    found = results.where(setting="domain", method="mas", options={"mode": "proximal"})
    mean = sum(100 * each["average_accuracy"] for _, each in found) / 2
    (row,) = [
        line
        for line in page.text.split("**Domain")[1].split("**")[1].splitlines()
        if "proximal |" in line
    ]
    assert row.startswith(f"| `mas`, proximal | {mean:.2f} ± ")
    assert row.endswith(" | 2 |")
    assert "| `joint` |" in page.text
    assert "98.59" in page.text
    for name in page.figures:
        assert f"]({name})" in page.text
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
