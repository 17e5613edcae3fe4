"""LoRA over linear layers of bitsandbytes and torchao: importance by a loop in float64 over decoded weights."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from definition import loop
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from snapshots import equal
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import (
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from mas_ext import FusedMASPenalty, check_importance, estimate_fisher, estimate_importance
from mas_ext.importance import FisherSum
from mas_ext.integrations.transformers import MASCallback

pytestmark = pytest.mark.usefixtures("one_thread")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

ADAPTED = ["first", "second"]
# Of 4 bits: blocks of 64 weights.
SIZES = (64, 96, 64)


def of_torchao(inputs: int, outputs: int) -> nn.Module:
    layer = nn.Linear(inputs, outputs)
    quantize_(layer, Int8WeightOnlyConfig())
    return layer


def of_4_bits(kind: str, **options: Any) -> Callable[[int, int], nn.Module]:
    options = {"compute_dtype": torch.float32, "quant_type": kind, **options}
    return lambda inputs, outputs: Linear4bit(inputs, outputs, **options)


IN_BFLOAT16 = of_4_bits("nf4", compute_dtype=torch.bfloat16)
KINDS: dict[str, Callable[[int, int], nn.Module]] = {
    "nf4": of_4_bits("nf4"),
    "nf4 without nested statistics": of_4_bits("nf4", compress_statistics=False),
    "fp4 stored as bfloat16": of_4_bits("fp4", quant_storage=torch.bfloat16),
    "8 bits": lambda i, o: Linear8bitLt(i, o, has_fp16_weights=False),
    "8 bits with a threshold": lambda i, o: Linear8bitLt(
        i, o, has_fp16_weights=False, threshold=6.0
    ),
    "torchao": of_torchao,
}


class Net(nn.Module):
    def __init__(self, linear: Callable[[int, int], Any]) -> None:
        super().__init__()
        self.first, self.second = linear(*SIZES[:2]), linear(*SIZES[1:])
        self.head = nn.Linear(SIZES[2], 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.second(torch.tanh(self.first(x))))
        output: Tensor = self.head(y.mean(1))
        return output


def adapted(kind: str, own_layers: bool = False) -> Any:
    """own_layers: with peft's layers for bitsandbytes, which from_pretrained asks for by these names."""
    torch.manual_seed(0)
    model: Any = Net(KINDS.get(kind, IN_BFLOAT16)).to("cpu")  # where it is quantised
    model.is_loaded_in_4bit = own_layers and "4" in kind
    model.is_loaded_in_8bit = own_layers and "8" in kind
    config = LoraConfig(r=4, target_modules=ADAPTED, init_lora_weights=False)
    return get_peft_model(model, config)


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 7, SIZES[0], generator=generator) for _ in range(2)]


def decoded(layer: Any) -> Tensor:
    """The weight, by what the layer makes of the unit matrix."""
    one = torch.eye(layer.in_features)
    with torch.no_grad():
        layer = copy.deepcopy(layer).train()
        return (layer(one) - layer(torch.zeros_like(one))).T.double()


def plain(model: Any) -> Net:
    """The same network in float64, of ordinary layers whose weights have the update in them."""
    found = Net(nn.Linear).double()
    for name in ADAPTED:
        layer = model.get_submodule(f"base_model.model.{name}")
        into = found.get_submodule(name)
        into.bias.data = layer.base_layer.bias.detach().double()
        update = layer.get_delta_weight("default").detach().double()
        into.weight.data = decoded(layer.base_layer) + update
    found.head.load_state_dict(model.base_model.model.head.state_dict())
    return found


def bits(model: nn.Module) -> dict[str, Any]:
    """What the model is: objects, modes, hooks, all that its layers save, and its output."""
    found: dict[str, Any] = {n: (id(p), p.shape) for n, p in model.named_parameters()}
    found |= {f"mode of {n}": (m.training, len(m._forward_hooks)) for n, m in model.named_modules()}
    copied = copy.deepcopy(model).train()  # in eval mode on a CPU bitsandbytes' layers change
    for name, t in copied.state_dict().items():
        found[f"{name} saved"] = t.dequantize() if type(t).__module__.startswith("torchao") else t
    found["output"] = copied(batches()[0]).detach()
    return found


