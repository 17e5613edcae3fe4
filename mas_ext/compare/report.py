"""The report of a run: a page that needs nothing beside it, and its pictures."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from mas_ext.compare.charts import pictures
from mas_ext.compare.directory import write
from mas_ext.compare.results import Findings
from mas_ext.compare.tables import notes, results

PAGE = "report.html"

# By picture, in the order of the page: what it shows, and how it is read.
CAPTIONS = {
    "lam": (
        "How lam was chosen",
        "Average accuracy on validation data over lam, mean over the seeds of the choice; a ring is "
        "around what was taken, a cross at the bottom means that a training diverged.",
    ),
    "accuracy": (
        "Accuracy over time",
        "One panel per task: its accuracy on test data after so many tasks, mean over seeds, with the "
        "95 % interval as a thin line that may leave the picture. A fall to the right is forgetting; a "
        "line ends where a seed diverged. Methods stand side by side at each task, so that none hides "
        "another.",
    ),
    "matrices": (
        "Accuracy matrices",
        "A row is what was known after so many tasks, a column what became of a task; the mean over "
        "seeds, in the same colours for all methods, white where nothing was measured.",
    ),
    "forgetting": (
        "Forgetting against average accuracy",
        "Each small point is a seed, each large one the mean of a method; higher is better, and "
        "further left is less forgotten.",
    ),
    "cost": (
        "What it costs",
        "Mean duration of a training step in each task, and what the method holds beside the model "
        "after it; a line that rises is a method that grows with the tasks.",
    ),
    "importance": (
        "Importance by layer",
        "What the methods hold at the end, mean over seeds: the share of each layer in the sum of all "
        "importance, and the mean over the layer's parameters divided by that over all parameters, "
        "drawn from 1: to the right a parameter counts more than the average one.",
    ),
}

TEMPLATE = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))


def report(run: str | Path, out: str | Path | None = None) -> Path:
    """Write report.html and its pictures, also of a run that is not finished.

    Args:
        run: the directory of a run, see `mas_ext.compare.directory`.
        out: where to write, made if it is not there; None for the run's directory.

    Returns:
        The page.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: a file of it is damaged.
        ModuleNotFoundError: matplotlib is not installed.
    """
    found = Findings.read(run)
    drawn = pictures(found)
    folder = Path(run if out is None else out)
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in drawn.items():
        write(folder / f"{name}.png", picture)
    write(folder / PAGE, page(found, drawn))
    return folder / PAGE


def page(found: Findings, drawn: Mapping[str, bytes]) -> str:
    """The page in HTML, with these PNGs in it."""
    config, figures = found.config, []
    for name, (heading, caption) in CAPTIONS.items():
        if name in drawn:
            image = base64.b64encode(drawn[name]).decode()
            figures += [
                f"<h2>{escape(heading)}</h2>",
                f'<figure><div class="wide"><img alt="{escape(heading)}" '
                f'src="data:image/png;base64,{image}"></div>',
                f"<figcaption>{escape(caption)}</figcaption></figure>",
            ]
    return TEMPLATE.substitute(
        title=escape(f"{config.scenario}, {config.settings.setting}-incremental"),
        compared=escape(f"{', '.join(config.methods)}; seeds: {config.seeds}."),
        results=_table("numbers", results(found)),
        notes="".join(f"<p>{escape(note)}</p>\n" for note in notes(found)),
        figures="".join(f"{line}\n" for line in figures),
        options=_table("facts", compared(found)),
        starts=_table("facts", starts(found)),
    )


def compared(found: Findings) -> list[list[str]]:
    """What was compared and how it was trained: names and values."""
    values = {**found.config.values(), "device": found.device}
    methods = values.pop("methods")
    rows = [[name, _text(value)] for name, value in values.items()]
    for name, given in methods.items():
        text = ", ".join(f"{option} = {_text(value)}" for option, value in given.items())
        rows.append([f"methods.{name}", text or "its defaults"])
    return rows


def starts(found: Findings) -> list[list[str]]:
    """Where and when the run was started: names and values, several where a later start found others."""
    names = dict.fromkeys(name for start in found.starts for name in start)
    each = {n: dict.fromkeys(_text(start.get(n)) for start in found.starts) for n in names}
    return [[name, "; ".join(values)] for name, values in each.items()]


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value))
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _table(kind: str, rows: Sequence[Sequence[str]]) -> str:
    """Cells as they are; of "numbers" the first row are titles, of "facts" the first column."""
    lines = []
    for i, row in enumerate(rows):
        cells = []
        for k, cell in enumerate(row):
            tag = "th" if (k if kind == "facts" else i) == 0 else "td"
            cells.append(f"<{tag}>{escape(cell)}</{tag}>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="wide"><table class="{kind}">\n' + "\n".join(lines) + "\n</table></div>"
