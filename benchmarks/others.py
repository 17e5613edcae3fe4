"""Tables of what others do for the same: forms of the penalty, ways to per-sample gradients, smaller omegas."""

from __future__ import annotations

from benchmarks.files import NAMES, Result, load, load_all, measured_on, row
from benchmarks.importance import OWN
from benchmarks.penalty import GRAPH
from experiments.tables import table
from mas_ext.metrics import mean_interval

# The tables' lines, by the names in the results of the benchmarks.
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
GRADIENTS = {
    "exact": "`estimate_importance(...)`",
    "batch approximation": "batch approximation",
    "forward + backward": "an ordinary forward and backward pass",
    "loop, one by one": "loop, one sample at a time",
    "vmap(grad), chunks": "`torch.func.vmap(grad)` in chunks",
    "BackPACK BatchGrad": "BackPACK, `BatchGrad`",
    "Opacus GradSampleModule": "Opacus, `GradSampleModule`",
}
# Networks that other packages take, too.
COMPARED = ("mlp", "cnn", "transformer", "resnet18")
SCENARIOS = {"split-mnist": "split MNIST", "split-cifar100": "split CIFAR-100"}


# -- the penalty -----------------------------------------------------------------------------------


def forms_table() -> str:
    """Milliseconds and multiples of add_grad_ by form and model, and what T tasks cost."""
    first, second = load("penalty_resnet18_cpu"), load("penalty_mlp_cpu")
    head = [
        "one step's penalty, milliseconds (times `add_grad_`)",
        *(f"{NAMES[r['model']]}, {r['parameters']:,} parameters" for r in (first, second)),
        "the same, again and again",
    ]
    parts = first["cold"], second["cold"], first, second
    rows = []
    for name, words in FORMS.items():
        *cold, again, again_too = (_cell(part, name) for part in parts)
        rows.append([words, *cold, f"{again} / {again_too}"])
    forms = first["cold"]["forms"]
    own, eager = (row(first["cold"], name, 1) for name in ("add_grad_", "eager autograd"))
    most, many = (
        max((r for r in forms if r["name"] == each["name"]), key=lambda r: r["tasks"])
        for each in (own, eager)
    )
    lines = [
        table(head, rows),
        "The first columns measure each call after other work has gone through the "
        "caches; the last one calls it again and again, so that small models stay in the cache.",
        f"ResNet-18, {most['tasks']} tasks instead of one: `add_grad_` takes "
        f"{most['ratio']['median']:.2f} times as long (95 % interval "
        f"{most['ratio']['low']:.2f} to {most['ratio']['high']:.2f}) and holds "
        f"{most['held']:.1f} bytes a parameter; eager autograd takes "
        f"{many['ratio']['median']:.0f} times `add_grad_` and {many['held']:.0f} bytes a "
        f"parameter for {many['tasks']} tasks. `add_grad_` reaches {own['fraction']:.2f} of the machine's own "
        "copy bandwidth, counting the fewest bytes that have to move.",
        f"{measured_on(first)}; {first['dtype']}; medians of {first['repeats']} interleaved repeats. Intervals "
        "and more in `benchmarks/results/`.",
        _on_a_gpu(load("penalty_gpt2_cuda")),
    ]
    return "\n\n".join(lines)


def _cell(part: Result, name: str) -> str:
    found = row(part, name, 1)
    return f"{1e3 * found['seconds']['median']:.3g} ({found['ratio']['median']:.2g})"


def _on_a_gpu(result: Result) -> str:
    """The GPU's times in a sentence, where calls follow each other."""

    def ms(name: str, tasks: int, part: Result = result) -> float:
        return float(1e3 * row(part, name, tasks)["seconds"]["median"])

    most = max(each["tasks"] for each in result["forms"] if each["name"] == "eager autograd")
    graph = f"add_grad_{GRAPH}"
    return (
        f"On a GPU, GPT-2 small with {result['parameters']:,} parameters: behind other launches "
        f"`add_grad_` takes {ms('add_grad_', 1):.2f} ms "
        f"({ms('add_grad_', 1, result['cold']):.2f} ms where the GPU waits for it), and "
        f"{ms(graph, 1):.2f} ms in a CUDA graph, which is "
        f"{row(result, graph, 1)['fraction']:.2f} of a plain copy's bandwidth; after {most} tasks "
        f"{ms('add_grad_', most):.2f} ms. Eager autograd takes {ms('eager autograd', 1):.0f} ms, after "
        f"{most} tasks {ms('eager autograd', most):.0f} ms, torch.compile "
        f"{ms('torch.compile', 1):.1f} ms ({measured_on(result)}; {result['repeats']} repeats)."
    )


