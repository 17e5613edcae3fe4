"""The report of a run: a page that needs nothing beside it, its pictures, and its tables for other programs."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any, Literal, get_args

from mas_ext.comparison.charts import CHARTS, Kind, pictures
from mas_ext.comparison.formats import csv_text, latex, markdown
from mas_ext.comparison.results import Findings, over_seeds
from mas_ext.comparison.tables import confusion_counts, matrix, notes, numbers, results
from mas_ext.state.replacing import write

Format = Literal["html", "csv", "latex", "markdown"]
FORMATS: tuple[Format, ...] = get_args(Format)

PAGE, RESULTS = "report.html", "results"

# With a section for each picture, which stays away without it.
TEMPLATE = Path(__file__).with_suffix(".html")


def report(
    run: str | Path,
    out: str | Path | None = None,
    formats: Sequence[Format] = ("html",),
    kinds: Sequence[Kind] | None = None,
) -> list[Path]:
    """Write what a run found, also one that is not finished.

    Args:
        run: the directory of a run, see `mas_ext.comparison.directory`.
        out: where to write, made if it is not there; None for the run's directory.
        formats: "html", the page report.html; "latex" and "markdown", its table as results.tex and results.md;
            "csv", numbers: results.csv, accuracy/METHOD.csv and METHOD-seedN.csv, which are accuracy[t, k] with
            the names of the tasks, mean over seeds and of each, and confusion.csv.
        kinds: of files that its pictures become, "png", "pdf" and "svg"; None: "png" beside the page.

    Returns:
        The files, but for pictures and accuracies.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: a file of it is damaged.
        ModuleNotFoundError: matplotlib is not installed, and there are to be pictures.
    """
    found, folder = Findings.read(run), Path(run if out is None else out)
    paged: list[Kind] = ["png"] if "html" in formats else []
    kinds = paged if kinds is None else kinds
    drawn = {kind: pictures(found, kind) for kind in dict.fromkeys([*paged, *kinds])}
    texts = dict(written(found, formats, drawn.get("png", {})))
    folder.mkdir(parents=True, exist_ok=True)
    for kind in kinds:
        for name, picture in drawn[kind].items():
            write(folder / f"{name}.{kind}", picture)
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write(folder / name, text)
    return [folder / name for name in texts if "/" not in name]


def written(
    found: Findings, formats: Sequence[Format], drawn: Mapping[str, bytes]
) -> Iterator[tuple[str, str]]:
    """Names of files in these formats, and what is in them; drawn: the PNGs of the page."""
    for each in formats:
        if each == "html":
            yield PAGE, page(found, drawn)
        elif each == "latex":
            yield f"{RESULTS}.tex", latex(results(found), notes=notes(found))
        elif each == "markdown":
            told = "".join(f"\n{note}\n" for note in notes(found))
            yield f"{RESULTS}.md", markdown(results(found)) + told
        else:
            yield from csv_files(found)


def csv_files(found: Findings) -> Iterator[tuple[str, str]]:
    """Names of CSV files, and what is in them; without those that have nothing to show yet."""
    yield f"{RESULTS}.csv", csv_text(numbers(found))
    for learned in found.learned.values():
        begun = [each for each in learned if each.tasks]
        if begun:
            mean, _ = over_seeds(learned, lambda each: each.accuracy)
            name = learned[0].folder.name.rpartition("-seed")[0]
            yield f"accuracy/{name}.csv", csv_text(matrix(found.tasks, mean.tolist()))
        for each in begun:
            accuracy = matrix(found.tasks_of(each), each.accuracy.tolist())
            yield f"accuracy/{each.folder.name}.csv", csv_text(accuracy)
    counted = confusion_counts(found)
    if len(counted) > 1:
        yield "confusion.csv", csv_text(counted)


def page(found: Findings, drawn: Mapping[str, bytes]) -> str:
    """The page in HTML, with these PNGs in it."""
    text, setting = TEMPLATE.read_text(encoding="utf-8"), found.values["setting"]
    for name in CHARTS.keys() - drawn.keys():
        text = re.sub(rf'<section id="{name}">.*?</section>\n', "", text, flags=re.DOTALL)
    return Template(text).substitute(
        title=escape(f"{found.values['scenario']}, {setting}-incremental"),
        compared=escape(f"{', '.join(found.learned)}; seeds: {found.seeds}."),
        results=_table("numbers", results(found)),
        notes="\n".join(f"<p>{escape(note)}</p>" for note in notes(found)),
        options=_table("facts", compared(found)),
        starts=_table("facts", starts(found)),
        **{name: base64.b64encode(picture).decode() for name, picture in drawn.items()},
    )


def compared(found: Findings) -> list[list[str]]:
    """What was compared and how it was trained: names and values."""
    values = dict(found.values)
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
            title = f' data-title="{escape(rows[0][k])}"' if kind == "numbers" and i else ""
            cells.append(f"<{tag}{title}>{escape(cell)}</{tag}>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="wide"><table class="{kind}">\n' + "\n".join(lines) + "\n</table></div>"
