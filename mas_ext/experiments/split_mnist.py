"""Split MNIST in three settings, beside what was published on this protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from mas_ext import config
from mas_ext.config import Config
from mas_ext.experiments.comparison import (
    HELD,
    MERGED,
    PLAIN,
    PROXIMAL,
    TAUGHT,
    Comparison,
    Variant,
)
from mas_ext.methods import Setting

OTHERS = tuple(Variant(name, {}, name) for name in ("mas-batch", "mas-vector", "local-mas"))

# Hsu et al. 2018, Re-evaluating continual learning scenarios: domain-, class- and task-incremental.
PUBLISHED = {
    "finetune": (55.16, 19.71, 93.46),
    "ewc": (58.85, 19.80, 97.70),
    "online-ewc": (57.33, 19.77, 98.04),
    "si": (64.76, 19.67, 98.56),
    "mas": (68.57, 19.52, 99.22),
    "lwf": (71.02, 24.17, 99.60),
    "joint": (98.59, 97.53, 99.52),
}

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
class SplitMNIST(Comparison):
    """All methods in the domain-, class- and task-incremental setting."""

    title: ClassVar[str] = "Split MNIST, as published"
    name: ClassVar[str] = "split-mnist"
    published: ClassVar[Mapping[str, Sequence[float]]] = PUBLISHED
    base: Config = BASE
    settings: tuple[Setting, ...] = ("domain", "class", "task")
    variants: Sequence[Variant] = (*PLAIN, *HELD, *MERGED, *TAUGHT, *PROXIMAL, *OTHERS)

    def quick(self) -> SplitMNIST:
        """The digits of scikit-learn, one seed, few methods."""
        settings = replace(self.base.settings, batch_size=32)
        base = replace(self.base, scenario="split-digits", settings=settings)
        few = [v for v in self.variants if v.method in ("finetune", "joint", "mas", "ewc", "lwf")]
        return replace(self, base=base, variants=few, seeds=1, grid=self.grid[2:8], data=None)
