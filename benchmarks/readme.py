"""Writes the README's tables: runs the demo, and reads what benchmarks and experiments measured.

python -m benchmarks.readme
"""

from __future__ import annotations

from benchmarks.files import (
    NAMES,
    ROOT,
    Result,
    dearest_first,
    fill,
    load_all,
    machine,
    measured_on,
    row,
)
from benchmarks.importance import OWN, first_batch
from experiments import EXPERIMENTS, Results
from experiments.learned import matrix
from experiments.on_pretrained import OnPretrained
from experiments.tables import percent, table
from mas_ext.comparison.demo import run_demo

# Methods on a pretrained network: none, what holds parameters, what holds outputs, what keeps data.
SHOWN = {
    "finetune": "fine-tuning",
    "mas": "MAS",
    "ewc": "EWC",
    "lwf": "distillation (LwF)",
    "lwf-mas": "MAS and distillation",
    "replay, 200": "replay of 20 images of each class",
}

# Networks of the benchmarks that nobody uses.
SYNTHETIC = ("cnn", "transformer")


def demo_picture() -> str:
    """The demo's picture, and where it was made."""
    result = run_demo(out=ROOT / "docs" / "demo.png")
    where = machine()
    return (
        "![five tasks of two digits each, one line per task: fine-tuning loses what it learned, MAS keeps "
        f"it](docs/demo.png)\n\nFive tasks of two digits each, learned in {result.seconds:.0f} s on "
        f"{where['cpu']}, torch {where['torch']}, {where['date']}, seed 0: `mas-ext demo`."
    )


def cost_table() -> str:
    """By network how much longer a step is, and how many ordinary passes exact importance takes."""
    steps = [
        r for r in load_all("step", "cpu") if (r["optimizer"], r["dtype"]) == ("sgd", "float32")
    ]
    longer = [
        [
            f"{NAMES[r['model']]}, batch of {r['shape'][0]}",
            _extra(r, "attach"),
            _extra(r, "eager autograd"),
        ]
        for r in steps
    ]
    on_cpu, on_gpu = (
        [r for r in dearest_first(load_all("importance", device)) if r["model"] not in SYNTHETIC]
        for device in ("cpu", "cuda")
    )
    passes = [
        [
            f"{NAMES[r['model']]}, {r['shape'][0]} samples" + ", GPU" * (r in on_gpu),
            *(f"{row(r, name)['to_training']['median']:.1f}" for name in (OWN, "loop, one by one")),
            f"{first_batch(r):.0f}",
        ]
        for r in [*on_cpu, *on_gpu]
    ]
    places = dict.fromkeys(map(measured_on, [*steps, *on_cpu, *on_gpu]))
    lines = [
        table(
            ["a step is longer by, %", "`penalty.attach`", "as other libraries write it"], longer
        ),
        table(
            ["importance, in ordinary passes", "exact", "loop over samples", "first batch"], passes
        ),
        f"SGD, float32, medians with 95 % intervals; {'; '.join(places)}.",
    ]
    return "\n\n".join(lines)


def _extra(result: Result, name: str) -> str:
    extra = row(result, name, 1)["extra"]
    low, middle, high = (100 * extra[key] for key in ("low", "median", "high"))
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"


def kept_table() -> str:
    """What is kept of a pretrained network's task, and learned of three others, by method."""
    experiment = EXPERIMENTS["on-pretrained"]
    assert isinstance(experiment, OnPretrained)
    results = Results(
        ROOT / "experiments" / "results" / "on-pretrained.json", experiment.protocol()
    )
    rows = []
    for variant in experiment.variants:
        if str(variant) in SHOWN:
            ends = [matrix(found)[-1] for found in experiment.finals(results, "task", variant)]
            kept, new = (
                [float(x) for x in part]
                for part in zip(*((e[0], e[1:].mean()) for e in ends), strict=True)
            )
            rows.append([SHOWN[str(variant)], percent(kept, 1), percent(new, 1)])
    return "\n\n".join(
        [
            table(["held by", "old task kept, %", "new tasks, %"], rows),
            f"Mean and 95 % interval over {experiment.seeds} seeds. {results.place()}",
        ]
    )


def measured_tables() -> dict[str, str]:
    """All but the demo's."""
    return {"cost": cost_table(), "kept": kept_table()}


def main() -> None:
    """Replace what stands between the README's marks."""
    fill(ROOT / "README.md", {"demo": demo_picture(), **measured_tables()})


if __name__ == "__main__":
    main()
