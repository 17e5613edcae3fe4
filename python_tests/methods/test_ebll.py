"""EBLL against its formula, and against a training written out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import naive_distillation as naive

from mas_ext.methods import SETTINGS, Setting
from mas_ext.methods.ebll import EBLL

ENCODING = naive.Encoding(alpha=3.0, code=2, reconstruction=0.4, epochs=6, lr=0.8)
TOGETHER = {"lam": 0.7, "temperature": 3.0, "warm_up": 2}


@pytest.mark.parametrize("setting", SETTINGS)
def test_three_tasks_are_those_of_a_naive_loop(setting: Setting) -> None:
    pairs = naive.tasks(setting)
    learner = naive.model()
    method = EBLL(**TOGETHER, **vars(ENCODING))
    naive.trainer(learner, method, setting).fit(naive.scenario(pairs))
    expected = naive.parameters_after(setting, pairs, **TOGETHER, encoding=ENCODING)
    assert learner.state_dict().keys() == expected.keys()
    for name, parameter in learner.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=0, atol=1e-12)
    # The codes have done something.
    without = naive.parameters_after(setting, pairs, **TOGETHER)
    assert (without["backbone.0.weight"] - expected["backbone.0.weight"]).abs().max() > 1e-4


def test_an_encoder_changes_nothing_of_the_model() -> None:
    run = naive.run_of(EBLL(), "task", naive.with_statistics(), batch_size=5)
    run.begin_task()
    naive.train(run)
    run.optimizer.zero_grad()
    before = naive.copies(run.model)
    run.end_task()
    assert naive.same(run.model.state_dict(), before)
    assert all(p.grad is None for p in run.model.parameters())


def test_an_encoder_is_smaller_than_the_features_and_has_no_gradient() -> None:
    for code, expected in ((100, 3), (2, 2)):  # 100, but not more than half of 6
        method = EBLL(code=code, epochs=1)
        run = naive.run_of(method, "task", naive.model(), epochs=1)
        naive.learn_task(run)
        naive.learn_task(run)
        assert method.encoders is not None
        weight, bias = method.encoders
        assert weight.shape == (2 * expected, naive.WIDTH)
        assert bias.shape == (2 * expected,)
        assert not weight.requires_grad
        assert not bias.requires_grad


def test_an_encoder_sees_as_many_samples_as_it_may() -> None:
    asked: list[int | None] = []
    method = EBLL(max_samples=5, epochs=2)
    run = naive.run_of(method, "task", naive.model(), epochs=1)
    run.begin_task()
    batches = run.training.batches

    def spied(samples: int | None) -> Any:
        asked.append(samples)
        return batches(samples)

    run.training.batches = spied
    naive.train(run)
    run.end_task()
    assert asked == [5]  # the features are computed once, not once an epoch
