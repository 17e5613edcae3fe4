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

# Bytes that are always unpacked, and how many times its own size a file may unpack to beyond them.
_ALWAYS_TAKEN, _MOST_PACKED = 1 << 26, 200


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
    header = 4 + 4 * dims
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            start = file.read(header)
            if len(start) < header:
                raise ValueError(
                    f"{path}: got {len(start)} bytes, expected a header of {header} bytes"
                )
            magic, *sizes = (int(number) for number in np.frombuffer(start, dtype=">u4"))
            if magic != 0x0800 + dims:
                raise ValueError(
                    f"{path}: got magic number {magic:#06x}, expected {0x0800 + dims:#06x}"
                )
            count = math.prod(sizes)
            _check_size(path, count)
            content = file.read(count + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{path}: got a damaged gzip file, expected a whole one ({error})"
        ) from error
    if len(content) != count:
        got = f"more than {count}" if len(content) > count else len(content)
        raise ValueError(
            f"{path}: got {got} bytes after the header, expected {' x '.join(map(str, sizes))} as it says"
        )
    # A bytearray, because torch warns about memory that it may not write to.
    return torch.from_numpy(np.frombuffer(bytearray(content), np.uint8)).reshape(sizes)


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
            entry = archive.getinfo(f"{name}.npy")
            _check_size(path, entry.file_size)
            # All of it first: that compares the checksum, so that what NumPy reads is whole.
            whole = io.BytesIO(archive.read(entry))
        _check_length(whole, entry.file_size)
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


def _check_length(whole: io.BytesIO, size: int) -> None:
    """Raise a ValueError for an array that says it has other numbers than there are, before it takes memory."""
    version = np.lib.format.read_magic(whole)
    read = np.lib.format.read_array_header_1_0
    shape, _, dtype = (read if version == (1, 0) else np.lib.format.read_array_header_2_0)(whole)
    if math.prod(shape) * dtype.itemsize != size - whole.tell():
        raise ValueError(f"shape {shape} of {dtype} in {size - whole.tell()} bytes")
    whole.seek(0)


def _check_size(path: Path, count: int) -> None:
    """Raise a ValueError for a file that says it unpacks to far more than images do, before it takes memory."""
    most = max(_ALWAYS_TAKEN, _MOST_PACKED * path.stat().st_size)
    if count > most:
        raise ValueError(f"{path}: got a size of {count} bytes, expected at most {most} unpacked")


def _plain_or_zipped(plain: Path) -> Path:
    zipped = plain.with_name(plain.name + ".gz")
    for path in (plain, zipped):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{zipped} is missing")
