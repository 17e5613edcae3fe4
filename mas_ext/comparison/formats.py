"""Tables of text, the first row being their titles, as CSV, LaTeX and Markdown."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence

Table = Sequence[Sequence[str]]

# What LaTeX takes for something else, and what it prints instead.
_ESCAPED = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "°": r"\textdegree{}",
}


def csv_text(table: Table) -> str:
    """The table as CSV, by RFC 4180 but for the end of lines, which is a single character."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(table)
    return file.getvalue()


def markdown(table: Table) -> str:
    """The table in Markdown, whose columns are aligned in the text, too."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in table]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return "".join("| " + " | ".join(map(str.ljust, row, widths)) + " |\n" for row in rows)


def latex(table: Table, left: int = 2, notes: Sequence[str] = ()) -> str:
    """The table as a tabular of LaTeX with the rules of the package booktabs.

    Args:
        table: cells that are numbers get signs of mathematics.
        left: how many columns are words, aligned to the left; the others to the right.
        notes: written above as comments, one line each.
    """
    titles, *rows = (" & ".join(map(_cell, row)) + r" \\" for row in table)
    columns = "l" * left + "r" * (len(table[0]) - left)
    lines = [f"% {' '.join(note.split())}" for note in (r"needs \usepackage{booktabs}", *notes)]
    lines += [f"\\begin{{tabular}}{{{columns}}}", r"\toprule", titles, r"\midrule", *rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _cell(text: str) -> str:
    """Escaped; a dash alone is one of words, and one before a digit a minus."""
    if text == "-":
        return "--"
    escaped = "".join(_ESCAPED.get(character, character) for character in text)
    return re.sub(r"(?<![\w.+-])-(?=\d)", "$-$", escaped)
