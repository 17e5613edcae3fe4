"""Labelled images: scikit-learn's digits, and MNIST in IDX files. Float32 in [0, 1], (N, C, H, W)."""

from __future__ import annotations

import gzip
import importlib
import math
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from mas_ext.scenarios import Tensors

MNIST_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"

Pair = tuple[Tensors, Tensors]  # to train and to test on


def load(dataset: str, folder: str | Path | None = None) -> Pair:
    """Read the data set called ``dataset``, one of `DATASETS`: samples to train and to test on.

    ``folder`` is where MNIST's files are looked for (see `load_mnist`); the digits need none.
    Raises ValueError for an unknown name or a broken file, FileNotFoundError for missing files,
    ModuleNotFoundError if scikit-learn is needed and not installed.
    """
    if dataset not in DATASETS:
        raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, got {dataset!r}")
    return DATASETS[dataset](folder)


def load_digits(folder: str | Path | None = None) -> Pair:
    """The 1,797 digits of 8 x 8 pixels bundled with scikit-learn; always the same quarter tests.

    Raises ValueError if a ``folder`` is given: nothing would be read from it.
    """
    if folder is not None:
        raise ValueError(
            "folder must not be given for the digits, which come with scikit-learn, "
            f"got {str(folder)!r}; did you mean the data set mnist?"
        )
    bundle = import_extra("sklearn.datasets").load_digits()
    shuffled = np.random.default_rng(0).permutation(len(bundle.target))  # neighbours share a writer
    x = torch.from_numpy(bundle.images[shuffled] / 16.0).float().unsqueeze(1)
    y = torch.from_numpy(bundle.target[shuffled]).long()
    test = len(y) // 4
    return Tensors(x[test:], y[test:]), Tensors(x[:test], y[:test])


def load_mnist(folder: str | Path | None = None) -> Pair:
    """MNIST from IDX files, plain or gzip, in torchvision's layout ``<folder>/MNIST/raw``.

    Only ``folder`` is searched if it is given, else ``$MAS_EXT_DATA``, ``./data`` and ``~/data``.
    Raises FileNotFoundError saying where to get the files, ValueError naming a broken one.
    """
    raw = _find_raw(folder)
    return _read_labelled(raw, "train"), _read_labelled(raw, "t10k")


DATASETS: dict[str, Callable[[str | Path | None], Pair]] = {
    "digits": load_digits,
    "mnist": load_mnist,
}


def read_idx(path: Path, dims: int) -> Tensor:
    """Read an IDX file of unsigned bytes with ``dims`` dimensions, gzip if its name ends in .gz.

    Layout: magic number 0x0800 + dims, then ``dims`` sizes, all big-endian uint32, then the bytes.
    Returns a uint8 tensor of those sizes. Raises ValueError if the file is anything else.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{path}: expected a whole gzip file, got a broken one: {error}"
        ) from error

    header = 4 + 4 * dims
    if len(content) < header:
        raise ValueError(f"{path}: expected a header of {header} bytes, got {len(content)} bytes")
    magic, *sizes = (int(number) for number in np.frombuffer(content[:header], dtype=">u4"))
    if magic != 0x0800 + dims:
        raise ValueError(f"{path}: expected magic number {0x0800 + dims:#06x}, got {magic:#06x}")
    if math.prod(sizes) != len(content) - header:
        raise ValueError(
            f"{path}: expected {' x '.join(map(str, sizes))} bytes after the header as it says, "
            f"got {len(content) - header}"
        )
    # A bytearray, because torch warns about memory that it may not write to.
    return torch.from_numpy(np.frombuffer(bytearray(content[header:]), np.uint8)).reshape(sizes)


def import_extra(module: str) -> ModuleType:
    """Import a module of the extra ``demo``, or raise ModuleNotFoundError naming that extra."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name} is not installed, run: pip install 'mas-ext[demo]'", name=error.name
        ) from error


def _find_raw(folder: str | Path | None) -> Path:
    if folder is not None:
        folders = [Path(folder)]
    else:
        from_env = os.environ.get("MAS_EXT_DATA")
        folders = [Path(from_env)] if from_env else []
        folders += [Path("data"), Path("~/data").expanduser()]
    for candidate in folders:
        if (candidate / "MNIST" / "raw").is_dir():
            return candidate / "MNIST" / "raw"
    raise FileNotFoundError(
        f"no MNIST/raw folder in {', '.join(map(str, folders))}: put the four files of {MNIST_URL} "
        "into DIR/MNIST/raw and give --data DIR or set MAS_EXT_DATA=DIR"
    )


def _read_labelled(raw: Path, part: str) -> Tensors:
    images_path = _find_file(raw / f"{part}-images-idx3-ubyte")
    labels_path = _find_file(raw / f"{part}-labels-idx1-ubyte")
    images, labels = read_idx(images_path, dims=3), read_idx(labels_path, dims=1)
    if len(images) != len(labels):
        raise ValueError(
            f"{labels_path}: expected a label for each of the {len(images)} images in "
            f"{images_path.name}, got {len(labels)}"
        )
    return Tensors(images.unsqueeze(1).float() / 255.0, labels)


def _find_file(plain: Path) -> Path:
    zipped = plain.with_name(plain.name + ".gz")
    for path in (plain, zipped):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{zipped} is missing: get it from {MNIST_URL}{zipped.name}")
