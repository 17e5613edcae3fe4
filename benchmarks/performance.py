"""Writes the tables and pictures of docs/PERFORMANCE.md from what the benchmarks measured.

python -m benchmarks.performance
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import bench_lam, pictures
from benchmarks.files import RESULTS, fill, measured_on
from benchmarks.step import AVALANCHE, DTYPES, EAGER, FUSED, FUSED_FORMS, PLAIN
from experiments.tables import table
from mas_ext.compare.bench import GRAPH
from mas_ext.training.settings import OPTIMIZERS

PAGE = Path(__file__).parents[1] / "docs" / "PERFORMANCE.md"
PICTURES = PAGE.parent / "performance"
LAM = RESULTS / "lam_split-mnist.json"
NETWORKS = {
    "mlp": "MLP 784-400-400-10",
    "cnn": "VGG-like",
    "transformer": "transformer, 4 layers",
    "resnet18": "ResNet-18",
    "resnet50": "ResNet-50",
    "vit_b": "ViT-B/16",
    "gpt2": "GPT-2 small",
}
FORMS = ["attach", "attach, proximal", "add_grad_", "penalty() in the loss", EAGER, AVALANCHE]

# From this share of a plain copy's speed on, a kernel is said to be limited by memory.
FULL_SPEED = 0.8
# Accuracy this near to the best, in % points, counts as kept.
NEAR = 1.0

Result = Mapping[str, Any]
Row = Mapping[str, Any]


def results(kind: str) -> list[dict[str, Any]]:
    """All results of one benchmark, small networks first."""
    found = [json.loads(p.read_text(encoding="utf-8")) for p in RESULTS.glob(f"{kind}_*.json")]
    order = [*NETWORKS]
    return sorted(
        found,
        key=lambda r: (
            r["device"],
            order.index(r["model"]),
            [*OPTIMIZERS, None].index(r.get("optimizer")),
            r["dtype"],
        ),
    )


def on(device: str, found: Sequence[Result]) -> list[Result]:
    """Those of "cpu" or "cuda"."""
    return [r for r in found if r["device"] == device]


def named(result: Result) -> str:
    """The network, and where if not on the CPU."""
    return NETWORKS[result["model"]] + ("" if result["device"] == "cpu" else ", GPU")


def machines(found: Sequence[Result]) -> str:
    """Where and when these were measured."""
    places = {measured_on(r["machine"], r["threads"]): None for r in found}
    repeats = sorted({r["repeats"] for r in found})
    return f"{'; '.join(places)}; medians of {_span(repeats, '{}')} interleaved repeats."


def _span(values: Sequence[Any], form: str) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


def _number(x: float) -> str:
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


# -- the penalty alone -----------------------------------------------------------------------------


def penalty_tables(found: Sequence[Result]) -> str:
    """Bytes, speed and what limits each of this library's forms."""
    rows = []
    for result in found:
        again = {(row["name"], row["tasks"]): row for row in result["forms"]}
        cold = {(row["name"], row["tasks"]): row for row in result["cold"]["forms"]}
        for row in result["cold"]["forms"]:
            if row["moved"]:
                name, tasks = row["name"], row["tasks"]
                speed = row["fraction"] * max(result["cold"]["bandwidth"].values())
                rows.append(
                    [
                        f"{named(result)}, {result['parameters']:,} parameters",
                        f"`{name}`",
                        str(tasks),
                        _number(1e3 * row["seconds"]["median"]),
                        str(row["moved"]),
                        f"{speed / 1e9:.1f}",
                        f"{row['fraction']:.2f}",
                        kernel_limit(row, again[name, tasks], cold.get((name + GRAPH, tasks))),
                    ]
                )
    head = ["network", "form", "tasks", "ms a call", "bytes a parameter", "GB/s", "of a copy"]
    copies = "; ".join(
        f"{named(r)} " + ", ".join(f"{n} {b / 1e9:.1f}" for n, b in r["cold"]["bandwidth"].items())
        for r in found
    )
    return "\n\n".join(
        [
            table([*head, "limited by"], rows),
            f"Copies of as many bytes in the same run, GB/s read and written: {copies}.",
            machines(found),
            "![bytes counted against bytes a second](performance/roofline.png)",
            *(["![the same on a GPU](performance/roofline_gpu.png)"] if on("cuda", found) else []),
        ]
    )


def kernel_limit(cold: Row, again: Row, graph: Row | None = None) -> str:
    """What limits a kernel, by its share of a copy's speed, its time when called again and again, and that of
    the same kernel in a CUDA graph, where Python has no part.
    """
    if cold["fraction"] >= FULL_SPEED:
        return "memory"
    faster = cold["seconds"]["median"] / again["seconds"]["median"]
    if graph is not None and cold["seconds"]["median"] >= 2 * graph["seconds"]["median"]:
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
        shape = " x ".join(map(str, result["shape"]))
        rows.append(
            [
                f"{named(result)}, {shape}",
                f"{result['optimizer']}, {result['dtype']}",
                _number(1e3 * forms[PLAIN]["seconds"]["median"]),
                *(_percent(forms.get(name)) for name in FORMS),
                f"{100 * bytes_share(result):.1f}",
                step_limit(result),
            ]
        )
    head = [
        "network, batch",
        "optimizer, dtype",
        "ms without",
        *(f"`{name}`" for name in FORMS[:4]),
    ]
    head += ["eager autograd", AVALANCHE, "bytes alone", "`attach` costs"]
    return "\n\n".join(
        [
            table(head, rows),
            "Forms: % by which a step is longer than without a penalty, after one task (95 % interval). Bytes "
            "alone: the same if `attach`'s bytes moved at the speed of a plain copy.",
            machines(found),
            "![longer steps by form and network](performance/steps.png)",
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
                    _number(1e3 * forms[FUSED]["seconds"]["median"]),
                    *map(_percent, (attached, *own)),
                    " / ".join(shares) if told else "can't be told",
                ]
            )
    head = ["network", "optimizer, dtype", "ms without", *(f"`{name}`, %" for name in FUSED_FORMS)]
    return table([*head, "of `attach`'s"], rows)


