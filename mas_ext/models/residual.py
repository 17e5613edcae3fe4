"""Residual networks: He et al., Deep residual learning for image recognition, CVPR 2016."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

Shortcut = Callable[[int, int, int], nn.Module]  # of channels before and after, and the stride


class Padded(nn.Module):
    """Option A of the paper: pixels are left out, channels of zeros are added, half on either side."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.stride, self.before = stride, (width - inputs) // 2
        self.after = width - inputs - self.before

    def forward(self, x: Tensor) -> Tensor:
        fewer = x[:, :, :: self.stride, :: self.stride]
        return F.pad(fewer, (0, 0, 0, 0, self.before, self.after))


def projected(inputs: int, width: int, stride: int) -> nn.Module:
    """Option B of the paper: a convolution of single pixels, normalised."""
    conv = nn.Conv2d(inputs, width, 1, stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width))


class Block(nn.Module):
    """Two convolutions and a way around them, straight where nothing changes its shape.

    Names are torchvision's, so that weights trained with it fit.
    """

    def __init__(self, inputs: int, width: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()
        changes = stride != 1 or inputs != width
        self.downsample = shortcut(inputs, width, stride) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        result: Tensor = self.relu2(y + self.downsample(x))
        return result


def stages(widths: Sequence[int], blocks: int, shortcut: Shortcut) -> list[nn.Sequential]:
    """For each width that many blocks; each stage but the first begins by halving the image."""
    made: list[nn.Sequential] = []
    for inputs, width in pairwise([widths[0], *widths]):
        first = Block(inputs, width, 2 if made else 1, shortcut)
        rest = (Block(width, width, 1, shortcut) for _ in range(1, blocks))
        made.append(nn.Sequential(first, *rest))
    return made


def small(channels: int, widths: Sequence[int], blocks: int, shortcut: Shortcut) -> nn.Sequential:
    """For small images, which keep their size until the second stage: x -> (N, widths[-1]).

    The layers are conv1, bn1, relu, layer1, layer2, ..., and the mean over pixels.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv1"] = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False)
    layers["bn1"] = nn.BatchNorm2d(widths[0])
    layers["relu"] = nn.ReLU()
    for i, stage in enumerate(stages(widths, blocks, shortcut), start=1):
        layers[f"layer{i}"] = stage
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    network = nn.Sequential(layers)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network