# -- importance ------------------------------------------------------------------------------------


def gradients_table() -> str:
    """Time and memory by form; what the batch approximation loses."""
    measured = load_all("importance", "cpu")
    results = [r for r in measured if r["model"] in COMPARED]
    head = ["milliseconds a batch (times the batch approximation; times a training pass's memory)"]
    rows = [
        [words, *(_gradient_cell(result, name) for result in results)]
        for name, words in GRADIENTS.items()
    ]
    kept = ", ".join(f"{100 * r['batch']['kept']:.0f} %" for r in results)
    ranks = ", ".join(f"{r['batch']['rank_correlation']:.2f}" for r in results)
    error = max(row(r, OWN)["error"] for r in measured)
    repeats = " or ".join(map(str, sorted({r["repeats"] for r in measured})))
    places = "; ".join(dict.fromkeys(map(measured_on, measured)))
    lines = [
        table([*head, *map(_batch, results)], rows),
        f"Of all importance, the batch approximation keeps {kept}, and its rank correlation with the exact one "
        f"is {ranks}, in the table's order. The exact one is within {error:.0e} of a float64 loop over single "
        "samples (relative L2).",
        f"{places}; {results[0]['dtype']}; networks as initialised, inputs "
        f"of random numbers; medians of {repeats} interleaved repeats; memory at its peak in two calls, the "
        "first one's check included, above that of the model and the batch. Intervals and more in "
        "`benchmarks/results/`.",
    ]
    return "\n\n".join(lines)


def _batch(result: Result) -> str:
    """The network, the pixels of its images and the number of samples."""
    samples, *shape = result["shape"]
    pixels = [" x ".join(map(str, shape[1:]))] if len(shape) == 3 else []
    return ", ".join([NAMES[result["model"]], *pixels, f"{samples} samples"])


def _gradient_cell(result: Result, name: str) -> str:
    found = row(result, name)
    if not found:
        absent = result["skipped"].get(name, "").startswith(("ImportError", "ModuleNotFoundError"))
        return "not measured" if absent else "can't"
    memory = found["memory_to_training"]
    return (
        f"{_number(1e3 * found['seconds']['median'], 3)} ({_number(found['to_batch']['median'], 2)}; "
        f"{'?' if memory is None else _number(memory, 2)})"
    )


def _number(x: float, digits: int) -> str:
    """So many digits, and never a power of ten."""
    return f"{x:,.0f}" if x >= 10 ** (digits - 1) else f"{x:.{digits}g}"


# -- omega in fewer bytes ----------------------------------------------------------------------------


def omega_table() -> str:
    """Bytes, errors and accuracies by the dtype of omega."""
    result = load("omega_cpu")
    found = result["errors"]["relative_error"]
    entries = list(found["float32"])
    rows = []
    for name, size in {"float32": 8, "bfloat16": 6, "uint8": 5}.items():
        errors = (
            ", ".join(_percent(found[name][n][kind]) for n in entries)
            for kind in ("omega", "gradient")
        )
        accuracies = (_accuracy_cell(result[scenario], name) for scenario in SCENARIOS)
        rows.append([name, str(size), *errors, *accuracies])
    head = ["omega", "bytes a parameter", f"error of W after {', '.join(entries)} entries"]
    head += ["of the gradient", *(f"accuracy, {name}" for name in SCENARIOS.values())]
    seeds = " and ".join(str(len(result[s]["average_accuracy"]["uint8"])) for s in SCENARIOS)
    lines = [
        table(head, rows),
        "Errors are relative to float64: the root mean square over W's elements, and the L2 norm over those "
        "of the gradient, with importance that spans orders of magnitude. Accuracy is the average in per cent "
        f"after the last task, and its difference to float32 with the same seeds ({seeds}), with a 95 % "
        "interval.",
        f"{measured_on(result['errors'])}. Protocol and every seed: `benchmarks/omega.py`, "
        "`benchmarks/results/omega_cpu.json`.",
    ]
    return "\n\n".join(lines)


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share >= 1e-4 else "< 0.01 %"


def _accuracy_cell(result: Result, name: str) -> str:
    by_dtype = result["average_accuracy"]
    if name not in by_dtype:
        return "not measured"
    mean = sum(by_dtype[name]) / len(by_dtype[name])
    if name == "float32":
        return f"{mean:.2f}"
    pairs = zip(by_dtype[name], by_dtype["float32"], strict=True)
    difference, half = mean_interval([a - b for a, b in pairs])
    return f"{mean:.2f} ({difference:+.2f} ± {half:.2f})"
