"""A ResNet-20 that was trained on CIFAR-10, images that it did not see, and CIFAR-100 as it sees it."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch

from mas_ext import models
from mas_ext.models import MultiHead
from mas_ext.scenarios import Scenario, Tensors, split
from mas_ext.scenarios import datasets as data
from mas_ext.scenarios.files import images
from mas_ext.scenarios.transforms import Standardisation

# What the network's images were standardised with.
SEEN = Standardisation(torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225]))


def trained(folder: str | None) -> MultiHead:
    """The network, whose first head tells CIFAR-10's classes apart.

    Raises:
        FileNotFoundError: its weights are missing.
    """
    path = _path("resnet20_cifar10.th", folder)
    network = models.resnet20((3, 32, 32))
    models.load_backbone(network, path)
    network.add_head(10)
    weights = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    for name, parameter in network.heads[0].named_parameters():
        parameter.data.copy_(weights[f"module.linear.{name}"])
    return network


def unseen(folder: str | None) -> Tensors:
    """1,000 of CIFAR-10's test images.

    Raises:
        FileNotFoundError: they are missing.
    """
    path = _path("cifar10_test1k.npz", folder)
    with np.load(path) as arrays:
        return images(path, arrays["x_test"], arrays["y_test"]).transformed(SEEN)


def groups(folder: str | None) -> Scenario:
    """CIFAR-100 in ten tasks of ten classes, standardised as the network's images were."""
    train, test = (part.transformed(SEEN) for part in data.load_dataset("cifar100", folder))
    return split(train, test, 10)


@functools.cache
def features(folder: str | None) -> Scenario:
    """CIFAR-100 in ten tasks, as the network's features, (64,), which a processor can learn.

    Raises:
        FileNotFoundError: its weights, or the images, are missing.
    """
    network = trained(folder).eval()

    def seen(part: Tensors) -> Tensors:
        with torch.no_grad():
            parts = [
                network.backbone(part.transformed(SEEN).batch(index)[0])
                for index in torch.arange(len(part)).split(200)
            ]
        return Tensors(torch.cat(parts), part.y)

    train, test = (seen(part) for part in data.load_dataset("cifar100", folder))
    return split(train, test, 10, "cifar100-features")


def _path(name: str, folder: str | None) -> Path:
    places = [place / name for place in data.folders(folder)]
    path = next((place for place in places if place.exists()), None)
    if path is None:
        raise FileNotFoundError(f"{name} is missing, expected at {places[0]}")
    return path
