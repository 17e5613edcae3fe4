"""The benchmark of training steps: each form does what it is called; what does not depend on the clock."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import step
from mas_ext.comparison import bench

pytestmark = pytest.mark.usefixtures("one_thread")

OWN = ["attach", "attach, proximal", "add_grad_", "penalty() in the loss"]


def every_step(optimizer: str, tasks: list[int]) -> tuple[nn.Module, list[step.Step]]:
    network, _, loss = step.training("mlp", 4, "cpu", torch.float32)
    return network, [*step.every_step(network, loss, optimizer, tasks, {})]


def gradients(network: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_every_form_but_the_proximal_has_the_gradient_of_the_same_loss(optimizer: str) -> None:
    network, forms = every_step(optimizer, [2])
    with torch.no_grad():
        for p in network.parameters():
            p += 1.0  # away from the anchors
    start = {n: p.detach().clone() for n, p in network.named_parameters()}
    found = {}
    for form in forms:
        with torch.no_grad():
            for n, p in network.named_parameters():
                p.copy_(start[n])
        form.call()
        found[form.name] = gradients(network)
    generator = torch.Generator().manual_seed(0)
    fused = [step.FUSED, *step.FUSED_FORMS]
    for n, p in start.items():
        noise = torch.rand(p.shape, generator=generator)
        plain = found[step.PLAIN][n]
        omega = noise + (noise + 0.01)  # of two tasks
        for name in found.keys() - {step.PLAIN, "attach, proximal", *fused} | {
            "attach, fused=True"
        }:
            torch.testing.assert_close(found[name][n], plain + 2 * 0.5 * omega)
        torch.testing.assert_close(found["attach, proximal"][n], plain)
    assert {*OWN, step.EAGER, *fused} == {f.name for f in forms} - {step.PLAIN, step.AVALANCHE}


def test_the_proximal_form_moves_and_momentum_is_shared() -> None:
    network, steps = every_step("sgd", [1])
    forms = {f.name: f for f in steps}
    (weight, *_) = network.parameters()
    with torch.no_grad():
        weight += 1.0
    before = weight.detach().clone()
    forms["attach, proximal"].call()
    generator = torch.Generator().manual_seed(0)
    omega = torch.rand(weight.shape, generator=generator).double()
    c = 2 * (1e-9 / (1 - 0.9)) * 0.5 * omega
    # The anchor is 1 below; a step of 1e-9 is below what float32 shows of numbers near 1.
    torch.testing.assert_close(weight.double(), before - c / (1 + c), rtol=0, atol=2e-7)
    states = {
        f.over: f.call.args[1].state  # type: ignore[attr-defined]
        for f in forms.values()
    }
    for form in forms.values():
        assert form.call.args[1].state is states[form.over]  # type: ignore[attr-defined]
    assert [len(state) for state in states.values()] == [6, 0]


@pytest.mark.parametrize(
    ("name", "theirs", "ours"),
    [
        ("sgd", torch.optim.SGD, step.optim.SGD),
        ("adamw", torch.optim.AdamW, step.optim.AdamW),
    ],
)
def test_steps_of_one_pass(
    name: str, theirs: Any, ours: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a learning rate that is seen: the gradient forms are the same to rounding."""
    pair = (partial(theirs, lr=0.5, fused=True), partial(ours, lr=0.5))
    monkeypatch.setitem(step.ONE_PASS, name, pair)  # type: ignore[misc]
    network, steps = every_step(name, [1])
    theta = [*network.parameters()]
    start = [p.detach().clone() for p in theta]
    found = {}
    for form in steps:
        if form.over == step.FUSED:
            form.call.args[1].state.clear()  # type: ignore[attr-defined]
            with torch.no_grad():
                for p, x in zip(theta, start, strict=True):
                    p.copy_(x + 1)
            form.call()
            found[form.name] = torch.cat([p.detach().flatten() for p in theta])
    attached, own, proximal = (found[each] for each in step.FUSED_FORMS)
    torch.testing.assert_close(attached, own)
    assert not torch.allclose(proximal, found[step.FUSED])
    if name == "sgd":  # Adam's first step is lr everywhere
        assert not torch.allclose(attached, found[step.FUSED])


