"""A training loop of one's own: accumulated gradients, averaged weights, and a checkpoint that it goes on from.

python examples/production.py [CHECKPOINT]: stop it at any time, and start it again.
"""

import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mas_ext import FusedMASPenalty, models
from mas_ext.scenarios import datasets, split

ACCUMULATED, BATCH, EVERY = 2, 32, 50  # batches per step, samples per batch, steps per checkpoint
TASKS = split(*datasets.load_dataset("digits"), 2).tasks


def main(checkpoint: Path = Path("production.pt"), steps: int = 300, lam: float = 1.0) -> str:
    """Learn digits modulo five, of 0-4, then of 5-9, in so many steps each; say how well both are known."""
    data = [(t.train.x, t.train.y % 5, t.test.x, t.test.y % 5) for t in TASKS]
    torch.manual_seed(0)
    model = models.mlp((1, 8, 8))
    model.add_head(5)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.98), use_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    penalty = FusedMASPenalty(model, lam=lam)
    penalty.attach(optimizer, mode="proximal")  # once per step, however many batches it has
    parts = {"model": model, "averaged": averaged, "optimizer": optimizer, "penalty": penalty}
    done = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        done = saved.pop("done")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    for step in range(done, 2 * steps):
        x, y = data[step // steps][:2]
        generator = torch.Generator().manual_seed(step)  # a step's samples are its own
        optimizer.zero_grad()
        for _ in range(ACCUMULATED):
            index = torch.randint(len(y), (BATCH,), generator=generator)
            (F.cross_entropy(model(x[index]), y[index]) / ACCUMULATED).backward()
        optimizer.step()
        averaged.update_parameters(model)
        if (step + 1) % steps == 0:  # the averaged weights are what is used, and what is held
            model.load_state_dict(averaged.module.state_dict())
            penalty.consolidate(x.split(256))
        if (step + 1) % EVERY == 0 or (step + 1) % steps == 0:
            state = {name: part.state_dict() for name, part in parts.items()}
            torch.save({"done": step + 1, **state}, f"{checkpoint}.new")
            os.replace(f"{checkpoint}.new", checkpoint)  # whole, or the old one
    right = [float((model(x).argmax(1) == y).double().mean()) for _, _, x, y in data]
    return f"accuracy on digits 0-4: {right[0]:.1%}, on 5-9: {right[1]:.1%}"


if __name__ == "__main__":
    print(main(*map(Path, sys.argv[1:])))
