"""Writes the README's tables: runs the demo, and reads what the benchmarks measured.

python benchmarks/readme.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from common import RESULTS, machine

from mas_ext.demo import run_demo

ROOT = Path(__file__).parents[1]
# The table's columns, by the names that bench_penalty.py gives, and its lines.
MODELS = {"resnet18": "ResNet-18", "mlp": "MLP 784-400-400-10"}
FORMS = {
    "add_grad_": "`penalty.add_grad_()`: value and gradient",
    "penalty() + backward": "`penalty()` in the loss, and its backward",
    "proximal_": "proximal step",
    "eager autograd": "eager autograd, as other libraries write it",
    "official code, gradient only": "in-place loop of the MAS authors' code, gradient only",
    "torch._foreach, gradient only": "torch._foreach, gradient only",
    "torch._foreach": "torch._foreach, value and gradient",
    "torch.compile, gradient only": "torch.compile, gradient only",
    "torch.compile": "torch.compile, value and gradient",
}

# The same for bench_importance.py.
NETWORKS = {
    "mlp": "MLP 784-400-400-10",
    "cnn": "VGG-like, 32 x 32",
    "transformer": "transformer, 4 layers",
    "resnet18": "ResNet-18, 64 x 64",
}
GRADIENTS = {
    "exact": "`estimate_importance(...)`",
    "batch approximation": "batch approximation",
    "forward + backward": "an ordinary forward and backward pass",
    "loop, one by one": "loop, one sample at a time",
    "vmap(grad), chunks": "`torch.func.vmap(grad)` in chunks",
    "BackPACK BatchGrad": "BackPACK, `BatchGrad`",
    "Opacus GradSampleModule": "Opacus, `GradSampleModule`",
}


def place(where: dict[str, Any], threads: int) -> str:
    """Machine and date in words."""
    return (
        f"{where['gpu'] or where['cpu']} ({threads} threads, {where['instruction_set']}), torch "
        f"{where['torch']}, {where['date']}"
    )


def benchmark_table() -> str:
    """Milliseconds and multiples of add_grad_ by form and model, and what T tasks cost."""
    results = {m: json.loads((RESULTS / f"penalty_{m}_cpu.json").read_text()) for m in MODELS}
    first = results["resnet18"]
    lines = [
        "| one step's penalty, milliseconds (times `add_grad_`) | "
        + " | ".join(f"{MODELS[m]}, {r['parameters']:,} parameters" for m, r in results.items())
        + " | the same, again and again |",
        "|---" * (len(results) + 2) + "|",
    ]
    for name, words in FORMS.items():
        cells = [_cell(result["cold"], name) for result in results.values()]
        again = " / ".join(_cell(result, name) for result in results.values())
        lines.append(f"| {words} | {' | '.join(cells)} | {again} |")
    own = {r["tasks"]: r for r in first["cold"]["forms"] if r["name"] == "add_grad_"}
    eager = {r["tasks"]: r for r in first["cold"]["forms"] if r["name"] == "eager autograd"}
    most, many = max(own), max(eager)
    lines += [
        "",
        "The first columns measure each call after other work has gone through the "
        "caches; the last one calls it again and again, so that small models stay in the cache.",
        "",
        f"ResNet-18, {most} tasks instead of one: `add_grad_` takes "
        f"{own[most]['ratio']['median']:.2f} times as long (95 % interval "
        f"{own[most]['ratio']['low']:.2f} to {own[most]['ratio']['high']:.2f}) and holds "
        f"{own[most]['held']:.1f} bytes a parameter; eager autograd takes "
        f"{eager[many]['ratio']['median']:.0f} times `add_grad_` and {eager[many]['held']:.0f} bytes a "
        f"parameter for {many} tasks. `add_grad_` reaches {own[1]['fraction']:.2f} of the machine's own "
        "copy bandwidth, counting the fewest bytes that have to move.",
        "",
        f"{place(first['machine'], first['threads'])}; {first['dtype']}; medians of "
        f"{first['repeats']} interleaved repeats. Intervals and more in `benchmarks/results/`.",
        "",
        "![time by form, and over the number of tasks](benchmarks/results/penalty_resnet18_cpu.png)",
    ]
    return "\n".join(lines)


def importance_table() -> str:
    """Time and memory by form and network, and what the batch approximation loses."""
    results = {m: json.loads((RESULTS / f"importance_{m}_cpu.json").read_text()) for m in NETWORKS}
    lines = [
        "| milliseconds a batch (times the batch approximation; times a training pass's memory) | "
        + " | ".join(f"{NETWORKS[m]}, {r['shape'][0]} samples" for m, r in results.items())
        + " |",
        "|---" * (len(results) + 1) + "|",
    ]
    for name, words in GRADIENTS.items():
        cells = [_gradient_cell(result, name) for result in results.values()]
        lines.append(f"| {words} | {' | '.join(cells)} |")
    kept = ", ".join(f"{100 * r['batch']['kept']:.0f} %" for r in results.values())
    ranks = ", ".join(f"{r['batch']['rank_correlation']:.2f}" for r in results.values())
    checks = ", ".join(f"{1e3 * r['self_check']['median']:.0f} ms" for r in results.values())
    errors = max(_gradient_row(r, "exact")["error"] for r in results.values())
    first = results["mlp"]
    lines += [
        "",
        f"Of all importance, the batch approximation keeps {kept} (same order); its rank correlation with "
        f"the exact one is {ranks}. The exact one is within {errors:.0e} of a float64 loop over single "
        f"samples (relative L2). The check of itself, once a model, takes {checks}.",
        "",
        f"{place(first['machine'], first['threads'])}; {first['dtype']}; networks as initialised, inputs of "
        f"random numbers; medians of {first['repeats']} interleaved repeats; memory at its peak, above that of "
        "the model and the batch. Intervals and more in `benchmarks/results/`.",
        "",
        "![time and memory by form](benchmarks/results/importance_transformer_cpu.png)",
    ]
    return "\n".join(lines)


def _gradient_row(result: dict[str, Any], name: str) -> dict[str, Any]:
    rows: list[dict[str, Any]] = result["forms"]
    return next((row for row in rows if row["name"] == name), {})


def _gradient_cell(result: dict[str, Any], name: str) -> str:
    row = _gradient_row(result, name)
    if not row:
        absent = result["skipped"].get(name, "").startswith(("ImportError", "ModuleNotFoundError"))
        return "not measured" if absent else "can't"
    memory = row["memory_to_training"]
    return (
        f"{_number(1e3 * row['seconds']['median'], 3)} ({_number(row['to_batch']['median'], 2)}; "
        f"{'?' if memory is None else _number(memory, 2)})"
    )


def _number(x: float, digits: int) -> str:
    """So many digits, and never a power of ten."""
    return f"{x:,.0f}" if x >= 10 ** (digits - 1) else f"{x:.{digits}g}"


def _cell(part: dict[str, Any], name: str) -> str:
    (row,) = [r for r in part["forms"] if r["name"] == name and r["tasks"] == 1]
    return f"{1e3 * row['seconds']['median']:.3g} ({row['ratio']['median']:.2g})"


def demo_table() -> str:
    """The demo's own table and picture."""
    (ROOT / "docs").mkdir(exist_ok=True)
    result = run_demo(out=ROOT / "docs" / "demo.png")
    where = machine()
    return (
        f"```\n{result.table()}\n```\n\n![accuracy on every task over time](docs/demo.png)\n\n"
        f"Learned in {result.seconds:.0f} s on {where['cpu']}, torch {where['torch']}, "
        f"{where['date']}, seed 0."
    )


def main() -> None:
    """Replace what stands between the README's marks."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    tables = {
        "demo": demo_table(),
        "benchmark": benchmark_table(),
        "importance": importance_table(),
    }
    for mark, table in tables.items():
        marks = rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)"
        text, found = re.subn(marks, lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.S)
        if found != 1:
            raise ValueError(f"README.md: got {found} places marked {mark}, expected 1")
    readme.write_text(text)


if __name__ == "__main__":
    main()