def test_rows() -> None:
    result = step.run("mlp", "adamw", tasks=[2, 1], samples=8, repeats=2)
    rows = [(row["name"], row["tasks"]) for row in result["forms"] if row["name"] != step.AVALANCHE]
    own = [*((name, 1) for name in OWN), (step.EAGER, 1)]
    attached, ours, proximal = step.FUSED_FORMS
    fused = [(step.FUSED, 0), (attached, 1), (proximal, 1), (ours, 1)]
    more = [("attach", 2), (step.EAGER, 2), (ours, 2)]
    assert sorted(rows) == sorted([(step.PLAIN, 0), *own, *fused, *more])
    assert rows[0] == (step.PLAIN, 0)
    over = {row["name"]: row["over"] for row in result["forms"]}
    assert {over[name] for name, _ in fused} == {step.FUSED}
    assert {over[name] for name, _ in own} == {step.PLAIN}
    assert result["forms"][0]["extra"] == {"median": 0, "low": 0, "high": 0}
    assert (result["parameters"], result["tensors"]) == (478_410, 6)
    assert (result["shape"], result["repeats"], result["dtype"]) == ([8, 784], 2, "float32")
    lines = step.table(result).splitlines()
    assert len(lines) == 3 + len(result["forms"]) + len(result["skipped"])
    assert lines[4].startswith("attach ")


def test_bytes() -> None:
    """Counted by hand: float32 parameters, gradients, moments; omega and anchor of 4 bytes each."""
    result = step.run("mlp", "adamw", tasks=[1, 3], samples=8, repeats=1)
    rows = {(row["name"], row["tasks"]): row for row in result["forms"]}
    size = 478_410
    moved = {"attach": 20, "attach, proximal": 20, "add_grad_": 20, "penalty() in the loss": 40}
    moved |= {"attach, fused=True": 20, "mas_ext.optim": 8, "mas_ext.optim, proximal": 8}
    for name, bytes_each in moved.items():
        row = rows[name, 1]
        assert row["moved"] == bytes_each * size
        assert row["held"] == pytest.approx(8 * size, rel=1e-3)  # tensors begin on cache lines
        longer = row["extra_seconds"]
        best = max(result["bandwidth"].values())
        expected = pytest.approx(bytes_each * size / longer["median"] / best)
        assert row["fraction"] == (expected if longer["low"] > 0 else None)
    assert rows["attach", 3]["held"] == rows["attach", 1]["held"]
    assert rows[step.EAGER, 3]["held"] == 3 * 8 * size
    # Without a penalty: gradients, and what AdamW takes for one tensor; eager autograd saves what it squares.
    assert 4 * size < rows[step.PLAIN, 0]["peak"] < 10 * size
    for name in ("attach", "attach, proximal", "add_grad_", *step.FUSED_FORMS):
        assert 8 * size <= rows[name, 1]["extra_memory"] < 8.1 * size
    assert rows[step.EAGER, 1]["extra_memory"] > 12 * size
    assert rows[step.EAGER, 3]["extra_memory"] > 3 * 12 * size


def test_bfloat16_parameters_with_float32_state() -> None:
    result = step.run("mlp", "sgd", dtype="bfloat16", tasks=[1], samples=8, repeats=1)
    rows = {row["name"]: row for row in result["forms"]}
    size = 478_410
    assert rows["attach"]["held"] == pytest.approx(8 * size, rel=1e-3)
    assert rows["attach"]["moved"] == (2 + 8 + 2 * 2) * size
    assert rows["attach, proximal"]["moved"] == (2 + 8 + 2) * size
    assert rows[step.EAGER]["held"] == 4 * size


def test_eager_autograd_is_left_out_where_it_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "eager_fits", lambda tasks, theta: tasks < 2)
    result = step.run("mlp", tasks=[1, 2], samples=8, repeats=1)
    assert [row["tasks"] for row in result["forms"] if row["name"] == step.EAGER] == [1]
    assert result["skipped"]["eager autograd, 2 tasks"] == "needs more than half of the memory"


def test_cross_entropy_of_a_network_that_knows_nothing() -> None:
    network, x, loss = step.training("resnet18", 2, "cpu", torch.float32)
    assert network.training
    value = loss()
    assert math.log(10) == pytest.approx(float(value.detach()), rel=0.35)
    value.backward()
    assert all(p.grad is not None for p in network.parameters())
    _, same, again = step.training("resnet18", 2, "cpu", torch.float32)
    assert torch.equal(x, same)
    assert torch.equal(value, again())


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="tasks: got 0, expected a whole number from 1 up"):
        step.run("mlp", tasks=[0])
