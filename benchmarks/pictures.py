"""Pictures of results: those of single benchmarks beside their JSON, and those of docs/PERFORMANCE.md."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from benchmarks.files import Result, batch, named
from mas_ext.comparison.charts import WIDTH, saved

matplotlib.use("Agg")

OWN, OTHER, DARK = "#1a6faf", "#b9bec4", "#7a8087"
# By the names of forms in the results.
COLORS = {
    "attach": OWN,
    "add_grad_": "#7fb2de",
    "attach, proximal": "#2a9d8f",
    "proximal_": "#2a9d8f",
    "penalty() in the loss": "#8a63b8",
    "penalty() + backward": "#8a63b8",
    "penalty(), value only": "#c9a227",
    "eager autograd": DARK,
    "Avalanche's MASPlugin": "#d0722c",
}
MODES = {"gradient": "#d0722c", "proximal": OWN}


# -- one result ------------------------------------------------------------------------------------


def penalty(result: Result, path: Path) -> None:
    """Left: time of one call by form. Right: time over the number of tasks."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 4.8), width_ratios=(1.5, 1), layout="constrained"
    )
    forms = result["cold"]["forms"]
    first = [row for row in forms if row["tasks"] == 1]
    ratios = [row["ratio"]["median"] for row in first]
    _bars(left, first, [_milliseconds(row) for row in first], ratios)
    left.set_xlabel("milliseconds a call, and times add_grad_")
    left.set_title("one task: this library (blue), other ways (grey)", fontsize=10)
    for name, color in (("add_grad_", OWN), ("eager autograd", DARK)):
        rows = [row for row in forms if row["name"] == name]
        tasks = [row["tasks"] for row in rows]
        times = [1e3 * row["seconds"]["median"] for row in rows]
        right.plot(tasks, times, "o-", color=color)
        right.annotate(
            f"{name}\n{rows[-1]['held']:,.0f} bytes a parameter",
            (tasks[-1], times[-1]),
            (0, 9),
            textcoords="offset points",
            ha="right" if len(tasks) > 1 else "left",
            color=color,
            fontsize=9,
        )
    right.set_xscale("log")
    right.set_yscale("log")
    right.margins(y=0.2)
    right.set_xlabel("tasks")
    right.set_ylabel("milliseconds a call")
    right.set_title("any number of tasks", fontsize=10)
    _light(right)
    title = f"{result['dtype']}, {_place(result)}, cold caches"
    figure.suptitle(f"{result['model']}, {result['parameters']:,} parameters, {title}", fontsize=11)
    _write(figure, path)


