"""Several processes, and the training of one that they must equal, written out in plain float64 loops."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mas_ext import FusedMASPenalty

LAM, LR, TASKS, STEPS, BATCH = 3.0, 0.05, 3, 6, 8
# Batches of 3 to estimate from: uneven over 2 ranks and over 4, where task 2 leaves rank 3 without any.
SAMPLES, PORTION = [13, 11, 3], 3


class Task(NamedTuple):
    x: Tensor
    y: Tensor
    unlabelled: Tensor

    def portions(self, rank: int, ranks: int) -> list[Tensor]:
        """The batches that a rank estimates from: every `ranks`-th sample."""
        return [b for b in self.unlabelled[rank::ranks].split(PORTION) if len(b)]


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Dropout(0.0), nn.Linear(5, 3)
    )
    layers.register_buffer("broadcast", torch.zeros(1))  # by DDP, on every pass
    return layers.double()


def tasks() -> list[Task]:
    torch.manual_seed(1)
    shapes = [((STEPS, BATCH, 6), (STEPS, BATCH, 3), (n, 6)) for n in SAMPLES]
    return [Task(*(torch.randn(s, dtype=torch.float64) for s in three)) for three in shapes]


# -- one process -----------------------------------------------------------------------------------


def importance_of(model: nn.Module, samples: Tensor) -> list[Tensor]:
    """Mean over samples of abs(d |F(x)|^2 / d theta), sample by sample."""
    total = [torch.zeros_like(p) for p in model.parameters()]
    for x in samples:
        found = torch.autograd.grad(model(x[None]).square().sum(), [*model.parameters()])
        total = [t + g.abs() for t, g in zip(total, found, strict=True)]
    return [t / len(samples) for t in total]


class Trained(NamedTuple):
    """After every task: the parameters, W of the merged quadratic times its scale, and its anchor."""

    theta: list[list[Tensor]]
    weight: list[list[Tensor]]
    anchor: list[list[Tensor]]


def one_process(proximal: bool) -> Trained:
    """SGD on loss + sum_t alpha_t Omega_t (theta - theta_t)^2, or a proximal step after each of the loss's."""
    model, history = network(), Trained([], [], [])
    entries: list[tuple[list[Tensor], list[Tensor]]] = []
    for task in tasks():
        for x, y in zip(task.x, task.y, strict=True):
            theta = [*model.parameters()]
            slope = torch.autograd.grad((model(x) - y).square().mean(), theta)
            for i, (p, g) in enumerate(zip(theta, slope, strict=True)):
                weight, anchor = merged(entries, i)
                with torch.no_grad():
                    if proximal:
                        p -= LR * g
                        c = 2 * LR * weight
                        p += c / (1 + c) * (anchor - p)
                    else:
                        p -= LR * (g + 2 * weight * (p - anchor))
        entries.append(
            (
                importance_of(model, task.unlabelled),
                [p.detach().clone() for p in model.parameters()],
            )
        )
        both = [merged(entries, i) for i in range(len(theta))]
        history.theta.append(entries[-1][1])
        history.weight.append([w for w, _ in both])
        history.anchor.append([a for _, a in both])
    return history


def merged(entries: list[tuple[list[Tensor], list[Tensor]]], i: int) -> tuple[Any, Any]:
    """sum_t alpha_t Omega_t and the anchors' mean by it, alpha_t S_t equal and sum_t alpha_t = lam T."""
    if not entries:
        return 0.0, 0.0
    inverse = [1 / float(sum(o.sum() for o in omega)) for omega, _ in entries]
    alpha = [LAM * len(entries) * s / sum(inverse) for s in inverse]
    weights = [a * omega[i] for a, (omega, _) in zip(alpha, entries, strict=True)]
    pulled = sum(w * theta[i] for w, (_, theta) in zip(weights, entries, strict=True))
    return sum(weights), pulled / sum(weights)


# -- several ---------------------------------------------------------------------------------------


def train(
    model: nn.Module,
    penalty: FusedMASPenalty,
    optimizer: torch.optim.Optimizer,
    form: str,
    task: Task,
    rank: int,
    ranks: int,
) -> None:
    """A task's steps, each with this rank's share of the batch; forms but these two are the optimizer's."""
    share = BATCH // ranks
    for x, y in zip(task.x, task.y, strict=True):
        mine = slice(rank * share, (rank + 1) * share)
        optimizer.zero_grad()
        loss = (model(x[mine]) - y[mine]).square().mean()
        if form == "loss":
            loss = loss + penalty()
        loss.backward()
        if form == "add_grad":
            penalty.add_grad_()
        optimizer.step()


def mesh_of(shape: Sequence[int]) -> DeviceMesh:
    """All ranks: shards, or replicas of shards."""
    names = ("replicate", "shard")[-len(shape) :]
    return init_device_mesh("cpu", tuple(shape), mesh_dim_names=names)


def run(worker: Any, ranks: int, folder: Path) -> list[Any]:
    """What worker(rank, ranks) returns on each of several processes."""
    torch.multiprocessing.spawn(_started, (worker, ranks, str(folder)), nprocs=ranks)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]


def _started(rank: int, worker: Any, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which jobs in the background ignore
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(minutes=2),
    )
    try:
        torch.save(worker(rank, ranks), f"{folder}/{rank}.pt")
        dist.barrier()  # none leaves while another still talks to it
    finally:
        dist.destroy_process_group()
