"""Tables in Markdown, and numbers in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mas_ext.metrics import interval_text


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """One line per row, of cells as they are."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def titled(rows: Sequence[Mapping[str, str]]) -> str:
    """A table of rows that have the same titles, those of the columns."""
    return table(list(rows[0]), [list(row.values()) for row in rows])


def percent(values: Sequence[float], digits: int = 2) -> str:
    """Mean and 95 % interval of shares in [0, 1], in per cent; empty without values."""
    return interval_text([100 * value for value in values], digits) if values else ""


def number(value: float | None) -> str:
    """A number in few digits, without a power of ten up to a million; empty for None."""
    return "" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
