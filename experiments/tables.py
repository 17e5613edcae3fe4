"""Tables in Markdown, and numbers in them."""

from __future__ import annotations

from collections.abc import Sequence

from mas_ext.metrics import interval_text


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A row a line; Markdown needs no more."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(values: Sequence[float], digits: int = 2) -> str:
    """Mean and 95 % interval of shares in [0, 1], in per cent; nothing of nothing."""
    return interval_text([100 * value for value in values], digits) if values else ""


def number(value: float | None) -> str:
    """In few digits, without a power of ten up to a million; nothing of None."""
    return "" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
