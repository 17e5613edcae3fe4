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
    # By hand, in a layer: 66,048 of attention, 98,816 behind it, 512 of norms. Around them: 2,000, 512 and 2
    # rows of 128, a norm, the pooler, the head.
    (IMPORTANCE["bert_narrow"], 4 * 165_376 + 2_514 * 128 + 256 + 16_512 + 1_290),
    # 198,272 in a layer, 2,000 and 128 rows of 128, and a norm; the head is the table.
    (IMPORTANCE["gpt2_narrow"], 4 * 198_272 + 2_128 * 128 + 256),
    # 49,152 of attention, 147,456 behind it, 256 of norms; table, head and a norm.
    (IMPORTANCE["llama_narrow"], 4 * 196_864 + 2 * 2_000 * 128 + 128),
    # Rank 8 at 256, 192 and 512 rows and columns.
    (IMPORTANCE["llama_lora"], 4 * 196_864 + 2 * 2_000 * 128 + 128 + 4 * 8 * (256 + 192 + 512)),
    # BERT's layers; patches of 3 x 8 x 8, 65 positions, a token, a norm, the head.
    (IMPORTANCE["vit_narrow"], 4 * 165_376 + 193 * 128 + 66 * 128 + 256 + 1_290),
    # torchvision's 28,288,354 with 990 outputs fewer.
    (IMPORTANCE["swin_t"], 28_288_354 - 990 * 769),
    (STEP["mlp"], 478_410),
    (STEP["resnet18"], 11_173_962),  # for 32 x 32, 10 outputs
    (STEP["resnet50"], 25_557_032),
    (STEP["vit_b"], 86_567_656),
    (STEP["gpt2"], 124_439_808),
]
PACKAGES = {
    **dict.fromkeys(("bert_narrow", "gpt2_narrow", "llama_narrow", "vit_narrow"), "transformers"),
    **dict.fromkeys(("resnet50", "vit_b", "gpt2"), "transformers"),
    "llama_lora": "peft",
    "swin_t": "torchvision",
}


def test_every_network_is_among_them() -> None:
    assert [network for network, _ in SIZES] == [*IMPORTANCE.values(), *STEP.values()]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
@pytest.mark.parametrize(("network", "parameters"), SIZES)
def test_sizes_are_the_published_ones(network: Network, parameters: int) -> None:
    (name,) = [n for n, each in (*IMPORTANCE.items(), *STEP.items()) if each is network]
    package = PACKAGES.get(name)
    if package is not None and find_spec(package) is None:
        with pytest.raises(ImportError, match=r"is not installed: pip install \w+$"):
            build(network)
        return
    model, x = build(network, 2)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert x.shape == (2, *network.shape)
    assert not model.training
    output = model(x)
    assert (len(output), output.shape[-1]) == (2, network.outputs)
    assert x.is_floating_point() is not bool(network.tokens)
    again, same = build(network, 2)
    assert torch.equal(x, same)
    torch.testing.assert_close(model.state_dict(), again.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("network", "package", "message"),
    [
        (STEP["gpt2"], "transformers", "GPT2LMHeadModel comes from transformers, which is"),
        (IMPORTANCE["swin_t"], "torchvision", "Swin-T comes from torchvision, which is"),
    ],
)
def test_missing_package(
    network: Network, package: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"model: {message} not installed: pip install {package}"):
        build(network)


def test_batch_and_dtype() -> None:
    model, x = build(STEP["mlp"], dtype=torch.bfloat16)
    assert (len(x), x.dtype) == (128, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
