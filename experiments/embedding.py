"""An embedding of pictures among facts, and methods that learn it by a ranking loss."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.adaptivity import Held
from experiments.compositions import Fact
from experiments.loops import Network, SquaredGradients, Variant
from mas_ext.methods.finetune import Finetune
from mas_ext.methods.mas import MAS
from mas_ext.methods.method import Method, Training
from mas_ext.methods.si import SI
from mas_ext.models import MultiHead


class Embedding(MultiHead):
    """An image network and its projections for facts of one, two and three words, side by side: (N, 6 words).

    facts: (F, 6 words), the words' vectors in the projection for facts of that order, else 0. order: (F,).
    """

    facts: Tensor
    order: Tensor

    def __init__(self, facts: Sequence[Fact], words: int) -> None:
        """words: the length of a word's vector, which is drawn by chance."""
        layers: list[nn.Module] = []
        for before, after in ((3, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU()]
        layers += [nn.Flatten(), nn.Linear(64 * 4 * 4, 128), nn.ReLU()]
        super().__init__(nn.Sequential(*layers), 128)
        for order in (1, 2, 3):
            self.add_head(order * words)
        self.register_buffer("facts", vectors(facts, words))
        self.register_buffer("order", torch.tensor([len(fact) for fact in facts]))

    def similarity(self, output: Tensor) -> Tensor:
        """Of (N, 6 words) to all facts, (N, F)."""
        return output @ self.facts.T


def vectors(facts: Sequence[Fact], words: int) -> Tensor:
    """See Embedding.facts; of length 1 for each word."""
    names = sorted({word for fact in facts for word in fact})
    known = dict(zip(names, F.normalize(torch.randn(len(names), words)), strict=True))
    found = torch.zeros(len(facts), 6 * words)
    for row, fact in zip(found, facts, strict=True):
        start = len(fact) * (len(fact) - 1) // 2 * words
        row[start : start + len(fact) * words] = torch.cat([known[word] for word in fact])
    return found


def rivals(y: Tensor, order: Tensor) -> Tensor:
    """The other facts of the same order in a mini-batch of facts y (N,): (N, F) bool."""
    met = torch.zeros_like(order, dtype=torch.bool).index_fill(0, y, True)
    return (met & (order == order[y, None])).scatter(1, y[:, None], False)


def shortfall(similarity: Tensor, y: Tensor, others: Tensor) -> Tensor:
    """mean over the rivals r of max(0, 1 - s_y + s_r), 0 without any: (N, F), (N,), (N, F) -> (N,)."""
    missing = (1 - similarity.gather(1, y[:, None]) + similarity).relu()
    return (missing * others).sum(1) / others.sum(1).clamp(min=1)


def ranks(similarity: Tensor, y: Tensor, among: Tensor) -> Tensor:
    """How many of these facts are at least as similar as the right one: (N, F), (N,), (N, F) -> (N,)."""
    return ((similarity >= similarity.gather(1, y[:, None])) & among).sum(1)


class Ranking(Method):
    """A method for embeddings: the ranking loss instead of the cross entropy."""

    def loss(self, training: Training, x: Tensor, y: Tensor) -> Tensor:
        """See Method.loss; y (N,) are positions among all facts."""
        model = embedding(training)
        similarity = model.similarity(training.logits(x))
        return shortfall(similarity, y, rivals(y, model.order)).mean()


def embedding(training: Training) -> Embedding:
    """The model in training."""
    assert isinstance(training.model, Embedding)
    return training.model


class Finetuning(Ranking, Finetune):
    """On one batch of facts after another."""


class Joint(Ranking):
    """On all facts so far."""

    joint = True


class FactsMAS(Ranking, MAS):
    """MAS on all three projections as they are: neither fact nor order is asked for."""


class FactsSI(Ranking, SI):
    """The path integral of the ranking loss."""


class RankingEWC(Ranking, SquaredGradients):
    """In place of the Fisher information, which needs a likelihood: f is a picture's ranking loss."""

    def samples(self, training: Training, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """See SquaredGradients.samples."""
        return x, y, rivals(y, embedding(training).order)

    def outputs(self, training: Training, network: Network, *sample: Tensor) -> Tensor:
        """See SquaredGradients.outputs."""
        x, y, others = (each[None] for each in sample)
        return shortfall(embedding(training).similarity(network(x)), y, others)


class HeldFacts(Ranking, Held):
    """Later batches of facts, held by an importance that is given."""


VARIANTS = {
    "finetune": Variant(Finetuning),
    "joint": Variant(Joint),
    "mas": Variant(FactsMAS, "mas"),
    "mas-alpha": Variant(partial(FactsMAS, merge="consistent"), "mas-alpha"),
    "ewc, of the ranking loss": Variant(RankingEWC, "ewc, of the ranking loss"),
    "si": Variant(FactsSI, "si"),
    "mas, proximal": Variant(partial(FactsMAS, mode="proximal"), "mas"),
}
