"""The networks that the benchmarks run: sizes as published, the same on every call."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import pytest
import torch

from benchmarks.networks import IMPORTANCE, STEP, Network, build

SIZES = [
    (IMPORTANCE["mlp"], 478_410),
    # By hand: 896 + 9,248 + 18,496 + 36,928 + 73,856 + 147,584 + 524,544 + 2,570.
    (IMPORTANCE["cnn"], 814_122),
    # Four times 789,760 (263,168 of attention, 525,568 behind it, 1,024 of norms), and the head.
    (IMPORTANCE["transformer"], 4 * 789_760 + 2_570),
    (IMPORTANCE["resnet18"], 11_689_512),
    (STEP["mlp"], 478_410),
    (STEP["resnet18"], 11_173_962),  # for 32 x 32, 10 outputs
    (STEP["resnet50"], 25_557_032),
    (STEP["vit_b"], 86_567_656),
    (STEP["gpt2"], 124_439_808),
]
FROM_TRANSFORMERS = {"resnet50", "vit_b", "gpt2"}


def test_every_network_is_among_them() -> None:
    assert [network for network, _ in SIZES] == [*IMPORTANCE.values(), *STEP.values()]


@pytest.mark.parametrize(("network", "parameters"), SIZES)
def test_sizes_are_the_published_ones(network: Network, parameters: int) -> None:
    if network in map(STEP.get, FROM_TRANSFORMERS) and find_spec("transformers") is None:
        with pytest.raises(ImportError, match=r"pip install transformers"):
            build(network)
        return
    model, x = build(network, 2)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert x.shape == (2, *network.shape)
    assert not model.training
    output = model(x)
    assert (len(output), output.shape[-1]) == (2, network.outputs)
    again, same = build(network, 2)
    assert torch.equal(x, same)
    torch.testing.assert_close(model.state_dict(), again.state_dict(), rtol=0, atol=0)


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ImportError, match="model: GPT2LMHeadModel comes from transformers, which is"
    ):
        build(STEP["gpt2"])


def test_batch_and_dtype() -> None:
    model, x = build(STEP["mlp"], dtype=torch.bfloat16)
    assert (len(x), x.dtype) == (128, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
