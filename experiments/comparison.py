"""Methods compared on one scenario: each one's lam chosen on validation data, then all seeds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

from experiments.experiment import Page, Results
from experiments.learned import (
    CHOOSING_SEED,
    DATA_SETS,
    Tuned,
    lam_option,
    scenario_of,
    told,
    with_auto,
)
from experiments.tables import number, percent, table
from mas_ext.comparison.cells import Cell, Found, chosen
from mas_ext.comparison.charts import canvas, legend, look
from mas_ext.comparison.options import Config, Purpose
from mas_ext.comparison.sweep import train
from mas_ext.methods import Method, Setting, create, options
from mas_ext.methods.quadratic import Lam
from mas_ext.models import MultiHead
from mas_ext.scenarios import Scenario

NAMES = {"task": "Task-incremental", "domain": "Domain-incremental", "class": "Class-incremental"}


class Variant(NamedTuple):
    """A method with these options, and the method whose lam it takes: None where it has none."""

    method: str
    options: Mapping[str, Any] = {}
    lam_of: str | None = None

    def __str__(self) -> str:
        return ", ".join([self.method, *map(str, self.options.values())])


# The proximal form minimises the same as the gradient form, and EBLL has LwF's distillation.
PLAIN = tuple(Variant(name) for name in ("finetune", "joint"))
PENALTIES = tuple(
    Variant(name, {}, name) for name in ("mas", "mas-alpha", "ewc", "online-ewc", "si")
)
PROXIMAL = tuple(Variant(each.method, {"mode": "proximal"}, each.method) for each in PENALTIES)
# MAS and MAS-alpha, each with the anchor of the other.
ANCHORS = tuple(Variant(name, {}, name) for name in ("mas-own", "mas-alpha-latest"))
MERGED = tuple(Variant(name) for name in ("imm-mean", "imm-mode"))
DISTILLED = (Variant("lwf", {}, "lwf"), Variant("ebll", {}, "lwf"))
BOTH = (Variant("lwf-mas", {}, "lwf-mas"),)


@dataclass(frozen=True)
class Comparison(Tuned):
    """Accuracy and forgetting of methods in some settings.

    name: of its files. published: average accuracy in % by method, in the order of `settings`.
    automatic: those of the variants that also learn with lam "auto".
    base: scenario and training. settings: in which methods are compared. variants: the methods.
    max_samples: of a task, that importance or a code is computed from; None for all.
    """

    name: ClassVar[str]
    published: ClassVar[Mapping[str, Sequence[float]]] = {}
    automatic: ClassVar[Sequence[Variant]] = (*PENALTIES, *ANCHORS)
    base: Config = field(default_factory=Config)
    settings: tuple[Setting, ...] = ("task",)
    variants: Sequence[Variant] = (*PLAIN, *PENALTIES, *ANCHORS, *MERGED, *DISTILLED)
    max_samples: int | None = None

    def data_sets(self) -> tuple[str, ...]:
        return DATA_SETS[str(self.base.scenario)]

    def protocol(self) -> dict[str, Any]:
        values = told(self.base, "setting")
        return values if self.max_samples is None else {**values, "max_samples": self.max_samples}

    def scenario(self, seed: int) -> Scenario:
        """The tasks with this seed."""
        return scenario_of(self.base, self.data, seed)

    def network(self, scenario: Scenario, seed: int) -> MultiHead:
        """The network before the first task."""
        return self.base.network(scenario, seed)

    def cell(self, setting: str, variant: Variant, seed: int, lam: Lam | None) -> Cell:
        """A training that counts."""
        return {
            "setting": setting,
            "method": variant.method,
            "options": dict(variant.options),
            "lam": lam,
            "seed": seed,
            "purpose": "auto" if lam == "auto" else "final",
        }

    def choosing(self, setting: str, variant: Variant) -> Cell | None:
        """The training that the lam of this variant is tried in."""
        if variant.lam_of is None:
            return None
        cell = self.cell(setting, Variant(variant.lam_of), CHOOSING_SEED, None)
        return {**cell, "purpose": "choose"}

    def plan(self, results: Results) -> Iterator[Cell]:
        """Every setting and method with one seed, then with two, ..., and then with lam "auto"."""
        for seed in range(self.seeds):
            for setting in self.settings:
                for variant in self.variants:
                    lam = yield from self.choice(results, self.choosing(setting, variant))
                    if lam is not None or variant.lam_of is None:
                        yield self.cell(setting, variant, seed, lam)
        for seed in range(self.seeds):
            for setting in self.settings:
                for variant in self._automatic():
                    yield self.cell(setting, variant, seed, "auto")

    def _automatic(self) -> list[Variant]:
        return [variant for variant in self.variants if variant in self.automatic]

    def method(self, cell: Cell) -> Method:
        """The method of a cell."""
        given = {**cell["options"], **lam_option(cell["lam"])}
        if self.max_samples is not None and "max_samples" in options(cell["method"]):
            given["max_samples"] = self.max_samples
        return create(cell["method"], **given)

    def measure(self, cell: Cell) -> Found:
        seed = cell["seed"]
        purpose: Purpose = "choose" if cell["purpose"] == "choose" else "final"
        scenario, settings = self.scenario(seed), self.base.training(seed, purpose)
        return train(
            self.network(scenario, seed),
            self.method(cell),
            scenario,
            replace(settings, setting=cell["setting"]),
        )

    def lam(self, results: Results, setting: str, variant: Variant) -> float | None:
        """The lam that was chosen, None where there is none."""
        return chosen(results, self.choice(results, self.choosing(setting, variant)))

    def finals(self, results: Results, setting: str, variant: Variant) -> list[Found]:
        """What was found with every seed, with the lam that was chosen."""
        cell = self.cell(setting, variant, 0, self.lam(results, setting, variant))
        del cell["seed"]
        return [found for _, found in results.where(**cell)]

    def show(self, results: Results) -> Page:
        """A table per setting, and pictures of the accuracies and of lam."""
        seeds = {len(self.finals(results, s, v)) for s in self.settings for v in self.variants}
        text = []
        for setting in self.settings:
            if len(self.settings) > 1:
                text.append(f"**{NAMES[setting]}**")
            text.append(self._table(results, setting))
            text += self._with_auto(results, setting)
        least, most = min(seeds - {0}), max(seeds)
        span = str(most) if least == most else f"{least} to {most}"
        text += [
            f"Mean and 95 % interval over {span} of {self.seeds} seeds. {results.place()}",
            f"![average accuracy by method]({self.name}.svg)",
            f"![validation accuracy over lam]({self.name}-lam.svg)",
        ]
        figures = {
            f"{self.name}.svg": self._accuracies(results),
            f"{self.name}-lam.svg": self._lams(results),
        }
        return Page("\n\n".join(text), figures)

    def columns(
        self, setting: Setting, variant: Variant, founds: Sequence[Found]
    ) -> dict[str, str]:
        """The cells of a variant's row, by title, from its trainings that did not diverge."""
        words = {"average accuracy, %": percent([found["average_accuracy"] for found in founds])}
        if self.published:
            theirs = self._published(setting, variant)
            words["published, %"] = "" if theirs is None else f"{theirs:.2f}"
        words["forgetting, % points"] = percent([found["forgetting"] for found in founds])
        return words

    def _published(self, setting: Setting, variant: Variant) -> float | None:
        if variant.options or variant.method not in self.published:
            return None
        return self.published[variant.method][self.settings.index(setting)]

    def _table(self, results: Results, setting: Setting) -> str:
        rows, titles = [], ["method"]
        for variant in self.variants:
            founds = self.finals(results, setting, variant)
            if not founds:
                continue
            well = [found for found in founds if "diverged" not in found]
            lost = f", {len(founds) - len(well)} diverged" * (len(well) < len(founds))
            words = self.columns(setting, variant, well)
            titles = ["method", *words, "lam", "seeds"]
            lam = number(self.lam(results, setting, variant))
            rows.append((f"`{variant}`", *words.values(), lam, f"{len(well)}{lost}"))
        return table(titles, rows) if rows else "Not measured yet."

    def _with_auto(self, results: Results, setting: Setting) -> list[str]:
        """A table of the methods with lam "auto", if there are some."""

        def by_seed(variant: Variant, lam: Lam | None) -> dict[int, Found]:
            cell = self.cell(setting, variant, 0, lam)
            del cell["seed"]
            return results.by_seed(**cell)

        return with_auto(
            (
                (f"`{v}`", by_seed(v, "auto"), by_seed(v, self.lam(results, setting, v)))
                for v in self._automatic()
            ),
            lambda found: float(found["average_accuracy"]),
        )

    def _accuracies(self, results: Results) -> Any:
        """A panel per setting: a point per seed, crosses for what was published."""
        count = len(self.settings)
        figure, panels = canvas(count, 1, 3.6, sharey=True)
        known = [v for v in self.variants if any(self.finals(results, s, v) for s in self.settings)]
        for panel, setting in zip(panels, self.settings, strict=True):
            for y, variant in enumerate(known):
                founds = self.finals(results, setting, variant)
                x = [100 * f["average_accuracy"] for f in founds if "diverged" not in f]
                panel.plot(x, [y] * len(x), "o", color=look(0)["color"], alpha=0.6, markersize=5)
                theirs = self._published(setting, variant)
                if theirs is not None:
                    panel.plot(theirs, y, "x", color=look(1)["color"])
            panel.set_title(NAMES[setting].lower(), fontsize="medium")
            panel.set_yticks(range(len(known)), list(map(str, known)), fontsize="small")
        panels[0].set_ylim(len(known) - 0.5, -0.5)
        cross = "; cross: published" * bool(self.published)
        figure.supxlabel(f"average accuracy in % (blue: a seed{cross})", fontsize="medium")
        return figure

    def _lams(self, results: Results) -> Any:
        """A panel per setting: validation accuracy over lam."""
        count = len(self.settings)
        figure, panels = canvas(count, 1, 2.6)
        names = [v.method for v in self.variants if v.lam_of == v.method and not v.options]
        for panel, setting in zip(panels, self.settings, strict=True):
            for i, name in enumerate(names):
                where = {"setting": setting, "method": name, "purpose": "choose"}
                tried = sorted(
                    (cell["lam"], 100 * found[self.score])
                    for cell, found in results.where(**where)
                    if "diverged" not in found
                )
                x, y = zip(*tried, strict=True) if tried else ((), ())
                panel.plot(x, y, label=name, **look(i))
            panel.set_xscale("log")
            panel.set_title(NAMES[setting].lower(), fontsize="medium")
        legend(figure, panels[0])
        figure.supxlabel("lam", fontsize="medium")
        figure.supylabel("validation accuracy in %", fontsize="medium")
        return figure
