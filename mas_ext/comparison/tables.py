"""Tables of what a run found: one row per method, and notes on what has no numbers."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from mas_ext.comparison.cells import Found
from mas_ext.comparison.formats import markdown
from mas_ext.comparison.results import FEWEST, SCORES, Findings
from mas_ext.metrics import interval_text, mean_interval

STEPS, HELD = "ms per step", "MB held"


class Row(NamedTuple):
    """A method in numbers.

    values: by title of a column the values by seed, None for a seed without one. seeds: how many count, and
    what became of the others. diverged: whether some did, without which a mean tells of the lucky ones alone.
    """

    method: str
    lam: str
    values: dict[str, list[float | None]]
    seeds: str
    diverged: bool

    def known(self, title: str) -> list[float]:
        """The values in a column of the seeds that have one."""
        return [x for x in self.values[title] if x is not None]


def measurements(findings: Findings) -> list[Row]:
    """One row per method, with the scores that are defined for some method."""
    every = [found for name in findings.learned for found in findings.finished(name)]
    defined = [key for key in SCORES if any(found[key] is not None for found in every)]
    rows = []
    for name, learned in findings.learned.items():
        found = [None if each.diverged is not None else each.found for each in learned]
        values = {SCORES[key]: [_percent(each, key) for each in found] for key in defined}
        values[STEPS] = [None if e is None else 1000 * fmean(e["step_seconds"]) for e in found]
        values[HELD] = [None if each is None else each["held_bytes"][-1] / 1e6 for each in found]
        lost, count = findings.diverged(name), len(found) - found.count(None)
        seeds = f"diverged, {lost} of {len(found)}" if lost else f"{count} of {len(found)}"
        if count == len(found):
            seeds = str(count)
        rows.append(Row(name, _lam(findings, name), values, seeds, lost > 0))
    return rows


def results(findings: Findings) -> list[list[str]]:
    """Titles, and one row per method in words: its scores, lam, time, memory and seeds.

    A method that diverged with some seed has no scores.
    """
    rows = measurements(findings)
    titles = list(rows[0].values)
    table = [["method", "lam", *titles, "seeds"]]
    for row in rows:
        known = {title: row.known(title) for title in titles}
        cells = ["-" if row.diverged or not of else _text(title, of) for title, of in known.items()]
        table.append([row.method, row.lam, *cells, row.seeds])
    return table


def numbers(findings: Findings) -> list[list[str]]:
    """`results` for programs: mean, half of the 95 % interval and every seed in columns of their own.

    What is not known is empty.
    """
    rows = measurements(findings)
    seeds = range(findings.seeds)
    parts = ["mean", "half interval", *(f"seed {n}" for n in seeds)]
    table = [["method", "lam", *(f"{t}: {p}" for t in rows[0].values for p in parts), "seeds"]]
    for row in rows:
        cells = []
        for title, of in row.values.items():
            known = row.known(title)
            mean = [None, None] if row.diverged or not known else mean_interval(known)
            cells += [_number(x) for x in (*mean, *of)]
        table.append([row.method, row.lam.strip("-"), *cells, row.seeds])
    return table


def matrix(tasks: Sequence[str], accuracy: Sequence[Sequence[float]]) -> list[list[str]]:
    """accuracy[t, k] in % with the names of tasks: a row after each, a column of each; empty for NaN."""
    names = _names(tasks)
    rows = [
        [f"after {name}", *(_number(100 * x) for x in row)]
        for name, row in zip(names, accuracy, strict=True)
    ]
    return [["accuracy in %", *names], *rows]


def confusion_counts(findings: Findings) -> list[list[str]]:
    """Which class the test samples of each class were taken for after the last task; counts above 0.

    Task and class that were predicted; the class is empty for an output without one.
    """
    titles = ("task", "class", "predicted task", "predicted class", "samples")
    rows = [["method", "seed", *titles]]
    for method, learned in findings.learned.items():
        for each in learned:
            names = _names(findings.tasks_of(each))
            for task, true, other, predicted, samples in each.confusion():
                shown = "" if predicted is None else str(predicted)
                cells = (names[task], str(true), names[other], shown, str(samples))
                rows.append([method, str(each.seed), *cells])
    return rows


def summary(findings: Findings) -> str:
    """Markdown: scores, how lam was chosen, what can't be told apart, and why trainings diverged.

    A method that diverged with some seed has no scores, whose means would tell of the lucky seeds alone.
    """
    rows: list[list[str]] = [
        ["method", "lam", "average accuracy, %", "forgetting, %", STEPS, HELD],
    ]
    for row in measurements(findings):
        cells = [f"{row.seeds} seeds", "-", "-", "-"]
        if not row.diverged:
            shown = (
                _shown(row.known(SCORES[key]), 2) for key in ("average_accuracy", "forgetting")
            )
            cells = [*shown, f"{fmean(row.known(STEPS)):.3g}", _text(HELD, row.known(HELD))]
        rows.append([row.method, row.lam, *cells])
    seeds = findings.seeds
    over = f"mean and 95 % interval over {seeds} seeds"
    if seeds < FEWEST:
        over = f"of each of {seeds} seeds" if seeds > 1 else "of one seed"
    lines = [f"Accuracy on all tasks after the last one, and forgetting: {over}."]
    lines += _undecided(findings)
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
    return markdown(rows) + "\n" + "\n".join(lines) + "\n"


def notes(findings: Findings) -> list[str]:
    """What can't be told apart, why methods diverged, and what is not finished."""
    told = _undecided(findings)
    told += [f"{name} diverged: {reason}." for name, reason in findings.reasons()]
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


def _undecided(findings: Findings) -> list[str]:
    """Which methods may be as accurate as the best one; joint training, which is a bound, is left out."""
    found = {
        name: [each["average_accuracy"] for each in findings.finished(name)]
        for name in findings.learned
        if name != "joint" and not findings.diverged(name)
    }
    if findings.seeds > 1:  # of a run that goes on, those that have an interval
        found = {name: values for name, values in found.items() if len(values) > 1}
    if len(found) < 2:
        return []
    if findings.seeds == 1:
        return ["One seed does not tell which method is better: results differ from seed to seed."]
    spread = {name: mean_interval(values) for name, values in found.items()}
    best = max(spread, key=lambda name: spread[name][0])
    low = spread[best][0] - spread[best][1]
    near = [name for name, (mean, half) in spread.items() if name != best and mean + half >= low]
    if not near:
        return []
    seeds = min(map(len, found.values()))
    return [
        f"The 95 % intervals of the average accuracy of {best}, the largest, and of {', '.join(near)} overlap: "
        f"{seeds} seeds do not tell which is better."
    ]


def _names(tasks: Sequence[str]) -> list[str]:
    """The names, or numbers from 1 on where there are none."""
    return [name or f"task {k}" for k, name in enumerate(tasks, 1)]


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


def _percent(found: Found | None, key: str) -> float | None:
    return None if found is None or found[key] is None else 100 * found[key]


def _text(title: str, values: Sequence[float]) -> str:
    """Values by seed in the column of this title; memory is as good as the same for all."""
    return f"{fmean(values):.3g}" if title == HELD else _shown(values, 2)


def _shown(values: Sequence[float], digits: int) -> str:
    """Mean and 95 % interval; fewer than FEWEST values themselves, whose interval says next to nothing."""
    if len(values) >= FEWEST or len(values) == 1:
        return interval_text(values, digits)
    return ", ".join(f"{value:.{digits - 1}f}" for value in values)


def _number(x: float | None) -> str:
    """A number for a program, without the noise of rounding; empty for None and NaN."""
    return "" if x is None or x != x else f"{x:.10g}"
