"""What these scripts share: the machine in words, bars with intervals, files of results, documents."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes

from mas_ext import info

matplotlib.use("Agg")

OWN, OTHER = "#1a6faf", "#b9bec4"
RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """The machine and the versions, in words."""
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


def place(result: Mapping[str, Any]) -> str:
    """Processor and threads in words."""
    on = result["machine"]["cpu" if result["device"] == "cpu" else "gpu"]
    return f"{on}, {result['threads']} threads"


def measured_on(where: Mapping[str, Any], threads: int) -> str:
    """Machine and date in words."""
    return (
        f"{where['gpu'] or where['cpu']} ({threads} threads, {where['instruction_set']}), torch "
        f"{where['torch']}, {where['date']}"
    )


def bars(
    axes: Axes,
    names: Sequence[str],
    values: Sequence[Mapping[str, float]],
    labels: Sequence[str],
    colors: Sequence[str],
) -> None:
    """Bars of medians from the top down, each with its interval (if any) and a label behind it."""
    places = range(len(names), 0, -1)
    axes.barh(places, [value["median"] for value in values], color=colors, tick_label=names)
    for y, value, label in zip(places, values, labels, strict=True):
        low, high = (value.get(key, value["median"]) for key in ("low", "high"))
        axes.plot([low, high], [y, y], color="#333333", linewidth=1)
        end = (max(high, value["median"]), y)
        axes.annotate(label, end, (4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_xlim(0, 1.12 * max(axes.get_xlim()))
    axes.spines[["top", "right"]].set_visible(False)


def times(ratio: float) -> str:
    """A ratio as a label."""
    return f"{ratio:.2g}x" if ratio < 100 else f"{ratio:.0f}x"


def save(result: Mapping[str, Any], what: str, path: Path | None) -> Path:
    """Write a result as JSON, by default as benchmarks/results/WHAT_MODEL_DEVICE.json."""
    name = f"{what}_{result['model']}_{result['device'].replace(':', '')}.json"
    path = path or RESULTS / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten: {path}")
    return path


def write(
    result: Mapping[str, Any],
    what: str,
    plot: Callable[[Mapping[str, Any], Path], None],
    path: Path | None,
    picture: Path | None,
) -> None:
    """Write a result as JSON and as a plot, by default beside it."""
    path = save(result, what, path)
    picture = picture or path.with_suffix(".png")
    picture.parent.mkdir(parents=True, exist_ok=True)
    plot(result, picture)
    print(f"written: {picture}")


def fill(document: Path, parts: Mapping[str, str]) -> None:
    """Replace what stands between the marks <!-- NAME --> and <!-- /NAME --> of a document.

    Raises:
        ValueError: a name is not marked once.
    """
    text = document.read_text()
    for name, part in parts.items():
        marks = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, found = re.subn(marks, lambda m, part=part: f"{m[1]}{part}\n{m[2]}", text, flags=re.S)
        if found != 1:
            raise ValueError(f"{document.name}: got {found} places marked {name}, expected 1")
    document.write_text(text)
