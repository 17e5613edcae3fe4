"""What is trained in the benchmark of steps: sizes as published, and a loss that trains everything."""

from __future__ import annotations

import math
import sys
from importlib.util import find_spec

import pytest
import torch

from benchmarks.workloads import WORKLOADS, build

PUBLISHED = {
    "mlp": 478_410,
    "resnet18": 11_173_962,  # for 32 x 32, 10 classes
    "resnet50": 25_557_032,
    "vit_b": 86_567_656,
    "gpt2": 124_439_808,
}


@pytest.mark.parametrize("name", WORKLOADS)
def test_sizes_and_losses(name: str) -> None:
    entry = WORKLOADS[name]
    if (entry.shape == (64,) or entry.classes == 1000) and find_spec("transformers") is None:
        with pytest.raises(ImportError, match=r"pip install transformers"):
            build(name)
        return
    network, x, loss = build(name, samples=2)
    assert sum(p.numel() for p in network.parameters()) == PUBLISHED[name]
    assert x.shape == (2, *entry.shape)
    value = loss()
    value.backward()
    # A network that knows nothing is near log(classes).
    assert math.log(entry.classes) == pytest.approx(float(value.detach()), rel=0.35)
    assert network.training
    assert all(p.grad is not None for p in network.parameters())


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ImportError, match="model: GPT2LMHeadModel comes from transformers, which is"
    ):
        build("gpt2")


def test_same_on_every_call_and_of_the_dtype() -> None:
    first, second = (build("mlp", 3, dtype=torch.bfloat16) for _ in range(2))
    assert torch.equal(first.x, second.x)
    assert first.x.dtype == torch.bfloat16
    for a, b in zip(first.network.parameters(), second.network.parameters(), strict=True):
        assert a.dtype == torch.bfloat16
        assert torch.equal(a, b)
    assert torch.equal(first.loss(), second.loss())
