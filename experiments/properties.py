"""Which method has which property, decided by measurements on data that everyone has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, ClassVar

from experiments.evidence import BATCH, HIDDEN, PROPERTIES, Property
from experiments.experiment import Cell, Experiment, Found, Page, Results
from experiments.tables import table
from mas_ext.failures import Diverged, Vanished
from mas_ext.methods import options

# What the document says that MAS-alpha comes from, in the order of PROPERTIES.
DOCUMENT = {
    "lwf": (True, False, True, False, False, False),
    "ebll": (False, False, False, False, False, False),
    "ewc": (True, True, True, False, False, False),
    "imm-mode": (True, True, False, False, False, False),
    "si": (True, True, False, False, False, False),
    "mas": (True, True, True, True, True, True),
    "mas-alpha": (True, True, True, True, True, True),
}


@dataclass(frozen=True)
class Properties(Experiment):
    """Which method has which property.

    methods: of the table. lams: of which the best decides.
    """

    title: ClassVar[str] = "The table of properties"
    methods: tuple[str, ...] = tuple(DOCUMENT)
    lams: tuple[float, ...] = (1e-2, 1e0, 1e2, 1e4)

    def quick(self) -> Properties:
        """MAS and LwF, two seeds, one lam."""
        return replace(self, methods=("lwf", "mas"), seeds=2, lams=(1.0,), data=None)

    def data_sets(self) -> tuple[str, ...]:
        return ("digits",)

    def protocol(self) -> dict[str, Any]:
        return {"hidden": HIDDEN, "batch_size": BATCH}

    def plan(self, results: Results) -> Iterator[Cell]:
        """All properties of all methods with one seed, then with two, ..."""
        for seed in range(self.seeds):
            for key, each in PROPERTIES.items():
                for name in (*self.methods, *each.references):
                    for lam in self._lams(each, name):
                        yield {"property": key, "method": name, "lam": lam, "seed": seed}

    def measure(self, cell: Cell) -> Found:
        each = PROPERTIES[cell["property"]]
        try:
            return each.measure(lambda: each.make(cell["method"], cell["lam"]), cell["seed"])
        except (Diverged, Vanished) as error:
            return {"diverged": str(error)}

    def best(self, results: Results, key: str, name: str) -> list[Found]:
        """The evidence with the lam that has the best mean score, of those with which nothing diverged."""
        each, known = PROPERTIES[key], []
        for lam in self._lams(each, name):
            founds = [f for _, f in results.where(property=key, method=name, lam=lam)]
            if founds and not any("diverged" in found for found in founds):
                known.append(founds)
        if not each.strengths:
            return known[0] if known else []
        return max(known, key=lambda founds: fmean(map(each.score, founds)), default=[])

    def show(self, results: Results) -> Page:
        """Yes or no, in bold where the document says otherwise; then the evidence."""
        titles = ("method", *(each.title for each in PROPERTIES.values()))
        decided, evidence = [], []
        for name in (*self.methods, "finetune", "joint"):
            founds = {key: self.best(results, key, name) for key in PROPERTIES}
            shown = (PROPERTIES[key].shown(each) if each else "" for key, each in founds.items())
            evidence.append((f"`{name}`", *shown))
            if name in self.methods:
                decided.append((f"`{name}`", *self._words(results, name)))
        meaning = ("", *(each.evidence for each in PROPERTIES.values()))
        text = [
            table(titles, decided),
            "The evidence:",
            table(titles, [meaning, *evidence]),
            f"Mean and 95 % interval; {self._seeds(results)}. {results.place()}",
        ]
        return Page("\n\n".join(text))

    def _words(self, results: Results, name: str) -> list[str]:
        words, holds = [], {}
        for key, document in zip(PROPERTIES, DOCUMENT[name], strict=True):
            each, founds = PROPERTIES[key], self.best(results, key, name)
            references = {other: self.best(results, key, other) for other in each.references}
            if not founds or not all(references.values()):
                words.append("")
                continue
            holds[key] = each.holds(founds, references)
            if key == "adaptive":  # in deployment there are no labels
                holds[key] = holds[key] and holds["unlabelled"]
            word = ("no", "yes")[holds[key]]
            words.append(word if holds[key] == document else f"**{word}**")
        return words

    def _seeds(self, results: Results) -> str:
        known = {
            key: max(len(self.best(results, key, name)) for name in self.methods)
            for key in PROPERTIES
        }
        counts = ", ".join(f"{PROPERTIES[key].title} {count}" for key, count in known.items())
        return f"seeds: {counts}"

    def _lams(self, each: Property, name: str) -> Sequence[float | None]:
        known = name not in each.references and "lam" in options(name)
        return self.lams if each.strengths and known else (None,)
