"""Consistency: whether MAS and MAS-alpha favour some tasks, at equal total strength."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.cifar import features
from experiments.experiment import Experiment, Page, Results
from experiments.learned import (
    importance_of_head,
    lam_option,
    matrix,
    scenario_of,
    told,
    trained,
)
from experiments.tables import percent, table, titled
from mas_ext import models
from mas_ext.comparison.cells import Cell, Found
from mas_ext.comparison.charts import canvas, legend, look
from mas_ext.comparison.options import Config
from mas_ext.methods import create
from mas_ext.methods.finetune import Finetune
from mas_ext.methods.mas import MAS
from mas_ext.metrics import interval_text
from mas_ext.penalty import FusedMASPenalty
from mas_ext.scenarios import Scenario

METHODS: dict[str, dict[str, Any]] = {
    "mas": {},
    "mas-own": {"anchor": "own"},
    "mas-alpha": {"merge": "consistent", "anchor": "own"},
    "mas-alpha-latest": {"merge": "consistent"},
}

ORDERS = {"small first": (1.0, 10.0, 1.0), "large first": (10.0, 1.0, 1.0)}

PROTOCOLS = {
    "split-mnist": Config.read(
        {"scenario": "split-mnist", "hidden": [100, 100], "epochs": 2, "methods": ["mas"]}
    ),
    # Features of a network that knows CIFAR-10, so that a processor can do it.
    "cifar100-features": Config.read(
        {"scenario": "split-cifar100", "hidden": [256, 256], "epochs": 10, "methods": ["mas"]}
    ),
}


@dataclass(frozen=True)
class Consistency(Experiment):
    """A toy whose tasks have outputs of scale 1 and 10, and real tasks in random orders.

    protocols: the real tasks. strengths: their lam; the sum of alpha is lam T for T tasks.
    lams, toy_steps: of the toy. digits: scikit-learn's instead of MNIST.
    """

    title: ClassVar[str] = "Consistency"
    protocols: tuple[str, ...] = tuple(PROTOCOLS)
    strengths: tuple[float, ...] = (1.0, 2.0, 3.0, 0.1, 0.01)
    lams: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1e0, 1e1, 1e2)
    toy_steps: int = 400
    digits: bool = False

    def quick(self) -> Consistency:
        """The digits of scikit-learn, two orders, a short toy."""
        small = replace(self, digits=True, protocols=("split-mnist",), strengths=(1.0,), seeds=2)
        return replace(small, lams=(1e-1, 1e1), toy_steps=100, data=None)

    def data_sets(self) -> tuple[str, ...]:
        return ("digits",) if self.digits else ("mnist", "cifar100", "resnet20")

    def protocol(self) -> dict[str, Any]:
        trainings = {name: told(config) for name, config in PROTOCOLS.items()}
        return {**trainings, "toy_steps": self.toy_steps, "digits": self.digits}

    def plan(self, results: Results) -> Iterator[Cell]:
        """Toy and real tasks, seed by seed; a seed is an order of the tasks, too."""
        for seed in range(self.seeds):
            for order in ORDERS:
                for lam in self.lams:
                    for method in METHODS:
                        yield {"toy": order, "method": method, "lam": lam, "seed": seed}
            for name in self.protocols:
                for method in ("alone", "finetune"):
                    yield {"protocol": name, "method": method, "lam": None, "seed": seed}
                for lam in self.strengths:
                    for method in METHODS:
                        yield {"protocol": name, "method": method, "lam": lam, "seed": seed}

    def measure(self, cell: Cell) -> Found:
        seed = cell["seed"]
        if "toy" in cell:
            return toy(ORDERS[cell["toy"]], cell["method"], cell["lam"], seed, self.toy_steps)
        config, scenario = PROTOCOLS[cell["protocol"]], self.scenario(cell["protocol"])
        order = torch.randperm(len(scenario.tasks), generator=torch.Generator().manual_seed(seed))
        scenario = scenario.reordered(order.tolist())
        if cell["method"] == "alone":
            each = [Scenario((task,)) for task in scenario.tasks]
            found = [trained(config, task, Finetune(), seed) for task in each]
            return {"order": order, "alone": [one["average_accuracy"] for one in found]}
        method = create(cell["method"], **lam_option(cell["lam"]))
        result = {"order": order, **trained(config, scenario, method, seed)}
        if METHODS.get(cell["method"], {}).get("merge") == "consistent":
            assert isinstance(method, MAS)
            assert method.penalty is not None
            result["alpha"] = method.penalty.alpha
        return result

    def scenario(self, name: str) -> Scenario:
        """The tasks in the order of their labels."""
        if name == "cifar100-features":
            return features(self.data)
        base = PROTOCOLS[name]
        base = replace(base, scenario="split-digits") if self.digits else base
        return scenario_of(base, self.data, 0)

    def show(self, results: Results) -> Page:
        """Tables and pictures of the toy and of the real tasks."""
        text = [self._toy_table(results), "![errors over lam](consistency-toy.svg)"]
        figures = {"consistency-toy.svg": self._toy_picture(results)}
        for name in self.protocols:
            if results.where(protocol=name):
                text += [f"**{name}**", self._table(results, name)]
        text += ["![forgetting by position](consistency.svg)", results.place()]
        return Page("\n\n".join(text), {**figures, "consistency.svg": self._positions(results)})

    def _toy(self, results: Results, order: str, method: str, lam: float) -> Tensor | None:
        """Error over variance of the tasks with small and with large outputs, and of the third: (seeds, 3)."""
        found = results.by_seed(toy=order, method=method, lam=lam)
        last = [each["error"][-1] for each in found.values()]
        by_scale = [0, 1, 2] if order == "small first" else [1, 0, 2]
        return torch.tensor(last)[:, by_scale] if last else None

    def _toy_table(self, results: Results) -> str:
        titles = ("order", "method", *(f"lam {lam:g}" for lam in self.lams))
        rows = []
        for order in ORDERS:
            for method in METHODS:
                cells = [self._toy(results, order, method, lam) for lam in self.lams]
                words = [
                    "" if e is None else " / ".join(f"{x:.2g}" for x in e.mean(0).tolist())
                    for e in cells
                ]
                rows.append((order, f"`{method}`", *words))
        return table(titles, rows)

    def _toy_picture(self, results: Results) -> Any:
        panels_of = [(order, anchor) for order in ORDERS for anchor in ("latest", "own")]
        figure, panels = canvas(len(panels_of), 2, 2.8, sharey=True)
        kinds = ("outputs of scale 1", "outputs of scale 10", "third task")
        for panel, (order, anchor) in zip(panels, panels_of, strict=True):
            methods = [m for m, how in METHODS.items() if how.get("anchor", "latest") == anchor]
            for style, merge, method in zip(
                ("-", "--"), ("sum", "consistent"), methods, strict=True
            ):
                cells = [(lam, self._toy(results, order, method, lam)) for lam in self.lams]
                known = [(lam, error.mean(0).tolist()) for lam, error in cells if error is not None]
                for k, kind in enumerate(kinds):
                    y = [error[k] for _, error in known]
                    how = {**look(k), "linestyle": style, "label": f"{merge}: {kind}"}
                    panel.plot([lam for lam, _ in known], y, **how)
            panel.set(xscale="log", yscale="log")
            panel.set_title(f"{order}, {anchor} anchor", fontsize="medium")
        legend(figure, panels[0], 2)
        figure.supxlabel("lam", fontsize="medium")
        figure.supylabel("squared error / variance, after the third task", fontsize="medium")
        return figure

    def _runs(
        self, results: Results, name: str, method: str, lam: float | None
    ) -> list[tuple[Tensor, Tensor, Found]]:
        """By order: accuracy[t, k], accuracy of a network that learned task k alone, all that was found."""
        alone = results.by_seed(protocol=name, method="alone")
        return [
            (matrix(found), torch.tensor(alone[seed]["alone"], dtype=torch.float64), found)
            for seed, found in results.by_seed(protocol=name, method=method, lam=lam).items()
            if seed in alone
        ]

    def _table(self, results: Results, name: str) -> str:
        rows = []
        for method, lam in self._variants():
            runs = self._runs(results, name, method, lam)
            if not runs:
                continue
            accuracy = [100 * m[-1].mean() for m, _, _ in runs]
            gap = [100 * (alone - m[-1]).mean() for m, alone, _ in runs]
            lost = [100 * forgotten(m) for m, _, _ in runs]
            alphas = [a for _, _, found in runs for a in found.get("alpha", ())]
            spread = f"{torch.stack(accuracy).std():.2f}" if len(runs) > 1 else ""
            ahead = "" if method in ("finetune", "mas") else self._ahead(results, name, method, lam)
            rows.append(
                {
                    "method": f"`{method}`" + ("" if lam is None else f", lam {lam:g}"),
                    "accuracy, %": interval_text([float(a) for a in accuracy], 2),
                    "minus that of `mas`": ahead,
                    "its deviation over orders": spread,
                    "single-task gap, %": interval_text([float(g) for g in gap], 3),
                    "forgetting, % points": interval_text([float(x.mean()) for x in lost], 2),
                    "its deviation over tasks": interval_text([float(x.std()) for x in lost], 2),
                    "alpha": f"{min(alphas):.2g} to {max(alphas):.2g}" if alphas else "",
                    "orders": str(len(runs)),
                }
            )
        return titled(rows)

    def _ahead(self, results: Results, name: str, method: str, lam: float | None) -> str:
        """By how much a method is more accurate than MAS, in the same orders."""
        own, other = (
            results.by_seed(protocol=name, method=each, lam=lam) for each in (method, "mas")
        )
        key, both = "average_accuracy", own.keys() & other.keys()
        return percent([own[seed][key] - other[seed][key] for seed in both])

    def _variants(self) -> Sequence[tuple[str, float | None]]:
        return [
            ("finetune", None),
            *((method, lam) for lam in sorted(self.strengths) for method in METHODS),
        ]

    def _positions(self, results: Results) -> Any:
        figure, panels = canvas(len(self.protocols), 1, 2.8)
        for panel, name in zip(panels, self.protocols, strict=True):
            lam = self.strengths[0]
            for i, method in enumerate(METHODS):
                if runs := self._runs(results, name, method, lam):
                    lost = 100 * torch.stack([forgotten(m) for m, _, _ in runs])
                    x = torch.arange(1, lost.shape[1] + 1) + 0.1 * (i - 0.5)
                    spread = lost.std(0) if len(runs) > 1 else None
                    label = f"{method}, lam {lam:g}"
                    panel.errorbar(x, lost.mean(0), spread, label=label, **look(i))
                    panel.set_xticks(range(1, lost.shape[1] + 1))
            panel.set_title(name, fontsize="medium")
            panel.set(xlabel="position of the task in the order", ylabel="forgetting in % points")
        legend(figure, panels[0], 2)
        return figure


def forgotten(accuracy: Tensor) -> Tensor:
    """Of every task but the last: accuracy when it was new minus accuracy after the last one, (T - 1,)."""
    return (accuracy.diagonal() - accuracy[-1])[:-1]


def toy(scales: Sequence[float], method: str, lam: float, seed: int, steps: int) -> Found:
    """Three tasks one after another, y = scale sin(w x + b) of the same x; errors over variance after each."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        network = models.mlp((2,), (50, 50))
        x = 2 * torch.rand(600, 2) - 1
        y = torch.tensor(scales) * (3 * x @ torch.randn(2, len(scales)) + torch.randn(3)).sin()
        for _ in scales:
            network.add_head(1)
        penalty = FusedMASPenalty(network, lam=lam, **METHODS[method], exclude=["heads.*"])
        learn, test, error = x[:400], x[400:], []
        for task, scale in enumerate(scales):
            optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
            handle = penalty.attach(optimizer, mode="proximal")
            for _ in range(steps):
                optimizer.zero_grad()
                loss = F.mse_loss(network(learn, task)[:, 0], y[:400, task]) / scale**2
                loss.backward()
                optimizer.step()
            handle.remove()
            penalty.consolidate(importance=importance_of_head(network, task, [learn]))
            with torch.no_grad():
                squares = [
                    (network(test, k)[:, 0] - y[400:, k]).square().mean() / y[400:, k].var()
                    for k in range(task + 1)
                ]
            error.append([float(square) for square in squares])
        return {"error": error, "alpha": penalty.alpha}
