"""The report of a run: a page that needs nothing beside it, and its pictures."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from mas_ext.compare.charts import CHARTS, pictures
from mas_ext.compare.results import Findings
from mas_ext.compare.tables import notes, results
from mas_ext.state.replacing import write

PAGE = "report.html"

# With a section for each picture, which stays away without it.
TEMPLATE = Path(__file__).with_suffix(".html")


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
            cells.append(f"<{tag}>{escape(cell)}</{tag}>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="wide"><table class="{kind}">\n' + "\n".join(lines) + "\n</table></div>"
