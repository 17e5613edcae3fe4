"""What the benchmarks share: options, files of results, the machine in words, and filling in pages."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from mas_ext import info
from mas_ext.comparison.bench import DEVICES

Result = Mapping[str, Any]

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
# Networks in words, small ones first.
NAMES = {
    "mlp": "MLP 784-400-400-10",
    "cnn": "VGG-like",
    "transformer": "transformer, 4 layers",
    "resnet18": "ResNet-18",
    "bert_narrow": "BERT, 4 layers of width 128",
    "gpt2_narrow": "GPT-2, 4 layers of width 128",
    "llama_narrow": "Llama, 4 layers of width 128",
    "llama_lora": "Llama with LoRA, 4 layers of width 128",
    "vit_narrow": "ViT, 4 layers of width 128",
    "swin_t": "Swin-T",
    "resnet50": "ResNet-50",
    "vit_b": "ViT-B/16",
    "gpt2": "GPT-2 small",
}


def parser(doc: str, models: Collection[str], repeats: int) -> argparse.ArgumentParser:
    """The options --model, --device, --repeats and --json; doc begins with what the benchmark measures."""
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    made.add_argument("--model", default="mlp", choices=models)
    made.add_argument("--device", default="cpu", choices=DEVICES)
    made.add_argument("--repeats", type=int, default=repeats, help="default: %(default)s")
    made.add_argument("--json", type=Path, help="default: benchmarks/results/...")
    return made


def measure(
    options: argparse.ArgumentParser,
    run: Callable[..., Result],
    table: Callable[[Result], str],
    name: str,
) -> tuple[Result, Path]:
    """Run a benchmark with the command line's options, print its table and write its result as JSON.

    name: of its file in benchmarks/results, with keys of the result in braces.
    """
    given = vars(options.parse_args())
    path = given.pop("json")
    result = {"machine": machine(), **run(**given)}
    print(table(result))
    path = path or RESULTS / f"{name.format(**result)}.json"
    save(result, path)
    return result, path


def save(result: Result, path: Path) -> None:
    """Write a result as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")


def report(result: Result, lines: Iterable[str]) -> str:
    """A result as text: what was measured, these lines, and why forms are missing."""
    words = [
        f"{result['model']}, {result['dtype']}: {result['parameters']:,} parameters, {result['device']}, "
        f"{result['threads']} threads, {result['repeats']} repeats; medians with 95 % intervals"
    ]
    left_out = (f"{name}: left out, {reason}" for name, reason in result["skipped"].items())
    return "\n".join([*words, *lines, *left_out])


def batch(result: Result) -> str:
    """The shape of a batch."""
    return " x ".join(map(str, result["shape"]))


def copies(result: Result) -> str:
    """The speeds of plain copies."""
    return ", ".join(f"{name} {b / 1e9:.1f}" for name, b in result["bandwidth"].items())


def named(result: Result) -> str:
    """The network of a result, and where it ran if not on the CPU."""
    return NAMES[result["model"]] + ("" if result["device"] == "cpu" else ", GPU")


def machine() -> dict[str, Any]:
    """The machine and the versions."""
    cpu = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        names = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        cpu = names[0].split(":")[1].strip() if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "instruction_set": info()["cpu_instruction_set"],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def measured_on(result: Result) -> str:
    """Machine, threads, versions and date of a result in words."""
    where = result["machine"]
    return (
        f"{where['gpu'] or where['cpu']} ({result['threads']} threads, {where['instruction_set']}), torch "
        f"{where['torch']}, {where['date']}"
    )


def load(name: str) -> dict[str, Any]:
    """The result in benchmarks/results/NAME.json."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def load_all(kind: str, device: str = "*") -> list[dict[str, Any]]:
    """All results of one benchmark, the CPU's and those of small networks first."""

    def place(r: Result) -> tuple[Any, ...]:
        return r["device"], [*NAMES].index(r["model"]), r.get("optimizer") != "sgd", r["dtype"]

    found = [load(path.stem) for path in RESULTS.glob(f"{kind}_*_{device}.json")]
    return sorted(found, key=place)


def row(part: Result, name: str, tasks: int | None = None) -> Result:
    """The row of a form, after so many tasks if it depends on them; empty if it was not measured."""
    return next((r for r in part["forms"] if r["name"] == name and r.get("tasks") == tasks), {})


def dearest_first(found: Iterable[Result]) -> list[Result]:
    """Results of importance, the CPU's first, and of each device those first that take the most passes."""

    def place(r: Result) -> tuple[str, float]:
        return r["device"], -row(r, "exact")["to_training"]["median"]

    return sorted(found, key=place)


def fill(document: Path, parts: Mapping[str, str]) -> None:
    """Replace what stands between the marks <!-- NAME --> and <!-- /NAME --> of a document.

    Raises:
        ValueError: a name is not marked once.
    """
    text = document.read_text()
    for name, part in parts.items():
        before, after = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        made = f"{before}{part}\n{after}".replace("\\", r"\\")
        text, found = re.subn(f"{before}.*?{after}", made, text, flags=re.S)
        if found != 1:
            raise ValueError(f"{document.name}: got {found} places marked {name}, expected 1")
    document.write_text(text)
