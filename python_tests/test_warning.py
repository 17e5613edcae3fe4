"""Warnings point at the line of this file that led to them."""

from __future__ import annotations

import linecache
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mas_ext import FusedMASPenalty, Trainer, estimate_importance, models
from mas_ext.kernels import backends
from mas_ext.kernels.warning import warn
from mas_ext.methods.mas import MAS
from mas_ext.scenarios import Tensors, from_datasets
from mas_ext.state.merge_rules import MergeRule
from mas_ext.state.quadratic import Consolidation


def line_of(category: type[Warning], message: str, call: Callable[[], object]) -> str:
    """The source of the line that a call's only warning of this kind points at, which is in this file."""
    with pytest.warns(category, match=message) as caught:
        call()
    (warning,) = (w for w in caught if issubclass(w.category, category))
    assert warning.filename == __file__
    return linecache.getline(warning.filename, warning.lineno)


def test_consolidation() -> None:
    frozen = nn.Linear(2, 1).requires_grad_(False)
    x, message = torch.randn(3, 2), "nothing is consolidated"
    penalty, state = FusedMASPenalty(frozen), Consolidation(MergeRule("consistent"), 1.0)
    for line in (
        line_of(RuntimeWarning, message, lambda: penalty.consolidate([x])),
        line_of(RuntimeWarning, message, lambda: penalty.adapt([x])),
        line_of(RuntimeWarning, message, lambda: state.add_task({"w": x}, {})),
    ):
        assert "lambda: " in line
    theta = {"w": torch.ones(2)}
    state.add_task(theta, {**theta})
    little = {"w": torch.full((2,), 1e-4)}
    line = line_of(RuntimeWarning, "of the strength", lambda: state.add_task(theta, little))
    assert "state.add_task(theta, little)" in line
    line = line_of(RuntimeWarning, "is dropped", lambda: state.add_task({"b": x}, {"b": x.abs()}))
    assert 'state.add_task({"b": x}' in line


def test_consolidation_by_a_method_of_the_trainer() -> None:
    data = Tensors(torch.randn(8, 3), torch.arange(8) % 2)
    scenario, model = from_datasets([(data, data)]), models.mlp((3,), (2,))
    model.backbone.requires_grad_(False)
    trainer = Trainer(model, MAS(), epochs=1)
    line = line_of(RuntimeWarning, "nothing is consolidated", lambda: trainer.fit(scenario))
    assert "trainer.fit(scenario)" in line


class Scripted(nn.Module):
    """A weight that is used by a function without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.solve(self.weight, x[..., None])[..., 0]


def test_the_fallback_of_a_parameter() -> None:
    model, x = Scripted(), torch.randn(4, 2)
    line = line_of(UserWarning, "takes the fallback", lambda: estimate_importance(model, [x]))
    assert "estimate_importance(model, [x])" in line


def test_the_fallback_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "WHY_NOT", "the compiled extension is missing")
    monkeypatch.setattr(backends, "_announced", False)
    model, x = nn.Linear(2, 1), torch.randn(4, 2)
    line = line_of(RuntimeWarning, "plain PyTorch", lambda: estimate_importance(model, [x]))
    assert "estimate_importance(model, [x])" in line


def test_torch_between() -> None:
    decorated = torch.no_grad()(warn)
    assert "decorated(" in line_of(UserWarning, "w", lambda: decorated("warned", UserWarning))


def test_once_for_each_line() -> None:
    """As Python shows warnings by default: what was shown is noted in the user's module."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            warn("again", UserWarning)
        warn("again", UserWarning)
    first, second = caught
    assert (first.filename, second.filename) == (__file__, __file__)
    assert second.lineno == first.lineno + 1
