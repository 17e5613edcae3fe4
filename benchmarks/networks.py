"""The networks whose importance the benchmark measures, with inputs of random numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mas_ext import models
from mas_ext.models import residual as resnet


def _with_ten_outputs(model: models.MultiHead) -> nn.Module:
    assert isinstance(model.backbone, nn.Sequential)
    return nn.Sequential(*model.backbone, nn.Linear(model.width, 10))


def mlp() -> nn.Module:
    """784-400-400-10."""
    return _with_ten_outputs(models.mlp((784,), (400, 400)))


def cnn() -> nn.Module:
    """Six convolutions in the manner of VGG, for 32 x 32 pixels."""
    return _with_ten_outputs(models.cnn((3, 32, 32)))


class Transformer(nn.Module):
    """Four encoder layers of width 256; ten numbers from the mean over positions."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(x).mean(1))
        return logits


def resnet18() -> nn.Module:
    """He et al. 2016, 1000 outputs. It has seen some batches, so that its statistics are its own."""
    model = nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        *resnet.stages((64, 128, 256, 512), 2, resnet.projected),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(512, 1000),
    )
    with torch.no_grad():
        for _ in range(10):
            model(torch.randn(8, 3, 64, 64))
    return model


class Network(NamedTuple):
    """How to make it, the shape of one sample, and the number of samples in a batch."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    samples: int


NETWORKS = {
    "mlp": Network(mlp, (784,), 512),
    "cnn": Network(cnn, (3, 32, 32), 128),
    "transformer": Network(Transformer, (64, 256), 32),
    "resnet18": Network(resnet18, (3, 64, 64), 32),
}


def build(name: str, samples: int | None = None, device: str = "cpu") -> tuple[nn.Module, Tensor]:
    """A network in eval mode and a batch for it, the same on every call."""
    network = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = network.make().eval()
        x = torch.randn(samples or network.samples, *network.shape)
    return model.to(device), x.to(device)
