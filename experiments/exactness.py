"""Exact importance and its approximations: how similar they are, and whether learning notices."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from experiments.experiment import Page, Results
from experiments.learned import (
    CHOOSING_SEED,
    DATA_SETS,
    GRID,
    Tuned,
    fewer,
    lam_option,
    scenario_of,
    told,
    trained,
)
from experiments.tables import number, percent, table, titled
from mas_ext.comparison.cells import Cell, Found, chosen
from mas_ext.comparison.charts import canvas, look
from mas_ext.comparison.options import Config
from mas_ext.importance import estimate_importance
from mas_ext.methods import create
from mas_ext.methods.finetune import Finetune
from mas_ext.metrics import interval_text, rank_correlation
from mas_ext.models import build
from mas_ext.scenarios import Scenario, Tensors
from mas_ext.trainer import Trainer


class Estimator(NamedTuple):
    """Arguments of estimate_importance and the size of its batches."""

    method: Any = "exact"
    objective: Any = "l2"
    batch_size: int = 100


SIZES = (1, 2, 5, 10, 20, 50, 100, 200, 500)
ESTIMATORS = {
    "exact, other samples": Estimator(),
    **{f"batch of {n}": Estimator("batch", batch_size=n) for n in SIZES},
    "l1": Estimator(objective="l1"),
    "vector": Estimator(objective="vector"),
    "local": Estimator("local"),
}

# Methods and their options, by their importance; the last two have none.
LEARNED: dict[str, tuple[str, Mapping[str, Any]]] = {
    "exact": ("mas", {}),
    "batch": ("mas-batch", {}),
    "l1": ("mas", {"objective": "l1"}),
    "vector": ("mas-vector", {}),
    "local": ("local-mas", {}),
    "fine-tuning": ("finetune", {}),
    "joint": ("joint", {}),
}
REFERENCES = ("fine-tuning", "joint")
# Compared at every strength: at the same lam, less importance is a weaker penalty.
AT_EACH_STRENGTH = ("exact", "batch")

BASE = Config.read(
    {
        "scenario": "permuted-mnist",
        "setting": "domain",
        "tasks": 5,
        "hidden": [100, 100],
        "epochs": 3,
        "methods": ["mas"],
    }
)


@dataclass(frozen=True)
class Exactness(Tuned):
    """Similarity to exact importance, and what is kept of five tasks by each importance.

    base: scenario and training. samples: of a task, to train on. measured: samples that importance is computed
    from. networks: the estimators are compared on these, each with at most so many seeds. strengths: lam of the
    comparison of exact and batch importance.
    """

    title: ClassVar[str] = "Exact importance, and what stands in for it"
    base: Config = BASE
    samples: int = 10_000
    measured: int = 2_000
    networks: tuple[tuple[str, int], ...] = (("mlp", 10), ("cnn", 3))
    strengths: tuple[float, ...] = (0.003, 0.01, 0.02, 0.03)

    def quick(self) -> Exactness:
        """Digits in two parts, one network, one seed."""
        base = replace(self.base, scenario="split-digits", tasks=2)
        few = replace(self, base=base, seeds=1, data=None, samples=500, measured=100)
        return replace(few, networks=(("mlp", 1),), grid=GRID[1:6], strengths=(0.1,))

    def data_sets(self) -> tuple[str, ...]:
        return DATA_SETS[str(self.base.scenario)]

    def protocol(self) -> dict[str, Any]:
        return {**told(self.base), "samples": self.samples, "measured": self.measured}

    def choosing(self, name: str) -> Cell | None:
        """The training that the lam of an importance is tried in."""
        if name in REFERENCES:
            return None
        return {"part": "learning", "importance": name, "seed": CHOOSING_SEED, "purpose": "choose"}

    def lam(self, results: Results, name: str) -> float | None:
        """The lam that was chosen, None where there is none."""
        return chosen(results, self.choice(results, self.choosing(name)))

    def plan(self, results: Results) -> Iterator[Cell]:
        """Each seed's estimates and trainings."""
        for seed in range(self.seeds):
            for network, seeds in self.networks:
                if seed < seeds:
                    yield {"part": "estimates", "network": network, "seed": seed}
            for name in LEARNED:
                lam = yield from self.choice(results, self.choosing(name))
                yield self.final(name, seed, lam)
            for lam in self.strengths:
                for name in AT_EACH_STRENGTH:
                    yield self.final(name, seed, lam)

    def final(self, name: str, seed: int, lam: float | None) -> Cell:
        """A training that counts."""
        part = {"part": "learning", "importance": name}
        return {**part, "seed": seed, "purpose": "final", "lam": lam}

    def measure(self, cell: Cell) -> Found:
        if cell["part"] == "estimates":
            return self._estimates(cell["network"], cell["seed"])
        name, options = LEARNED[cell["importance"]]
        method = create(name, **options, **lam_option(cell["lam"]))
        scenario = self.scenario(cell["seed"])
        return trained(self.base, scenario, method, cell["seed"], cell["purpose"])

    def scenario(self, seed: int) -> Scenario:
        """The tasks, with some of their samples to train on."""
        return fewer(scenario_of(self.base, self.data, seed), self.samples, seed=seed)

    def _estimates(self, network: str, seed: int) -> Found:
        """By estimator: similarity to exact importance after the first task, and time."""
        scenario = Scenario(self.scenario(seed).tasks[:1])
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            mlp = network == "mlp"
            model = self.base.network(scenario, seed) if mlp else build(network, scenario.shape)
        Trainer(model, Finetune(), **vars(self.base.training(seed, "final"))).fit(scenario)
        assert isinstance(scenario.tasks[0].test, Tensors)
        x = scenario.tasks[0].test.batch(torch.arange(2 * self.measured))[0]

        def omega(estimator: Estimator, x: Tensor) -> Tensor:
            given = estimator.method, estimator.objective
            batches = x.split(estimator.batch_size)
            found = estimate_importance(model, batches, *given, exclude=["heads.*"])
            return torch.cat([each.flatten().double() for each in found.values()])

        half = x[: len(x) // 2]
        exact, rows = omega(Estimator(), half), {}
        for name, estimator in ESTIMATORS.items():
            # What is done once per model is not timed.
            omega(estimator, half[: 2 * estimator.batch_size])
            start = time.perf_counter()
            own = omega(estimator, x[len(x) // 2 :] if name == "exact, other samples" else half)
            rows[name] = {
                "seconds": time.perf_counter() - start,
                "rank_correlation": rank_correlation(own, exact),
                "cosine": float(own @ exact / (own.norm() * exact.norm())),
                "kept": float(own.sum() / exact.sum()),
            }
        return {"estimators": rows}

    def show(self, results: Results) -> Page:
        """Tables of both parts, and a picture of what is lost as the batch grows."""
        text = []
        for network, _ in self.networks:
            if found := results.by_seed(part="estimates", network=network):
                text += [f"**Likeness with exact importance, {network}**, {len(found)} seeds"]
                text += [self._likeness([each["estimators"] for each in found.values()])]
        text += ["**Learning**", self._learning(results)]
        text += ["**At every strength**, average accuracy, %", self._by_strength(results)]
        text += [results.place(), "![likeness over the size of batches](exactness.svg)"]
        return Page("\n\n".join(text), {"exactness.svg": self._over_sizes(results)})

    def _likeness(self, found: Sequence[Found]) -> str:
        rows = []
        for name in ESTIMATORS:
            each = [estimators[name] for estimators in found]
            kept = percent([one["kept"] for one in each], 1)
            rows.append(
                {
                    "importance": name,
                    "rank correlation": interval_text([e["rank_correlation"] for e in each], 3),
                    "cosine": interval_text([e["cosine"] for e in each], 3),
                    "of exact, %": kept if name.startswith(("batch", "exact")) else "",
                    "ms": f"{1e3 * sum(e['seconds'] for e in each) / len(each):,.0f}",
                }
            )
        return titled(rows)

    def _learning(self, results: Results) -> str:
        rows = []
        for name in LEARNED:
            lam = self.lam(results, name)
            if found := list(self._finals(results, name, lam).values()):
                borders = sum(sum(each["border_seconds"]) for each in found) / len(found)
                rows.append(
                    {
                        "importance": name,
                        "accuracy, %": percent([each["average_accuracy"] for each in found]),
                        "forgetting, % points": percent([each["forgetting"] for each in found]),
                        "lam": number(lam),
                        "s for importance": "" if name in REFERENCES else f"{borders:.2g}",
                        "seeds": str(len(found)),
                    }
                )
        return titled(rows)

    def _by_strength(self, results: Results) -> str:
        """With the difference, paired by seed."""
        rows = []
        for lam in self.strengths:
            found = [self._finals(results, name, lam) for name in AT_EACH_STRENGTH]
            pairs = [
                [each[seed]["average_accuracy"] for each in found]
                for seed in range(self.seeds)
                if all(seed in each for each in found)
            ]
            exact, batch = ([pair[i] for pair in pairs] for i in (0, 1))
            both = [a - b for a, b in pairs]
            rows.append((number(lam), *map(percent, (exact, batch, both)), str(len(both))))
        return table(("lam", *AT_EACH_STRENGTH, "exact - batch", "seeds"), rows)

    def _finals(self, results: Results, name: str, lam: float | None) -> dict[int, Found]:
        return results.by_seed(part="learning", importance=name, purpose="final", lam=lam)

    def _over_sizes(self, results: Results) -> Any:
        figure, panels = canvas(2, 1, 2.6)
        labels = {
            "rank_correlation": "rank correlation with exact",
            "kept": "share of all importance",
        }
        for i, (network, _) in enumerate(self.networks):
            found = results.by_seed(part="estimates", network=network).values()
            for panel, key in zip(panels, labels, strict=True):
                by_size = [[e["estimators"][f"batch of {n}"][key] for n in SIZES] for e in found]
                if by_size:
                    mean = torch.tensor(by_size, dtype=torch.float64).mean(0)
                    panel.plot(SIZES, mean, label=network, **look(i))
        for panel, label in zip(panels, labels.values(), strict=True):
            panel.set(xscale="log", ylim=(0, 1.05), xlabel="samples in a batch", ylabel=label)
        panels[0].legend(frameon=False)
        return figure
