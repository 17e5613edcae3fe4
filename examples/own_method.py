"""A scenario and a method of one's own, compared with others; the table for a paper.

python examples/own_method.py NEW_FOLDER
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

import mas_ext
from mas_ext import methods, models, scenarios
from mas_ext.comparison.report import report


@dataclass(eq=False)
class Anchored(methods.Method):
    """Task loss + lam |theta - theta*|^2: all parameters are held alike near where the last task ended."""

    lam: float = 0.01

    def begin_task(self, training: methods.Training) -> None:
        if not training.resumed:
            self.anchor = [p.detach().clone() for p in training.model.backbone.parameters()]

    def loss(self, training: methods.Training, x: Tensor, y: Tensor) -> Tensor:
        loss = super().loss(training, x, y)
        for p, old in zip(training.model.backbone.parameters(), self.anchor, strict=True):
            loss = loss + (training.task > 0) * self.lam * (p - old).square().sum()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"anchor": self.anchor}

    def load_state_dict(self, state: dict[str, Any], model: models.MultiHead) -> None:
        self.anchor = state["anchor"]


def mirrored(seed: int) -> scenarios.Scenario:
    """Digits as they are, upside down, and with light and dark exchanged; is the digit even?"""
    train, test = scenarios.datasets.load_dataset("digits")
    seen = (train.x, test.x), (train.x.flip(2), test.x.flip(2)), (1 - train.x, 1 - test.x)
    pairs = [(scenarios.Tensors(a, train.y % 2), scenarios.Tensors(b, test.y % 2)) for a, b in seen]
    return scenarios.from_datasets(pairs, ["as it is", "upside down", "negative"])


def main(folder: Path, seeds: int = 3, epochs: int = 10) -> str:
    """Compare, with one head for all tasks; returns the table in LaTeX."""
    methods.register("anchored", Anchored)
    compared = {"finetune": {}, "anchored": {"lam": [0.01, 0.1, 1.0]}, "mas": {}, "joint": {}}
    how: Any = {"setting": "domain", "epochs": epochs, "batch_size": 32}
    print(mas_ext.compare(mirrored, models.mlp, compared, seeds, out=folder, **how))
    return report(folder, formats=["latex"])[0].read_text()


if __name__ == "__main__":
    print(main(Path(sys.argv[1])))
