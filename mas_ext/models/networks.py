"""Networks by name, without a head: MLP, CNN, AlexNet, ResNets for small images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import nn

from mas_ext._arguments import resolve
from mas_ext.models import residual as resnet
from mas_ext.models.heads import MultiHead


def mlp(shape: Sequence[int], hidden: Sequence[int] = (400, 400)) -> MultiHead:
    """Linear layers of these widths with ReLU, for inputs of any shape, without a head."""
    widths = [math.prod(shape), *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, width in pairwise(widths):
        layers += [nn.Linear(before, width), nn.ReLU()]
    return MultiHead(nn.Sequential(*layers), widths[-1])


def cnn(shape: Sequence[int]) -> MultiHead:
    """Six convolutions in the manner of VGG and a linear layer, for images of 8 x 8 pixels or more."""
    channels, height, width = _image(shape, 8)
    layers: list[nn.Module] = []
    for before, after in pairwise((channels, 32, 64, 128)):
        for inputs in (before, after):
            layers += [nn.Conv2d(inputs, after, 3, padding=1), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
    flat = 128 * (height // 8) * (width // 8)
    return MultiHead(nn.Sequential(*layers, nn.Flatten(), nn.Linear(flat, 256), nn.ReLU()), 256)


def alexnet(shape: Sequence[int]) -> MultiHead:
    """AlexNet for images of 20 x 20 pixels or more, with dropout.

    Serra et al., Overcoming catastrophic forgetting with hard attention to the task, ICML 2018: three
    convolutions of 64, 128 and 256 channels (for 32 x 32 pixels 4 x 4, 3 x 3 and 2 x 2), two linear
    layers of width 2048.
    """
    channels, *size = _image(shape, 20)
    kernels = [[side // 8 for side in size], [side // 10 for side in size], [2, 2]]
    layers: list[nn.Module] = []
    for before, after, kernel, rate in zip(
        (channels, 64, 128), (64, 128, 256), kernels, (0.2, 0.2, 0.5), strict=True
    ):
        layers += [nn.Conv2d(before, after, (kernel[0], kernel[1])), nn.ReLU()]
        layers += [nn.Dropout(rate), nn.MaxPool2d(2)]
        size = [(side - k + 1) // 2 for side, k in zip(size, kernel, strict=True)]
    layers.append(nn.Flatten())
    for before, after in pairwise((256 * math.prod(size), 2048, 2048)):
        layers += [nn.Linear(before, after), nn.ReLU(), nn.Dropout(0.5)]
    return MultiHead(nn.Sequential(*layers), 2048)


def resnet18(shape: Sequence[int]) -> MultiHead:
    """ResNet-18 for small images: it begins with a 3 x 3 convolution and does not pool before its end."""
    return MultiHead(resnet.small(_image(shape)[0], (64, 128, 256, 512), 2, resnet.projected), 512)


def resnet20(shape: Sequence[int]) -> MultiHead:
    """He et al. 2016, section 4.2, with n = 3: for CIFAR, shortcuts without parameters (option A)."""
    return MultiHead(resnet.small(_image(shape)[0], (16, 32, 64), 3, resnet.Padded), 64)


def resnet32(shape: Sequence[int]) -> MultiHead:
    """He et al. 2016, section 4.2, with n = 5: for CIFAR, shortcuts without parameters (option A)."""
    return MultiHead(resnet.small(_image(shape)[0], (16, 32, 64), 5, resnet.Padded), 64)


# From the shape of one input to a network without a head.
MakeModel = Callable[[Sequence[int]], MultiHead]

MODELS: dict[str, MakeModel] = {
    "mlp": mlp,
    "cnn": cnn,
    "alexnet": alexnet,
    "resnet18": resnet18,
    "resnet20": resnet20,
    "resnet32": resnet32,
}


def build(name: str | MakeModel, shape: Sequence[int]) -> MultiHead:
    """The network called `name` for inputs of this shape, without a head.

    Args:
        name: one of `MODELS`, or a function shape -> MultiHead of one's own, or "module:function" of it.
        shape: of one input.

    Raises:
        ValueError: an unknown name, or a function that returns something else.
    """
    make = resolve("name", name, MODELS) if isinstance(name, str) else name
    network = make(shape)
    if not isinstance(network, MultiHead):
        raise ValueError(f"model: got {type(network).__name__} from {name!r}, expected a MultiHead")
    return network


def _image(shape: Sequence[int], least: int = 1) -> tuple[int, int, int]:
    """Channels, height and width; a ValueError unless it is an image with sides of at least `least`."""
    if len(shape) != 3 or min(shape[1:]) < least:
        raise ValueError(
            f"shape: got {tuple(shape)}, expected (channels, height, width) with sides of at least {least}"
        )
    return shape[0], shape[1], shape[2]
