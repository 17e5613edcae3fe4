"""A pretrained language model learns another language by LoRA: what is kept of what it knew, held how."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import exp, log
from statistics import fmean
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from experiments.experiment import Experiment, Page, Results
from experiments.subjects import INSTALL, Subject, nats, perplexity, smollm2, tiny, whole
from experiments.tables import number, titled
from mas_ext import FusedMASPenalty
from mas_ext.comparison.cells import Cell, Found
from mas_ext.comparison.charts import canvas, legend, look
from mas_ext.importance import FisherSum
from mas_ext.integrations.model_output import ModelOutput
from mas_ext.methods.quadratic import Lam
from mas_ext.metrics import interval_text
from mas_ext.parameters.adapters import adapted_weights
from mas_ext.parameters.names import named_parameters
from mas_ext.scenarios.datasets import import_extra
from mas_ext.training.lam import choose_lam

Held = Literal["parameters", "weights"]
Importance = Literal["mas", "fisher", "ones"]


class Start(NamedTuple):
    """What a training begins with: a subject and its size, the rank of new adapters, the seed."""

    subject: Literal["smollm2", "tiny"]
    length: int
    held: int
    tested: int
    rank: int
    seed: int

    def make(self) -> Subject:
        """The model without adapters, and its texts."""
        make = smollm2 if self.subject == "smollm2" else tiny
        return make(self.length, self.held, self.tested)

    def adapted(self) -> nn.Module:
        """A copy of the model with LoRA on all linear layers of its blocks, which adds nothing yet."""
        peft = import_extra("peft", INSTALL)
        how = {"r": self.rank, "lora_alpha": 2 * self.rank, "target_modules": "all-linear"}
        config = peft.LoraConfig(task_type="CAUSAL_LM", **how)
        torch.manual_seed(self.seed)
        model: nn.Module = peft.get_peft_model(copy.deepcopy(self.make().model), config)
        return model.eval()


class Variant(NamedTuple):
    """What is held, by which importance, and with which lam.

    adapters: "parameters", the factors A and B one by one, or "weights", the products s B A.
    importance: "mas", "fisher", or "ones": L2 to the base.
    """

    adapters: Held
    importance: Importance
    lams: Sequence[float]


# By name, each with three lam a decade apart.
VARIANTS = {
    "L2 of A and B": Variant("parameters", "ones", (1e-2, 1e-1, 1e0)),
    "MAS of A and B": Variant("parameters", "mas", (1e-3, 1e-2, 1e-1)),
    "Fisher of A and B": Variant("parameters", "fisher", (1e0, 1e1, 1e2)),
    "L2 of s B A": Variant("weights", "ones", (1e-2, 1e-1, 1e0)),
    "MAS of s B A": Variant("weights", "mas", (1e-3, 1e-2, 1e-1)),
    "Fisher of s B A": Variant("weights", "fisher", (1e0, 1e1, 1e2)),
}
BASE, PLAIN = "before", "fine-tuning"
AUTO: Lam = "auto"


@dataclass(frozen=True)
class Language(Experiment):
    """Perplexity on the text that is learned and on texts that the model knew.

    subject: the model and its texts. variants: the penalties, by name. rank: of the adapters on all linear
    layers, whose scale s is 2. steps, batch, length: so many batches of rows of tokens. lr: of AdamW, without
    decay. held: rows that importance is taken from. tested: rows of a kind.
    """

    title: ClassVar[str] = "A language model, fine-tuned by LoRA"
    subject: Literal["smollm2", "tiny"] = "smollm2"
    variants: Mapping[str, Variant] = field(default_factory=lambda: VARIANTS)
    rank: int = 8
    steps: int = 16
    batch: int = 4
    length: int = 64
    lr: float = 1e-3
    held: int = 16
    tested: int = 16
    seeds: int = 3

    def quick(self) -> Language:
        """A tiny model, which need not be fetched, and two penalties."""
        names = ("L2 of A and B", "MAS of s B A")
        few = {name: self.variants[name]._replace(lams=(0.1, 1.0)) for name in names}
        return replace(self, subject="tiny", variants=few, rank=4, length=32, lr=1e-2, seeds=1)

    def data_sets(self) -> tuple[str, ...]:
        return ("smollm2", "bible") if self.subject == "smollm2" else ()

    def protocol(self) -> dict[str, Any]:
        names = ("subject", "rank", "steps", "batch", "length", "lr", "held", "tested")
        return {name: getattr(self, name) for name in names}

    def cells(self, method: str, lam: Lam | None = None) -> list[Cell]:
        """A method with one lam, with every seed; the model as it was has none."""
        seeds = range(1 if method == BASE else self.seeds)
        return [{"method": method, "lam": lam, "seed": seed} for seed in seeds]

    def compared(self) -> Iterator[tuple[str, Lam | None]]:
        """Methods and their lam, as in the table."""
        yield BASE, None
        yield PLAIN, None
        for method, variant in self.variants.items():
            for lam in (*variant.lams, AUTO):
                yield method, lam

    def plan(self, results: Results) -> Iterator[Cell]:
        """Everything with one seed, then with two, ...; of a method's lam the middle one first, "auto" last."""
        yield from self.cells(BASE)
        most = max(len(variant.lams) for variant in self.variants.values())
        for seed in range(self.seeds):
            yield self.cells(PLAIN)[seed]
            for i in sorted(range(most), key=lambda i: abs(i - most // 2)):
                for method, variant in self.variants.items():
                    for lam in variant.lams[i : i + 1]:
                        yield self.cells(method, lam)[seed]
        for seed in range(self.seeds):
            for method in self.variants:
                yield self.cells(method, AUTO)[seed]

    def measure(self, cell: Cell) -> Found:
        sizes = (self.subject, self.length, self.held, self.tested, self.rank)
        start = Start(*sizes, cell["seed"])
        penalty = None
        with torch.random.fork_rng([]):
            subject = start.make()
            model: nn.Module | None = subject.model
            if cell["method"] != BASE:
                model, penalty = self.learn(start, cell)
        if model is None:
            return {"diverged": "loss: got NaN or Inf, expected a finite one"}
        found: Found = {
            "perplexity": {kind: perplexity(model, each) for kind, each in subject.test.items()}
        }
        if penalty is not None and cell["lam"] == AUTO:
            found["chosen_lam"] = penalty.lam
        return found

    def learn(self, start: Start, cell: Cell) -> tuple[nn.Module | None, FusedMASPenalty | None]:
        """The model after training by a cell's method, None where that diverged; the penalty it had."""
        penalty = None
        if cell["method"] != PLAIN:
            variant = self.variants[cell["method"]]
            # In weight space it is that of the base, for all seeds.
            at = start._replace(seed=0) if variant.adapters == "weights" else start
            omega = importance_at(at, *variant[:2])
        model, rows = start.adapted(), start.make().learned
        if cell["method"] != PLAIN:
            penalty = FusedMASPenalty(model, adapters=variant.adapters)
            penalty.consolidate(importance=omega)
        count = self.steps * self.batch
        order = torch.randperm(len(rows))
        taken = rows[order[:count]].split(self.batch)
        if penalty is not None:
            held_out = rows[order[count:][: self.held]].split(self.batch)
            automatic = cell["lam"] == AUTO
            penalty.lam = self._choose(penalty, taken, held_out) if automatic else cell["lam"]
        for _ in self._training(model, taken, penalty):
            pass
        finite = all(p.isfinite().all() for p in model.parameters() if p.requires_grad)
        return model if finite else None, penalty

    def _training(
        self, model: nn.Module, batches: Sequence[Tensor], penalty: FusedMASPenalty | None = None
    ) -> Generator[Optimizer, None, None]:
        """Train on batches of rows, and give the optimizer after every step."""
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, self.lr, weight_decay=0.0)
        for batch in batches:
            optimizer.zero_grad()
            loss = nats(model, whole(batch)).mean()
            if penalty is not None:
                loss = loss + penalty()
            loss.backward()
            optimizer.step()
            yield optimizer

    def _choose(
        self, penalty: FusedMASPenalty, batches: Sequence[Tensor], held_out: Sequence[Tensor]
    ) -> float:
        """The lam for what is to be learned, from more of the same text alone."""
        model = penalty.model

        @torch.no_grad()
        def measure() -> tuple[float, tuple[()]]:
            return fmean(float(nats(model, whole(each)).mean()) for each in held_out), ()

        return choose_lam(penalty, lambda: self._training(model, batches), measure)

    def show(self, results: Results) -> Page:
        """Perplexities, and a picture of what is learned and what is lost."""
        rows = []
        for method, lam in self.compared():
            founds = list(results.by_seed(method=method, lam=lam).values())
            if founds:
                kinds = {
                    kind: interval_text([found["perplexity"][kind] for found in founds], 2)
                    for kind in founds[0]["perplexity"]
                }
                seeds = "" if method == BASE else str(len(founds))
                told = _of_auto(founds) if isinstance(lam, str) else number(lam)
                rows.append({"method": method, "lam": told, **kinds, "seeds": seeds})
        text = [
            titled(rows),
            f"Perplexity, mean and 95 % interval over the seeds. {results.place()}",
            "![perplexity of what was known over that of what is learned; stars: auto](language.svg)",
        ]
        return Page("\n\n".join(text), {"language.svg": self.picture(results)})

    def picture(self, results: Results) -> Any:
        """Perplexity of what was known over that of what is learned: a curve over lam for each method.

        A star is what lam "auto" leads to.
        """
        figure, (panel,) = canvas(1, 1, 4.5)
        curves: dict[str, list[list[float]]] = {}
        stars: dict[str, list[float]] = {}
        for method, lam in self.compared():
            founds = results.by_seed(method=method, lam=lam).values()
            logs = [[log(each) for each in found["perplexity"].values()] for found in founds]
            if logs:
                new, *known = (fmean(each) for each in zip(*logs, strict=True))
                point = [exp(new), exp(fmean(known))]
                if lam == AUTO:
                    stars[method] = point
                else:
                    curves.setdefault(method, []).append(point)
        for i, (method, points) in enumerate(curves.items()):
            panel.plot(*zip(*points, strict=True), label=method, **look(i))
            if method in stars:
                panel.plot(*stars[method], "*", color=look(i)["color"], markersize=14)
        panel.set_xlabel("what is learned: perplexity")
        panel.set_ylabel("what was known: geometric mean of perplexities")
        legend(figure, panel, 4)
        return figure


def _of_auto(founds: Sequence[Found]) -> str:
    lams = sorted(found["chosen_lam"] for found in founds)
    return "auto: " + " to ".join(f"{lam:.2g}" for lam in dict.fromkeys((lams[0], lams[-1])))


@lru_cache(maxsize=len(VARIANTS))
def importance_at(start: Start, adapters: Held, importance: Importance) -> dict[str, Tensor]:
    """What of the model matters for the texts that it is to keep, before its first step: `importance_of`."""
    return importance_of(start.adapted(), start.make().held, adapters, importance)


def importance_of(
    model: nn.Module, rows: Tensor, adapters: Held, importance: Importance, batch: int = 4
) -> dict[str, Tensor]:
    """Importance by name of what is held, from rows of token ids, each a sample."""
    if importance == "ones":
        like: Mapping[str, Tensor] = named_parameters(model)
        if adapters == "weights":
            like = {name: adapted.weight for name, adapted in adapted_weights(model).items()}
        return {name: torch.ones_like(p, dtype=torch.float32) for name, p in like.items()}
    estimator: Any = "exact"
    if importance == "fisher":
        estimator = FisherSum(forward=ModelOutput("logits"), shift=True)
    penalty = FusedMASPenalty(model, importance=estimator, forward=ModelOutput(), adapters=adapters)
    penalty.consolidate({"input_ids": each, "labels": each} for each in rows.split(batch))
    return penalty.omega
