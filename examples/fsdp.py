"""Two tasks on several processes, each with its own part of the data and of the model (fully_shard, FSDP2).

torchrun --nproc-per-node 2 examples/fsdp.py [FOLDER TO KEEP A CHECKPOINT IN]
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from mas_ext import FusedMASPenalty, load_distributed
from mas_ext.scenarios import datasets as data

EPOCHS, BATCH, HIDDEN = 8, 64, 200


def digits(task: int) -> tuple[TensorDataset, TensorDataset]:
    """Handwritten digits to train and to test on; the pixels of each task are permuted in its own way."""
    order = torch.randperm(64, generator=torch.Generator().manual_seed(task))
    train, test = (
        TensorDataset(part.x.flatten(1)[:, order], part.y) for part in data.load_dataset("digits")
    )
    return train, test


def network() -> nn.Module:
    """Each layer with its activation is gathered, used and given back by itself, the last with the root."""
    torch.manual_seed(0)  # the same on every rank
    layers = [nn.Sequential(nn.Linear(n, HIDDEN), nn.ReLU()) for n in (64, HIDDEN)]
    model = nn.Sequential(*layers, nn.Linear(HIDDEN, 10))
    for layer in layers:
        fully_shard(layer)
    fully_shard(model)
    return model


def main() -> None:
    """What every process does."""
    cuda = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    penalty = FusedMASPenalty(model, lam=0.03)  # after fully_shard: sharded as the parameters are
    penalty.attach(optimizer)

    tests = []
    for t in range(2):
        train, test = digits(t)
        tests.append(test)
        sampler: DistributedSampler[tuple[torch.Tensor, ...]] = DistributedSampler(train)
        loader = DataLoader(train, batch_size=BATCH // ranks, sampler=sampler)
        for epoch in range(EPOCHS):
            sampler.set_epoch(epoch)
            for x, y in loader:
                optimizer.zero_grad()
                F.cross_entropy(model(x.to(device)), y.to(device)).backward()
                optimizer.step()

        # Every sample once: a DistributedSampler would repeat some, to give all ranks as many.
        penalty.consolidate(train.tensors[0][rank::ranks].split(100))

        with torch.no_grad():
            accuracy = [
                (model(x.to(device)).argmax(1).cpu() == y).double().mean().item()
                for x, y in (old.tensors for old in tests)
            ]
        if rank == 0:
            shown = ", ".join(f"{a:.1%}" for a in accuracy)
            print(f"after task {t + 1}: accuracy {shown}; {ranks} ranks", flush=True)

    for folder in sys.argv[1:]:
        state = {"model": model.state_dict(), "penalty": penalty.state_dict()}
        dcp.save(state, checkpoint_id=folder)
        again = FusedMASPenalty(model, lam=0.03)
        load_distributed(again, folder)  # on any number of ranks, or on one without any
        value = again()
        if rank == 0:
            print(f"read from {folder}: {again.num_tasks} tasks, penalty {value:.4f}", flush=True)

    dist.barrier()  # none leaves while another still talks to it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
