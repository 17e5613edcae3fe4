"""Writes the tables and pictures of docs/PERFORMANCE.md from what the benchmarks measured.

python -m benchmarks.performance
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import pictures
from benchmarks.files import (
    ROOT,
    Result,
    batch,
    copies,
    dearest_first,
    fill,
    load,
    load_all,
    measured_on,
    named,
    row,
)
from benchmarks.importance import OWN, first_batch
from benchmarks.others import forms_table, gradients_table, omega_table
from benchmarks.penalty import GRAPH
from benchmarks.step import AVALANCHE, FUSED, FUSED_FORMS, PLAIN
from experiments.tables import table
from mas_ext.comparison.bench import EAGER
from mas_ext.comparison.timing import spread

PAGE = ROOT / "docs" / "PERFORMANCE.md"
PICTURES = PAGE.parent / "performance"
LAM = "lam_split-mnist"
FORMS = ["attach", "attach, proximal", "add_grad_", "penalty() in the loss", EAGER, AVALANCHE]
TITLES = [*(f"`{name}`" for name in FORMS[:4]), *FORMS[4:]]

# From this share of a plain copy's speed on, a kernel is said to be limited by memory.
FULL_SPEED = 0.8
# Accuracy this near to the best, in % points, counts as kept.
NEAR = 1.0

Row = Mapping[str, Any]


def machines(found: Sequence[Result]) -> str:
    """Where and when these were measured."""
    places = {measured_on(r): None for r in found}
    repeats = sorted({r["repeats"] for r in found})
    span = " to ".join(map(str, dict.fromkeys((repeats[0], repeats[-1]))))
    return f"{'; '.join(places)}; medians of {span} interleaved repeats."


def _milliseconds(form: Row) -> str:
    return _number(1e3 * form["seconds"]["median"])


def _number(x: float) -> str:
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


# -- the penalty alone -----------------------------------------------------------------------------


def penalty_tables(found: Sequence[Result]) -> str:
    """Bytes, speed and what limits each of this library's forms."""
    rows = [
        [
            f"{named(result)}, {result['parameters']:,} parameters",
            f"`{cold['name']}`",
            str(cold["tasks"]),
            _milliseconds(cold),
            str(cold["moved"]),
            f"{cold['fraction'] * max(result['cold']['bandwidth'].values()) / 1e9:.1f}",
            f"{cold['fraction']:.2f}",
            kernel_limit(
                cold,
                row(result, cold["name"], cold["tasks"]),
                row(result["cold"], cold["name"] + GRAPH, cold["tasks"]),
            ),
        ]
        for result in found
        for cold in result["cold"]["forms"]
        if cold["moved"]
    ]
    head = ["network", "form", "tasks", "ms a call", "bytes a parameter", "GB/s", "of a copy"]
    speeds = "; ".join(f"{named(r)} {copies(r['cold'])}" for r in found)
    parts = [
        table([*head, "limited by"], rows),
        f"Copies of as many bytes in the same run, GB/s read and written: {speeds}.",
        machines(found),
        "![bytes counted against bytes a second](performance/roofline.svg)",
    ]
    if any(r["device"] == "cuda" for r in found):
        parts.append("![the same on a GPU](performance/roofline_gpu.svg)")
    return "\n\n".join(parts)


def kernel_limit(cold: Row, again: Row, graph: Row | None = None) -> str:
    """What limits a kernel, by its share of a copy's speed, and its time in other circumstances.

    again: when called again and again; graph: in a CUDA graph, where Python has no part.
    """
    if cold["fraction"] >= FULL_SPEED:
        return "memory"
    faster = cold["seconds"]["median"] / again["seconds"]["median"]
    if graph and cold["seconds"]["median"] >= 2 * graph["seconds"]["median"]:
        times = cold["seconds"]["median"] / graph["seconds"]["median"]
        return f"Python before the launch: {times:.1f} times as fast in a graph"
    if faster >= 2:
        return f"memory, met with cold caches: {faster:.1f} times as fast from warm ones"
    return f"other than bytes: they alone would take {100 * cold['fraction']:.0f} % of the time"


# -- training steps --------------------------------------------------------------------------------


def rows_by_name(result: Result, tasks: int | None = None) -> dict[str, Row]:
    """The rows of one number of tasks, by default of the smallest."""
    first = min(row["tasks"] for row in result["forms"] if row["tasks"])
    wanted = (0, first if tasks is None else tasks)
    return {row["name"]: row for row in result["forms"] if row["tasks"] in wanted}


