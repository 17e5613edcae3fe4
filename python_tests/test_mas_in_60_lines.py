"""The method written out in docs/mas_in_60_lines.py is that of the library, and runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from modules import loaded
from torch import Tensor, nn

from mas_ext import FusedMASPenalty, estimate_importance

FILE = Path(__file__).parents[1] / "docs" / "mas_in_60_lines.py"


written_out = loaded("mas_in_60_lines", FILE)


def network() -> nn.Module:
    layers = [nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 5), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(5, 3)).double()


def images(task: int) -> Tensor:
    """A task's samples: their number and their scale differ, so that total importance does."""
    return (1 + 2 * task) * torch.randn(6 + task, 1, 4, 4, dtype=torch.float64)


def move(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))


def assert_equal(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10 * expected.abs().max().item())


def test_importance() -> None:
    model, x = network(), images(1)
    found = estimate_importance(model, x.split(3))
    expected = written_out.importance(model, x)
    assert found.keys() == expected.keys()
    for name, omega in expected.items():
        assert_equal(found[name], omega)
        assert float(omega.max()) > 0


@pytest.mark.parametrize(
    ("merge", "anchor", "name"), [("sum", "latest", "MAS"), ("consistent", "own", "MASAlpha")]
)
def test_penalty(merge: Any, anchor: Any, name: str) -> None:
    """Value, gradient and factors after each of four tasks, away from every anchor."""
    model = network()
    penalty = FusedMASPenalty(model, lam=0.7, merge=merge, anchor=anchor, omega_dtype=torch.float64)
    method = getattr(written_out, name)(model, 0.7)
    assert penalty().item() == method.penalty().item() == 0
    theta = list(model.parameters())
    for task in range(4):
        x = images(task)
        penalty.consolidate(x.split(4))
        method.consolidate(x)
        move(model)
        value, expected = penalty(), method.penalty()
        assert_equal(value, expected)
        assert value.item() > 0
        gradients = (torch.autograd.grad(each, theta) for each in (value, expected))
        for got, g in zip(*gradients, strict=True):
            assert_equal(got, g)
        alpha = [float(term[0]) for term in method.terms()]
        assert penalty.alpha.tolist() == pytest.approx(alpha, rel=1e-10)


def test_it_is_short_and_runs() -> None:
    """As it is: what it prints is the accuracy on each of three tasks after the last."""
    lines = FILE.read_text(encoding="utf-8").splitlines()
    assert sum(bool(line.strip()) for line in lines) <= 60
    assert "mas_ext" not in "".join(line for line in lines if "import" in line)
    done = subprocess.run([sys.executable, FILE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    kept = {
        line.split()[0]: [float(share) for share in re.findall(r"([\d.]+)%", line)]
        for line in done.stdout.splitlines()
    }
    assert list(kept) == ["fine-tuning", "MAS", "MAS-alpha"]
    assert all(len(shares) == 3 for shares in kept.values())
    for held in ("MAS", "MAS-alpha"):
        assert kept[held][0] > kept["fine-tuning"][0] + 30
