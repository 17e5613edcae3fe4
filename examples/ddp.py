"""Two tasks on several processes, each with its own part of the data.

torchrun --nproc-per-node 2 examples/ddp.py
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from mas_ext import FusedMASPenalty

EPOCHS, SAMPLES, CLASSES = 10, 1001, 4


def blobs(task: int) -> TensorDataset:
    """A cluster of points for each class, in the plane of this task: two of four coordinates."""
    generator = torch.Generator().manual_seed(task)
    labels = torch.randint(CLASSES, (SAMPLES,), generator=generator)
    angle = labels * 2 * torch.pi / CLASSES
    points = 0.3 * torch.randn(SAMPLES, 4, generator=generator)
    points[:, 2 * task : 2 * task + 2] += torch.stack([angle.cos(), angle.sin()], dim=1)
    return TensorDataset(points, labels)


def main() -> None:
    """What every process does."""
    cuda = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    torch.manual_seed(0)

    model = DistributedDataParallel(
        nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, CLASSES)).to(device)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    penalty = FusedMASPenalty(model, lam=0.03)
    penalty.attach(optimizer)  # after DDP's reduction: the same on every rank

    tasks = [blobs(0), blobs(1)]
    for t, task in enumerate(tasks):
        sampler: DistributedSampler[tuple[Tensor, ...]] = DistributedSampler(task)
        loader = DataLoader(task, batch_size=32, sampler=sampler)
        for epoch in range(EPOCHS):
            sampler.set_epoch(epoch)
            for x, y in loader:
                optimizer.zero_grad()
                F.cross_entropy(model(x.to(device)), y.to(device)).backward()
                optimizer.step()

        # Every sample once: a DistributedSampler would repeat some, to give all ranks as many.
        own = task.tensors[0][dist.get_rank() :: dist.get_world_size()]
        penalty.consolidate(own.split(100))

        with torch.no_grad():
            accuracy = [
                (model.module(x.to(device)).argmax(1).cpu() == y).double().mean().item()
                for x, y in (old.tensors for old in tasks[: t + 1])
            ]
        if dist.get_rank() == 0:
            shown = ", ".join(f"{a:.1%}" for a in accuracy)
            print(
                f"after task {t + 1}: accuracy {shown}; {dist.get_world_size()} ranks", flush=True
            )

    dist.barrier()  # none leaves while another still talks to it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
