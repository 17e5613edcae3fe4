"""Writes the tables and pictures of docs/RESULTS.md from what the experiments found so far.

python -m benchmarks.results_page
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.files import fill
from experiments import EXPERIMENTS, Results, draw

ROOT = Path(__file__).parents[1]
FOUND = ROOT / "experiments" / "results"
PICTURES = ROOT / "docs" / "results"


def main() -> None:
    """Replace what stands between the page's marks."""
    PICTURES.mkdir(exist_ok=True)
    parts = {}
    for name, experiment in EXPERIMENTS.items():
        path = FOUND / f"{name}.json"
        if path.exists():
            page = draw(experiment, Results(path, experiment.protocol()), PICTURES)
            parts[name] = page.text.replace(f"]({name}", f"](results/{name}")
        else:
            parts[name] = "Not measured yet."
    fill(ROOT / "docs" / "RESULTS.md", parts)


if __name__ == "__main__":
    main()
