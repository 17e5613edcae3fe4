"""What is trained in the benchmark of steps: a network, a batch of random numbers, and its loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mas_ext import models


class Workload(NamedTuple):
    """A network in train mode, its batch, and what gives the loss of both."""

    network: nn.Module
    x: Tensor
    loss: Callable[[], Tensor]


class Entry(NamedTuple):
    """How to make a network, the shape of a sample, the number of samples, and of classes or tokens."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    samples: int
    classes: int


def _own(name: str, shape: tuple[int, ...]) -> nn.Module:
    model = models.build(name, shape)
    model.add_head(10)
    return model


def _transformers(network: str, config: str, **options: Any) -> nn.Module:
    """A network of Hugging Face, of the size that its configuration has by default."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"model: {network} comes from transformers, which is not installed: pip install transformers"
        ) from error
    made: nn.Module = getattr(transformers, network)(getattr(transformers, config)(**options))
    return made


# Their default configurations are ResNet-50, ViT-B/16 and GPT-2 small.
_resnet50 = partial(_transformers, "ResNetForImageClassification", "ResNetConfig", num_labels=1000)
_vit_b = partial(_transformers, "ViTForImageClassification", "ViTConfig", num_labels=1000)
_gpt2 = partial(_transformers, "GPT2LMHeadModel", "GPT2Config", use_cache=False)

# Batches are such that two cores take a second at most.
WORKLOADS = {
    "mlp": Entry(partial(_own, "mlp", (784,)), (784,), 128, 10),
    "resnet18": Entry(partial(_own, "resnet18", (3, 32, 32)), (3, 32, 32), 32, 10),
    "resnet50": Entry(_resnet50, (3, 64, 64), 8, 1000),
    "vit_b": Entry(_vit_b, (3, 224, 224), 2, 1000),
    "gpt2": Entry(_gpt2, (64,), 2, 50257),
}
TOKENS = {"gpt2"}


def build(
    name: str,
    samples: int | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Workload:
    """One of WORKLOADS with parameters of this dtype, the same on every call.

    Raises:
        ImportError: a network of transformers, where that is not installed.
    """
    make, shape, usual, classes = WORKLOADS[name]
    batch = (samples or usual, *shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = make().train()
        x = torch.randint(classes, batch) if name in TOKENS else torch.randn(batch, dtype=dtype)
        y = torch.randint(classes, batch if name in TOKENS else batch[:1]).to(device)
    network.to(device, dtype)
    x = x.to(device)

    def loss() -> Tensor:
        output = network(x)
        logits: Tensor = getattr(output, "logits", output)
        return F.cross_entropy(logits.flatten(0, -2), y.flatten())

    return Workload(network, x, loss)
