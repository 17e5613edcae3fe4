"""Pictures of what a run found; a method has the same colour, marker and line in all of them."""

from __future__ import annotations

import io
import math
from operator import attrgetter
from typing import Any, Literal, get_args

import torch

from mas_ext.comparison.results import (
    FEWEST,
    Findings,
    Learned,
    confusion_shares,
    over_seeds,
    shares,
)
from mas_ext.scenarios.datasets import import_extra

# Okabe and Ito's, which colour-blind people tell apart, without yellow, which is too light for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
MARKERS = "osD^vP<>Xp*hd8H1234+x"
LINES = ("-", "--", ":")
WIDTH = 5.5  # inches: letters are large enough on a page of 400 pixels

Kind = Literal["png", "pdf", "svg"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# Letters stay letters that can be searched and edited (Type 3 fonts are refused by many publishers), and the
# same picture is the same file.
SAVING = {"pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "mas_ext"}
UNDATED: dict[Kind, dict[str, None]] = {
    "png": {},
    "pdf": {"CreationDate": None},
    "svg": {"Date": None},
}


def look(i: int) -> dict[str, Any]:
    """Colour, marker and line of the i-th curve: no two of up to 21 are the same."""
    return {
        "color": COLOURS[i % len(COLOURS)],
        "marker": MARKERS[i % len(MARKERS)],
        "linestyle": LINES[i // len(COLOURS) % len(LINES)],
        "markersize": 5,
        "linewidth": 1.3,
    }


def style(findings: Findings, method: str) -> dict[str, Any]:
    """The look of a method in all pictures."""
    return look(list(findings.learned).index(method))


def pictures(findings: Findings, kind: Kind = "png") -> dict[str, bytes]:
    """Files of this kind by name; without those that have nothing to show yet.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import_extra("matplotlib")
    drawn = {name: draw(findings) for name, draw in CHARTS.items()}
    return {name: saved(figure, kind) for name, figure in drawn.items() if figure is not None}


def saved(figure: Any, kind: Kind) -> bytes:
    """A figure as a file of this kind."""
    file = io.BytesIO()
    with import_extra("matplotlib").rc_context(SAVING):
        figure.savefig(file, dpi=220, format=kind, metadata=UNDATED[kind])
    return file.getvalue()


def canvas(
    count: int, columns: int, height: float, grid: bool = True, **how: Any
) -> tuple[Any, list[Any]]:
    """A figure and its panels, in rows of so many columns.

    height: of a panel, in inches. grid: whether panels have grid lines. how: further arguments of subplots.
    """
    from matplotlib.figure import Figure  # not pyplot: no global state, no window

    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(WIDTH, 0.6 + rows * height), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, **how).flat)
    for empty in panels[count:]:
        empty.remove()
    for panel in panels[:count] if grid else ():
        panel.grid(alpha=0.3)
    return figure, panels[:count]


def legend(figure: Any, panel: Any, columns: int = 4) -> None:
    """The legend of a panel's lines, above all panels: in so many columns, or in fewer that fit."""
    lines = panel.get_legend_handles_labels()
    while True:
        made = figure.legend(*lines, loc="outside upper center", ncols=columns, frameon=False)
        if columns == 1 or made.get_window_extent().width <= figure.bbox.width:
            return
        made.remove()
        columns -= 1


def _entitle(panel: Any, method: str) -> None:
    """Write the method above a small panel; of module:Class in two lines."""
    lines = method.split(":")
    small = max(map(len, lines)) > 22
    panel.set_title(":\n".join(lines), fontsize="x-small" if small else "medium")


def begun(findings: Findings) -> dict[str, list[Learned]]:
    """The methods with some task that is over."""
    return {m: seeds for m, seeds in findings.learned.items() if any(s.tasks for s in seeds)}


def _beside(i: int, count: int, tasks: int) -> Any:
    """x of tasks 1 to T for the i-th of so many methods, side by side, so that none hides another."""
    return torch.arange(1, tasks + 1) + 0.5 * ((i + 0.5) / count - 0.5)


def _over_tasks(panel: Any, tasks: int) -> None:
    """Let x be the task."""
    panel.set_xlim(0.5, tasks + 0.5)
    panel.set_xticks(range(1, tasks + 1, math.ceil(tasks / 10)))


def _limits(values: Any) -> tuple[float, float]:
    """Limits of an axis for these values in %, NaN left out: some room around them, at least a point."""
    known = values[~values.isnan()]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 100.0)
    room = max(0.1 * (high - low), 0.5)
    return low - room, high + room


def accuracy_chart(findings: Findings) -> Any:
    """Accuracy after each task: one panel per task, and one for the mean of the tasks so far."""
    methods, count = begun(findings), len(findings.tasks)
    if not methods:
        return None
    # A number for a name would be taken for that of the task.
    titles = [
        f"task {k}" + (f": {name}" if name and not name.isdigit() else "")
        for k, name in enumerate(findings.tasks, 1)
    ]
    titles.append("mean of the tasks so far")
    figure, panels = canvas(count + 1, 2, 2.3, sharex=True, sharey=True)
    within: list[Any] = []
    for i, (method, seeds) in enumerate(methods.items()):
        each = torch.stack([torch.hstack([s.accuracy, s.average[:, None]]) for s in seeds])
        mean, half = over_seeds(seeds, lambda s: torch.hstack([s.accuracy, s.average[:, None]]))
        # Intervals would leave no room for means.
        within += each if len(seeds) < FEWEST else [mean]
        how = {"label": method, **style(findings, method)}
        x = _beside(i, len(methods), count)
        for k, (panel, y) in enumerate(zip(panels, 100 * mean.T, strict=True)):
            if len(seeds) < FEWEST:
                for seed in 100 * each[:, :, k]:
                    panel.plot(x, seed, ".", color=how["color"], markersize=3, alpha=0.6)
            else:
                error = 100 * half[:, k].nan_to_num()
                panel.vlines(x, y - error, y + error, color=how["color"], linewidth=0.6, alpha=0.6)
            panel.plot(x, y, **how)
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title, fontsize="medium", parse_math=False)  # a name may have dollars
        _over_tasks(panel, count)
    panels[0].set_ylim(_limits(100 * torch.stack(within)))
    figure.supxlabel("tasks learned", fontsize="medium")
    figure.supylabel("accuracy in %", fontsize="medium")
    legend(figure, panels[0])
    return figure


def matrices_chart(findings: Findings) -> Any:
    """accuracy[t, k] as colours, and as numbers where there is room for them: one panel per method."""
    methods, count = begun(findings), len(findings.tasks)
    if not methods:
        return None
    found = {method: 100 * over_seeds(s, lambda s: s.accuracy)[0] for method, s in methods.items()}
    values = torch.stack(list(found.values()))
    low, high = _limits(values)
    if bool((values.nan_to_num() >= 0).all()):  # else they are scores, which may be negative
        low, high = max(low, 0.0), min(high, 100.0)
    figure, panels = canvas(len(found), 2, 2.3, grid=False)
    for panel, (method, matrix) in zip(panels, found.items(), strict=True):
        image = panel.imshow(matrix.numpy(), cmap="cividis", vmin=low, vmax=high)
        _entitle(panel, method)
        panel.tick_params(labelsize="small")
        ticks = range(0, count, math.ceil(count / 10))
        panel.set_xticks(ticks, [k + 1 for k in ticks])
        panel.set_yticks(ticks, [k + 1 for k in ticks])
        for t, k in (~matrix.isnan() * (count <= 12)).nonzero().tolist():
            value = float(matrix[t, k])
            text = f"{value:.0f}" if count > 5 else f"{value:.1f}"
            colour = "white" if image.norm(value) < 0.5 else "black"
            panel.text(k, t, text, ha="center", va="center", color=colour, fontsize=7 - (count > 8))
    figure.supxlabel("accuracy on task", fontsize="medium")
    figure.supylabel("tasks learned", fontsize="medium")
    figure.colorbar(image, ax=panels, label="accuracy in %", aspect=40)
    return figure


def confusion_chart(findings: Findings) -> Any:
    """Of each class the share of its test samples that is taken for each class: one panel per method."""
    places, found = confusion_shares(findings)
    if not found:
        return None
    tasks = [task for task, _ in places]
    if len(places) <= 20:
        by, ticks = "class", [*range(len(places))]
        names = ["-" if label is None else str(label) for _, label in places]
    else:  # one for each task, in its middle
        of_task = {task: [i for i, t in enumerate(tasks) if t == task] for task in tasks}
        by, ticks = "class, by number of its task", [sum(p) / len(p) for p in of_task.values()]
        names = [str(task + 1) for task in of_task]
    figure, panels = canvas(len(found), 2, 2.5, grid=False)
    norm = import_extra("matplotlib.colors").PowerNorm(0.5, 0, 100)
    for panel, (method, taken) in zip(panels, found.items(), strict=True):
        image = panel.imshow(taken.numpy(), cmap="cividis", norm=norm)
        _entitle(panel, method)
        panel.tick_params(labelsize="small")
        for border in (i - 0.5 for i in range(1, len(tasks)) if tasks[i] != tasks[i - 1]):
            panel.axhline(border, color="grey", linewidth=0.5)
            panel.axvline(border, color="grey", linewidth=0.5)
        panel.set_xticks(ticks, names)
        panel.set_yticks(ticks, names)
        for i, k in ((taken >= 0.5) * (len(places) <= 12)).nonzero().tolist():
            value = float(taken[i, k])
            colour = "white" if image.norm(value) < 0.5 else "black"
            panel.text(k, i, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=6)
    figure.supxlabel(f"taken for {by}", fontsize="medium")
    figure.supylabel(by, fontsize="medium")
    figure.colorbar(image, ax=panels, label="share of the class in %", aspect=40)
    return figure


def forgetting_chart(findings: Findings) -> Any:
    """Forgetting against average accuracy: small points for seeds, a large one for their mean."""
    methods = [name for name in findings.learned if not findings.diverged(name)]
    results = {name: found for name in methods if (found := findings.finished(name))}
    if not results or len(findings.tasks) == 1:
        return None
    figure, (panel,) = canvas(1, 1, 4.2)
    for method, each in results.items():
        x, y = ([100 * found[key] for found in each] for key in ("forgetting", "average_accuracy"))
        how = {**style(findings, method), "linestyle": ""}
        panel.plot(x, y, **{**how, "markersize": 4}, alpha=0.4)
        mean = sum(x) / len(x), sum(y) / len(y)
        large = {**how, "markersize": 11, "markeredgewidth": 2}
        panel.plot(*mean, **large, markerfacecolor="none", label=method)
    for key, limit in (("forgetting", panel.set_xlim), ("average_accuracy", panel.set_ylim)):
        limit(_limits(torch.tensor([100 * one[key] for each in results.values() for one in each])))
    panel.set(xlabel="forgetting in % points", ylabel="average accuracy in %")
    legend(figure, panel)
    return figure


def cost_chart(findings: Findings) -> Any:
    """Duration of a step and what is held, by task."""
    methods, count = begun(findings), len(findings.tasks)
    if not methods:
        return None
    figure, panels = canvas(2, 1, 2.6)
    for i, (method, seeds) in enumerate(methods.items()):
        seconds, held = (
            over_seeds(seeds, attrgetter(k))[0] for k in ("step_seconds", "held_bytes")
        )
        for panel, y in zip(panels, (1e3 * seconds, 1e-6 * held), strict=True):
            x = _beside(i, len(methods), count)
            panel.plot(x, y, label=method, **style(findings, method))
    for panel, label in zip(panels, ("ms per step", "MB held beside the model"), strict=True):
        panel.set(xlabel="task", ylabel=label)
        high = panel.get_ylim()[1]
        panel.set_ylim(-0.03 * high, 1.03 * high)
        _over_tasks(panel, count)
    legend(figure, panels[0])
    return figure


def importance_chart(findings: Findings) -> Any:
    """By layer the share of all importance, and the mean per parameter over that of all parameters."""
    found = {m: s for m, seeds in findings.learned.items() if (s := shares(seeds))}
    if not found:
        return None
    layers = list(dict.fromkeys(layer for each in found.values() for layer in each))
    height = min(max(0.35, 0.13 * len(found) + 0.15) * len(layers), 12.0)
    figure, panels = canvas(2, 1, 0.8 + height, grid=False, sharey=True)
    for i, (method, each) in enumerate(found.items()):
        y = [layers.index(layer) + 0.8 * ((i + 0.5) / len(found) - 0.5) for layer in each]
        how = {**style(findings, method), "linestyle": ""}
        for panel, x, base in zip(panels, zip(*each.values(), strict=True), (0, 1), strict=True):
            panel.hlines(y, base, x, color=how["color"], linewidth=1.5)
            panel.plot(x, y, label=method, **how)
    for panel, label in zip(
        panels, ("share of all importance", "mean of its parameters (of all: 1)"), strict=True
    ):
        for i in range(1, len(layers), 2):
            panel.axhspan(i - 0.5, i + 0.5, color="#f0f0f0", zorder=0)
        panel.set_xlabel(label)
    panels[0].set_xlim(left=0)
    panels[1].set_xscale("log")
    low, high = panels[1].get_xlim()
    panels[1].set_xlim(min(low, 0.1), max(high, 10))  # decades have labels that don't overlap
    panels[1].axvline(1, color="grey", linewidth=0.8)
    panels[0].set_yticks(range(len(layers)), layers)
    panels[0].set_ylim(len(layers) - 0.5, -0.5)
    legend(figure, panels[0])
    return figure


def lam_chart(findings: Findings) -> Any:
    """Average accuracy on validation data over lam; what was chosen has a ring."""
    if not findings.grid:
        return None
    figure, (panel,) = canvas(1, 1, 3.6)
    tried = [lam for choice in findings.grid.values() for lam in choice.means]
    if min(tried) == 0:
        panel.set_xscale("symlog", linthresh=min((x for x in tried if x), default=1.0))
    else:
        panel.set_xscale("log")
    for i, (method, choice) in enumerate(findings.grid.items()):
        how = style(findings, method)
        known = sorted((lam, 100 * y) for lam, y in choice.means.items() if y is not None)
        best = [each for each in known if each[0] == choice.lam]
        x, y = torch.tensor(known).reshape(-1, 2).T
        panel.plot(x, y, label=method, **how)
        lost = [lam for lam, y in choice.means.items() if y is None]
        bottom, cross = panel.get_xaxis_transform(), {"markersize": 9, "color": how["color"]}
        panel.plot(lost, [0.03 + 0.05 * i] * len(lost), "x", transform=bottom, **cross)
        ring = {"markersize": 12 + 4 * i, "markerfacecolor": "none", "color": how["color"]}
        panel.plot(*torch.tensor(best).reshape(-1, 2).T, "o", **ring)
    panel.set(xlabel="lam", ylabel="average accuracy on validation data in %")
    legend(figure, panel)
    return figure


CHARTS = {
    "accuracy": accuracy_chart,
    "matrices": matrices_chart,
    "confusion": confusion_chart,
    "forgetting": forgetting_chart,
    "cost": cost_chart,
    "importance": importance_chart,
    "lam": lam_chart,
}
