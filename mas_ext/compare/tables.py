"""The table of a run: one row per method."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from mas_ext.compare.results import Findings
from mas_ext.metrics import interval_text

TITLES = ("method", "lam", "average accuracy, %", "forgetting, %", "ms per step", "MB held")


def table(findings: Findings) -> str:
    """Markdown: mean and 95 % interval over seeds, how lam was chosen, and why trainings diverged.

    A method that diverged with some seed has no means, which would tell of the lucky ones alone.
    """
    rows = [TITLES, *(_row(findings, name) for name in findings.learned)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, tuple("-" * width for width in widths))
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    seeds = findings.config.seeds
    over = f"mean and 95 % interval over {seeds} seeds" if seeds > 1 else "of one seed"
    lines += ["", f"Accuracy on all tasks after the last one, and forgetting: {over}."]
    for name, choice in findings.grid.items():
        scores = ", ".join(
            f"{lam:g} ({'diverged' if mean is None else format(100 * mean, '.2f')})"
            for lam, mean in choice.means.items()
        )
        lines.append(
            f"{name}: lam was chosen on validation data (average accuracy, %) from {scores}."
        )
    for name, learned in findings.learned.items():
        reasons = {each.diverged for each in learned if each.diverged is not None}
        lines += [f"{name} diverged: {reason}" for reason in sorted(reasons)]
    return "\n".join(lines) + "\n"


def _row(findings: Findings, name: str) -> Sequence[str]:
    lam, learned = findings.lam(name), findings.learned[name]
    first = (name, "-" if lam is None else f"{lam:g}")
    if lost := sum(each.diverged is not None for each in learned):
        return (*first, f"diverged, {lost} of {len(learned)} seeds", "-", "-", "-")
    found = [each.found for each in learned if each.found is not None]
    return (
        *first,
        interval_text([100 * each["average_accuracy"] for each in found], 2),
        interval_text([100 * each["forgetting"] for each in found], 2),
        f"{1000 * fmean(fmean(each['step_seconds']) for each in found):.3g}",
        f"{fmean(each['held_bytes'][-1] for each in found) / 1e6:.3g}",
    )
