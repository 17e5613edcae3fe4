"""LwF against its formula, and against a training written out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import naive_distillation as naive
from oracles import naive_training
from torch import nn

from mas_ext.distillation import softened
from mas_ext.methods import SETTINGS, Setting
from mas_ext.methods.lwf import LwF
from mas_ext.models import MultiHead
from mas_ext.training.run import Learning


def second_task(method: LwF, setting: Setting, learner: MultiHead, **settings: Any) -> Learning:
    """A run that has learned its first task."""
    run = naive.run_of(method, setting, learner, **settings)
    naive.learn_task(run)
    return run


def test_distillation_of_known_probabilities() -> None:
    # Roots of 4 : 9 are 2 : 3, so that q' = (.4, .6); those of 1 : 9 give q = (.25, .75).
    target = torch.tensor([[4.0, 9.0], [1.0, 1.0]], dtype=torch.float64).log()
    logits = torch.tensor([[1.0, 9.0], [1.0, 1.0]], dtype=torch.float64).log()
    expected = -(0.4 * torch.tensor(0.25).double().log() + 0.6 * torch.tensor(0.75).double().log())
    expected = (expected + torch.tensor(2.0).double().log()) / 2
    torch.testing.assert_close(softened(logits, target, 2.0), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("setting", SETTINGS)
def test_three_tasks_are_those_of_a_naive_loop(setting: Setting) -> None:
    pairs = naive.tasks(setting)
    learner = naive.model()
    method = LwF(lam=0.7, temperature=3.0, warm_up=2)
    naive.trainer(learner, method, setting).fit(naive.scenario(pairs))
    expected = naive.parameters_after(setting, pairs, lam=0.7, temperature=3.0, warm_up=2)
    assert learner.state_dict().keys() == expected.keys()
    for name, parameter in learner.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("setting", ["task", "domain"])
def test_outputs_that_are_no_logits_are_kept_by_their_squared_distance(setting: Setting) -> None:
    method = LwF(lam=0.7, warm_up=0)
    run = naive_training.start(method, setting, squared=True, epochs=1)
    steps = naive_training.steps(run)
    while run.at.task < 2:
        next(steps)
    next(steps)
    assert method.teacher is not None
    torch.manual_seed(0)
    x, y = torch.randn(5, 5, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    before = [method.teacher(x, k).detach() for k in range(len(method.teacher.heads))]
    now = [run.model(x, k) for k in range(len(run.model.heads))]
    assert len(before) == (2 if setting == "task" else 1)
    assert not any(map(torch.equal, before, now))
    own = (now[-1] - y).square().sum() / 10
    squares = [(a - b).square().sum() / 10 for a, b in zip(now, before, strict=False)]
    softmax = [naive.distance(a, b, 2.0) for a, b in zip(now, before, strict=False)]
    for name, distances in ((None, squares), ("squared", squares), ("softmax", softmax)):
        method.distance = name
        expected = own + 0.7 * torch.stack(distances).sum()
        got = method.loss(run.training, x, y)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_teacher_is_the_model_before_the_task_and_never_moves(setting: Setting) -> None:
    method = LwF()
    run = second_task(method, setting, naive.with_statistics(), batch_size=5)
    assert method.teacher is None
    before = naive.copies(run.model)
    naive.learn_task(run)
    assert method.teacher is not None
    assert naive.same(method.teacher.state_dict(), before)
    assert not any(module.training for module in method.teacher.modules())
    assert not any(p.requires_grad for p in method.teacher.parameters())
    assert all(p.grad is None for p in method.teacher.parameters())
    optimized = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in run.model.parameters()}
    assert not naive.same(naive.copies(run.model.backbone), naive.copies(method.teacher.backbone))


@pytest.mark.parametrize("setting", ["task", "class"])
def test_warm_up_changes_the_new_head_only(setting: Setting) -> None:
    run = second_task(LwF(warm_up=2), setting, naive.with_statistics(), batch_size=5)
    before = naive.copies(run.model)
    run.optimizer.zero_grad()
    torch.manual_seed(9)
    new = nn.Linear(naive.WIDTH, 3, dtype=torch.float64)
    torch.manual_seed(9)
    run.begin_task()
    after = naive.copies(run.model)
    for kind in ("weight", "bias"):
        assert not torch.equal(after.pop(f"heads.1.{kind}"), getattr(new, kind))
    assert naive.same(after, before)
    moved = {name for name, p in run.model.named_parameters() if p.grad is not None}
    assert moved == {"heads.1.weight", "heads.1.bias"}
    assert all(module.training for module in run.model.modules())


def test_no_warm_up_without_a_new_head() -> None:
    run = second_task(LwF(warm_up=2), "domain", naive.model())
    before = naive.copies(run.model)
    run.begin_task()
    assert naive.same(naive.copies(run.model), before)


def test_the_backbone_runs_once_a_step() -> None:
    method = LwF(warm_up=0)
    run = second_task(method, "task", naive.model(), epochs=1)
    naive.learn_task(run)
    run.begin_task()
    assert method.teacher is not None
    calls = []
    for name, model in (("model", run.model), ("teacher", method.teacher)):
        model.backbone.register_forward_hook(lambda *_, name=name: calls.append(name))
    next(run.steps())
    assert calls == ["model", "teacher"]


def test_a_checkpoint_written_inside_a_task_goes_on(tmp_path: Path) -> None:
    scenario = naive.scenario(naive.tasks("task"))
    whole, stopped = naive.model(), naive.model()
    naive.trainer(whole, LwF(), "task").fit(scenario)

    def stop(news: object) -> None:
        if getattr(news, "task", None) == 1:
            raise KeyboardInterrupt

    file = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        naive.trainer(stopped, LwF(), "task", checkpoint=file, callbacks=[stop]).fit(scenario)
    again = naive.model()
    naive.trainer(again, LwF(), "task", checkpoint=file).fit(scenario)
    assert naive.same(naive.copies(again), naive.copies(whole))


def test_under_autocast_the_loss_is_nearly_the_same() -> None:
    method = LwF()
    run = second_task(method, "task", naive.with_statistics())
    run.begin_task()
    assert method.teacher is not None
    run.model.float().eval()
    method.teacher.float()
    x, y = naive.tasks("task")[1]
    with torch.no_grad():
        exact = method.loss(run.training, x.float(), y)
        with torch.autocast("cpu", torch.bfloat16):
            rough = method.loss(run.training, x.float(), y)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=1e-2, atol=0)
