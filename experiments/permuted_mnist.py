"""Permuted MNIST: ten tasks with one head, the pixels in another order in each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from experiments.comparison import Comparison
from mas_ext.comparison.options import Config
from mas_ext.methods import Setting

# Zenke et al. 2017, Continual learning through synaptic intelligence: MLP 784-2000-2000, 20 epochs, c = 0.1.
PUBLISHED = {"finetune": (57.4,), "si": (96.9,)}

BASE = Config.read(
    {
        "scenario": "permuted-mnist",
        "tasks": 10,
        "hidden": [400, 400],
        "optimizer": "adam",
        "lr": 1e-3,
        "epochs": 2,
        "batch_size": 256,
        "methods": ["finetune"],
    }
)


@dataclass(frozen=True)
class PermutedMNIST(Comparison):
    """All methods in the domain-incremental setting."""

    title: ClassVar[str] = "Permuted MNIST"
    name: ClassVar[str] = "permuted-mnist"
    published: ClassVar[Mapping[str, Sequence[float]]] = PUBLISHED
    base: Config = BASE
    settings: tuple[Setting, ...] = ("domain",)
    seeds: int = 3

    def quick(self) -> PermutedMNIST:
        """Digits in two parts, one seed, few methods."""
        settings = replace(self.base.settings, batch_size=32)
        base = replace(self.base, scenario="split-digits", tasks=2, settings=settings)
        few = [v for v in self.variants if v.method in ("finetune", "mas", "si")]
        return replace(self, base=base, variants=few, seeds=1, grid=self.grid[1:6], data=None)
