"""Two processes: `both` runs them, and what follows is what each of them does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from integrations import written
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


def both(library: str, folder: Path) -> list[dict[str, Any]]:
    """The state of the model, and omega, of each rank."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [*command, __file__, library, str(folder)]
    subprocess.run(command, check=True, timeout=300, env={**os.environ, **path})
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def avalanche(folder: Path) -> tuple[nn.Module, dict[str, Tensor]]:
    from avalanche.distributed import DistributedHelper
    from integrations import conftest  # noqa: F401  # imports it without its warnings
    from integrations.test_avalanche import ours, plain, strategy, stream

    dist.init_process_group("gloo")
    torch.set_default_dtype(torch.float64)
    plugin = ours.MASPlugin(0.5, merge="sum", omega_dtype=torch.float64)
    trained, _ = strategy(lambda: DistributedHelper.wrap_model(plain()), plugin)
    trained.train(stream()[0])
    assert plugin.penalty is not None
    return trained.model.module, plugin.penalty.omega


def transformers(folder: Path) -> tuple[nn.Module, dict[str, Tensor]]:
    from integrations.test_transformers import (
        LAM,
        InOrder,
        MASCallback,
        ModelOutput,
        arguments,
        corpus,
        network,
    )

    torch.set_default_dtype(torch.float64)
    model, ranks = network(), {"ddp_backend": "gloo"}
    options = {"forward": ModelOutput("logits"), "omega_dtype": torch.float64}
    mas = MASCallback(LAM, **options)
    still = arguments(folder, 1, learning_rate=0.0, max_steps=1, **ranks)
    InOrder(model, still, train_dataset=corpus(0, 13), callbacks=[mas]).train()
    assert mas.penalty is not None
    omega = {n: w.clone() for n, w in mas.penalty.omega.items()}
    mas.distillation = 0.5
    own = arguments(folder, 1, **ranks)
    InOrder(model, own, train_dataset=corpus(1, 12), callbacks=[mas]).train()
    return model, omega


def lightning(folder: Path) -> tuple[nn.Module, dict[str, Tensor]]:
    from integrations.test_lightning import Module, mas
    from lightning.pytorch import Trainer

    from mas_ext.integrations.loading import once

    current = 0

    def uneven(trainer: Trainer) -> Any:
        return once(DataLoader(TensorDataset(*written.task(current, 33)), batch_size=4))

    module, callback = Module(), mas(batches=uneven, distillation=0.5)
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
    assert callback.penalty is not None
    return module, callback.penalty.omega


def main() -> None:
    library, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    model, omega = globals()[library](folder)
    found = {"state": model.state_dict(), "omega": {n: w.clone() for n, w in omega.items()}}
    torch.save(found, folder / f"{dist.get_rank()}.pt")
    # The group's threads may not outlive the interpreter, and no rank may wait for one that is gone.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
