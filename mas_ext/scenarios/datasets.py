"""Data sets by name, read from a folder: images as float32 (N, C, H, W) in [0, 1]."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from mas_ext._arguments import hint
from mas_ext.scenarios.files import images, read_idx_folder, read_npz
from mas_ext.scenarios.tasks import Tensors

Pair = tuple[Tensors, Tensors]  # to train and to test on


class Source(NamedTuple):
    """A file or folder that may hold a data set, how it is read, and what it holds or where to get it."""

    path: str
    read: Callable[[Path], Pair]
    origin: str = "arrays x_train, y_train, x_test and y_test, all of bytes"


def load_dataset(dataset: str, folder: str | Path | None = None) -> Pair:
    """Read a data set: samples to train and to test on.

    Args:
        dataset: one of `DATASETS`.
        folder: searched alone if it is given, else $MAS_EXT_DATA, ./data and ~/data, in each of them for
            everything that `SOURCES` lists, in that order. The digits need no folder.

    Raises:
        ValueError: an unknown name, or a damaged file.
        FileNotFoundError: no files; it says where to get them.
        ModuleNotFoundError: a package that is needed is not installed.
    """
    if dataset not in DATASETS:
        raise ValueError(f"dataset: got {dataset!r}, {hint(dataset, DATASETS)}")
    if dataset == "digits":
        return _digits(folder)
    places = folders(folder)
    for candidate in places:
        for source in SOURCES[dataset]:
            if (candidate / source.path).exists():
                try:
                    return source.read(candidate / source.path)
                except FileNotFoundError as error:
                    raise FileNotFoundError(f"{error}: get it from {source.origin}") from error
    ways = " or ".join(f"{source.path} ({source.origin})" for source in SOURCES[dataset])
    raise FileNotFoundError(
        f"{dataset} is not in {', '.join(map(str, places))}: put {ways} into a folder DIR "
        "and give --data DIR or set MAS_EXT_DATA=DIR"
    )


def torchvision_dataset(
    name: str,
    folder: str | Path,
    size: int,
    splits: tuple[str, str] = ("train", "test"),
) -> tuple[Dataset[Any], Dataset[Any]]:
    """A classification data set of torchvision, to train and to test on, as images (3, size, size).

    Images are read when they are asked for: as colours in [0, 1], the shorter side scaled to `size`, and the
    centre cut out.

    Args:
        name: the class in `torchvision.datasets`, such as "Flowers102", "FGVCAircraft" or "SVHN".
        folder: given to it as it is; nothing is downloaded.
        size: height and width in pixels.
        splits: what it calls the two parts, for classes that take names of parts.

    Raises:
        ValueError: an unknown name, or a data set of a single part (divide that by
            `torch.utils.data.random_split`, and give it to `mas_ext.scenarios.from_datasets`).
        FileNotFoundError: the data are not in the folder.
        ModuleNotFoundError: torchvision is not installed.
    """
    datasets = import_extra("torchvision.datasets", install="torchvision")
    transforms = import_extra("torchvision.transforms", install="torchvision")
    names = [each for each in vars(datasets) if inspect.isclass(getattr(datasets, each))]
    if name not in names:
        raise ValueError(f"name: got {name!r}, which torchvision lacks, {hint(name, names)}")
    make = getattr(datasets, name)
    accepted = inspect.signature(make).parameters
    if "train" in accepted:
        parts: list[dict[str, Any]] = [{"train": True}, {"train": False}]
    elif "split" in accepted:
        parts = [{"split": split} for split in splits]
    else:
        raise ValueError(
            f"name: got {name!r}, expected a data set with parts to train and to test on"
        )
    transform = transforms.Compose(
        [_colours, transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor()]
    )
    try:
        train, test = (make(folder, **part, transform=transform) for part in parts)
    except RuntimeError as error:  # what torchvision raises for files that aren't there
        raise FileNotFoundError(f"{name} is not whole in {folder}: {error}") from error
    return train, test


def import_extra(module: str, install: str = "'mas-ext[demo]'") -> ModuleType:
    """Import a module, or raise ModuleNotFoundError naming what has to be installed for it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name} is not installed, run: pip install {install}", name=error.name
        ) from error


def _digits(folder: str | Path | None) -> Pair:
    """The 1,797 digits of 8 x 8 pixels bundled with scikit-learn; a fixed quarter of them to test on."""
    if folder is not None:
        raise ValueError(
            f"folder: got {str(folder)!r} for the digits, expected none, since they come with scikit-learn; "
            "did you mean the data set mnist?"
        )
    bundle = import_extra("sklearn.datasets").load_digits()
    shuffled = np.random.default_rng(0).permutation(len(bundle.target))  # neighbours share a writer
    x = torch.from_numpy(bundle.images[shuffled] / 16.0).float().unsqueeze(1)
    y = torch.from_numpy(bundle.target[shuffled])
    test = len(y) // 4
    return Tensors(x[test:], y[test:]), Tensors(x[:test], y[:test])


def _cifar(name: str) -> Callable[[Path], Pair]:
    """CIFAR, whose files are pickles: torchvision first compares their checksums with those it knows."""

    def read(path: Path) -> Pair:
        make = getattr(import_extra("torchvision.datasets", install="torchvision"), name)
        try:
            train, test = (make(path.parent, train=part) for part in (True, False))
        except RuntimeError as error:
            raise ValueError(
                f"{path}: got other files, expected those of {name} ({error})"
            ) from error
        first, second = (images(path, p.data, np.asarray(p.targets)) for p in (train, test))
        return first, second

    return read


SOURCES: dict[str, tuple[Source, ...]] = {
    "mnist": (
        Source("MNIST/raw", read_idx_folder, "https://ossci-datasets.s3.amazonaws.com/mnist/"),
    ),
    "fashion-mnist": (
        Source(
            "FashionMNIST/raw",
            read_idx_folder,
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        ),
    ),
    "kmnist": (
        Source("KMNIST/raw", read_idx_folder, "http://codh.rois.ac.jp/kmnist/dataset/kmnist/"),
        Source("kmnist10k.npz", read_npz),
    ),
    "notmnist": (Source("notmnist10k.npz", read_npz),),
    "cifar10": (Source("cifar-10-batches-py", _cifar("CIFAR10"), "torchvision downloads it"),),
    "cifar100": (
        Source("cifar-100-python", _cifar("CIFAR100"), "torchvision downloads it"),
        Source("cifar100_subset.npz", read_npz),
    ),
}
DATASETS = ("digits", *SOURCES)


def folders(folder: str | Path | None) -> list[Path]:
    """Where files are looked for: this folder alone or, for None, $MAS_EXT_DATA, ./data and ~/data.

    Raises:
        FileNotFoundError: $MAS_EXT_DATA is to be searched and is no folder.
    """
    if folder is not None:
        return [Path(folder)]
    places = [Path("data"), Path("~/data").expanduser()]
    from_env = os.environ.get("MAS_EXT_DATA")
    if from_env:
        if not Path(from_env).is_dir():
            raise FileNotFoundError(
                f"MAS_EXT_DATA: got {from_env!r}, expected a folder that exists"
            )
        places.insert(0, Path(from_env))
    return places


def _colours(image: Any) -> Any:
    """The image in RGB; no lambda, so that the data set can be sent to other processes."""
    return image.convert("RGB")
