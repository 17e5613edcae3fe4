"""Images and labels in files: IDX (as MNIST's) and NumPy's npz. Nothing is ever unpickled.

A file that is damaged, truncated or of another kind raises a ValueError that names it.
"""

from __future__ import annotations

import gzip
import io
import math
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mas_ext.scenarios.tasks import Tensors


def images(path: Path, pixels: npt.NDArray[Any], labels: npt.NDArray[Any]) -> Tensors:
    """Bytes (N, H, W) or (N, H, W, C) as float32 (N, C, H, W) in [0, 1], with their labels (N,)."""
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4):
        raise ValueError(
            f"{path}: got images as {pixels.dtype} of shape {pixels.shape}, expected bytes (N, H, W) or "
            "(N, H, W, C)"
        )
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise ValueError(
            f"{path}: got labels as {labels.dtype} of shape {labels.shape}, expected integers (N,)"
        )
    if len(pixels) != len(labels):
        raise ValueError(
            f"{path}: got {len(labels)} labels, expected one for each of the {len(pixels)} images"
        )
    channels_last = pixels.reshape(*pixels.shape[:3], -1)
    # In one step: a copy in bytes would be one more, and torch may not write to what NumPy read.
    x = torch.from_numpy(channels_last.transpose(0, 3, 1, 2).astype(np.float32, order="C"))
    return Tensors(x.div_(255), torch.from_numpy(labels.astype(np.int64)))


def read_idx_folder(raw: Path) -> tuple[Tensors, Tensors]:
    """The four IDX files of MNIST and data sets in its format, plain or gzip: to train and to test on."""
    train, test = (
        images(
            _plain_or_zipped(raw / f"{part}-labels-idx1-ubyte"),
            read_idx(_plain_or_zipped(raw / f"{part}-images-idx3-ubyte"), dims=3).numpy(),
            read_idx(_plain_or_zipped(raw / f"{part}-labels-idx1-ubyte"), dims=1).numpy(),
        )
        for part in ("train", "t10k")
    )
    return train, test


def read_idx(path: Path, dims: int) -> Tensor:
    """Read an IDX file of unsigned bytes with `dims` dimensions, gzip if its name ends in .gz.

    Layout: magic number 0x0800 + dims, then `dims` sizes, all big-endian uint32, then the bytes.

    Returns:
        A uint8 tensor of those sizes.

    Raises:
        ValueError: the file is anything else.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{path}: got a damaged gzip file, expected a whole one ({error})"
        ) from error

    header = 4 + 4 * dims
    if len(content) < header:
        raise ValueError(f"{path}: got {len(content)} bytes, expected a header of {header} bytes")
    magic, *sizes = (int(number) for number in np.frombuffer(content[:header], dtype=">u4"))
    if magic != 0x0800 + dims:
        raise ValueError(f"{path}: got magic number {magic:#06x}, expected {0x0800 + dims:#06x}")
    if math.prod(sizes) != len(content) - header:
        raise ValueError(
            f"{path}: got {len(content) - header} bytes after the header, expected "
            f"{' x '.join(map(str, sizes))} as it says"
        )
    # A bytearray, because torch warns about memory that it may not write to.
    return torch.from_numpy(np.frombuffer(bytearray(content[header:]), np.uint8)).reshape(sizes)


def read_npz(path: Path) -> tuple[Tensors, Tensors]:
    """x_train, y_train, x_test and y_test of an npz file: to train and to test on."""
    content = io.BytesIO(path.read_bytes())
    train, test = (
        images(path, _array(path, content, f"x_{part}"), _array(path, content, f"y_{part}"))
        for part in ("train", "test")
    )
    return train, test


def _array(path: Path, content: io.BytesIO, name: str) -> npt.NDArray[Any]:
    try:
        with zipfile.ZipFile(content) as archive:
            # All of it first: that compares the checksum, so that what NumPy reads is whole.
            whole = io.BytesIO(archive.read(f"{name}.npy"))
        array: npt.NDArray[Any] = np.load(whole, allow_pickle=False)
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{path}: got no array {name!r} of numbers, expected one ({error})"
        ) from error
    except Exception as error:  # each way to compress has its own, and a broken file may name any
        raise ValueError(
            f"{path}: got a damaged npz file, expected a whole one ({error})"
        ) from error
    return array


def _plain_or_zipped(plain: Path) -> Path:
    zipped = plain.with_name(plain.name + ".gz")
    for path in (plain, zipped):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{zipped} is missing")