def importance(result: Result, path: Path) -> None:
    """Left: time of one batch by form. Right: memory at its peak."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
    rows = result["forms"]
    ratios = [row["to_batch"]["median"] for row in rows]
    _bars(left, rows, [_milliseconds(row) for row in rows], ratios)
    left.set_xlabel("milliseconds a batch, and times the batch approximation")
    rows = [row for row in rows if row["memory"] is not None]
    megabytes = [{"median": row["memory"] / 1e6} for row in rows]
    ratios = [row["memory_to_training"] for row in rows]
    _bars(right, rows, megabytes, ratios)
    right.set_xlabel("megabytes at the peak, and times forward + backward")
    figure.suptitle(
        f"{result['model']}, {result['parameters']:,} parameters, batch of {batch(result)}, {_place(result)}; "
        "this library in blue",
        fontsize=11,
    )
    _write(figure, path)


def _milliseconds(row: Result) -> dict[str, float]:
    return {key: 1e3 * value for key, value in row["seconds"].items()}


def _place(result: Result) -> str:
    processor = result["machine"]["cpu" if result["device"] == "cpu" else "gpu"]
    return f"{processor}, {result['threads']} threads"


def _bars(
    axes: Axes, rows: Sequence[Result], values: Sequence[Result], ratios: Sequence[float]
) -> None:
    """A bar for each row from the top down: the median, its interval (if any), and a ratio behind it."""
    places = range(len(rows), 0, -1)
    colors = [OWN if row.get("moved") or row["name"] == "exact" else OTHER for row in rows]
    names = [row["name"] for row in rows]
    axes.barh(places, [value["median"] for value in values], color=colors, tick_label=names)
    for y, value, ratio in zip(places, values, ratios, strict=True):
        low, high = (value.get(key, value["median"]) for key in ("low", "high"))
        axes.plot([low, high], [y, y], color="#333333", linewidth=1)
        label = f"{ratio:.2g}x" if ratio < 100 else f"{ratio:.0f}x"
        end = (max(high, value["median"]), y)
        axes.annotate(label, end, (4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_xlim(0, 1.12 * max(axes.get_xlim()))
    axes.spines[["top", "right"]].set_visible(False)


# -- docs/PERFORMANCE.md ---------------------------------------------------------------------------


def roofline(results: Sequence[Result], path: Path) -> None:
    """Bytes of a call against bytes a second; the roof is a plain copy in the same run."""
    figure, panels = plt.subplots(2, 1, figsize=(WIDTH, 7.4), layout="constrained")
    titles = ("each call after other work has gone through the caches", "called again and again")
    for axes, part, title in zip(panels, ("cold", None), titles, strict=True):
        for result in results:
            measured = result if part is None else result[part]
            _roof(axes, measured, result["parameters"], named(result))
        axes.set_xscale("log")
        axes.set_ylim(0, 1.25 * axes.get_ylim()[1])  # above all markers there is room for names
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("megabytes that a call has to move, at the least")
        _light(axes)
    figure.supylabel("GB/s", fontsize=10)
    _legend(figure, panels[0], 2)
    _write(figure, path)


def _roof(axes: Axes, measured: Result, parameters: int, name: str) -> None:
    roof = max(measured["bandwidth"].values()) / 1e9
    rows = [row for row in measured["forms"] if row["moved"] and row["tasks"] == 1]
    megabytes = [row["moved"] * parameters / 1e6 for row in rows]
    ends = [0.8 * min(megabytes), 1.25 * max(megabytes)]
    axes.plot(ends, [roof, roof], color="#333333", linewidth=2, label="fastest plain copy")
    middle = (ends[0] * ends[1]) ** 0.5
    above: dict[str, Any] = {"ha": "center", "va": "top", "fontsize": 8}
    axes.text(middle, 0.98, name, transform=axes.get_xaxis_transform(), **above)
    for row, x in zip(rows, megabytes, strict=True):
        form = row["name"].removesuffix(", graph")
        look: dict[str, Any] = {"marker": "o", "color": COLORS[form], "linestyle": "none"}
        if form != row["name"]:
            look |= {"marker": "D", "fillstyle": "none"}
        axes.plot(x, row["fraction"] * roof, **look, markersize=6, label=row["name"])


def steps(results: Sequence[Result], forms: Sequence[str], path: Path) -> None:
    """By which share a step is longer: a panel for each optimizer and dtype, a line for each form."""
    kinds = sorted(
        {(r["optimizer"], r["dtype"]) for r in results},
        key=lambda kind: (kind[1] != "float32", kind[0] != "sgd"),
    )
    shown = [[r for r in results if (r["optimizer"], r["dtype"]) == kind] for kind in kinds]
    heights = [len(each) for each in shown]
    figure, panels = plt.subplots(
        len(kinds),
        1,
        figsize=(WIDTH, 1.1 * len(kinds) + 0.55 * sum(heights)),
        height_ratios=heights,
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for axes, kind, found in zip(panels.flat, kinds, shown, strict=True):
        for y, result in enumerate(found):
            _longer(axes, result, y, forms)
            axes.axhline(y + 0.5, color="#dddddd", linewidth=1)
        axes.axvline(0, color="#333333", linewidth=1)
        axes.set_xscale("symlog", linthresh=10)
        _percent(axes.xaxis)
        axes.set_yticks(range(len(found)), map(named, found))
        axes.set_ylim(len(found) - 0.5, -0.5)
        axes.set_title(f"{kind[0]}, {kind[1]}", fontsize=10)
        _light(axes, "x")
    panels[-1][0].set_xlabel("% by which a step is longer (linear up to 10)")
    _legend(figure, panels[0][0], 2)
    _write(figure, path)


def _percent(axis: Axis) -> None:
    """Ticks of a scale that is linear up to 10 %, then logarithmic."""
    axis.set_major_locator(FixedLocator([-10, -5, 0, 5, 10, 20, 50, 100, 300, 1000, 3000]))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def _longer(axes: Axes, result: Result, y: float, forms: Sequence[str]) -> None:
    first = min(row["tasks"] for row in result["forms"] if row["tasks"])
    for row in result["forms"]:
        if row["name"] in forms and row["tasks"] == first:
            place = y + 0.12 * (forms.index(row["name"]) - len(forms) / 2)
            low, middle, high = (100 * row["extra"][key] for key in ("low", "median", "high"))
            color = COLORS[row["name"]]
            axes.plot([low, high], [place, place], color=color, linewidth=1.4)
            axes.plot(middle, place, "o", color=color, markersize=4.5, label=row["name"])


def tasks(results: Sequence[Result], path: Path) -> None:
    """Extra time and memory over the number of tasks, SGD in float32."""
    figure, panels = plt.subplots(2, 1, figsize=(WIDTH, 8.2), layout="constrained")
    shown = [r for r in results if (r["optimizer"], r["dtype"]) == ("sgd", "float32")]
    values = (
        lambda row, result: 100 * row["extra"]["median"],
        lambda row, result: row["extra_memory"] / result["parameters"],
    )
    labels = ("% by which a step is longer", "bytes a parameter more at the peak")
    panels[0].set_yscale("symlog", linthresh=10)
    panels[1].set_yscale("log")
    for axes, value, label in zip(panels, values, labels, strict=True):
        for result, marker in zip(shown, "os^Dv", strict=False):
            for form in ("attach", "eager autograd"):
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
        _light(axes)
    _percent(panels[0].yaxis)
    for axis in (panels[0].xaxis, panels[1].xaxis, panels[1].yaxis):
        axis.set_major_formatter("{x:g}")
    _legend(figure, panels[0], 2)
    _write(figure, path)


def lam(result: Result, path: Path) -> None:
    """Every run as a point and their means as lines; runs that diverged as crosses at the bottom."""
    figure, panels = plt.subplots(
        len(result["rates"]),
        1,
        figsize=(WIDTH, 3 * len(result["rates"])),
        sharey=True,
        layout="constrained",
    )
    for axes, (optimizer, rate) in zip(panels, result["rates"].items(), strict=True):
        _accuracies(axes, [r for r in result["runs"] if r["optimizer"] == optimizer])
        axes.set_title(f"{optimizer}, learning rate {rate:g}", fontsize=10)
    figure.supylabel("average accuracy after the last task, %", fontsize=10)
    figure.suptitle(
        f"split MNIST, 5 tasks, MLP 784-{'-'.join(map(str, result['hidden']))}", fontsize=11
    )
    _write(figure, path)


def _accuracies(axes: Axes, runs: Sequence[Result]) -> None:
    forgetful = [100 * r["accuracy"] for r in runs if r["lam"] == 0]
    if forgetful:
        axes.axhline(statistics.mean(forgetful), color=OTHER, linestyle="--", label="no penalty")
    for mode, color in MODES.items():
        own = [r for r in runs if r["mode"] == mode and r["lam"] > 0]
        crosses = [r["lam"] for r in own if r["accuracy"] is None]
        points = [(r["lam"], 100 * r["accuracy"]) for r in own if r["accuracy"] is not None]
        lams = sorted({x for x, _ in points} - set(crosses))
        means = [statistics.mean(y for x, y in points if x == each) for each in lams]
        axes.plot(lams, means, color=color, label=mode)
        axes.plot(*zip(*points, strict=True), ".", color=color, markersize=5)
        if crosses:
            label = f"{mode}: diverged"
            bottom: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False}
            axes.plot(crosses, [0.03] * len(crosses), "x", color=color, label=label, **bottom)
    axes.set_xscale("log")
    axes.set_xlabel("lam")
    axes.legend(fontsize=9)
    _light(axes)


# -- any picture -----------------------------------------------------------------------------------


def _light(axes: Axes, lines: Any = "both") -> None:
    axes.grid(alpha=0.25, axis=lines)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, axes: Axes, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))
    figure.legend(
        by_label.values(), by_label.keys(), loc="outside lower center", ncols=columns, fontsize=9
    )


def _write(figure: Figure, path: Path) -> None:
    path.write_bytes(saved(figure, "svg"))
    plt.close(figure)
