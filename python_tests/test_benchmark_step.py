"""The benchmark of training steps: each form does what it is called; what does not depend on the clock."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from mas_ext import models
from mas_ext.benchmarks import step

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_form_but_the_proximal_has_the_gradient_of_the_same_loss() -> None:
    torch.manual_seed(0)
    network = models.mlp((6,), (5,))
    network.add_head(3)
    x, y = torch.randn(8, 6), torch.arange(8) % 3
    with torch.no_grad():
        start = {n: p.clone() for n, p in network.named_parameters()}
    found = {}
    for name in step.FORMS:
        model = copy.deepcopy(network)
        act = step._step(name, 2, model, "sgd", lambda z: F.cross_entropy(z, y), x)
        with torch.no_grad():
            for p in model.parameters():
                p += 1.0  # away from the anchors
        act()
        found[name] = {n: p.grad for n, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(1)
    for n, p in start.items():
        noise = torch.rand(p.shape, generator=generator)
        plain = found[step.PLAIN][n]
        assert plain is not None
        omega = noise + (noise + 0.01)  # of two tasks
        for name in ("attach", "add_grad_", "penalty() in the loss", step.EAGER):
            torch.testing.assert_close(found[name][n], plain + 2 * 0.1 * omega)
        torch.testing.assert_close(found["attach, proximal"][n], plain)


def test_rows() -> None:
    result = step.run("mlp", "adamw", tasks=[2, 1], repeats=2)
    rows = [(row["name"], row["tasks"]) for row in result["forms"]]
    own = ["attach", "attach, proximal", "add_grad_", "penalty() in the loss", "eager autograd"]
    assert rows == [("no penalty", 0), *((name, 1) for name in own), ("attach", 2)]
    assert result["forms"][0]["extra"] == {"median": 0, "low": 0, "high": 0}
    assert result["parameters"] == 478_410
    lines = step.table(result).splitlines()
    assert len(lines) == 2 + len(rows)
    assert "eager autograd" in lines[7]


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="model: got 'vgg', expected one of mlp, resnet18"):
        step.run("vgg")
    with pytest.raises(ValueError, match="optimizer: got 'lion', expected one of sgd"):
        step.run("mlp", "lion")
    with pytest.raises(ValueError, match=r"tasks, repeats: got \[0\], 31"):
        step.run("mlp", tasks=[0])
