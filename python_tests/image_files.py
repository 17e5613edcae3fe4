"""Small files of images made for tests, and where the real ones are, if they are at hand."""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path

import numpy as np

SHARED = Path(os.environ.get("MAS_EXT_DATA", Path(__file__).parents[2] / "shared" / "data"))


def idx(content: bytes, *sizes: int, magic: int | None = None) -> bytes:
    magic = 0x0800 + len(sizes) if magic is None else magic
    return struct.pack(f">I{len(sizes)}I", magic, *sizes) + content


def write_idx_folder(raw: Path, zipped: bool = False) -> None:
    """Six training and four test images of 2 x 3 pixels, the pixel values and labels counting up."""
    raw.mkdir(parents=True)
    for part, count in (("train", 6), ("t10k", 4)):
        images = idx(bytes(range(6 * count)), count, 2, 3)
        labels = idx(bytes(range(count)), count)
        for name, content in ((f"{part}-images-idx3", images), (f"{part}-labels-idx1", labels)):
            path = raw / f"{name}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(content) if zipped else content)


def write_npz(path: Path, *shape: int, classes: int = 2, **changed: np.ndarray) -> None:
    """Two training images and one test image of every class, of random bytes of this shape."""
    random, y = np.random.default_rng(0), np.arange(classes, dtype=np.uint8)
    arrays = {
        "x_train": random.integers(0, 256, (2 * classes, *shape), np.uint8),
        "y_train": np.concatenate([y, y]),
        "x_test": random.integers(0, 256, (classes, *shape), np.uint8),
        "y_test": y,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **(arrays | changed))
