"""What is drawn: the values in the pictures are those of the run."""

import io
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from comparison.test_results import ACCURACY, make, result
from matplotlib.collections import LineCollection

from mas_ext.comparison import charts
from mas_ext.comparison.directory import write_json
from mas_ext.comparison.options import Config
from mas_ext.comparison.results import Findings
from mas_ext.methods import METHODS
from mas_ext.state.replacing import write


@pytest.fixture
def found(tmp_path: Path) -> Findings:
    return Findings.read(make(tmp_path / "run"))


def curves(panel: Any) -> dict[str, Any]:
    """What is drawn under each name."""
    return {line.get_label(): line for line in panel.lines if line.get_label()[0] != "_"}


def test_pictures(found: Findings) -> None:
    pictures = charts.pictures(found)
    assert list(pictures) == [
        "accuracy", "matrices", "confusion", "forgetting", "cost", "importance", "lam",
    ]  # fmt: skip
    for picture in pictures.values():
        pixels = matplotlib.image.imread(io.BytesIO(picture), format="png")
        assert pixels.shape[1] == 1210
        assert len(np.unique(pixels)) > 10


@pytest.mark.parametrize(("kind", "begins"), [("pdf", b"%PDF-"), ("svg", b"<?xml")])
def test_pictures_for_other_programs(kind: charts.Kind, begins: bytes, found: Findings) -> None:
    """The same file from the same run, whose letters are letters."""
    pictures = charts.pictures(found, kind)
    assert list(pictures) == list(charts.CHARTS)
    assert charts.pictures(found, kind) == pictures
    for picture in pictures.values():
        assert picture.startswith(begins)
    if kind == "svg":
        assert b">finetune</text>" in pictures["accuracy"]
    else:
        assert b"/FontFile2" in pictures["accuracy"]  # TrueType, and not Type 3
        assert b"/Type3" not in pictures["accuracy"]


def test_accuracy_of_few_seeds(found: Findings) -> None:
    """Three seeds are dots, all within the picture, as their interval would fill it."""
    figure = charts.accuracy_chart(found)
    each = 100 * np.array([ACCURACY["finetune", n] for n in range(3)], dtype=float)
    expected = [each[:, :, 0], each[:, :, 1], np.stack([each[:, 0, 0], each[:, 1].mean(1)], 1)]
    for panel, values in zip(figure.axes, expected, strict=True):
        dots = [line for line in panel.lines if line.get_marker() == "."]
        assert not panel.collections
        np.testing.assert_allclose([line.get_ydata() for line in dots[:3]], values, rtol=1e-14)
        colours = {line.get_color() for line in dots[:3]}
        assert colours == {charts.style(found, "finetune")["color"]}
        # All are from 40 to 100.
        assert panel.get_ylim() == pytest.approx((34, 106))


def test_accuracy(tmp_path: Path) -> None:
    """From four seeds on there is an interval."""
    run = make(tmp_path / "run")
    write(run / "config.toml", Config.read({"methods": list(METHODS)[:1], "seeds": 4}).toml())
    (run / "lam.json").unlink()  # of a method that is no longer there
    ACCURACY_OF_4 = [*(ACCURACY["finetune", n] for n in range(3)), [[0.7, None], [0.6, 0.7]]]
    same = {"method": "finetune", "seed": 3, "lam": None, "purpose": "final", "epoch": None}
    with (run / "metrics.jsonl").open("r+") as file:
        whole = file.read().rpartition("\n")[0]
        file.truncate(0)
        file.seek(0)
        file.write(whole + "\n")
        for task, row in enumerate(ACCURACY_OF_4[3]):
            line = {**same, "task": task, "accuracy": row, "step_seconds": 1.0, "held_bytes": 0.0}
            file.write(json.dumps(line) + "\n")
    found = Findings.read(run)
    figure = charts.accuracy_chart(found)
    each = 100 * np.array(ACCURACY_OF_4, dtype=float)
    titles = [panel.get_title() for panel in figure.axes]
    assert titles == ["task 1: 0/1", "task 2: 2/3", "mean of the tasks so far"]
    expected = [each[:, :, 0], each[:, :, 1], np.stack([each[:, 0, 0], each[:, 1].mean(1)], 1)]
    for panel, values in zip(figure.axes, expected, strict=True):
        line = curves(panel)["finetune"]
        np.testing.assert_allclose(line.get_ydata(), values.mean(0), rtol=1e-14)
        np.testing.assert_array_less(np.abs(line.get_xdata() - [1, 2]), 0.3)
        bars = next(c for c in panel.collections if isinstance(c, LineCollection)).get_segments()
        # Student's quantile for three degrees of freedom.
        half = 3.182446 * values.std(0, ddof=1) / 2
        for bar, middle, h in zip(bars, values.mean(0), half, strict=True):
            if not np.isnan(middle):
                np.testing.assert_allclose(bar[:, 1], [middle - h, middle + h], rtol=1e-6)
        # All means are from 60 to 85.
        assert panel.get_ylim() == pytest.approx((57.5, 87.5))


