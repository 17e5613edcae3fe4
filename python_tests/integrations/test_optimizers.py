"""attach with optimizers of other libraries: as the penalty's gradient in their steps, or refused by name."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import bitsandbytes.optim
import pytest
import schedulefree
import torch
import transformers
from torch import Tensor, nn

from mas_ext import FusedMASPenalty

pytestmark = pytest.mark.usefixtures("one_thread")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

bnb: Any = bitsandbytes.optim
OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "Muon": lambda p: torch.optim.Muon(p, lr=0.02),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "transformers' Adafactor": transformers.Adafactor,
    "Lion": lambda p: bnb.Lion(p, lr=1e-3),
    "Lion8bit": lambda p: bnb.Lion8bit(p, lr=1e-3, min_8bit_size=16),
    "AdamW8bit": lambda p: bnb.AdamW8bit(p, min_8bit_size=16),
    "bitsandbytes' AdamW": bnb.AdamW,
    "schedule-free AdamW": schedulefree.AdamWScheduleFree,
    "schedule-free SGD": lambda p: schedulefree.SGDScheduleFree(p, lr=1e-4),
}
SCHEDULE_FREE = [name for name in OPTIMIZERS if name.startswith("schedule-free")]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96, bias=False), nn.Tanh(), nn.Linear(96, 64, bias=False))


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 64, generator=generator) for _ in range(4)]


def trained(name: str, attached: bool, lam: float) -> tuple[list[Tensor], FusedMASPenalty]:
    """Four steps, with the penalty attached, or added by hand to the gradients before each step."""
    model = network()
    penalty = FusedMASPenalty(model, lam=lam)
    penalty.consolidate(batches())
    optimizer = OPTIMIZERS[name]([*model.parameters()])
    if name in SCHEDULE_FREE:
        optimizer.train()
    if attached:
        penalty.attach(optimizer)
    for batch in batches():
        model(batch).square().sum().backward()
        if not attached:
            penalty.add_grad_()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()], penalty


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_gradient_form_is_the_penalty_in_the_loss(name: str) -> None:
    found, penalty = trained(name, True, 100.0)
    expected, _ = trained(name, False, 100.0)
    without, free = trained(name, True, 0.0)
    for got, right, other in zip(found, expected, without, strict=True):
        torch.testing.assert_close(got, right, rtol=0, atol=0)
        assert not torch.equal(got, other)
    free.lam = penalty.lam
    assert float(penalty().detach()) < float(free().detach())


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n not in SCHEDULE_FREE])
def test_the_proximal_form_asks_for_a_step_length(name: str) -> None:
    model = network()
    penalty = FusedMASPenalty(model, lam=1.0)
    penalty.consolidate(batches())
    optimizer = OPTIMIZERS[name]([*model.parameters()])
    with pytest.raises(TypeError, match=r"whose step length is unknown, .* pass eta="):
        penalty.attach(optimizer, mode="proximal")
    penalty.attach(optimizer, mode="proximal", eta=0.05)
    twin: Any = copy.deepcopy((model, optimizer.state_dict()))
    alone, other = twin[0], OPTIMIZERS[name]([*twin[0].parameters()])
    other.load_state_dict(twin[1])
    for one, by in ((model, optimizer), (alone, other)):
        one(batches()[0]).square().sum().backward()
        by.step()
    weights, anchor = penalty.omega, penalty.anchor
    for (key, got), p in zip(model.named_parameters(), alone.parameters(), strict=True):
        c = 2 * 0.05 * weights[key]
        torch.testing.assert_close(got, p + c / (1 + c) * (anchor[key] - p))


@pytest.mark.parametrize("eta", [None, 0.1])
@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_the_proximal_form_of_means_is_refused(name: str, eta: float | None) -> None:
    model = network()
    penalty = FusedMASPenalty(model)
    penalty.consolidate(batches())
    with pytest.raises(
        TypeError, match=r'optimizer: got the schedule-free .* expected mode="gradient"'
    ):
        penalty.attach(OPTIMIZERS[name]([*model.parameters()]), mode="proximal", eta=eta)
