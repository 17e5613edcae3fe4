"""Facts <S, P, O> in pictures: an embedding without classes learns batches of facts one after another."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from experiments.adaptivity import GivenImportance, total
from experiments.compositions import Fact, batches_of_facts, paint, shrunk
from experiments.embedding import VARIANTS, Embedding, ranks
from experiments.experiment import Page, Results
from experiments.learned import GRID
from experiments.loops import Batch, InOwnLoop, Pair, Variant, course
from experiments.tables import number, percent, table
from mas_ext import metrics
from mas_ext.comparison.cells import Cell, Found
from mas_ext.importance import estimate_importance
from mas_ext.methods.finetune import Finetune
from mas_ext.methods.method import Method, Training
from mas_ext.scenarios import datasets as data

# Batches of facts.
TASKS = 4
GARMENTS = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "boot",
)
COLUMNS = ("mAP", "recall at 1", "recall at 5", "mAP in its batch")
Glyphs = dict[str, Tensor]


def half_of_the_subjects(facts: Sequence[Fact]) -> list[bool]:
    """Facts (of the first task) whose subject is among the first half of them."""
    subjects = list(dict.fromkeys(fact[0] for fact in facts))
    return [fact[0] in subjects[: len(subjects) // 2] for fact in facts]


def relations(facts: Sequence[Fact]) -> list[bool]:
    """Facts of three words."""
    return [len(fact) == 3 for fact in facts]


PARTS = {"half of the subjects": half_of_the_subjects, "relations": relations}


class Pictures(NamedTuple):
    """All facts; by task pictures (N, 3, 32, 32) and positions among all facts (N,), mixed."""

    facts: list[list[Fact]]
    train: list[Pair]
    validation: list[Pair]
    test: list[Pair]


@functools.lru_cache(maxsize=1)
def glyphs(digits: bool, folder: str | None) -> tuple[Glyphs, Glyphs, Glyphs]:
    """By word (N, 1, h, w): for training, for validation, for tests."""
    sets = (
        [("digits", "0123456789")]
        if digits
        else [("mnist", "0123456789"), ("fashion-mnist", GARMENTS)]
    )
    found: tuple[Glyphs, Glyphs, Glyphs] = {}, {}, {}
    for name, words in sets:
        for part, samples in zip(("train", "test"), data.load_dataset(name, folder), strict=True):
            x, y = samples.batch(torch.arange(len(samples)))
            for label, word in enumerate(words):
                own = shrunk(x[y == label])
                if part == "test":
                    found[2][word] = own
                else:
                    found[0][word], found[1][word] = own.tensor_split([5 * len(own) // 6])
    return found


@dataclass(frozen=True)
class Facts(InOwnLoop):
    """Retrieval of facts by pictures, on all batches of facts after each.

    images: of a fact, to train on; half as many for validation and for testing each. words: length of a
    vector. lams: of the adaptivity test. digits: scikit-learn's instead of MNIST's and Fashion-MNIST's.
    """

    title: ClassVar[str] = "Problem agnostic: facts"
    variants: ClassVar[Mapping[str, Variant]] = VARIANTS
    score: ClassVar[str] = "validation_map"
    images: int = 24
    epochs: int = 8
    words: int = 32
    lams: tuple[float, ...] = (1e-3, 1e-2, 1e-1)
    digits: bool = False

    def quick(self) -> Facts:
        """The digits of scikit-learn, few pictures, one seed."""
        small: Any = {"images": 4, "epochs": 2, "grid": GRID[2:4], "lams": (0.1,), "seeds": 1}
        return replace(self, digits=True, data=None, **small)

    def data_sets(self) -> tuple[str, ...]:
        return ("digits",) if self.digits else ("mnist", "fashion-mnist")

    def protocol(self) -> dict[str, Any]:
        names = ("images", "epochs", "batch_size", "lr", "words", "lams", "digits")
        return {"tasks": TASKS, **{name: getattr(self, name) for name in names}}

    def plan(self, results: Results) -> Iterator[Cell]:
        """Every method and the adaptivity test with one seed, then with two, ..."""
        # With seed 0, sizes were settled.
        for seed in range(1, self.seeds + 1):
            yield from self.cells(results, seed)
            yield {"seed": seed, "purpose": "adaptivity"}

    def measure_seeded(self, cell: Cell) -> Found:
        pictures = self.pictures(cell["seed"])
        model = Embedding([fact for facts in pictures.facts for fact in facts], self.words)
        if cell["purpose"] == "adaptivity":
            return self.adapt(model, pictures)
        return self.learn(model, self.method(cell), pictures)

    def pictures(self, seed: int) -> Pictures:
        """Other facts, and other pictures of them, for each seed."""
        generator = torch.Generator().manual_seed(seed)
        sources = glyphs(self.digits, self.data)
        facts = batches_of_facts(list(sources[0]), TASKS, generator)

        def painted(source: Glyphs, n: int) -> list[Pair]:
            found, start = [], 0
            for own in facts:
                x = torch.cat([paint(fact, n, source, generator) for fact in own])
                y = torch.arange(start, start + len(own)).repeat_interleave(n)
                mixed = torch.randperm(len(x), generator=generator)
                found.append((x[mixed], y[mixed]))
                start += len(own)
            return found

        counts = (self.images, self.images // 2, self.images // 2)
        return Pictures(facts, *map(painted, sources, counts))

    def learn(self, model: Embedding, method: Method, pictures: Pictures) -> Found:
        """scores[column][t, k] on task k after task t; mAP on validation pictures after the last task."""
        found: dict[str, list[list[float]]] = {column: [] for column in COLUMNS}
        for task in range(TASKS):
            self.learn_facts(model, method, task, pictures)
            each = [scores(model, pictures.facts, *test) for test in pictures.test]
            for column in COLUMNS:
                found[column].append([one[column] for one in each])
        last = [scores(model, pictures.facts, *check)["mAP"] for check in pictures.validation]
        return {"scores": found, self.score: sum(last) / TASKS}

    def learn_facts(self, model: Embedding, method: Method, task: int, pictures: Pictures) -> None:
        """One batch of facts."""
        chosen_tasks = pictures.train[: task + 1] if method.joint else [pictures.train[task]]
        x, y = (torch.cat(parts) for parts in zip(*chosen_tasks, strict=True))

        def order() -> Iterator[Batch]:
            for index in torch.randperm(len(x)).split(self.batch_size):
                yield None, x[index], y[index]

        self.learn_task(method, self.begun(model, task, pictures), order)

    def begun(self, model: Embedding, task: int, pictures: Pictures) -> Training:
        """The training of a batch of facts, of which no head is its own."""
        return self.training(model, task, "domain", None, pictures.train[task], model.ranking_loss)

    def adapt(self, model: Embedding, pictures: Pictures) -> Found:
        """mAP on parts of the first task and on their rests, after all tasks, by source of importance."""
        self.learn_facts(model, Finetune(), 0, pictures)
        parts = {name: torch.tensor(of(pictures.facts[0])) for name, of in PARTS.items()}
        x, y = pictures.train[0]
        omegas = {"all": importance(model, x)}
        omegas |= {name: importance(model, x[part[y]]) for name, part in parts.items()}
        found = []
        for source, lam in self.importances():
            method = GivenImportance(lam, omegas[source or "all"], total(omegas["all"]))
            later = copy.deepcopy(model)
            method.begin_task(self.begun(later, 0, pictures))
            for task in range(1, TASKS):
                self.learn_facts(later, method, task, pictures)
            new = [scores(later, pictures.facts, *test)["mAP"] for test in pictures.test[1:]]
            kept = self.kept(later, parts, pictures)
            found.append({"source": source, "lam": lam, "kept": kept, "new": sum(new) / len(new)})
        return {"before": self.kept(model, parts, pictures), "variants": found}

    def importances(self) -> list[tuple[str | None, float]]:
        """Sources of importance, and strengths."""
        return [(None, 0.0), *((source, lam) for lam in self.lams for source in ("all", *PARTS))]

    def kept(
        self, model: Embedding, parts: Mapping[str, Tensor], pictures: Pictures
    ) -> dict[str, list[float]]:
        """By part: mAP on it and on the rest of the first task."""
        x, y = pictures.test[0]
        return {
            name: [
                scores(model, pictures.facts, x[own], y[own])["mAP"] for own in (part[y], ~part[y])
            ]
            for name, part in parts.items()
        }

    def show(self, results: Results) -> Page:
        """A table of methods, one of parts, and a picture of mAP as facts come."""
        rows, by_method = [], {}
        for name in VARIANTS:
            lam, found = self.finals(results, name)
            if not found:
                continue
            by_seed = {
                c: [torch.tensor(f["scores"][c], dtype=torch.float64) for f in found]
                for c in COLUMNS
            }
            by_method[name] = maps = by_seed["mAP"]
            columns = [[metrics.average_accuracy(m) for m in by_seed[c]] for c in COLUMNS]
            columns.append([float(m.diagonal().mean()) for m in maps])
            columns.append([metrics.forgetting(m) for m in maps])
            rows.append((f"`{name}`", *map(percent, columns), number(lam), str(len(found))))
        titles = [f"{column}, %" for column in COLUMNS]
        titles = ["method", *titles, "mAP when new, %", "forgetting, % points", "lam", "seeds"]
        text = [table(titles, rows), *self._adapted(results), results.place()]
        figure = course(by_method, "task", "mAP in %")
        return Page("\n\n".join([*text, "![mAP by task](facts.svg)"]), {"facts.svg": figure})

    def _adapted(self, results: Results) -> list[str]:
        """A table for each part: before, by source of importance, and the part's minus all, paired by seed."""
        text = []
        founds = [found for _, found in results.where(purpose="adaptivity")]
        for part in PARTS if founds else ():
            before = [percent([f["before"][part][k] for f in founds]) for k in (0, 1)]
            rows = [("before", "", *before, "", str(len(founds)))]
            by_source: dict[Any, list[list[float]]] = {}
            for i, (source, lam) in enumerate(self.importances()):
                if source in (None, "all", part):
                    each = [f["variants"][i] for f in founds]
                    columns = [[f["kept"][part][k] for f in each] for k in (0, 1)]
                    columns.append([f["new"] for f in each])
                    by_source[source, lam] = columns
                    name = source or "none"
                    rows.append((name, number(lam), *(percent(c) for c in columns), str(len(each))))
            for lam in self.lams:
                more = [
                    percent([a - b for a, b in zip(own, other, strict=True)])
                    for own, other in zip(by_source[part, lam], by_source["all", lam], strict=True)
                ]
                rows.append((f"{part}, minus all", number(lam), *more, str(len(founds))))
            titles = ("importance from", "lam", "part, %", "rest, %", "later tasks, %", "seeds")
            text += [f"**Adaptivity: {part}**", table(titles, rows)]
        return text


def importance(model: Embedding, x: Tensor) -> dict[str, Tensor]:
    """Omega by all projections, from pictures alone."""
    return estimate_importance(model, x.split(128))


@torch.no_grad()
def scores(
    model: Embedding, facts: Sequence[Sequence[Fact]], x: Tensor, y: Tensor
) -> dict[str, float]:
    """COLUMNS on pictures x, y: among all facts of their order, and among those of their own task."""
    task = torch.arange(len(facts)).repeat_interleave(torch.tensor([len(own) for own in facts]))
    similarity = model.similarity(model(x))
    same_order = model.order == model.order[y, None]
    rank = ranks(similarity, y, same_order)
    own = ranks(similarity, y, same_order & (task == task[y, None]))
    # A picture has one right fact: its average precision is 1 / rank.
    found = (1 / rank, rank <= 1, rank <= 5, 1 / own)
    return {name: float(each.double().mean()) for name, each in zip(COLUMNS, found, strict=True)}
