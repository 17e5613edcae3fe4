"""Split MNIST in three settings, beside what was published on this protocol."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

from mas_ext import config
from mas_ext.charts import canvas, legend, look
from mas_ext.config import Config
from mas_ext.experiments.experiment import Cell, Experiment, Found, Page, Results
from mas_ext.experiments.learned import CHOOSING_SEED, GRID, choose, chosen, measured, scenario_of
from mas_ext.experiments.tables import number, percent, table
from mas_ext.methods import SETTINGS, create


class Variant(NamedTuple):
    """A method with these options, and the method whose lam it takes: None where it has none."""

    method: str
    options: Mapping[str, Any] = {}
    lam_of: str | None = None

    def __str__(self) -> str:
        return ", ".join([f"`{self.method}`", *map(str, self.options.values())])


# The first are measured first.
MAIN = (
    *(Variant(name) for name in ("finetune", "joint")),
    *(Variant(name, {}, name) for name in ("mas", "mas-alpha", "ewc", "online-ewc", "si", "lwf")),
    *(Variant(name) for name in ("imm-mean", "imm-mode")),
)
# The proximal form minimises the same as the gradient form, and EBLL has LwF's distillation.
OTHERS = (
    *(
        Variant(name, {"mode": "proximal"}, name)
        for name in ("mas", "mas-alpha", "ewc", "online-ewc", "si")
    ),
    *(Variant(name, {}, name) for name in ("mas-batch", "mas-vector", "local-mas")),
    Variant("ebll", {}, "lwf"),
)

# Hsu et al. 2018, Re-evaluating continual learning scenarios: average accuracy in %, in the order of SETTINGS.
PUBLISHED = {
    "finetune": (93.46, 55.16, 19.71),
    "ewc": (97.70, 58.85, 19.80),
    "online-ewc": (98.04, 57.33, 19.77),
    "si": (98.56, 64.76, 19.67),
    "mas": (99.22, 68.57, 19.52),
    "lwf": (99.60, 71.02, 24.17),
    "joint": (99.52, 98.59, 97.53),
}

NAMES = {"task": "task-incremental", "domain": "domain-incremental", "class": "class-incremental"}

BASE = config.read(
    {
        "scenario": "split-mnist",
        "hidden": [400, 400],
        "optimizer": "adam",
        "lr": 1e-3,
        "epochs": 4,
        "batch_size": 128,
        "methods": ["finetune"],
    }
)


@dataclass(frozen=True)
class SplitMNIST(Experiment):
    """Average accuracy of all methods in the task-, domain- and class-incremental setting.

    base: how it is learned. groups: of variants, those of a group in all settings before the next.
    choosing_epochs: for a task, where lam is chosen.
    """

    title: ClassVar[str] = "Split MNIST, as published"
    base: Config = BASE
    groups: Sequence[Sequence[Variant]] = (MAIN, OTHERS)
    choosing_epochs: int = 1
    grid: tuple[float, ...] = GRID

    @property
    def variants(self) -> list[Variant]:
        """Of all groups."""
        return [variant for variants in self.groups for variant in variants]

    def quick(self) -> SplitMNIST:
        """The digits of scikit-learn, one seed, few methods."""
        small = replace(
            self.base, scenario="split-digits", settings=replace(self.base.settings, batch_size=32)
        )
        few = [v for v in self.variants if v.method in ("finetune", "joint", "mas", "ewc", "lwf")]
        return replace(
            self,
            base=small,
            groups=[few],
            seeds=1,
            choosing_epochs=4,
            grid=self.grid[2:8],
            data=None,
        )

    def protocol(self) -> dict[str, Any]:
        """See Experiment.protocol."""
        values = self.base.values()
        return {name: value for name, value in values.items() if name not in ("setting", "methods")}

    def cell(self, setting: str, variant: Variant, seed: int, lam: float | None) -> Cell:
        """A training that counts."""
        return {
            "setting": setting,
            "method": variant.method,
            "options": dict(variant.options),
            "lam": lam,
            "seed": seed,
            "purpose": "final",
        }

    def choosing(self, setting: str, variant: Variant) -> Cell:
        """A training that chooses the lam of this variant, but for the lam."""
        assert variant.lam_of is not None
        cell = self.cell(setting, Variant(variant.lam_of), CHOOSING_SEED, None)
        return {**cell, "purpose": "choose", "epochs": self.choosing_epochs}

    def plan(self, results: Results) -> Iterator[Cell]:
        """Every setting and method with one seed, then with two, ..."""
        for seed in range(self.seeds):
            for setting in ("domain", "class", "task"):
                for variant in self.variants:
                    lam = None
                    if variant.lam_of is not None:
                        lam = yield from choose(results, self.choosing(setting, variant), self.grid)
                        if lam is None:
                            continue
                    yield self.cell(setting, variant, seed, lam)

    def measure(self, cell: Cell) -> Found:
        """See Experiment.measure."""
        settings = self.base.settings
        settings = replace(
            settings, setting=cell["setting"], epochs=cell.get("epochs", settings.epochs)
        )
        comparison = replace(self.base, settings=settings)
        lam = {} if cell["lam"] is None else {"lam": cell["lam"]}
        method = create(cell["method"], **cell["options"], **lam)
        scenario = scenario_of(comparison, self.data, cell["seed"])
        return measured(comparison, scenario, method, cell["seed"], cell["purpose"])

    def finals(self, results: Results, setting: str, variant: Variant) -> list[Found]:
        """Of every seed, with the lam that was chosen."""
        lam = self.lam(results, setting, variant)
        cell = self.cell(setting, variant, 0, lam)
        del cell["seed"]
        return [found for _, found in results.where(**cell)]

    def lam(self, results: Results, setting: str, variant: Variant) -> float | None:
        """The one that was chosen, None where there is none."""
        if variant.lam_of is None:
            return None
        return chosen(results, self.choosing(setting, variant), self.grid)

    def show(self, results: Results) -> Page:
        """A table a setting, and pictures of the accuracies and of lam."""
        seeds = {len(self.finals(results, s, v)) for s in SETTINGS for v in self.variants} - {0}
        text = []
        for i, setting in enumerate(SETTINGS):
            text += [
                f"**{NAMES[setting][0].upper()}{NAMES[setting][1:]}**",
                self._table(results, setting, i),
            ]
        text += [
            f"Mean and 95 % interval over {min(seeds)} to {max(seeds)} of {self.seeds} seeds; lam was chosen "
            f"with {self.choosing_epochs} of {self.base.settings.epochs} epochs a task. {results.place()}",
            "![average accuracy by method](split-mnist.png)",
            "![validation accuracy over lam](split-mnist-lam.png)",
        ]
        figures = {
            "split-mnist.png": self._accuracies(results),
            "split-mnist-lam.png": self._lams(results),
        }
        return Page("\n\n".join(text), figures)

    def _table(self, results: Results, setting: str, i: int) -> str:
        titles = (
            "method",
            "average accuracy, %",
            "published, %",
            "forgetting, % points",
            "lam",
            "seeds",
        )
        rows = []
        for variant in self.variants:
            founds = self.finals(results, setting, variant)
            if not founds:
                continue
            well = [found for found in founds if "diverged" not in found]
            lost = f", {len(founds) - len(well)} diverged" * (len(well) < len(founds))
            published = PUBLISHED.get(variant.method, ("",) * 3)[i] if not variant.options else ""
            rows.append(
                (
                    str(variant),
                    percent([found["average_accuracy"] for found in well]),
                    str(published),
                    percent([found["forgetting"] for found in well]),
                    number(self.lam(results, setting, variant)),
                    f"{len(well)}{lost}",
                )
            )
        return table(titles, rows) if rows else "Not measured yet."

    def _accuracies(self, results: Results) -> Any:
        """A panel a setting: a point a seed, what was published as a cross."""
        figure, panels = canvas(len(SETTINGS), 3, 4.5, sharey=True)
        known = [v for v in self.variants if any(self.finals(results, s, v) for s in SETTINGS)]
        labels = [str(variant).replace("`", "") for variant in known]
        for i, (panel, setting) in enumerate(zip(panels, SETTINGS, strict=True)):
            for y, variant in enumerate(known):
                founds = self.finals(results, setting, variant)
                x = [100 * f["average_accuracy"] for f in founds if "diverged" not in f]
                panel.plot(x, [y] * len(x), "o", color=look(0)["color"], alpha=0.6, markersize=5)
                if variant.method in PUBLISHED and not variant.options:
                    panel.plot(PUBLISHED[variant.method][i], y, "x", color=look(1)["color"])
            panel.set_title(NAMES[setting], fontsize="medium")
            panel.grid(alpha=0.3)
            panel.set_yticks(range(len(labels)), labels, fontsize="small")
        panels[0].set_ylim(len(labels) - 0.5, -0.5)
        figure.supxlabel(
            "average accuracy in % (blue: a seed; cross: published)", fontsize="medium"
        )
        return figure

    def _lams(self, results: Results) -> Any:
        """A panel a setting: validation accuracy over lam."""
        figure, panels = canvas(len(SETTINGS), 3, 3.2)
        names = [v.method for v in self.variants if v.lam_of == v.method and not v.options]
        for panel, setting in zip(panels, SETTINGS, strict=True):
            for i, name in enumerate(names):
                where = {"setting": setting, "method": name, "purpose": "choose"}
                tried = sorted(
                    (cell["lam"], 100 * found["validation_accuracy"])
                    for cell, found in results.where(**where)
                    if "diverged" not in found
                )
                x, y = zip(*tried, strict=True) if tried else ((), ())
                panel.plot(x, y, label=name, **look(i))
            panel.set_xscale("log")
            panel.set_title(NAMES[setting], fontsize="medium")
            panel.grid(alpha=0.3)
        legend(figure, panels[0])
        figure.supxlabel("lam", fontsize="medium")
        figure.supylabel("validation accuracy in %", fontsize="medium")
        return figure
