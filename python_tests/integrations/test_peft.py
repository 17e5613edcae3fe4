"""peft's LoRA held in weight space: updates as peft gives them, and importance by a loop in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from definition import loop
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mas_ext import FusedMASPenalty

pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """One of each kind of layer that peft adapts by products."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 16)
        self.wide = nn.Conv2d(1, 3, 3, padding=1)
        self.narrow = nn.Conv2d(3, 2, 1)
        self.turned = Conv1D(5, 32)
        self.last = nn.Linear(5, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids).unflatten(-1, (4, 4)).mean(1, keepdim=True)
        x = torch.tanh(self.narrow(torch.tanh(self.wide(x)))).flatten(1)
        return self.head(torch.tanh(self.last(torch.tanh(self.turned(x)))))


ADAPTED = ["table", "wide", "narrow", "turned", "last"]


def adapted(**options: Any) -> Any:
    torch.manual_seed(3)
    options = {"target_modules": ADAPTED, **options}
    config = LoraConfig(r=2, lora_alpha=3, fan_in_fan_out=False, **options)
    model = get_peft_model(Net().double(), config, autocast_adapter_dtype=False)
    shake(model, 0.2)
    return model


def shake(model: nn.Module, size: float) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += size * torch.randn_like(p)


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 11, (3, 6), generator=generator) for _ in range(2)]


def layer(model: Any, name: str) -> Any:
    return model.get_submodule(f"base_model.model.{name}")


def updates(model: Any, adapters: tuple[str, ...] = ("default",)) -> dict[str, Tensor]:
    return {
        f"{name}.weight": sum(layer(model, name).get_delta_weight(a) for a in adapters)
        for name in ADAPTED
    }


def importance(model: Any) -> dict[str, Tensor]:
    plain = copy.deepcopy(model).merge_and_unload()
    for p in plain.parameters():
        p.requires_grad_(True)
    return loop(plain, batches(), objective="l2")[0]


def penalty_of(model: nn.Module, **options: Any) -> FusedMASPenalty:
    return FusedMASPenalty(model, lam=0.7, omega_dtype=torch.float64, **options)


def assert_same(
    penalty: FusedMASPenalty,
    model: Any,
    omega: dict[str, Tensor],
    anchor: dict[str, Tensor],
    now: dict[str, Tensor],
) -> None:
    expected = sum(0.7 * (omega[n] * (x - anchor[n]) ** 2).sum() for n, x in now.items())
    assert isinstance(expected, Tensor)
    theta = [p for p in model.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(expected, theta, allow_unused=True)
    value = penalty()
    torch.testing.assert_close(value, expected)
    found = torch.autograd.grad(value, theta, allow_unused=True)
    model.zero_grad()
    penalty.add_grad_()
    for p, grad, expected_grad in zip(theta, found, wanted, strict=True):
        zero = torch.zeros_like(p)
        expected_grad = zero if expected_grad is None else expected_grad
        torch.testing.assert_close(zero if grad is None else grad, expected_grad)
        torch.testing.assert_close(zero if p.grad is None else p.grad, expected_grad)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=["plain", "rslora"])
def test_every_kind_of_layer(options: dict[str, Any]) -> None:
    model = adapted(**options)
    penalty = penalty_of(model)
    penalty.consolidate(batches())
    omega = importance(model)
    assert penalty.omega.keys() == {f"{name}.weight" for name in ADAPTED}
    for name, found in penalty.omega.items():
        torch.testing.assert_close(found, omega[name])
    anchor = {n: t.detach() for n, t in updates(model).items()}
    shake(model, 0.1)
    assert_same(penalty, model, omega, anchor, updates(model))


def test_modules_to_save_are_held_one_by_one() -> None:
    model = adapted(modules_to_save=["head"])
    penalty = penalty_of(model)
    penalty.consolidate(batches())
    omega = importance(model)
    kept = {n: t for n, t in penalty.omega.items() if "modules_to_save" in n}
    assert len(kept) == 2
    for name, found in kept.items():
        torch.testing.assert_close(found, omega[f"head.{name.rpartition('.')[2]}"])
    assert len(penalty.omega) == len(ADAPTED) + 2


def test_merged_and_adapted_anew() -> None:
    """The state goes from one model to the next, under the names of the model without adapters."""
    model = adapted()
    penalty = penalty_of(model)
    penalty.consolidate(batches())
    omega = importance(model)
    shake(model, 0.0)
    plain = model.merge_and_unload()
    assert float(penalty()) == 0
    torch.manual_seed(8)
    config = LoraConfig(r=3, target_modules=ADAPTED)
    again = get_peft_model(plain, config, autocast_adapter_dtype=False)
    shake(again, 0.1)
    zero = {n: torch.zeros_like(t) for n, t in updates(again).items()}
    for second in (penalty, penalty_of(again)):
        second.load_state_dict(penalty.state_dict())
        assert_same(second, again, omega, zero, updates(again))


def test_several_adapters() -> None:
    model = adapted()
    penalty = penalty_of(model)
    penalty.consolidate(batches())
    omega = importance(model)
    anchor = {n: t.detach() for n, t in updates(model).items()}
    model.add_adapter("other", LoraConfig(r=3, target_modules=ADAPTED))
    model.to(torch.float64)
    model.set_adapter("other")
    shake(model, 0.1)
    zero = {n: torch.zeros_like(t) for n, t in anchor.items()}
    assert_same(penalty, model, omega, zero, updates(model, ("other",)))
    model.base_model.set_adapter(["default", "other"])
    shake(model, 0.1)
    assert_same(penalty, model, omega, anchor, updates(model, ("default", "other")))
    with model.disable_adapter():
        assert float(penalty()) == 0
    model.set_adapter("default")
    assert_same(penalty, model, omega, anchor, updates(model))


def test_dora_is_held_by_parameter() -> None:
    torch.manual_seed(3)
    config = LoraConfig(r=2, target_modules=["last"], use_dora=True)
    model = get_peft_model(Net().double(), config, autocast_adapter_dtype=False)
    shake(model, 0.1)
    penalty = penalty_of(model)
    penalty.consolidate(batches())
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {*penalty.omega} == names
    assert any("magnitude" in name for name in names)


def test_weights_that_share_memory_count_by_use() -> None:
    """A table and an output layer of one weight have two updates, and each the importance of its own use."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 4)
            self.out = nn.Linear(4, 7, bias=False)
            self.out.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(torch.tanh(self.table(ids).mean(1)))

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["table", "out"])
    model: Any = get_peft_model(Tied().double(), config, autocast_adapter_dtype=False)
    shake(model, 0.2)
    plain = Tied().double()
    plain.out.weight = nn.Parameter(torch.empty(7, 4, dtype=torch.float64))
    with torch.no_grad():
        for name in ("table", "out"):
            one = layer(model, name)
            plain.get_submodule(name).weight.copy_(
                one.base_layer.weight + one.get_delta_weight("default")
            )
    expected, _ = loop(plain, [b % 7 for b in batches()], objective="l2")
    penalty = penalty_of(model)
    penalty.consolidate([b % 7 for b in batches()])
    for name in ("table.weight", "out.weight"):
        torch.testing.assert_close(penalty.omega[name], expected[name])
