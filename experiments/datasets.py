"""A sequence of different data sets: digits, clothes, Kuzushiji, letters, groups of CIFAR-100's classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import nn

from experiments.comparison import Comparison, Variant
from experiments.learned import fewer, matrix, scenario_of
from mas_ext.comparison.cells import Found
from mas_ext.comparison.options import FIRST_WEIGHTS, Config
from mas_ext.methods import Setting
from mas_ext.models import MultiHead
from mas_ext.scenarios import Scenario

BASE = Config.read(
    {
        "scenario": "recognition",
        "optimizer": "adam",
        "lr": 1e-3,
        "epochs": 5,
        "batch_size": 64,
        "methods": ["finetune"],
    }
)

# What the protocol of stored results calls the scenario.
STORED_AS = {"recognition": "datasets"}


@dataclass(frozen=True)
class Datasets(Comparison):
    """All methods on eight tasks that have little in common.

    train, test: at most so many samples of a task.
    """

    title: ClassVar[str] = "A sequence of different data sets"
    name: ClassVar[str] = "datasets"
    base: Config = BASE
    train: int = 2000
    test: int = 1000
    max_samples: int | None = 500
    seeds: int = 3

    def quick(self) -> Datasets:
        """Digits in pairs, one seed, few methods."""
        settings = replace(self.base.settings, batch_size=32)
        base = replace(self.base, scenario="split-digits", settings=settings)
        few = [v for v in self.variants if v.method in ("finetune", "mas", "lwf")]
        small = replace(self, base=base, variants=few, seeds=1, grid=self.grid[1:6], data=None)
        return replace(small, train=200, test=100, max_samples=100)

    def protocol(self) -> dict[str, Any]:
        told = {"model": "strided", "train": self.train, "test": self.test}
        found = {**super().protocol(), **told}
        return {**found, "scenario": STORED_AS.get(found["scenario"], found["scenario"])}

    def scenario(self, seed: int) -> Scenario:
        return fewer(scenario_of(self.base, self.data, 0), self.train, self.test, seed)

    def network(self, scenario: Scenario, seed: int) -> MultiHead:
        """A tenth of the operations of `models.cnn`: 32, 64 and 128 channels at stride 2, 256 features."""
        channels, height, width = scenario.shape
        with torch.random.fork_rng([]):
            torch.manual_seed(seed + FIRST_WEIGHTS)
            layers: list[nn.Module] = []
            for before, after in pairwise((channels, 32, 64, 128)):
                layers += [nn.Conv2d(before, after, 3, 2, padding=1), nn.ReLU()]
                height, width = (height + 1) // 2, (width + 1) // 2
            layers += [nn.Flatten(), nn.Linear(128 * height * width, 256), nn.ReLU()]
            return MultiHead(nn.Sequential(*layers), 256)

    def columns(
        self, setting: Setting, variant: Variant, founds: Sequence[Found]
    ) -> dict[str, str]:
        """One column per task, too: accuracy after the last task, and its change since the task was new."""
        words = super().columns(setting, variant, founds)
        if founds:
            mean = 100 * torch.stack([matrix(found) for found in founds]).mean(0)
            changes = mean[-1] - mean.diagonal()
            for name, last, change in zip(founds[0]["tasks"], mean[-1], changes, strict=True):
                words[name] = f"{last:.1f} ({change:+.1f})"
        return words
