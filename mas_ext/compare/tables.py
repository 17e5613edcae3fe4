"""Tables of what a run found: one row per method, and notes on what has no numbers."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from mas_ext.compare.cells import Found
from mas_ext.compare.results import SCORES, Findings
from mas_ext.metrics import interval_text


def summary(findings: Findings) -> str:
    """Markdown: mean and 95 % interval over seeds, how lam was chosen, and why trainings diverged.

    A method that diverged with some seed has no means, which would tell of the lucky seeds alone.
    """
    rows: list[tuple[str, ...]] = [
        ("method", "lam", "average accuracy, %", "forgetting, %", "ms per step", "MB held")
    ]
    for name, learned in findings.learned.items():
        if lost := findings.diverged(name):
            cells = (f"diverged, {lost} of {len(learned)} seeds", "-", "-", "-")
        else:
            found = findings.finished(name)
            steps = f"{1000 * fmean(map(_step_seconds, found)):.3g}"
            cells = (
                _mean(found, "average_accuracy"),
                _mean(found, "forgetting"),
                steps,
                _held(found),
            )
        rows.append((name, _lam(findings, name), *cells))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, tuple("-" * width for width in widths))
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    seeds = findings.seeds
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
    lines += [f"{name} diverged: {reason}" for name, reason in findings.reasons()]
    lines += _score(findings)
    return "\n".join(lines) + "\n"


def results(findings: Findings) -> list[list[str]]:
    """Titles of the scores that are defined, and one row per method, over the seeds that are finished.

    A method that diverged with some seed has no means, as in `summary`.
    """
    every = [found for name in findings.learned for found in findings.finished(name)]
    defined = [key for key in SCORES if any(found[key] is not None for found in every)]
    titles = [SCORES[key] for key in defined]
    rows = [["method", "lam", *titles, "ms per step", "MB held", "seeds"]]
    for name, learned in findings.learned.items():
        found, lost = findings.finished(name), findings.diverged(name)
        cells, count = ["-"] * (len(defined) + 2), f"{len(found)} of {len(learned)}"
        if lost:
            count = f"diverged, {lost} of {len(learned)}"
        elif found:
            steps = interval_text([1000 * _step_seconds(each) for each in found], 2)
            cells = [*(_mean(found, key) for key in defined), steps, _held(found)]
        if len(found) == len(learned):
            count = str(len(found))
        rows.append([name, _lam(findings, name), *cells, count])
    return rows


def notes(findings: Findings) -> list[str]:
    """Why methods diverged, and what is not finished."""
    told = [f"{name} diverged: {reason}." for name, reason in findings.reasons()]
    for name, learned in findings.learned.items():
        left = [
            f"seed {each.seed} after {each.tasks} of {len(findings.tasks)} tasks"
            if each.tasks
            else f"seed {each.seed} before the end of its first task"
            for each in learned
            if each.found is None
        ]
        if left:
            told.append(f"{name} is not finished: {', '.join(left)}.")
    return told + _score(findings)


def _score(findings: Findings) -> list[str]:
    """What accuracies are of, where they are of no labels."""
    loss, score = findings.values.get("task_loss"), findings.values.get("score")
    if score is None and loss in (None, "cross-entropy"):
        return []
    score = score or f"minus {loss}"
    return [f"Accuracies are mean scores times 100, of the score {score}."]


def _lam(findings: Findings, name: str) -> str:
    lam = findings.lam(name)
    return "-" if lam is None else lam if isinstance(lam, str) else f"{lam:g}"


def _mean(found: Sequence[Found], key: str) -> str:
    """Mean and interval in %; - where it is not defined."""
    if found[0][key] is None:
        return "-"
    return interval_text([100 * each[key] for each in found], 2)


def _step_seconds(found: Found) -> float:
    return fmean(found["step_seconds"])


def _held(found: Sequence[Found]) -> str:
    return f"{fmean(each['held_bytes'][-1] for each in found) / 1e6:.3g}"
