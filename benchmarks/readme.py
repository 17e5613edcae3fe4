"""Writes the README's tables: runs the demo, and reads what the benchmarks measured.

python -m benchmarks.readme
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.files import RESULTS, fill, machine, measured_on
from experiments import Results
from experiments.split_mnist import SplitMNIST
from experiments.tables import number, table
from mas_ext.compare.bench import GRAPH
from mas_ext.compare.demo import run_demo
from mas_ext.metrics import mean_interval

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

# The same for omega.py.
SCENARIOS = {"split-mnist": "split MNIST", "split-cifar100": "split CIFAR-100"}

SPLIT_MNIST = SplitMNIST()


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
        f"{measured_on(first['machine'], first['threads'])}; {first['dtype']}; medians of "
        f"{first['repeats']} interleaved repeats. Intervals and more in `benchmarks/results/`.",
        "",
        "![time by form, and over the number of tasks](benchmarks/results/penalty_resnet18_cpu.png)",
        "",
        _on_a_gpu(json.loads((RESULTS / "penalty_gpt2_cuda.json").read_text())),
    ]
    return "\n".join(lines)


def _on_a_gpu(result: dict[str, Any]) -> str:
    """The same in a sentence, where calls follow each other."""
    rows = {(row["name"], row["tasks"]): row for row in result["forms"]}
    idle = next(row for row in result["cold"]["forms"] if row["name"] == "add_grad_")
    ms = {key: 1e3 * row["seconds"]["median"] for key, row in rows.items()}
    graph, most = rows[f"add_grad_{GRAPH}", 1], max(t for name, t in ms if name == "eager autograd")
    return (
        f"On a GPU, GPT-2 small with {result['parameters']:,} parameters: behind other launches "
        f"`add_grad_` takes {ms['add_grad_', 1]:.2f} ms "
        f"({1e3 * idle['seconds']['median']:.2f} ms where the GPU waits for it), and "
        f"{ms['add_grad_' + GRAPH, 1]:.2f} ms in a CUDA graph, which is "
        f"{graph['fraction']:.2f} of a plain copy's bandwidth; after {most} tasks "
        f"{ms['add_grad_', most]:.2f} ms. Eager autograd takes {ms['eager autograd', 1]:.0f} ms, after "
        f"{most} tasks {ms['eager autograd', most]:.0f} ms, torch.compile "
        f"{ms['torch.compile', 1]:.1f} ms ({measured_on(result['machine'], result['threads'])}; "
        f"{result['repeats']} repeats)."
    )


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
    repeats = " or ".join(map(str, sorted({r["repeats"] for r in results.values()})))
    lines += [
        "",
        f"Of all importance, the batch approximation keeps {kept} (same order); its rank correlation with "
        f"the exact one is {ranks}. The exact one is within {errors:.0e} of a float64 loop over single "
        f"samples (relative L2). The check of itself, once a model, takes {checks}.",
        "",
        _importance_on_a_gpu(),
        "",
        f"{measured_on(first['machine'], first['threads'])}; {first['dtype']}; networks as initialised, inputs "
        f"of random numbers; medians of {repeats} interleaved repeats; memory at its peak in two calls, the "
        "first one's check included, above that of the model and the batch. Intervals and more in "
        "`benchmarks/results/`.",
        "",
        "![time and memory by form](benchmarks/results/importance_transformer_cpu.png)",
    ]
    return "\n".join(lines)


def _importance_on_a_gpu() -> str:
    results = {n: RESULTS / f"importance_{n}_cuda.json" for n in NETWORKS}
    found = {n: json.loads(path.read_text()) for n, path in results.items() if path.exists()}
    times = ", ".join(
        f"{_gradient_row(r, 'exact')['to_batch']['median']:.1f} for {NETWORKS[n]}, {r['shape'][0]} samples"
        for n, r in found.items()
    )
    first = next(iter(found.values()))
    return (
        f"On a GPU the batch approximation is further ahead: exact importance takes that many times as long: "
        f"{times} ({measured_on(first['machine'], first['threads'])}; {first['repeats']} repeats)."
    )


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


def methods_table() -> str:
    """Task-incremental split MNIST: the methods as they are, the best first."""
    path = ROOT / "experiments" / "results" / "split-mnist.json"
    results = Results(path, SPLIT_MNIST.protocol())
    rows = []
    for variant in SPLIT_MNIST.variants:
        founds = SPLIT_MNIST.finals(results, "task", variant)
        if founds and not variant.options and not any("diverged" in found for found in founds):
            words = SPLIT_MNIST.columns("task", variant, founds)
            lam = number(SPLIT_MNIST.lam(results, "task", variant))
            accuracy = sum(found["average_accuracy"] for found in founds) / len(founds)
            rows.append((accuracy, (f"`{variant}`", *words.values(), lam, str(len(founds)))))
    titles = ("method", *words, "lam", "seeds")
    lines = [
        table(titles, [row for _, row in sorted(rows, reverse=True)]),
        "",
        "Split MNIST, five tasks of two digits, task-incremental; MLP 784-400-400, Adam 0.001, 4 epochs, "
        "batches of 128; mean and 95 % interval. lam was chosen on a tenth of the training data, with another "
        "seed. Published: Hsu et al. 2018, whose protocol this is. The other settings, forms and experiments: "
        "[docs/RESULTS.md](docs/RESULTS.md).",
        "",
        results.place(),
    ]
    return "\n".join(lines)


def omega_table() -> str:
    """Bytes, errors and accuracies by the dtype of omega."""
    result = json.loads((RESULTS / "omega_cpu.json").read_text())
    found = result["errors"]["relative_error"]
    entries = list(found["float32"])
    lines = [
        f"| omega | bytes a parameter | error of W after {', '.join(entries)} entries | of the gradient | "
        + " | ".join(f"accuracy, {name}" for name in SCENARIOS.values())
        + " |",
        "|---" * (4 + len(SCENARIOS)) + "|",
    ]
    for name, size in {"float32": 8, "bfloat16": 6, "uint8": 5}.items():
        errors = (
            ", ".join(_percent(found[name][n][kind]) for n in entries)
            for kind in ("omega", "gradient")
        )
        cells = [_accuracy_cell(result[scenario], name) for scenario in SCENARIOS]
        lines.append(f"| {name} | {size} | {' | '.join((*errors, *cells))} |")
    seeds = " and ".join(str(len(result[s]["average_accuracy"]["uint8"])) for s in SCENARIOS)
    lines += [
        "",
        "Errors are relative to float64: the root mean square over W's elements, and the L2 norm over those "
        "of the gradient, with importance that spans orders of magnitude. Accuracy is the average in per cent "
        f"after the last task, and its difference to float32 with the same seeds ({seeds}), with a 95 % "
        "interval.",
        "",
        f"{measured_on(result['errors']['machine'], result['errors']['threads'])}. Protocol and every seed: "
        "`benchmarks/omega.py`, `benchmarks/results/omega_cpu.json`.",
    ]
    return "\n".join(lines)


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share >= 1e-4 else "< 0.01 %"


def _accuracy_cell(result: dict[str, Any], name: str) -> str:
    by_dtype = result["average_accuracy"]
    if name not in by_dtype:
        return "not measured"
    mean = sum(by_dtype[name]) / len(by_dtype[name])
    if name == "float32":
        return f"{mean:.2f}"
    pairs = zip(by_dtype[name], by_dtype["float32"], strict=True)
    difference, half = mean_interval([a - b for a, b in pairs])
    return f"{mean:.2f} ({difference:+.2f} ± {half:.2f})"


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


def measured_tables() -> dict[str, str]:
    """All but the demo's."""
    return {
        "benchmark": benchmark_table(),
        "importance": importance_table(),
        "methods": methods_table(),
        "omega": omega_table(),
    }


def main() -> None:
    """Replace what stands between the README's marks."""
    fill(ROOT / "README.md", {"demo": demo_table(), **measured_tables()})


if __name__ == "__main__":
    main()