def test_the_mean_of_what_diverged_ends(found: Findings) -> None:
    mas = curves(charts.accuracy_chart(found).axes[0])["mas"].get_ydata()
    np.testing.assert_allclose(mas, [100 * (0.9 + 0.7 + 0.6) / 3, np.nan])


def test_names_of_tasks_are_no_formulas(found: Findings) -> None:
    priced = replace(found, tasks=["from $\\frac$ up", "2"])
    assert b"from $\\frac$ up</text>" in charts.pictures(priced, "svg")["accuracy"]


def test_matrices(found: Findings) -> None:
    figure = charts.matrices_chart(found)
    panels = {panel.get_title(): panel for panel in figure.axes if panel.get_title()}
    assert list(panels) == ["finetune", "mas", "joint"]
    each = 100 * np.array([ACCURACY["finetune", n] for n in range(3)], dtype=float)
    image = panels["finetune"].images[0].get_array()
    np.testing.assert_allclose(image.filled(np.nan), each.mean(0), rtol=1e-14)
    numbers = [(t.get_position(), t.get_text()) for t in panels["finetune"].texts]
    assert numbers == [((0, 0), "90.0"), ((0, 1), "60.0"), ((1, 1), "70.0")]
    assert len({panel.images[0].get_clim() for panel in panels.values()}) == 1


def test_scores_below_0(tmp_path: Path) -> None:
    """Their colours begin at the lowest, and not at 0."""
    run = make(tmp_path / "run")
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text.replace('"accuracy": [0.', '"accuracy": [-0.'))
    (panel, *_) = charts.matrices_chart(Findings.read(run)).axes
    low, high = panel.images[0].get_clim()
    assert low < -90 < 80 < high


def test_confusion(found: Findings) -> None:
    panel, bar = charts.confusion_chart(found).axes
    assert (panel.get_title(), bar.get_ylabel()) == ("finetune", "share of the class in %")
    image = panel.images[0].get_array().filled(np.nan)
    nan = np.nan
    right = [[90, 10, nan, nan], [20, 80, nan, nan], [nan, nan, 100, 0], [nan, nan, 5, 95]]
    np.testing.assert_allclose(image, right, rtol=1e-14)
    numbers = {t.get_position(): t.get_text() for t in panel.texts}
    assert numbers == {
        (0, 0): "90",
        (1, 0): "10",
        (0, 1): "20",
        (1, 1): "80",
        (2, 2): "100",
        (2, 3): "5",
        (3, 3): "95",
    }
    assert [label.get_text() for label in panel.get_yticklabels()] == ["0", "1", "2", "3"]
    assert [line.get_ydata()[0] for line in panel.lines if line.get_xdata()[0] == 0] == [1.5]


def test_confusion_of_many_classes(tmp_path: Path) -> None:
    """Tasks are named by their numbers, in the middle of their classes."""
    run = make(tmp_path / "run")
    lines = [f"{c >= 20:d},{c},{c >= 20:d},{c},3" for c in range(30)]
    write(run / "finetune-seed0" / "confusion.csv", "\n".join(["a,b,c,d,e", *lines]) + "\n")
    (run / "finetune-seed1" / "confusion.csv").unlink()
    panel, _ = charts.confusion_chart(Findings.read(run)).axes
    assert not panel.texts
    assert [*panel.get_xticks()] == [9.5, 24.5]
    assert [label.get_text() for label in panel.get_xticklabels()] == ["1", "2"]


def test_forgetting(found: Findings) -> None:
    (panel,) = charts.forgetting_chart(found).axes
    # Of mas a seed diverged.
    assert list(curves(panel)) == ["finetune", "joint"]
    points = [(line.get_xdata(), line.get_ydata()) for line in panel.lines]
    np.testing.assert_allclose(points[0], [[40, 40, 10], [65, 55, 75]], rtol=1e-14)
    np.testing.assert_allclose(points[1], [[30], [65]], rtol=1e-14)
    np.testing.assert_allclose(points[2], [[-1], [95]], rtol=1e-12)
    assert panel.get_xlim() == pytest.approx((-1 - 4.1, 40 + 4.1))