def assert_as_before(now: dict[str, Any], before: dict[str, Any]) -> None:
    assert now.keys() == before.keys()
    for name, value in before.items():
        assert equal(now[name], value), name


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("own_layers", [False, True], ids=["", "own layers"])
@pytest.mark.parametrize("kind", KINDS)
def test_importance_is_that_of_the_decoded_weight(kind: str, own_layers: bool, mode: bool) -> None:
    model = adapted(kind, own_layers)
    data = [b.double() for b in batches()]
    exact, batch = loop(plain(model), data, objective="l2")
    logits = [(b, torch.tensor([0, 1, 2, 3, 4])) for b in data]
    fisher = estimate_fisher(plain(model), logits)
    model.train(mode)
    before = bits(model)
    estimate_importance(model, batches())  # a first pass, in which layers move their statistics
    assert_as_before(bits(model), before)
    labelled = [(b.float(), y) for b, y in logits]
    for importance, given, expected in (
        ("exact", batches(), exact),
        ("batch", batches(), batch),
        (FisherSum(), labelled, fisher),
    ):
        penalty = FusedMASPenalty(model, importance=importance)  # type: ignore[arg-type]
        penalty.consolidate(given, sweeps=2)
        assert {*penalty.omega} == {f"{name}.weight" for name in ADAPTED}
        for name, omega in penalty.omega.items():
            assert omega.shape == expected[name].shape
            assert error(omega, expected[name]) < 1e-5
        assert_as_before(bits(model), before)


def test_16_bits_to_compute_with() -> None:
    model = adapted("nf4 in bfloat16")
    expected, _ = loop(plain(model), [b.double() for b in batches()], objective="l2")
    penalty = FusedMASPenalty(model)
    penalty.consolidate(batches())
    for name, omega in penalty.omega.items():
        assert error(omega, expected[name]) < 2**-7


@pytest.mark.parametrize("kind", KINDS)
def test_the_update_is_held(kind: str) -> None:
    model = adapted(kind)
    penalty = FusedMASPenalty(model, lam=0.5)
    penalty.consolidate(batches())
    layers = {n: model.get_submodule(f"base_model.model.{n}") for n in ADAPTED}
    anchor = {n: layer.get_delta_weight("default").detach() for n, layer in layers.items()}
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn_like(p)
    fresh = FusedMASPenalty(model)
    fresh.load_state_dict(penalty.state_dict())
    for one in (penalty, fresh):
        expected = torch.zeros(())
        for name, layer in layers.items():
            moved = layer.get_delta_weight("default") - anchor[name]
            expected = expected + 0.5 * (penalty.omega[f"{name}.weight"] * moved**2).sum()
        theta = [p for p in model.parameters() if p.requires_grad]
        torch.testing.assert_close(one(), expected)
        for found, right in zip(
            torch.autograd.grad(one(), theta), torch.autograd.grad(expected, theta), strict=True
        ):
            torch.testing.assert_close(
                found, right, rtol=1e-4, atol=1e-5 * float(right.abs().max())
            )


@pytest.mark.parametrize("kind", ["nf4", "8 bits", "torchao"])
def test_factors_are_measured_one_by_one_as_ever(kind: str) -> None:
    report = check_importance(adapted(kind), batches()[0])
    assert len(report.rows) == 4
    for row in report.rows:
        assert row.fast, row
        assert row.error < 1e-5, row


def test_a_weight_packed_for_inference_is_refused() -> None:
    """As eval mode does on some CPUs, with layers whose input has no gradient."""
    model = adapted("nf4")
    model.base_model.model.second.base_layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="got a Linear4bit that ran in eval mode on a CPU"):
        FusedMASPenalty(model).consolidate(batches())


@pytest.mark.parametrize("bits_of", [4, 8])
def test_a_trainer_of_a_quantised_model(bits_of: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=64, num_attention_heads=4, max_position_embeddings=32, **shape)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    how = {4: {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, 8: {"load_in_8bit": True}}
    model: Any = LlamaForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**how[bits_of]), device_map="cpu"
    )
    model = prepare_model_for_kbit_training(model)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)

    def corpus(seed: int) -> list[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        texts = torch.randint(32, (16, 12), generator=generator) + 32 * seed
        return [{"input_ids": text, "labels": text} for text in texts]

    mas = MASCallback(lam=1.0, remember=corpus(0), omega_dtype=torch.uint8)
    arguments = TrainingArguments(
        str(tmp_path / "out"),
        max_steps=2,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
    )
    Trainer(model, arguments, train_dataset=corpus(1), callbacks=[mas]).train()
    penalty = mas.penalty
    assert penalty is not None
    assert penalty.num_tasks == 2
    layers = [n for n, m in model.named_modules() if isinstance(m, (Linear4bit, Linear8bitLt))]
    assert len(layers) == 7
    bare = {n.removeprefix("base_model.model.").replace("base_layer", "weight") for n in layers}
    assert {*penalty.omega} == bare
    for name, omega in penalty.omega.items():
        base = model.get_submodule("base_model.model." + name.removesuffix(".weight")).base_layer
        assert omega.shape == (base.out_features, base.in_features)
        assert float(omega.max()) > 0
