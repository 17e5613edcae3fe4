"""The networks that the benchmarks run, with batches of random numbers. Each maps one tensor to one tensor."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mas_ext import models
from mas_ext.models import residual


class Network(NamedTuple):
    """A network and its batches.

    shape: of one sample. samples: in a batch, on a CPU and on a GPU. outputs: the last dimension of what it
    returns. tokens: how many kinds of tokens its inputs are of; 0: they are real numbers.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    samples: tuple[int, int]
    outputs: int = 10
    tokens: int = 0


def build(
    network: Network,
    samples: int | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[nn.Module, Tensor]:
    """The network in eval mode and a batch for it, the same on every call.

    Raises:
        ImportError: a network of transformers, torchvision or peft, where that is not installed.
    """
    shape = (samples or network.samples[device != "cpu"], *network.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = network.make().eval()
        x = torch.randint(network.tokens, shape) if network.tokens else torch.randn(shape)
    return model.to(device, dtype), x.to(device, x.dtype if network.tokens else dtype)


def _with_ten_outputs(name: str, shape: tuple[int, ...]) -> nn.Module:
    """A network of mas_ext.models as an nn.Sequential, which every library understands."""
    model = models.build(name, shape)
    assert isinstance(model.backbone, nn.Sequential)
    return nn.Sequential(*model.backbone, nn.Linear(model.width, 10))


class Mean(nn.Module):
    """Over positions: (N, positions, width) -> (N, width)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def transformer() -> nn.Module:
    """Four encoder layers of width 256; ten numbers from the mean over positions."""
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    return nn.Sequential(encoder, Mean(), nn.Linear(256, 10))


def resnet18() -> nn.Module:
    """He et al. 2016, 1000 outputs. It has seen some batches, so that its statistics are its own."""
    model = nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        *residual.stages((64, 128, 256, 512), 2, residual.projected),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(512, 1000),
    )
    with torch.no_grad():
        for _ in range(10):
            model(torch.randn(8, 3, 64, 64))
    return model


def _package(name: str, model: str) -> Any:
    """The package that a model comes from."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"model: {model} comes from {name}, which is not installed: pip install {name}"
        ) from error


class Logits(nn.Module):
    """A network of Hugging Face; what its options don't say is as in its configuration's defaults."""

    def __init__(self, name: str, configuration: str, **options: Any) -> None:
        super().__init__()
        transformers = _package("transformers", name)
        self.network = getattr(transformers, name)(getattr(transformers, configuration)(**options))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x).logits
        return logits


def llama_lora() -> nn.Module:
    """The narrow Llama, frozen, with adapters of rank 8 that have learned something."""
    model = _narrow_llama()
    peft = _package("peft", "LoRA")
    names = ["q_proj", "v_proj", "up_proj"]
    model.network = peft.get_peft_model(model.network, peft.LoraConfig(r=8, target_modules=names))
    for name, p in model.named_parameters():
        if "lora_B" in name:  # zero at first
            nn.init.normal_(p, std=0.05)
    return model


def swin_t() -> nn.Module:
    """Swin-T of torchvision, ten outputs."""
    model: nn.Module = _package("torchvision", "Swin-T").models.swin_t(num_classes=10)
    return model


_mlp = partial(_with_ten_outputs, "mlp", (784,))
# Their default configurations are ResNet-50, ViT-B/16 and GPT-2 small.
_resnet50 = partial(Logits, "ResNetForImageClassification", "ResNetConfig", num_labels=1000)
_vit_b = partial(Logits, "ViTForImageClassification", "ViTConfig", num_labels=1000)
_gpt2 = partial(Logits, "GPT2LMHeadModel", "GPT2Config", use_cache=False)
# Real architectures, so small that a pass takes a few tenths of a second on two cores at most.
_NARROW: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
_WORDS = 2000
_narrow_bert = partial(
    Logits,
    "BertForSequenceClassification",
    "BertConfig",
    vocab_size=_WORDS,
    num_labels=10,
    **_NARROW,
)
_narrow_gpt2 = partial(
    Logits,
    "GPT2LMHeadModel",
    "GPT2Config",
    vocab_size=_WORDS,
    n_positions=128,
    n_embd=128,
    n_layer=4,
    n_head=4,
    use_cache=False,
    bos_token_id=None,
    eos_token_id=None,
)
_narrow_llama = partial(
    Logits,
    "LlamaForCausalLM",
    "LlamaConfig",
    vocab_size=_WORDS,
    num_key_value_heads=2,
    use_cache=False,
    **_NARROW,
)
_narrow_vit = partial(
    Logits,
    "ViTForImageClassification",
    "ViTConfig",
    image_size=64,
    patch_size=8,
    num_labels=10,
    **_NARROW,
)

# What benchmarks/importance.py measures.
IMPORTANCE = {
    "mlp": Network(_mlp, (784,), (512, 1024)),
    "cnn": Network(partial(_with_ten_outputs, "cnn", (3, 32, 32)), (3, 32, 32), (128, 256)),
    "transformer": Network(transformer, (64, 256), (32, 64)),
    "resnet18": Network(resnet18, (3, 64, 64), (32, 128), 1000),
    "bert_narrow": Network(_narrow_bert, (64,), (8, 64), tokens=_WORDS),
    "gpt2_narrow": Network(_narrow_gpt2, (64,), (8, 64), _WORDS, _WORDS),
    "llama_narrow": Network(_narrow_llama, (64,), (8, 64), _WORDS, _WORDS),
    "llama_lora": Network(llama_lora, (64,), (8, 64), _WORDS, _WORDS),
    "vit_narrow": Network(_narrow_vit, (3, 64, 64), (16, 64)),
    "swin_t": Network(swin_t, (3, 64, 64), (8, 64)),
}
# What benchmarks/step.py trains. A step takes two cores a second at most.
STEP = {
    "mlp": Network(_mlp, (784,), (128, 128)),
    "resnet18": Network(
        partial(_with_ten_outputs, "resnet18", (3, 32, 32)), (3, 32, 32), (32, 256)
    ),
    "resnet50": Network(_resnet50, (3, 64, 64), (8, 64), 1000),
    "vit_b": Network(_vit_b, (3, 224, 224), (2, 32), 1000),
    "gpt2": Network(_gpt2, (64,), (2, 16), 50257, tokens=50257),
}
