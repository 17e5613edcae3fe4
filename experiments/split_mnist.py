"""Split MNIST in three settings, beside what was published on this protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from experiments.comparison import (
    ANCHORS,
    DISTILLED,
    MERGED,
    PENALTIES,
    PLAIN,
    PROXIMAL,
    Comparison,
    Variant,
)
from mas_ext.comparison.options import Config
from mas_ext.methods import Setting

OTHERS = tuple(Variant(name, {}, name) for name in ("mas-batch", "mas-vector", "local-mas"))

# Hsu et al. 2018, Re-evaluating continual learning scenarios: task-, domain- and class-incremental.
PUBLISHED = {
    "finetune": (93.46, 55.16, 19.71),
    "ewc": (97.70, 58.85, 19.80),
    "online-ewc": (98.04, 57.33, 19.77),
    "si": (98.56, 64.76, 19.67),
    "mas": (99.22, 68.57, 19.52),
    "lwf": (99.60, 71.02, 24.17),
    "joint": (99.52, 98.59, 97.53),
}

BASE = Config.read(
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
class SplitMNIST(Comparison):
    """All methods in the task-, domain- and class-incremental setting."""

    title: ClassVar[str] = "Split MNIST, as published"
    name: ClassVar[str] = "split-mnist"
    published: ClassVar[Mapping[str, Sequence[float]]] = PUBLISHED
    base: Config = BASE
    settings: tuple[Setting, ...] = ("task", "domain", "class")
    variants: Sequence[Variant] = (
        *PLAIN,
        *PENALTIES,
        *ANCHORS,
        *MERGED,
        *DISTILLED,
        *PROXIMAL,
        *OTHERS,
    )

    def quick(self) -> SplitMNIST:
        """The digits of scikit-learn, one seed, few methods."""
        settings = replace(self.base.settings, batch_size=32)
        base = replace(self.base, scenario="split-digits", settings=settings)
        few = [v for v in self.variants if v.method in ("finetune", "joint", "mas", "ewc", "lwf")]
        return replace(self, base=base, variants=few, seeds=1, grid=self.grid[2:8], data=None)
