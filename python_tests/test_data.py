"""Reading images: small IDX files made here, broken ones, and real ones where they are at hand."""

import gzip
import os
import struct
from pathlib import Path

import pytest
import torch

from mas_ext import data

SHARED = Path(os.environ.get("MAS_EXT_DATA", Path(__file__).parents[2] / "shared" / "data"))


def idx(content: bytes, *sizes: int, magic: int | None = None) -> bytes:
    magic = 0x0800 + len(sizes) if magic is None else magic
    return struct.pack(f">I{len(sizes)}I", magic, *sizes) + content


IMAGES = idx(bytes(range(24)), 2, 3, 4)


def write_mnist(root: Path, zipped: bool) -> None:
    """Six training and four test images of 2 x 3 pixels, the pixel values counting up."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 6), ("t10k", 4)):
        images = idx(bytes(range(6 * count)), count, 2, 3)
        labels = idx(bytes(range(count)), count)
        for name, content in ((f"{part}-images-idx3", images), (f"{part}-labels-idx1", labels)):
            path = raw / f"{name}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(content) if zipped else content)


@pytest.mark.parametrize("zipped", [False, True])
def test_mnist_folder(tmp_path: Path, zipped: bool) -> None:
    write_mnist(tmp_path, zipped)
    for images, count in zip(data.load("mnist", tmp_path), (6, 4), strict=True):
        assert images.y.dtype == torch.int64
        torch.testing.assert_close(
            images.x, torch.arange(6.0 * count).reshape(count, 1, 2, 3) / 255
        )
        assert images.y.tolist() == list(range(count))


def test_read_idx_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "images"
    path.write_bytes(IMAGES)
    pixels = data.read_idx(path, dims=3)
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels, torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "expected a header of 16 bytes, got 0 bytes"),
        (IMAGES[:15], "expected a header of 16 bytes, got 15 bytes"),
        (IMAGES[:-1], "expected 2 x 3 x 4 bytes after the header as it says, got 23"),
        (IMAGES + b"\0", "expected 2 x 3 x 4 bytes after the header as it says, got 25"),
        (idx(b"", 2**31, 2**31, 2**31), "expected 2147483648 x 2147483648 x 2147483648 bytes"),
        (idx(bytes(24), 24), "expected magic number 0x0803, got 0x0801"),
        (idx(bytes(24), 2, 3, 4, magic=0x0D03), "expected magic number 0x0803, got 0x0d03"),
        (gzip.compress(IMAGES), "expected magic number 0x0803, got 0x1f8b08"),
        (b"<!DOCTYPE html><html>", "expected magic number 0x0803, got 0x3c21444f"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_broken_idx(tmp_path: Path, content: bytes, expected: str) -> None:
    for path, written in (
        (tmp_path / "images", content),
        (tmp_path / "images.gz", gzip.compress(content)),
    ):
        path.write_bytes(written)
        with pytest.raises(ValueError, match=f"^{path}: {expected}"):
            data.read_idx(path, dims=3)


@pytest.mark.parametrize("length", range(len(gzip.compress(IMAGES))))
def test_truncated_gzip(tmp_path: Path, length: int) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(IMAGES)[:length])
    with pytest.raises(ValueError, match=f"^{path}: expected a "):
        data.read_idx(path, dims=3)


def test_any_flipped_bit_is_found_or_harmless(tmp_path: Path) -> None:
    whole = gzip.compress(IMAGES)
    path = tmp_path / "images.gz"
    messages = []
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            pixels = data.read_idx(path, dims=3)
        except ValueError as error:
            messages.append(str(error))
        else:
            assert pixels.flatten().tolist() == list(range(24))
    # Harmless at most: flags, time and system in gzip's header, and the last bits before its sum.
    assert len(messages) >= 8 * len(whole) - 8 * 7 - 7
    assert all(message.startswith(f"{path}: expected a ") for message in messages)


def test_as_many_labels_as_images(tmp_path: Path) -> None:
    write_mnist(tmp_path, zipped=False)
    labels = tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    labels.write_bytes(idx(bytes(3), 3))
    with pytest.raises(ValueError, match=f"^{labels}: expected a label for each of the 4 images"):
        data.load("mnist", tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write_mnist(tmp_path, zipped=True)
    missing = tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte.gz"
    missing.unlink()
    with pytest.raises(FileNotFoundError, match=f"^{missing} is missing: get it from https://"):
        data.load("mnist", tmp_path)


def test_search_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, here, env, given = (tmp_path / name for name in ("home", "here", "env", "given"))
    (here / "data").mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("MAS_EXT_DATA", str(env))

    with pytest.raises(FileNotFoundError) as error:
        data.load("mnist")
    for expected in (str(env), "data", str(home / "data"), "https://", "--data", "MAS_EXT_DATA"):
        assert expected in str(error.value)

    # From the last place searched to the first: each hides the ones before it.
    for marker, folder in enumerate((home / "data", here / "data", env)):
        write_mnist(folder, zipped=False)
        labels = folder / "MNIST" / "raw" / "train-labels-idx1-ubyte"
        labels.write_bytes(idx(bytes([marker] * 6), 6))
        assert data.load("mnist")[0].y.tolist() == [marker] * 6

    with pytest.raises(FileNotFoundError, match=f"^no MNIST/raw folder in {given}:"):
        data.load("mnist", given)


def test_digits_are_all_there_and_always_the_same() -> None:
    (train, test), (again, _) = data.load("digits"), data.load("digits")
    assert train.x.shape == (1348, 1, 8, 8)
    assert test.x.shape == (449, 1, 8, 8)
    assert train.x.dtype == torch.float32
    assert train.x.min() == 0
    assert train.x.max() == 1
    assert torch.equal(train.x, again.x)
    assert torch.equal(train.y, again.y)
    # scikit-learn's own count of every digit.
    counted = torch.cat([train.y, test.y]).bincount().tolist()
    assert counted == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_digits_take_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="folder must not be given for the digits"):
        data.load("digits", tmp_path)


def test_unknown_dataset() -> None:
    with pytest.raises(ValueError, match="dataset must be one of digits, mnist, got 'cifar'"):
        data.load("cifar")


def test_a_missing_extra_is_named() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"not_installed.*pip install 'mas-ext\[demo\]'"):
        data.import_extra("not_installed.at.all")


# Real files, where they are at hand. Defined conditionally, so that no test is ever skipped.

if (SHARED / "MNIST").is_dir():

    def test_real_mnist() -> None:
        train, test = data.load("mnist", SHARED)
        assert train.x.shape == (60000, 1, 28, 28)
        assert test.x.shape == (10000, 1, 28, 28)
        # Published: how often each digit occurs, the mean and the deviation of the pixels.
        counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
        assert train.y.bincount().tolist() == counts
        counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
        assert test.y.bincount().tolist() == counts
        assert float(train.x.mean()) == pytest.approx(0.1307, abs=1e-4)
        assert float(train.x.std()) == pytest.approx(0.3081, abs=1e-4)


if (SHARED / "broken-truncated-idx3-ubyte.gz").is_file():

    def test_real_truncated_file() -> None:
        path = SHARED / "broken-truncated-idx3-ubyte.gz"
        with pytest.raises(ValueError, match=f"^{path}: expected a whole gzip file, got a broken"):
            data.read_idx(path, dims=3)
