"""The pictures of docs/PERFORMANCE.md."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from benchmarks.files import OTHER, OWN
from benchmarks.step import AVALANCHE, DTYPES, EAGER
from mas_ext.compare.bench import GRAPH

MODES = {"gradient": "#d0722c", "proximal": OWN}

Result = Mapping[str, Any]
Named = Callable[[Result], str]

COLORS = {
    "attach": OWN,
    "add_grad_": "#7fb2de",
    "attach, proximal": "#2a9d8f",
    "proximal_": "#2a9d8f",
    "penalty() in the loss": "#8a63b8",
    "penalty() + backward": "#8a63b8",
    "penalty(), value only": "#c9a227",
    EAGER: "#7a8087",
    AVALANCHE: "#d0722c",
}


def roofline(results: Sequence[Result], named: Named, path: Path) -> None:
    """Bytes of a call against bytes a second; the roof is a plain copy in the same run."""
    figure, panels = plt.subplots(1, 2, figsize=(11.5, 4.6), layout="constrained")
    titles = ("each call after other work has gone through the caches", "called again and again")
    for axes, part, title in zip(panels, ("cold", None), titles, strict=True):
        for result in results:
            measured = result if part is None else result[part]
            _roof(axes, measured, result["parameters"], named(result))
        axes.set_xscale("log")
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        axes.margins(x=0.25)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("megabytes that a call has to move, at the least")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("GB/s")
    _legend(figure, panels[0], 5)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _roof(axes: Axes, measured: Result, parameters: int, name: str) -> None:
    roof = max(measured["bandwidth"].values()) / 1e9
    rows = [row for row in measured["forms"] if row["moved"] and row["tasks"] == 1]
    megabytes = [row["moved"] * parameters / 1e6 for row in rows]
    ends = [0.8 * min(megabytes), 1.25 * max(megabytes)]
    axes.plot(ends, [roof, roof], color="#333333", linewidth=2, label="fastest plain copy")
    behind = {"textcoords": "offset points", "va": "center", "fontsize": 9}
    axes.annotate(name, (ends[1], roof), (5, 0), **behind)
    for row, x in zip(rows, megabytes, strict=True):
        replayed = row["name"].endswith(GRAPH)
        look: dict[str, Any] = {"marker": "D", "fillstyle": "none"} if replayed else {"marker": "o"}
        look |= {"color": COLORS[row["name"].removesuffix(GRAPH)], "linestyle": "none"}
        axes.plot(x, row["fraction"] * roof, **look, markersize=6, label=row["name"])


def steps(results: Sequence[Result], named: Named, forms: Sequence[str], path: Path) -> None:
    """By which share a step is longer: a panel for each optimizer and dtype, a line for each form."""
    kinds = sorted(
        {(r["optimizer"], r["dtype"]) for r in results},
        key=lambda k: (DTYPES.index(k[1]), k[0] != "sgd"),
    )
    names = [*dict.fromkeys(map(named, results))]
    height = 0.7 * len(names) + 1.0
    rows = (len(kinds) + 1) // 2
    figure, panels = plt.subplots(
        rows, 2, figsize=(11.5, rows * height), sharey=True, squeeze=False, layout="constrained"
    )
    for axes in panels.flat[len(kinds) :]:
        axes.set_visible(False)
    for axes, kind in zip(panels.flat, kinds, strict=False):
        for result in results:
            if (result["optimizer"], result["dtype"]) == kind:
                _longer(axes, result, len(names) - names.index(named(result)), forms)
        axes.axvline(0, color="#333333", linewidth=1)
        for y in range(1, len(names)):
            axes.axhline(y + 0.5, color="#dddddd", linewidth=1)
        axes.set_xscale("symlog", linthresh=10)
        _percent(axes.xaxis)
        axes.set_yticks([len(names) - i for i in range(len(names))], names)
        axes.set_title(f"{kind[0]}, {kind[1]}", fontsize=10)
        axes.set_xlabel("% by which a step is longer (linear up to 10)")
        axes.grid(alpha=0.25, axis="x")
        axes.spines[["top", "right"]].set_visible(False)
    _legend(figure, panels[0][0], 6)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _percent(axis: Axis) -> None:
    """Ticks of a scale that is linear up to 10 %, then logarithmic."""
    axis.set_major_locator(
        FixedLocator([-10, -5, 0, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000])
    )
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def _longer(axes: Axes, result: Result, y: float, forms: Sequence[str]) -> None:
    first = min(row["tasks"] for row in result["forms"] if row["tasks"])
    for row in result["forms"]:
        if row["name"] in forms and row["tasks"] == first:
            place = y + 0.12 * (len(forms) / 2 - forms.index(row["name"]))
            low, middle, high = (100 * row["extra"][key] for key in ("low", "median", "high"))
            color = COLORS[row["name"]]
            axes.plot([low, high], [place, place], color=color, linewidth=1.4)
            axes.plot(middle, place, "o", color=color, markersize=4.5, label=row["name"])


def _legend(figure: Figure, axes: Axes, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))
    figure.legend(
        by_label.values(), by_label.keys(), loc="outside lower center", ncols=columns, fontsize=9
    )


def tasks(results: Sequence[Result], named: Named, path: Path) -> None:
    """Extra time and memory over the number of tasks, SGD in float32."""
    figure, panels = plt.subplots(1, 2, figsize=(11.5, 4.4), layout="constrained")
    shown = [r for r in results if (r["optimizer"], r["dtype"]) == ("sgd", DTYPES[0])]
    values = (
        lambda row, result: 100 * row["extra"]["median"],
        lambda row, result: row["extra_memory"] / result["parameters"],
    )
    labels = ("% by which a step is longer", "bytes a parameter more at the peak")
    panels[0].set_yscale("symlog", linthresh=10)
    panels[1].set_yscale("log")
    for axes, value, label in zip(panels, values, labels, strict=True):
        for result, marker in zip(shown, "os^Dv", strict=False):
            for form in ("attach", EAGER):
                rows = [row for row in result["forms"] if row["name"] == form]
                points = [(row["tasks"], value(row, result)) for row in rows]
                axes.plot(
                    *zip(*points, strict=True),
                    marker=marker,
                    color=COLORS[form],
                    label=f"{named(result)}, {form}",
                )
        axes.set_xscale("log")
        axes.set_xlabel("tasks")
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    _percent(panels[0].yaxis)
    for axis in (panels[0].xaxis, panels[1].xaxis, panels[1].yaxis):
        axis.set_major_formatter("{x:g}")
    _legend(figure, panels[0], 3)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def lam(result: Result, path: Path) -> None:
    """Every run as a point and their means as lines; runs that diverged as crosses at the bottom."""
    figure, panels = plt.subplots(
        1, len(result["rates"]), figsize=(11, 4), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, optimizer in zip(panels[0], result["rates"], strict=True):
        _plot_optimizer(axes, [r for r in result["runs"] if r["optimizer"] == optimizer])
        axes.set_title(f"{optimizer}, learning rate {result['rates'][optimizer]:g}", fontsize=10)
    panels[0][0].set_ylabel("average accuracy after the last task, %")
    figure.suptitle(
        f"split MNIST, 5 tasks, MLP 784-{'-'.join(map(str, result['hidden']))}", fontsize=11
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _plot_optimizer(axes: Axes, runs: Sequence[Result]) -> None:
    forgetful = [100 * r["accuracy"] for r in runs if r["lam"] == 0]
    if forgetful:
        axes.axhline(statistics.mean(forgetful), color=OTHER, linestyle="--", label="no penalty")
    for mode, color in MODES.items():
        by_lam: dict[float, list[float]] = {}
        crosses = []
        for r in runs:
            if r["mode"] == mode and r["lam"] > 0:
                if r["accuracy"] is None:
                    crosses.append(r["lam"])
                else:
                    by_lam.setdefault(r["lam"], []).append(100 * r["accuracy"])
        lams = sorted(by_lam.keys() - set(crosses))
        axes.plot(lams, [statistics.mean(by_lam[x]) for x in lams], color=color, label=mode)
        for x, values in by_lam.items():
            axes.plot([x] * len(values), values, ".", color=color, markersize=5)
        if crosses:
            label = f"{mode}: diverged"
            bottom = {"transform": axes.get_xaxis_transform(), "clip_on": False}
            axes.plot(crosses, [0.03] * len(crosses), "x", color=color, label=label, **bottom)
    axes.set_xscale("log")
    axes.set_xlabel("lam")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