def step_tables(found: Sequence[Result]) -> str:
    """By how much a step is longer with each form, and why."""
    rows = []
    for result in found:
        forms = rows_by_name(result)
        rows.append(
            [
                f"{named(result)}, {batch(result)}",
                f"{result['optimizer']}, {result['dtype']}",
                _milliseconds(forms[PLAIN]),
                *(_percent(forms.get(name)) for name in FORMS),
                f"{100 * bytes_share(result):.1f}",
                step_limit(result),
            ]
        )
    head = ["network, batch", "optimizer, dtype", "ms without", *TITLES, "bytes alone"]
    return "\n\n".join(
        [
            table([*head, "`attach` costs"], rows),
            "Forms: % by which a step is longer than without a penalty, after one task (95 % interval). Bytes "
            "alone: the same if `attach`'s bytes moved at the speed of a plain copy.",
            machines(found),
            "![longer steps by form and network](performance/steps.svg)",
        ]
    )


def fused_table(found: Sequence[Result]) -> str:
    """What the penalty adds to a step of an optimizer that takes one pass."""
    rows = []
    for result in found:
        forms = rows_by_name(result)
        if FUSED in forms:
            attached, *own = (forms[name] for name in FUSED_FORMS)
            whole = attached["extra_seconds"]["median"]
            shares = [f"{row['extra_seconds']['median'] / whole:.2f}" for row in own]
            told = attached["extra"]["low"] > 0
            rows.append(
                [
                    named(result),
                    f"{result['optimizer']}, {result['dtype']}",
                    _milliseconds(forms[FUSED]),
                    *map(_percent, (attached, *own)),
                    " / ".join(shares) if told else "can't be told",
                ]
            )
    head = ["network", "optimizer, dtype", "ms without", *(f"`{name}`, %" for name in FUSED_FORMS)]
    return table([*head, "of `attach`'s"], rows)


def _percent(form: Row | None) -> str:
    return "not installed" if form is None else spread(form["extra"], 1, 100)


def bytes_share(result: Result) -> float:
    """The share of a step that attach's bytes take at the speed of a copy."""
    forms = rows_by_name(result)
    seconds = forms["attach"]["moved"] / max(result["bandwidth"].values())
    return float(seconds / forms[PLAIN]["seconds"]["median"])


def step_limit(result: Result) -> str:
    """What attach's extra time is made of, as far as its interval says."""
    row, share = rows_by_name(result)["attach"], bytes_share(result)
    low, high = row["extra"]["low"], row["extra"]["high"]
    if low <= 0:
        return "nothing that can be told from chance"
    if high < share:
        return "less than its bytes from memory: some are in caches"
    if low <= share:
        return "its bytes"
    return f"its bytes and {1e3 * (1 - share / row['extra']['median']) * row['extra_seconds']['median']:.2g} ms"


def memory_table(found: Sequence[Result]) -> str:
    """Bytes by which a step's peak is higher."""
    rows = []
    for result in found:
        forms = rows_by_name(result)
        cells = (
            f"{forms[n]['extra_memory'] / result['parameters']:.1f}"
            if n in forms
            else "not installed"
            for n in FORMS
        )
        rows.append([named(result), f"{result['optimizer']}, {result['dtype']}", *cells])
    return table(["bytes a parameter", "optimizer, dtype", *TITLES], rows)


def tasks_table(found: Sequence[Result]) -> str:
    """Time and memory over the number of tasks, SGD in float32."""
    rows = []
    for result in found:
        if (result["optimizer"], result["dtype"]) == ("sgd", "float32"):
            for tasks in sorted({row["tasks"] for row in result["forms"]} - {0}):
                forms = rows_by_name(result, tasks)
                cells = [
                    [_percent(r), _bytes(r, result)] for r in map(forms.get, ("attach", EAGER)) if r
                ]
                cells += [["does not fit"] * 2] * (2 - len(cells))
                rows.append([named(result), str(tasks), *cells[0], *cells[1]])
    head = ["network", "tasks", "`attach`: % longer", "bytes a parameter"]
    return "\n\n".join(
        [
            table([*head, "eager autograd: % longer", "bytes a parameter"], rows),
            "![time and memory over the number of tasks](performance/tasks.svg)",
        ]
    )


def _bytes(row: Row, result: Result) -> str:
    return _number(row["extra_memory"] / result["parameters"])


# -- importance ------------------------------------------------------------------------------------