def test_no_axis_makes_much_of_next_to_nothing(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    for method, seed in ACCURACY:
        (run / f"{method}-seed{seed}" / "result.json").unlink(missing_ok=True)
    value = {"average_accuracy": 0.95, "forgetting": 0.02}
    write_json(run / "joint-seed0" / "result.json", {**result(ACCURACY["joint", 0], 0), **value})
    (panel,) = charts.forgetting_chart(Findings.read(run)).axes
    assert (*panel.get_xlim(), *panel.get_ylim()) == pytest.approx((1.5, 2.5, 94.5, 95.5))


def test_cost(found: Findings) -> None:
    steps, held = charts.cost_chart(found).axes
    for panel, expected in ((steps, [2, 4]), (held, [0, 3])):
        for method in ("finetune", "joint"):
            np.testing.assert_allclose(curves(panel)[method].get_ydata(), expected, rtol=1e-14)
        assert panel.get_ylim()[0] <= 0


def test_importance(found: Findings) -> None:
    share, mean = charts.importance_chart(found).axes
    assert [label.get_text() for label in share.get_yticklabels()] == ["backbone.1", "backbone.3"]
    np.testing.assert_allclose(curves(share)["mas"].get_xdata(), [10 / 22, 12 / 22], rtol=1e-14)
    expected = [(10 / 8) / (22 / 12), 3 / (22 / 12)]
    np.testing.assert_allclose(curves(mean)["mas"].get_xdata(), expected, rtol=1e-14)
    assert list(curves(share)) == ["mas"]
    # What it is more or less than.
    bars = next(c for c in mean.collections if isinstance(c, LineCollection)).get_segments()
    np.testing.assert_allclose([bar[0, 0] for bar in bars], 1)


@pytest.mark.parametrize("least", [0.0, 0.5])
def test_lam(least: float, tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    means = {2.0: 0.8, least: 0.9, 9.0: None}
    candidates = [{"lam": lam, "mean": mean} for lam, mean in means.items()]
    tried = {"mas": {"candidates": candidates, "chosen": least}}
    lost = {"joint": {"candidates": [{"lam": 9.0, "mean": None}], "chosen": None}}
    write_json(run / "lam.json", {**tried, **lost})
    (panel,) = charts.lam_chart(Findings.read(run)).axes
    assert list(curves(panel)) == ["mas", "joint"]
    points = [(list(line.get_xdata()), list(line.get_ydata())) for line in panel.lines]
    assert points[0] == ([least, 2.0], pytest.approx([90, 80]))
    assert points[1][0] == [9.0]
    assert points[2] == ([least], pytest.approx([90]))
    assert points[3:] == [([], []), ([9.0], [pytest.approx(0.08)]), ([], [])]
    low, high = panel.get_xlim()
    assert low < least or (low, least) == (0, 0)
    assert high > 9


def test_no_picture_of_nothing(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    for path in (*run.glob("*/*"), run / "metrics.jsonl", run / "lam.json"):
        path.unlink()
    assert charts.pictures(Findings.read(run)) == {}


def test_methods_are_told_apart_the_same_way_everywhere(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    everything = Config.read({"methods": list(METHODS)})
    write(run / "config.toml", everything.toml())
    found = Findings.read(run)
    looks = [tuple(charts.style(found, method).values()) for method in METHODS]
    assert len(set(looks)) == len(METHODS) > 10
    assert len({charts.style(found, method)["marker"] for method in METHODS}) == len(METHODS)
    panels = [
        *charts.accuracy_chart(found).axes,
        *charts.cost_chart(found).axes,
        *charts.importance_chart(found).axes,
    ]
    for panel in panels:
        for method, line in curves(panel).items():
            look = charts.style(found, method)
            assert (line.get_color(), line.get_marker()) == (look["color"], look["marker"])


def test_long_names_leave_room_for_one_another(tmp_path: Path) -> None:
    """Those of classes: titles in two lines and within their panels, and a legend within its figure."""
    run = make(tmp_path / "run")
    name, short = "a_module_with_a_name:AndAClassWithAName", "finetune"
    text = (run / "config.toml").read_text().replace("[methods.mas]", f'[methods."{name}"]')
    (run / "config.toml").write_text(text)
    for path in (run / "metrics.jsonl", run / "lam.json"):
        path.write_text(path.read_text().replace('"mas"', f'"{name}"'))
    for seed in range(3):
        (run / f"mas-seed{seed}").rename(run / f"{name.replace(':', '.')}-seed{seed}")
    found = Findings.read(run)
    assert found.learned[name][0].found is not None
    figure = charts.matrices_chart(found)
    figure.draw_without_rendering()
    titles = {panel.get_title(): panel for panel in figure.axes if panel.get_title()}
    assert list(titles) == [short, name.replace(":", ":\n"), "joint"]
    boxes = [panel.title.get_window_extent() for panel in titles.values()]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)


NAMES = [
    "mas",
    "mas-alpha",
    "ewc",
    "online-ewc",
    "si",
    "mas-own",
    "mas-alpha-latest",
    "lwf",
    "joint",
]


@pytest.mark.parametrize(
    ("labels", "columns"),
    [
        ([f"a_module_with_a_name:AndAClassWithAName{i}" for i in range(4)], 1),
        (NAMES[:8], 3),
        (NAMES, 3),
        (["mas", "ewc"], 4),
        (["a", "b", "c", "d", "e", "mas-alpha-latest-and-more"], 4),
    ],
)
def test_a_legend_has_as_many_columns_as_fit(labels: list[str], columns: int) -> None:
    figure, (panel,) = charts.canvas(1, 1, 2.0)
    for label in labels:
        panel.plot([0], [0], label=label)
    charts.legend(figure, panel)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.x1
    assert legend._ncols == columns


def test_without_matplotlib(found: Findings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"run: pip install 'mas-ext\[demo\]'"):
        charts.pictures(found)
