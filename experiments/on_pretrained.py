"""On a pretrained network: CIFAR-10 as it was learned elsewhere, then groups of CIFAR-100's classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from experiments import cifar
from experiments.comparison import (
    ANCHORS,
    BOTH,
    DISTILLED,
    PENALTIES,
    PROXIMAL,
    Comparison,
    Variant,
)
from experiments.learned import matrix
from experiments.tables import percent
from mas_ext.comparison.cells import Found
from mas_ext.comparison.options import Config
from mas_ext.methods import Setting
from mas_ext.methods.finetune import Finetune
from mas_ext.models import MultiHead
from mas_ext.scenarios import Scenario, from_datasets, split
from mas_ext.scenarios import datasets as data
from mas_ext.trainer import Trainer

BASE = Config.read(
    {
        "scenario": "split-cifar100",
        "optimizer": "adam",
        "lr": 1e-3,
        "epochs": [0, 4, 4, 4],
        "batch_size": 32,
        "amp": "bfloat16",
        "methods": ["finetune"],
    }
)

VARIANTS = (
    Variant("finetune"),
    *(each for each in PENALTIES if each.method != "online-ewc"),
    *ANCHORS,
    *DISTILLED,
    *(each for each in PROXIMAL if each.method == "mas"),
    *BOTH,
    # 1, 5 and 20 images of each of a task's ten classes.
    *(Variant("replay", {"samples": samples}) for samples in (10, 50, 200)),
)


@dataclass(frozen=True)
class OnPretrained(Comparison):
    """What is kept of a task that was learned elsewhere, by methods that see only unseen samples of it.

    samples: of the first task that importance is computed from; its other images are tested on.
    """

    title: ClassVar[str] = "On a pretrained network"
    name: ClassVar[str] = "on-pretrained"
    base: Config = BASE
    variants: Sequence[Variant] = VARIANTS
    samples: int = 500
    max_samples: int | None = 500
    seeds: int = 3

    def quick(self) -> OnPretrained:
        """Digits, the first five before, one seed, few methods."""
        settings = replace(self.base.settings, epochs=[0, 5], amp=None)
        base = replace(self.base, scenario="split-digits", settings=settings)
        few = [v for v in self.variants if v.method in ("finetune", "mas", "si") and not v.options]
        return replace(self, base=base, variants=few, seeds=1, grid=self.grid[1:6], data=None)

    def data_sets(self) -> tuple[str, ...]:
        own = super().data_sets()
        return own if own == ("digits",) else (*own, "cifar10-test", "resnet20")

    def protocol(self) -> dict[str, Any]:
        return {**super().protocol(), "model": "resnet20, pretrained", "samples": self.samples}

    def scenario(self, seed: int) -> Scenario:
        """Images of CIFAR-10 that the network has not seen, then three groups of CIFAR-100's classes."""
        if self.base.scenario == "split-digits":
            return split(*data.load_dataset("digits"), 2)
        known, order = cifar.unseen(self.data), torch.Generator().manual_seed(seed)
        index = torch.randperm(len(known), generator=order)
        parts = known.subset(index[: self.samples]), known.subset(index[self.samples :])
        first = from_datasets([parts], ["cifar10"]).tasks
        return Scenario((*first, *cifar.groups(self.data).tasks[:3]))

    def network(self, scenario: Scenario, seed: int) -> MultiHead:
        """ResNet-20 with published weights; for digits, a network that learns the first task here."""
        if self.base.scenario == "split-digits":
            network = super().network(scenario, seed)
            Trainer(network, Finetune(), epochs=20, seed=seed).fit(Scenario(scenario.tasks[:1]))
        else:
            network = cifar.trained(self.data)
        # The tasks to come look different, and no method holds running statistics.
        network.keep_statistics = True
        return network

    def columns(
        self, setting: Setting, variant: Variant, founds: Sequence[Found]
    ) -> dict[str, str]:
        """The first task before and after the others, and what was learned of those."""
        matrices = [matrix(found) for found in founds]
        return {
            "first task before, %": percent([float(m[0, 0]) for m in matrices]),
            "kept, %": percent([float(m[-1, 0]) for m in matrices]),
            "new tasks when new, %": percent([float(m.diagonal()[1:].mean()) for m in matrices]),
            "new tasks at the end, %": percent([float(m[-1, 1:].mean()) for m in matrices]),
        }
