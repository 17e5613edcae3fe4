"""A pretrained language model learns another language by LoRA: what is kept of what it knew, held how."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import log
from statistics import fmean
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from experiments.experiment import Page, Results
from experiments.learned import CHOOSING_SEED, Tuned
from experiments.subjects import INSTALL, Subject, nats, perplexity, smollm2, tiny, whole
from experiments.tables import number, titled
from mas_ext import FusedMASPenalty
from mas_ext.compare.cells import Cell, Found, choose, chosen, decades
from mas_ext.compare.charts import canvas, legend, look
from mas_ext.importance import FisherSum
from mas_ext.integrations.model_output import ModelOutput
from mas_ext.metrics import interval_text
from mas_ext.parameters.names import named_parameters
from mas_ext.scenarios.datasets import import_extra

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
    """What is held, by which importance, and the lam that are tried first: every second one of a grid.

    adapters: "parameters", the factors A and B one by one, or "weights", the products s B A.
    importance: "mas", "fisher", or "ones": L2 to the base.
    """

    adapters: Held
    importance: Importance
    grid: Sequence[float]


VARIANTS = {
    "L2 of A and B": Variant("parameters", "ones", (1e-4, 1e-3, 1e-2, 1e-1)),
    "MAS of A and B": Variant("parameters", "mas", (1e-4, 1e-3, 1e-2, 1e-1)),
    "Fisher of A and B": Variant("parameters", "fisher", (1e-3, 1e-2, 1e-1, 1e0)),
    "L2 of s B A": Variant("weights", "ones", (1e-3, 1e-2, 1e-1, 1e0)),
    "MAS of s B A": Variant("weights", "mas", (1e-3, 1e-2, 1e-1, 1e0)),
    "Fisher of s B A": Variant("weights", "fisher", (1e-3, 1e-2, 1e-1, 1e0)),
}
BASE, PLAIN = "before", "fine-tuning"


@dataclass(frozen=True)
class Language(Tuned):
    """Perplexity on the text that is learned and on texts that the model knew.

    subject: the model and its texts. variants: the penalties, by name. rank: of the adapters on all linear
    layers, whose scale s is 2. steps, batch, length: so many batches of rows of tokens. lr: of AdamW, without
    decay. held: rows that importance is taken from. tested: rows of a kind.
    """

    title: ClassVar[str] = "A language model, fine-tuned by LoRA"
    score: ClassVar[str] = "score"
    subject: Literal["smollm2", "tiny"] = "smollm2"
    variants: Mapping[str, Variant] = field(default_factory=lambda: VARIANTS)
    rank: int = 8
    steps: int = 24
    batch: int = 4
    length: int = 64
    lr: float = 1e-3
    held: int = 16
    tested: int = 16
    seeds: int = 3

    def quick(self) -> Language:
        """A tiny model, which need not be fetched, and two penalties."""
        few = {name: each._replace(grid=(0.1, 1.0)) for name, each in self.variants.items()}
        few = {name: few[name] for name in ("L2 of A and B", "MAS of A and B")}
        return replace(self, subject="tiny", variants=few, rank=4, length=32, lr=1e-2, seeds=1)

    def data_sets(self) -> tuple[str, ...]:
        return ("smollm2", "bible") if self.subject == "smollm2" else ()

    def protocol(self) -> dict[str, Any]:
        names = ("subject", "rank", "steps", "batch", "length", "lr", "held", "tested")
        return {name: getattr(self, name) for name in names}

    def cell(self, method: str, lam: float | None = None, seed: int | None = None) -> Cell:
        """A training that counts or, without a seed, that lam is chosen by."""
        if seed is None:
            return {"method": method, "lam": lam, "seed": CHOOSING_SEED, "purpose": "choose"}
        return {"method": method, "lam": lam, "seed": seed, "purpose": "final"}

    def lam(self, results: Results, method: str) -> Any:
        """Ask for what lam is chosen by, see `choose`."""
        trial = self.cell(method)
        del trial["lam"]
        return choose(results, [trial], decades(self.variants[method].grid), self.score)

    def plan(self, results: Results) -> Iterator[Cell]:
        """The model as it was, then every method with one seed, with two, ..."""
        yield self.cell(BASE)
        yield self.cell(BASE, seed=0)
        yield self.cell(PLAIN)
        for seed in range(self.seeds):
            yield self.cell(PLAIN, seed=seed)
            for method in self.variants:
                lam = yield from self.lam(results, method)
                if lam is not None:
                    yield self.cell(method, lam, seed)

    def measure(self, cell: Cell) -> Found:
        sizes = (self.subject, self.length, self.held, self.tested, self.rank)
        start = Start(*sizes, cell["seed"])
        subject = start.make()
        with torch.random.fork_rng([]):
            model = subject.model if cell["method"] == BASE else self.learn(start, cell)
        if model is None:
            return {"diverged": "loss: got NaN or Inf, expected a finite one"}
        rows = subject.validation if cell["purpose"] == "choose" else subject.test
        found = {kind: perplexity(model, each) for kind, each in rows.items()}
        new, *known = (log(each) for each in found.values())
        return {"perplexity": found, "score": -(new + fmean(known)) / 2}

    def learn(self, start: Start, cell: Cell) -> nn.Module | None:
        """The model after training by a cell's method, None where that diverged."""
        penalty = None
        if cell["method"] != PLAIN:
            variant = self.variants[cell["method"]]
            omega = importance_at(start, variant.adapters, variant.importance)
        model, rows = start.adapted(), start.make().learned
        if cell["method"] != PLAIN:
            penalty = FusedMASPenalty(model, cell["lam"], **held_as(variant.adapters))
            penalty.consolidate(importance=omega)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, self.lr, weight_decay=0.0)
        order = torch.randperm(len(rows))[: self.steps * self.batch]
        for batch in rows[order].split(self.batch):
            optimizer.zero_grad()
            loss = nats(model, whole(batch)).mean()
            if penalty is not None:
                loss = loss + penalty()
            loss.backward()
            optimizer.step()
        return model if loss.isfinite() else None

    def show(self, results: Results) -> Page:
        """Perplexities at the lam that was chosen, and a picture of all lam."""
        rows = []
        for method in (BASE, PLAIN, *self.variants):
            lam = chosen(results, self.lam(results, method)) if method in self.variants else None
            founds = list(results.by_seed(method=method, lam=lam, purpose="final").values())
            if founds:
                kinds = {
                    kind: interval_text([found["perplexity"][kind] for found in founds], 2)
                    for kind in founds[0]["perplexity"]
                }
                seeds = "" if method == BASE else str(len(founds))
                rows.append({"method": method, **kinds, "lam": number(lam), "seeds": seeds})
        text = [
            titled(rows) if rows else "Not measured yet.",
            f"Mean and 95 % interval over {self.seeds} seeds. {results.place()}",
            "![perplexity on the new language and on what was known, for every lam](language.png)",
        ]
        return Page("\n\n".join(text), {"language.png": self.picture(results)})

    def picture(self, results: Results) -> Any:
        """Validation perplexity on what was known over that on what is learned, a curve over lam per method."""
        figure, (panel,) = canvas(1, 1, 4.5)
        for i, method in enumerate((BASE, PLAIN, *self.variants)):
            tried = sorted(
                (cell["lam"] or 0.0, list(found["perplexity"].values()))
                for cell, found in results.where(method=method, purpose="choose")
                if "diverged" not in found
            )
            x = [new for _, (new, *_) in tried]
            y = [torch.tensor(known).log().mean().exp() for _, (_, *known) in tried]
            panel.plot(x, y, label=method, **look(i))
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xlabel("perplexity on what is learned")
        panel.set_ylabel("geometric mean over what was known")
        legend(figure, panel, 4)
        return figure


def held_as(adapters: Held) -> Any:
    """The argument of FusedMASPenalty that tells what of the adapters is held."""
    return {} if adapters == "parameters" else {"adapters": adapters}


@lru_cache(maxsize=1)
def importance_at(start: Start, adapters: Held, importance: Importance) -> dict[str, Tensor]:
    """What of the model matters for the texts that it is to keep, before its first step: `importance_of`."""
    return importance_of(start.adapted(), start.make().held, adapters, importance)


def importance_of(
    model: nn.Module, rows: Tensor, adapters: Held, importance: Importance, batch: int = 4
) -> dict[str, Tensor]:
    """Importance by name of what is held, from rows of token ids, each a sample."""
    if importance == "ones":
        held = named_parameters(model).items()
        return {name: torch.ones_like(p, dtype=torch.float32) for name, p in held}
    estimator: Any = "exact"
    if importance == "fisher":
        estimator = FisherSum(forward=ModelOutput("logits"), shift=True)
    penalty = FusedMASPenalty(
        model, importance=estimator, forward=ModelOutput(), **held_as(adapters)
    )
    penalty.consolidate({"input_ids": each, "labels": each} for each in rows.split(batch))
    return penalty.omega
