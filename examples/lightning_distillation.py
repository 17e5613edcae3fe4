"""Lightning: digits 0 to 4, then 5 to 9, on outputs of their own; what is kept by MAS, distillation, or both.

pip install ".[lightning,demo]"
python examples/lightning_distillation.py [--epochs 15] [--lam 0.003] [--distillation 10]
"""

import argparse

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mas_ext.integrations.lightning import MASCallback
from mas_ext.scenarios import split
from mas_ext.scenarios.datasets import load_dataset

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--epochs", type=int, default=15, help="per task")
parser.add_argument("--lam", type=float, default=0.003)
parser.add_argument("--distillation", type=float, default=10.0)
chosen = parser.parse_args()
off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
how = {"max_epochs": chosen.epochs, "accelerator": "cpu", **dict.fromkeys(off, False)}


class Digits(lightning.LightningModule):
    """A small network, and the outputs of the task that it learns."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10)
        self.network, self.classes = nn.Sequential(nn.Flatten(), *layers), slice(0, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x)[:, self.classes], y - self.classes.start)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


tasks = split(*load_dataset("digits"), tasks=2).tasks
for lam in (0.0, chosen.lam):
    for weight in (0.0, chosen.distillation):
        lightning.seed_everything(0, verbose=False)
        module, accuracy = Digits(), []
        mas = MASCallback(lam, distillation=weight, forward=lambda m, batch: m(batch[0])[:, :5])
        for t, task in enumerate(tasks):
            module.classes = slice(5 * t, 5 * t + 5)
            trainer = lightning.Trainer(callbacks=[mas], **how)
            trainer.fit(module, DataLoader(task.train, batch_size=32, shuffle=True))
        for t, task in enumerate(tasks):
            x, y = task.test[:]
            right = module(x)[:, 5 * t : 5 * t + 5].argmax(1) + 5 * t == y
            accuracy.append(f"{100 * right.float().mean():5.1f} %")
        print(f"lam {lam:5g}, distillation {weight:4g}: old {accuracy[0]}, new {accuracy[1]}")