def importance_table(found: Sequence[Result]) -> str:
    """What exact importance takes beside an ordinary pass, and what a loop over samples takes."""
    rows = [
        [
            f"{named(result)}, {batch(result)}",
            _milliseconds(exact),
            spread(exact["to_training"], 2),
            f"{row(result, 'loop, one by one')['to_training']['median']:.2f}",
            f"{first_batch(result):.1f}",
            f"{exact['memory_to_training']:.2f}" if exact["memory"] else "not measured",
        ]
        for result, exact in ((r, row(r, OWN)) for r in dearest_first(found))
    ]
    head = ["network, batch", "ms a batch", "exact", "loop over samples", "first batch", "memory"]
    return "\n\n".join(
        [
            table(head, rows),
            "In units of an ordinary forward and backward pass of the batch: its time, or its peak of memory. "
            "`exact` is every batch but the first.",
            machines(found),
        ]
    )


# -- strength --------------------------------------------------------------------------------------


def lam_table(result: Result) -> str:
    """Mean accuracy by lam, and how wide the range of good ones is."""
    means: dict[tuple[str, str], dict[float, float | None]] = {}
    for run in result["runs"]:
        seeds = [
            r["accuracy"]
            for r in result["runs"]
            if all(r[key] == run[key] for key in ("optimizer", "mode", "lam"))
        ]
        mean = None if None in seeds else 100 * statistics.mean(seeds)
        means.setdefault((run["optimizer"], run["mode"]), {})[run["lam"]] = mean
    columns = [(optimizer, mode) for optimizer in result["rates"] for mode in pictures.MODES]
    lams = sorted({run["lam"] for run in result["runs"]} - {0.0})
    rows = [[f"{lam:g}", *(_accuracy(means[column], lam) for column in columns)] for lam in lams]
    sentences = [_range(column, means[column]) for column in columns]
    plain = ", ".join(f"{o} {means[o, 'gradient'][0.0]:.2f}" for o in result["rates"])
    count = len({run["seed"] for run in result["runs"]})
    return "\n\n".join(
        [
            table(["lam", *(f"{optimizer}, {mode}" for optimizer, mode in columns)], rows),
            f"Average accuracy after the last task, %, mean over {count} seeds; without a penalty: {plain}. "
            f"MLP 784-{'-'.join(map(str, result['hidden']))}, {result['epochs']} epochs, batches of "
            f"{result['batch']}, task-incremental; importance of all training data.",
            "\n".join(f"- {sentence}" for sentence in sentences),
            f"{measured_on(result)}.",
            "![accuracy over lam](performance/lam.svg)",
        ]
    )


def _accuracy(means: Mapping[float, float | None], lam: float) -> str:
    if lam not in means:
        return "not learned yet"
    mean = means[lam]
    return "diverged" if mean is None else f"{mean:.2f}"


def _range(column: tuple[str, str], means: Mapping[float, float | None]) -> str:
    known = {lam: mean for lam, mean in means.items() if mean is not None and lam > 0}
    best, worst = max(known.values()), min(known.values())
    good = sorted(lam for lam, mean in known.items() if mean >= best - NEAR)
    lost = sorted(lam for lam, mean in means.items() if mean is None)
    words = (
        f"{column[0]}, {column[1]}: within {NEAR:g} point of its best, {best:.2f}, for {len(good)} of "
        f"{len(means.keys() - {0.0})} lam, from {good[0]:g} to {good[-1]:g}; lowest {worst:.2f}"
    )
    if lost:
        words += f"; diverged for lam = {', '.join(f'{lam:g}' for lam in lost)}"
    return words + "."


# -- the page --------------------------------------------------------------------------------------


def tables() -> dict[str, str]:
    """Everything between the page's marks; what has no results yet says so."""
    parts = {
        "penalty": (penalty_tables, load_all("penalty")),
        "steps": (step_tables, load_all("step")),
        "fused": (fused_table, load_all("step")),
        "memory": (memory_table, load_all("step")),
        "tasks": (tasks_table, load_all("step")),
        "importance": (importance_table, load_all("importance")),
    }
    made = {
        mark: write(found) if found else "Not measured yet."
        for mark, (write, found) in parts.items()
    }
    by_others = {"forms": forms_table(), "gradients": gradients_table(), "omega": omega_table()}
    return {**made, **by_others, "lam": lam_table(load(LAM))}


def main() -> None:
    """Draw, and replace what stands between the page's marks."""
    PICTURES.mkdir(exist_ok=True)
    for device, name in (("cpu", "roofline.svg"), ("cuda", "roofline_gpu.svg")):
        if penalties := load_all("penalty", device):
            pictures.roofline(penalties, PICTURES / name)
    if steps := load_all("step", "cpu"):  # a GPU has other batches, too
        pictures.steps(steps, FORMS, PICTURES / "steps.svg")
        pictures.tasks(steps, PICTURES / "tasks.svg")
    pictures.lam(load(LAM), PICTURES / "lam.svg")
    fill(PAGE, tables())
    print(f"written: {PAGE}")


if __name__ == "__main__":
    main()
