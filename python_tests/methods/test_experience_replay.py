"""Replay: its loss sample by sample, what it keeps, and a run that is resumed."""

from __future__ import annotations

import pytest
import torch
from oracles import naive_distillation
from oracles.naive_training import SETTINGS, regression, start, steps
from torch import Tensor

from mas_ext.methods.replay import ExperienceReplay
from mas_ext.training.run import Learning

pytestmark = pytest.mark.usefixtures("one_thread")


def third_task(
    setting: str, samples: int, squared: bool = False
) -> tuple[ExperienceReplay, Learning]:
    """A run that has just begun its third task."""
    method = ExperienceReplay(samples)
    run = start(method, setting, squared=squared)
    going = steps(run)
    while run.at.task < 2:
        next(going)
    next(going)
    return method, run


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_loss_is_a_mean_over_the_batch_and_one_over_what_is_drawn(setting: str) -> None:
    method, run = third_task(setting, samples=6)
    head = {"task": 2, "domain": 0, "class": None}[setting]
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(5, 5, dtype=torch.float64, generator=generator)
    y = torch.tensor([0, 1, 1, 0, 1]) + (4 if setting == "class" else 0)

    def loss(x: Tensor, y: Tensor, head: int | None) -> Tensor:
        with torch.no_grad():
            return naive_distillation.cross_entropy(run.model(x[None], head), y[None])

    memory = [
        (old_x[i], old_y[i], old_head)
        for old_x, old_y, old_head in method.kept
        for i in range(len(old_y))
    ]
    assert len(memory) == 12
    assert {each[2] for each in memory} == {"task": {0, 1}, "domain": {0}, "class": {None}}[setting]
    torch.manual_seed(7)
    drawn = torch.randperm(12)[:5].tolist()
    torch.manual_seed(7)
    got = method.loss(run.training, x, y).detach()
    own = sum(loss(x[i], y[i], head) for i in range(5)) / 5
    old = sum(loss(*memory[i]) for i in drawn) / 5
    torch.testing.assert_close(got, torch.as_tensor(own + old), rtol=1e-12, atol=0)


def test_as_many_samples_of_every_class_of_a_task_are_kept() -> None:
    method, run = third_task("class", samples=6)
    for task, (x, y, _) in enumerate(method.kept):
        assert y.bincount().tolist()[2 * task :] == [3, 3]
        data = run.tasks[task].train
        for sample, label in zip(x, y, strict=True):
            same = (data.x == sample).all(1)  # type: ignore[attr-defined]
            assert int(same.sum()) == 1
            assert int(data.y[same]) == int(label)  # type: ignore[attr-defined]


def test_targets_that_are_no_classes() -> None:
    method, run = third_task("domain", samples=6, squared=True)
    data = regression().tasks
    for task, (x, y, _) in enumerate(method.kept):
        own = data[task].train
        place = [int((own.x == sample).all(1).nonzero()) for sample in x]  # type: ignore[attr-defined]
        assert len(set(place)) == 6
        assert torch.equal(own.y[place], y)  # type: ignore[attr-defined]
    x, y = method.kept[0][0], method.kept[0][1] + 1
    method.kept = method.kept[:1]
    got = method.loss(run.training, x, y).detach()
    z = run.model(x, 0).detach()
    expected = ((z - y) ** 2).mean() + ((z - (y - 1)) ** 2).mean()
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
