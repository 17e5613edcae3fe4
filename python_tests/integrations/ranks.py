"""What each of two processes does: `torchrun ranks.py LIBRARY FOLDER` leaves theta and omega of each rank."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import written
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


def lightning(folder: Path) -> tuple[nn.Module, Any]:
    from lightning.pytorch import Trainer
    from test_lightning import Module, mas

    from mas_ext.integrations.loading import once

    current = 0

    def uneven(trainer: Trainer) -> Any:
        return once(DataLoader(TensorDataset(*written.task(current, 33)), batch_size=4))

    module, callback = Module(), mas(batches=uneven)
    for current in range(2):
        data = TensorDataset(*written.task(current))
        # Rank r reads samples r, r + 2, ...: together as one process in batches of 8.
        sampler = DistributedSampler(data, 2, int(os.environ["RANK"]), shuffle=False)
        Trainer(
            accelerator="cpu",
            strategy="ddp",
            devices=2,
            use_distributed_sampler=False,
            callbacks=[callback],
            precision="64-true",
            max_epochs=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        ).fit(module, DataLoader(data, batch_size=4, sampler=sampler))
    return module, callback.penalty


def main() -> None:
    library, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    model, penalty = globals()[library](folder)
    found = {
        "theta": {n: p.detach() for n, p in model.named_parameters()},
        "omega": {n: w.clone() for n, w in penalty.omega.items()},
    }
    torch.save(found, folder / f"{dist.get_rank()}.pt")


if __name__ == "__main__":
    main()