def _percent(row: Row | None) -> str:
    if row is None:
        return "not installed"
    low, middle, high = (100 * row["extra"][key] for key in ("low", "median", "high"))
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"


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
            forms[n]["extra_memory"] / result["parameters"] if n in forms else None for n in FORMS
        )
        rows.append(
            [
                named(result),
                f"{result['optimizer']}, {result['dtype']}",
                *("not installed" if x is None else f"{x:.1f}" for x in cells),
            ]
        )
    head = ["bytes a parameter", "optimizer, dtype", *(f"`{name}`" for name in FORMS[:4])]
    return table([*head, "eager autograd", AVALANCHE], rows)


def tasks_table(found: Sequence[Result]) -> str:
    """Time and memory over the number of tasks, SGD in float32."""
    rows = []
    for result in found:
        if (result["optimizer"], result["dtype"]) == ("sgd", DTYPES[0]):
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
            "![time and memory over the number of tasks](performance/tasks.png)",
        ]
    )


def _bytes(row: Row, result: Result) -> str:
    return _number(row["extra_memory"] / result["parameters"])


# -- importance ------------------------------------------------------------------------------------


def importance_table(found: Sequence[Result]) -> str:
    """What exact importance takes beside an ordinary pass."""
    rows = []
    for result in found:
        row = next(r for r in result["forms"] if r["name"] == "exact")
        times = row["to_training"]["median"]
        memory = row["memory_to_training"]
        rows.append(
            [
                f"{named(result)}, {' x '.join(map(str, result['shape']))}",
                _number(1e3 * row["seconds"]["median"]),
                f"{times:.2f} ({row['to_training']['low']:.2f} to {row['to_training']['high']:.2f})",
                "not measured" if memory is None else f"{memory:.2f}",
                f"{100 / max(times, 1):.0f} % of it",
            ]
        )
    head = [
        "network, batch",
        "ms a batch",
        "times a training pass",
        "times its memory",
        "the pass itself",
    ]
    return f"{table(head, rows)}\n\n{machines(found)}"


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
    columns = [(optimizer, mode) for optimizer in bench_lam.RATES for mode in bench_lam.MODES]
    lams = sorted({run["lam"] for run in result["runs"]} - {0.0})
    rows = [[f"{lam:g}", *(_accuracy(means[column], lam) for column in columns)] for lam in lams]
    sentences = [_range(column, means[column]) for column in columns]
    plain = ", ".join(f"{o} {means[o, 'gradient'][0.0]:.2f}" for o in bench_lam.RATES)
    seeds = len({run["seed"] for run in result["runs"]})
    return "\n\n".join(
        [
            table(["lam", *(f"{optimizer}, {mode}" for optimizer, mode in columns)], rows),
            f"Average accuracy after the last task, %, mean over {seeds} seeds; without a penalty: {plain}. "
            f"MLP 784-{'-'.join(map(str, result['hidden']))}, {result['epochs']} epochs, batches of "
            f"{result['batch']}, task-incremental; importance of all training data.",
            "\n".join(f"- {sentence}" for sentence in sentences),
            f"{measured_on(result['machine'], result['threads'])}.",
            "![accuracy over lam](performance/lam.png)",
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
        "penalty": (penalty_tables, results("penalty")),
        "steps": (step_tables, results("step")),
        "fused": (fused_table, results("step")),
        "memory": (memory_table, results("step")),
        "tasks": (tasks_table, results("step")),
        "importance": (importance_table, results("importance")),
    }
    made = {
        mark: write(found) if found else "Not measured yet."
        for mark, (write, found) in parts.items()
    }
    return {**made, "lam": lam_table(json.loads(LAM.read_text(encoding="utf-8")))}


def main() -> None:
    """Draw, and replace what stands between the page's marks."""
    PICTURES.mkdir(exist_ok=True)
    for device, name in (("cpu", "roofline.png"), ("cuda", "roofline_gpu.png")):
        if penalties := on(device, results("penalty")):
            pictures.roofline(penalties, named, PICTURES / name)
    if steps := on("cpu", results("step")):  # a GPU has other batches, too
        pictures.steps(steps, named, FORMS, PICTURES / "steps.png")
        pictures.tasks(steps, named, PICTURES / "tasks.png")
    pictures.lam(json.loads(LAM.read_text(encoding="utf-8")), PICTURES / "lam.png")
    fill(PAGE, tables())
    print(f"written: {PAGE}")


if __name__ == "__main__":
    main()
