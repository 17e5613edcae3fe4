"""The report of a run: a page that needs nothing beside it, and its pictures."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from mas_ext import metrics
from mas_ext.compare.charts import pictures
from mas_ext.compare.directory import write
from mas_ext.compare.results import Findings

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
        "A panel a task: its accuracy on test data after so many tasks, mean over seeds, with the "
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

# By what `mas_ext.compare.tables.summary` calls them: titles, and what they mean.
METRICS = {
    "average_accuracy": (
        "average accuracy, %",
        "mean accuracy on all tasks after the last one",
    ),
    "forgetting": (
        "forgetting, % points",
        "best accuracy that a task ever had before the last one was learned, minus that at the end; "
        "mean over all tasks but the last; negative where later tasks helped",
    ),
    "backward_transfer": (
        "backward transfer, % points",
        "accuracy on a task at the end, minus that right after it was learned; mean over all tasks "
        "but the last",
    ),
    "forward_transfer": (
        "forward transfer, % points",
        "accuracy on a task just before it is learned, minus that of the untrained network; mean over"
        " all tasks but the first; only with one head for all tasks",
    ),
    "intransigence": (
        "intransigence, % points",
        "accuracy of joint training (on all tasks so far at once) on a task when it is new, minus the"
        " method's; mean over all tasks; only where joint training was among the methods",
    ),
}
COSTS = {
    "ms per step": "mean duration of a training step, over all tasks",
    "MB held": "what the method holds beside the model after the last task, in millions of bytes",
    "95 % interval": "mean ± Student's quantile times standard deviation / square root of the number of seeds",
}

TEMPLATE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root { color-scheme: light dark; --line: #ccc; }
@media (prefers-color-scheme: dark) { :root { --line: #555; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1, h2 { line-height: 1.2; }
h2 { margin-top: 2.5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
.numbers th:not(:first-child), .numbers td:not(:first-child) { text-align: right; }
.numbers td { white-space: nowrap; }
.facts td { overflow-wrap: anywhere; }
figure { margin: 1rem 0; }
img { display: block; width: 100%; min-width: 36rem; background: white; }
dt { font-weight: bold; }
@media print {
  body { font-size: 10pt; max-width: none; }
  .wide { overflow: visible; }
  img { min-width: 0; max-height: 22cm; object-fit: contain; }
  h2 { break-after: avoid; }
  figure, tr { break-inside: avoid; }
  th, td { padding: .1rem .35rem; }
  .numbers { font-size: 8pt; }
}
</style>
</head>
<body>
<h1>$title</h1>
$body
</body>
</html>
""")


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
    config = found.config
    title = f"{config.scenario}, {config.settings.setting}-incremental"
    body = [
        f"<p>{escape(', '.join(config.methods))}; seeds: {config.seeds}.</p>",
        "<h2>Results</h2>",
        _table("numbers", results(found)),
    ]
    body += [f"<p>{escape(note)}</p>" for note in notes(found)]
    for name, (heading, caption) in CAPTIONS.items():
        if name in drawn:
            image = base64.b64encode(drawn[name]).decode()
            body += [
                f"<h2>{escape(heading)}</h2>",
                f'<figure><div class="wide"><img alt="{escape(heading)}" '
                f'src="data:image/png;base64,{image}"></div>',
                f"<figcaption>{escape(caption)}</figcaption></figure>",
            ]
    meanings = {**dict(METRICS.values()), **COSTS}
    body += ["<h2>What the numbers mean</h2>", "<dl>"]
    body += [f"<dt>{escape(t)}</dt><dd>{escape(d)}</dd>" for t, d in meanings.items()]
    body += ["</dl>", "<h2>What was compared</h2>", _table("facts", compared(found))]
    body += ["<h2>Where and when</h2>", _table("facts", starts(found))]
    return TEMPLATE.substitute(title=escape(title), body="\n".join(body))


def results(found: Findings) -> list[list[str]]:
    """Titles, and a row a method: means and 95 % intervals over the seeds that are finished.

    A method that diverged with some seed has no means: the others would tell of the lucky ones alone.
    """
    every = [each.found for seeds in found.learned.values() for each in seeds if each.finished]
    defined = [key for key in METRICS if any(each and each[key] is not None for each in every)]
    titles = ["method", "lam", *(METRICS[key][0] for key in defined), *list(COSTS)[:2], "seeds"]
    return [titles, *(_row(found, name, defined) for name in found.learned)]


def _row(found: Findings, name: str, defined: Sequence[str]) -> list[str]:
    seeds = found.learned[name]
    done = [each.found for each in seeds if each.finished and each.found]
    lost = sum(each.diverged is not None for each in seeds)
    lam = found.lam(name)
    first = [name, "-" if lam is None else f"{lam:g}"]
    if lost or not done:
        state = f"diverged, {lost} of {len(seeds)}" if lost else f"0 of {len(seeds)}"
        return [*first, *["-"] * (len(defined) + 2), state]

    def mean(values: Iterable[float], digits: int = 2) -> str:
        return metrics.interval_text(list(values), digits)

    scores = [
        mean(100 * each[key] for each in done) if done[0][key] is not None else "-"
        for key in defined
    ]
    steps = mean(1000 * sum(e["step_seconds"]) / len(e["step_seconds"]) for e in done)
    held = sum(each["held_bytes"][-1] for each in done) / len(done)
    count = str(len(done)) if len(done) == len(seeds) else f"{len(done)} of {len(seeds)}"
    return [*first, *scores, steps, f"{held / 1e6:.3g}", count]


def notes(found: Findings) -> list[str]:
    """Why something diverged, and what is not finished."""
    told = []
    for name, seeds in found.learned.items():
        reasons = sorted({each.diverged for each in seeds if each.diverged})
        told += [f"{name} diverged: {reason}." for reason in reasons]
        left = [
            f"seed {each.seed} after {each.tasks} of {len(found.tasks)} tasks"
            if each.tasks
            else f"seed {each.seed} before the end of its first task"
            for each in seeds
            if each.found is None
        ]
        if left:
            told.append(f"{name} is not finished: {', '.join(left)}.")
    return told


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
