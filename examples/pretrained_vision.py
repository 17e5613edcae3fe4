"""A pretrained network learns new classes and keeps the old ones: by a penalty, by distillation, by both.

python examples/pretrained_vision.py: a small network that learned the digits 0 to 4 learns 5 to 9.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F

from mas_ext import Distillation, FusedMASPenalty, Trainer, models
from mas_ext.scenarios import Scenario, datasets, split


def pretrained(epochs: int = 10) -> tuple[Any, ...]:
    """A network, in whose place comes yours; its task, of which no labels are needed; a new task."""
    old, new = split(*datasets.load_dataset("digits"), 2).tasks
    torch.manual_seed(0)
    network = models.cnn((1, 8, 8))
    Trainer(network, "finetune", epochs=epochs, batch_size=32).fit(Scenario((old,)))
    return network, old, new


def main(network: Any, old: Any, new: Any, lam: float = 0.01, epochs: int = 8) -> None:
    """Print the accuracy on the old and the new classes, by what was held."""
    for held in ((), ("penalty",), ("distillation",), ("penalty", "distillation")):
        torch.manual_seed(0)
        model = copy.deepcopy(network)
        model.add_head(len(new.classes))
        model.keep_statistics = True  # of BatchNorm: no penalty holds them
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        penalty = FusedMASPenalty(model, lam, forward=lambda m, x: m(x, 0), exclude=["heads.*"])
        penalty.consolidate(old.train.x.split(100))  # before the first step: what is known
        teacher = Distillation(model, forward=lambda m, x: m(x, 0))
        if "penalty" in held:
            penalty.attach(optimizer)
        for _ in range(epochs):
            model.train()
            for index in torch.randperm(len(new.train)).split(32):
                x, y = new.train.x[index], new.positions(new.train.y[index])
                features = model.backbone(x)
                loss = F.cross_entropy(model.classify(features, 1), y)
                if "distillation" in held:
                    loss = loss + teacher(x, model.classify(features, 0))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        model.eval()
        known = []
        for head, task in enumerate((old, new)):
            right = model(task.test.x, head).argmax(1) == task.positions(task.test.y)
            known.append(f"{task.name} {right.double().mean():6.1%}")
        print(f"{' and '.join(held) or 'nothing':24} held:", *known)


if __name__ == "__main__":
    main(*pretrained())
