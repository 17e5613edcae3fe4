"""An embedding of pictures among facts, its ranking loss, and the methods that learn it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.compositions import Fact
from experiments.loops import SquaredGradients, Variant
from mas_ext.methods.finetune import Finetune
from mas_ext.methods.joint import Joint
from mas_ext.methods.mas import MAS
from mas_ext.methods.method import Training
from mas_ext.methods.si import SI
from mas_ext.models import MultiHead


class Embedding(MultiHead):
    """An image network and its projections for facts of one, two and three words, side by side: (N, 6 words).

    facts: (F, 6 words), the words' vectors in the projection for facts of that order, else 0. order: (F,).
    words: the length of a word's vector, which is random.
    """

    facts: Tensor
    order: Tensor

    def __init__(self, facts: Sequence[Fact], words: int) -> None:
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
        """Similarities to all facts: (N, 6 words) -> (N, F)."""
        return output @ self.facts.T

    def ranking_loss(self, output: Tensor, y: Tensor) -> Tensor:
        """The task loss, 0-dim: (N, 6 words), and the position of each picture's fact, (N,)."""
        return shortfall(self.similarity(output), y, rivals(y, self.order)).mean()


def vectors(facts: Sequence[Fact], words: int) -> Tensor:
    """Embedding.facts: of each word a vector of length 1."""
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
    """The number of these facts that are at least as similar as the right one: (N, F), (N,), (N, F) -> (N,)."""
    return ((similarity >= similarity.gather(1, y[:, None])) & among).sum(1)


class RankingEWC(SquaredGradients):
    """EWC in which f is a picture's ranking loss, as the Fisher information needs a likelihood."""

    def entries(self, training: Training, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        assert isinstance(training.model, Embedding)
        return y, rivals(y, training.model.order)

    def values(self, training: Training, output: Tensor, *entries: Tensor) -> Tensor:
        assert isinstance(training.model, Embedding)
        y, others = entries
        return shortfall(training.model.similarity(output), y, others)


VARIANTS = {
    "finetune": Variant(Finetune),
    "joint": Variant(Joint),
    "mas": Variant(MAS, "mas"),
    "mas-alpha": Variant(partial(MAS, merge="consistent", anchor="own"), "mas-alpha"),
    "ewc, of the ranking loss": Variant(RankingEWC, "ewc, of the ranking loss"),
    "si": Variant(SI, "si"),
    "mas, proximal": Variant(partial(MAS, mode="proximal"), "mas"),
}
