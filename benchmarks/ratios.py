"""Two results of benchmarks/penalty.py side by side, as shares of a plain copy's speed in the run of each.

python -m benchmarks.ratios BEFORE.json AFTER.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.files import Result, measured_on, named, row
from experiments.tables import table


def ratios(before: Result, after: Result) -> str:
    """One line per form that moves bytes: its share with warm and with cold caches, before and after."""
    rows = []
    for form in after["forms"]:
        if form["moved"]:
            parts = [(before, after), (before["cold"], after["cold"])]
            shares = [
                row(part, form["name"], form["tasks"]).get("fraction")
                for pair in parts
                for part in pair
            ]
            told = ["" if share is None else f"{share:.2f}" for share in shares]
            rows.append([f"`{form['name']}`", str(form["tasks"]), *told])
    titles = ["form", "tasks", "before", "after", "before, cold caches", "after, cold caches"]
    where = f"{named(after)}, {measured_on(after)}; bytes per second over those of a plain copy."
    return f"{table(titles, rows)}\n\n{where}"


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("before", type=Path)
    options.add_argument("after", type=Path)
    given = options.parse_args()
    print(ratios(*(json.loads(path.read_bytes()) for path in (given.before, given.after))))


if __name__ == "__main__":
    main()
