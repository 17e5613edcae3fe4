"""Several processes against one, written out in plain float64 loops."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from processes import LAM, LR, TASKS, importance_of, network, one_process, run, tasks, train
from torch import Tensor, nn
from torch.distributed.tensor import distribute_module, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from mas_ext import Distillation, FusedMASPenalty, estimate_importance
from mas_ext.parameters import ranks as module

FORMS = ["loss", "add_grad", "gradient", "proximal"]


def trained(rank: int, ranks: int) -> dict[str, list[dict[str, list[Tensor]]]]:
    """After every task of every form: theta, scale W and A."""
    return {form: _trained(form, rank, ranks) for form in FORMS}


def _trained(form: str, rank: int, ranks: int) -> list[dict[str, list[Tensor]]]:
    bare = network()
    model = DistributedDataParallel(bare, gradient_as_bucket_view=form == "gradient")
    rule = {"merge": "consistent", "anchor": "own"}
    options: dict[str, Any] = {"lam": LAM, "omega_dtype": torch.float64, **rule}
    if form == "proximal":
        penalty = FusedMASPenalty(bare, **options, process_group=dist.group.WORLD)
    else:
        penalty = FusedMASPenalty(model, **options)
    optimizer = torch.optim.SGD(model.parameters(), LR)
    if form in ("gradient", "proximal"):
        penalty.attach(optimizer, mode=form)
    history = []
    for t, task in enumerate(tasks()):
        train(model, penalty, optimizer, form, task, rank, ranks)
        portions = task.portions(rank, ranks)
        if form == "add_grad" and t > 0:
            for batch in portions:
                penalty.observe(batch)
            penalty.consolidate()
        else:
            penalty.consolidate(iter(portions))
        assert penalty.model.training
        names = [name for name, _ in bare.named_parameters()]
        history.append(
            {
                "theta": [p.detach().clone() for p in bare.parameters()],
                "weight": [penalty.scale * penalty.omega[name] for name in names],
                "anchor": [penalty.anchor[name].clone() for name in names],
            }
        )
    return history


def refused(rank: int, ranks: int) -> None:
    """What must not be silent, nor leave a rank waiting for another one."""
    x = torch.randn(4 + rank, 6, dtype=torch.float64)
    model = DistributedDataParallel(network())
    penalty = FusedMASPenalty(model)

    def failing() -> Iterator[Tensor]:
        yield x
        if rank == 1:
            raise OSError("no such image")

    wrong = (OSError, "no such image") if rank == 1 else (RuntimeError, "rank 1 .* no such image")
    with pytest.raises(wrong[0], match=wrong[1]):
        penalty.consolidate(failing())
    with pytest.raises(ValueError, match="no samples"):
        penalty.consolidate([])
    with pytest.raises(ValueError, match="no samples"):
        penalty.consolidate()
    model.module[4].bias.requires_grad_(rank == 0)
    with pytest.raises(
        ValueError,
        match=r"parameter '4\.bias': got .*'frozen'.* on rank 1, expected .*'trained'.* as on rank 0",
    ):
        penalty.adapt([x])
    model.module[4].bias.requires_grad_(True)
    assert penalty.num_tasks == 0

    with pytest.raises(ValueError, match="process_group: got 'auto' for a model without"):
        FusedMASPenalty(network())
    with pytest.raises(ValueError, match="process_group: got 'ddp', expected 'auto'"):
        FusedMASPenalty(network(), process_group="ddp")  # type: ignore[arg-type]
    for wrong in (7, True, "", [0, 1]):
        with pytest.raises(ValueError, match=r"process_group: got .*, expected 'auto', a process"):
            FusedMASPenalty(network(), process_group=wrong)  # type: ignore[arg-type]
    if rank == 0:  # and the others do nothing
        alone = network()
        own = FusedMASPenalty(alone, anchor="own", process_group=None, omega_dtype=torch.float64)
        own.consolidate([x])
        for omega, expected in zip(own.omega.values(), importance_of(alone, x), strict=True):
            torch.testing.assert_close(omega, expected)

    inner = FusedMASPenalty(nn.Sequential(model), anchor="own", process_group=dist.group.WORLD)
    copied = copy.deepcopy(inner)
    copied.consolidate([x] if rank == 0 else [])
    expected = estimate_importance(model, [x])
    everywhere = [torch.empty_like(expected["4.bias"]) for _ in range(ranks)]
    dist.all_gather(everywhere, expected["4.bias"])
    torch.testing.assert_close(copied.omega["0.4.bias"], everywhere[0].float())

    sharded = distribute_module(network(), init_device_mesh("cpu", (ranks,)))
    with pytest.raises(TypeError, match=r"parameter '0\.weight': got a DTensor"):
        FusedMASPenalty(sharded)
    with pytest.raises(TypeError, match=r"parameter '0\.weight': got a DTensor, as by fully_shard"):
        Distillation(sharded)

    partly = DistributedDataParallel(network(), find_unused_parameters=True)
    loose = FusedMASPenalty(partly)
    with pytest.raises(RuntimeError, match=r"find_unused_parameters=True.*penalty\.attach"):
        loose()
    with torch.no_grad():
        assert loose() == 0
    loose.consolidate([x])
    optimizer = torch.optim.SGD(partly.parameters(), LR)
    loose.attach(optimizer)
    partly(x).sum().backward()
    optimizer.step()


def statistics(rank: int, ranks: int) -> None:
    """Every rank's samples run through the first rank's running statistics; its own come back."""
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)
    )
    for p in model.parameters():  # the same on every rank
        p.data = torch.linspace(-1, 1, p.numel(), dtype=torch.float64).view(p.shape)
    model.double().to(memory_format=torch.channels_last)
    torch.manual_seed(2)
    x = torch.randn(7, 2, 4, 4, dtype=torch.float64)
    expected = importance_of(model.eval(), x)
    batch_norm = model.train()[1]
    batch_norm.running_mean += rank
    batch_norm.num_batches_tracked += rank
    parallel = DistributedDataParallel(model, broadcast_buffers=False, init_sync=False)
    penalty = FusedMASPenalty(parallel, anchor="own", omega_dtype=torch.float64)
    penalty.consolidate([x[rank::ranks]])
    for omega, e in zip(penalty.omega.values(), expected, strict=True):
        torch.testing.assert_close(omega, e)
    assert torch.equal(batch_norm.running_mean, torch.full((3,), rank, dtype=torch.float64))
    assert batch_norm.num_batches_tracked == rank


def trained_and_refused(rank: int, ranks: int) -> dict[str, list[dict[str, list[Tensor]]]]:
    refused(rank, ranks)
    statistics(rank, ranks)
    return trained(rank, ranks)


@pytest.mark.parametrize("ranks", [2, 4])
def test_several_processes_train_as_one(ranks: int, tmp_path: Path) -> None:
    found = run(trained_and_refused, ranks, tmp_path)
    for form in FORMS:
        expected = one_process(proximal=form == "proximal")._asdict()
        for t in range(TASKS):
            for what, values in found[0][form][t].items():
                for i, value in enumerate(values):
                    for other in found[1:]:
                        assert torch.equal(other[form][t][what][i], value), (form, t, what)
                    torch.testing.assert_close(value, expected[what][t][i], rtol=1e-9, atol=1e-12)


def test_a_group_of_other_ranks_than_a_model_is_sharded_over_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As many of them, too."""
    groups: dict[Any, list[int]] = {"shards": [0, 1], "same": [1, 0], "other": [0, 2]}
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: groups[group.name])
    monkeypatch.setattr(dist, "ProcessGroup", SimpleNamespace)
    shards, same, other = (SimpleNamespace(name=name) for name in groups)
    monkeypatch.setattr(module, "group_of", lambda model: shards)
    for given in ("auto", same):
        assert module.Ranks(given).group(nn.Linear(1, 1)) is shards
    for given, got in ((other, r"ranks \[0, 2\]"), (None, "None")):
        with pytest.raises(
            ValueError, match=f"got {got} for a model .* over ranks .0, 1., expected"
        ):
            module.Ranks(given).group(nn.Linear(1, 1))


@pytest.mark.parametrize("ranks", [2, pytest.param(1, marks=pytest.mark.cuda)])
def test_example(ranks: int) -> None:
    example = Path(__file__).parents[2] / "examples" / "ddp.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, f"--nproc-per-node={ranks}", str(example)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    # Not by its exit code: torch's own threads were seen to abort a process whose work was done.
    assert f"{ranks} ranks" in done.stdout, done.stderr
    first, kept, second = (float(n) for n in re.findall(r"([\d.]+)%", done.stdout))
    assert first > 95
    assert kept > 85  # 75 at lam = 0
    assert second > 85  # 39 at lam = 1
