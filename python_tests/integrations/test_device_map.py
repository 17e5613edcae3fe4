"""Models that accelerate dispatched by a device_map: as any other, but for weights that it offloads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from mas_ext import FusedMASPenalty, estimate_importance

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 6), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return output


def lora() -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False)
    return get_peft_model(Net(), config)


def batches() -> list[Tensor]:
    return [torch.randn(4, 8, generator=torch.Generator().manual_seed(1))]


def omega(model: nn.Module) -> dict[str, Tensor]:
    penalty = FusedMASPenalty(model)
    penalty.consolidate(batches())
    return penalty.omega


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        assert float(t.sum()) > 0
        torch.testing.assert_close(found[name], t)


def test_a_dispatched_model_is_as_any_other() -> None:
    model = lora()
    dispatch_model(
        model,
        {
            "base_model.model.first": "cpu",
            "base_model.model.second": "cpu",
            "base_model.model.head": "cpu",
        },
        force_hooks=True,
    )
    assert hasattr(model.base_model.model.first, "_hf_hook")
    assert_same(omega(model), omega(lora()))


def test_frozen_weights_may_be_offloaded() -> None:
    found = []
    for offloaded in (False, True):
        torch.manual_seed(0)
        model = Net()
        model.first.requires_grad_(False)
        if offloaded:
            cpu_offload(model.first, execution_device=CPU)
            assert model.first.weight.is_meta
        found.append(omega(model))
        assert model.first.weight.is_meta == offloaded
    assert_same(*found)


@pytest.mark.parametrize("adapted", [False, True])
def test_what_is_held_may_not(adapted: bool) -> None:
    model = lora() if adapted else Net()
    cpu_offload(
        model.base_model.model.first.base_layer if adapted else model.first, execution_device=CPU
    )
    with pytest.raises(TypeError, match=r"parameter '.*first.*': got a meta tensor, .* device_map"):
        omega(model)
    if not adapted:
        with pytest.raises(TypeError, match=r"parameter 'first.weight': got a meta tensor"):
            estimate_importance(model, batches())
