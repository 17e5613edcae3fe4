"""Images in files: small ones made here, broken ones, and a real broken one where it is at hand."""

import gzip
import io
import pickle
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import SHARED, idx, write_idx_folder, write_npz

from mas_ext.scenarios import files as data_files

IMAGES = idx(bytes(range(24)), 2, 3, 4)


# IDX


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_folder(tmp_path: Path, zipped: bool) -> None:
    raw = tmp_path / "raw"
    write_idx_folder(raw, zipped)
    for images, count in zip(data_files.read_idx_folder(raw), (6, 4), strict=True):
        assert images.y.dtype == torch.int64
        assert images.y.tolist() == list(range(count))
        torch.testing.assert_close(
            images.x, torch.arange(6.0 * count).reshape(count, 1, 2, 3) / 255
        )


def test_read_idx_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "images"
    path.write_bytes(IMAGES)
    pixels = data_files.read_idx(path, dims=3)
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels, torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "got 0 bytes, expected a header of 16 bytes"),
        (IMAGES[:15], "got 15 bytes, expected a header of 16 bytes"),
        (IMAGES[:-1], "got 23 bytes after the header, expected 2 x 3 x 4 as"),
        (IMAGES + b"\0", "got more than 24 bytes after the header, expected 2 x 3 x 4 as"),
        (
            idx(b"", 2**31, 2**31, 2**31),
            f"got a size of {2**93} bytes, expected at most {2**26} unpacked",
        ),
        (idx(bytes(24), 24), "got magic number 0x0801, expected 0x0803"),
        (idx(bytes(24), 2, 3, 4, magic=0x0D03), "got magic number 0x0d03, expected 0x0803"),
        (gzip.compress(IMAGES), "got magic number 0x1f8b08"),
        (b"<!DOCTYPE html><html>", "got magic number 0x3c21444f"),
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
            data_files.read_idx(path, dims=3)


@pytest.mark.parametrize("length", range(len(gzip.compress(IMAGES))))
def test_truncated_gzip(tmp_path: Path, length: int) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(IMAGES)[:length])
    with pytest.raises(ValueError, match=f"^{path}: got "):
        data_files.read_idx(path, dims=3)


def test_any_flipped_bit_is_found_or_harmless(tmp_path: Path) -> None:
    whole = gzip.compress(IMAGES)
    path = tmp_path / "images.gz"
    messages = []
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            pixels = data_files.read_idx(path, dims=3)
        except ValueError as error:
            messages.append(str(error))
        else:
            assert pixels.flatten().tolist() == list(range(24))
    # Harmless at most: flags, time and system in gzip's header, and the last bits before its sum.
    assert len(messages) >= 8 * len(whole) - 8 * 7 - 7
    assert all(message.startswith(f"{path}: got ") for message in messages)


def test_as_many_labels_as_images(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    write_idx_folder(raw)
    labels = raw / "t10k-labels-idx1-ubyte"
    labels.write_bytes(idx(bytes(3), 3))
    with pytest.raises(
        ValueError, match=f"^{labels}: got 3 labels, expected one for each of the 4 images"
    ):
        data_files.read_idx_folder(raw)


def test_a_bomb_is_refused_before_it_takes_memory(tmp_path: Path) -> None:
    """A file of 100 KB that unpacks to 100 MB, as IDX and as npz."""
    sizes = (1000, 320, 320)
    bomb, npz = tmp_path / "images.gz", tmp_path / "images.npz"
    bomb.write_bytes(gzip.compress(idx(bytes(1000 * 320 * 320), *sizes)))
    arrays = {"x_train": np.zeros(sizes, np.uint8), "y_train": np.zeros(1000, np.uint8)}
    np.savez_compressed(npz, **arrays)
    for path, read in (
        (bomb, lambda p: data_files.read_idx(p, dims=3)),
        (npz, data_files.read_npz),
    ):
        tracemalloc.start()
        with pytest.raises(ValueError, match=rf"^{path}: got .*a size of 102400"):
            read(path)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2**22


def test_an_array_that_says_it_is_larger(tmp_path: Path) -> None:
    path = tmp_path / "images.npz"
    whole = io.BytesIO()
    np.save(whole, np.zeros((4, 2, 3), np.uint8))
    wrong = (
        whole.getvalue()
        .replace(b"(4, 2, 3)", b"(4" + 5 * b"0" + b", 2, 3)")
        .replace(5 * b" ", b"", 1)
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x_train.npy", wrong)
    with pytest.raises(
        ValueError, match=f"^{path}: got no array 'x_train' of numbers.*in 24 bytes"
    ):
        data_files.read_npz(path)


# npz


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 3)])
def test_npz(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = tmp_path / "images.npz"
    write_npz(path, *shape, classes=4)
    for images, part in zip(data_files.read_npz(path), ("train", "test"), strict=True):
        pixels = np.load(path)[f"x_{part}"].reshape(-1, 2, 3, 1 if len(shape) == 2 else 3)
        assert images.x.dtype == torch.float32
        assert images.x.shape == (len(pixels), pixels.shape[3], 2, 3)
        for n, row, column, channel in np.ndindex(*pixels.shape):
            value = pixels[n, row, column, channel] / 255
            assert images.x[n, channel, row, column].item() == pytest.approx(value)
        assert images.y.tolist() == np.load(path)[f"y_{part}"].tolist()


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"x_train": np.zeros((4, 2, 3))}, "images as float64 of shape .*, expected bytes"),
        ({"x_test": np.zeros((2, 6), np.uint8)}, "images as uint8 of shape .*, expected bytes"),
        ({"y_train": np.zeros(4)}, "labels as float64 of shape .*, expected integers"),
        ({"y_test": np.zeros((2, 1), int)}, "labels as int64 of shape .*, expected integers"),
        ({"y_test": np.zeros(3, int)}, "3 labels, expected one for each of the 2 images"),
        ({"y_test": np.array([0, "a"], dtype=object)}, "no array 'y_test' of numbers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_npz_of_something_else(tmp_path: Path, changed: dict, expected: str) -> None:
    path = tmp_path / "images.npz"
    write_npz(path, 2, 3, **changed)
    with pytest.raises(ValueError, match=f"^{path}: got {expected}"):
        data_files.read_npz(path)


def test_a_missing_array_is_named(tmp_path: Path) -> None:
    path = tmp_path / "images.npz"
    np.savez(path, x_train=np.zeros((1, 2, 3), np.uint8))
    with pytest.raises(ValueError, match=f"^{path}: got no array 'y_train' of numbers"):
        data_files.read_npz(path)


class Bomb:
    """What an evil pickle does when it is read."""

    def __reduce__(self) -> tuple:
        return pytest.fail, ("the file was unpickled",)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    content = io.BytesIO()
    np.save(content, np.array([Bomb()], dtype=object), allow_pickle=True)
    for name, member in (("array", content.getvalue()), ("bare", pickle.dumps(Bomb()))):
        path = tmp_path / f"{name}.npz"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x_train.npy", member)
        with pytest.raises(ValueError, match=f"^{path}: got no array 'x_train' of numbers"):
            data_files.read_npz(path)
    path = tmp_path / "pickle.npz"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=f"^{path}: got a damaged npz file"):
        data_files.read_npz(path)


def test_any_flipped_bit_or_cut_of_an_npz_is_found_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "images.npz"
    write_npz(path, 2, 3)
    whole, expected = path.read_bytes(), data_files.read_npz(path)
    broken = []
    for bit in range(0, 8 * len(whole), 13):  # 13 and 8 have no factor in common
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        broken.append(bytes(flipped))
    broken += [whole[:length] for length in range(0, len(whole), 7)]
    messages = []
    for content in broken:
        path.write_bytes(content)
        try:
            read = data_files.read_npz(path)
        except ValueError as error:
            messages.append(str(error))
        else:
            for images, right in zip(read, expected, strict=True):
                assert torch.equal(images.x, right.x)
                assert torch.equal(images.y, right.y)
    # Harmless: times, systems, versions and rights, which zip keeps for each of the four arrays.
    assert len(messages) > len(broken) / 2
    assert all(message.startswith(f"{path}: got ") for message in messages)


# A real file, where it is at hand. Defined conditionally, so that no test is ever skipped.

if (SHARED / "broken-truncated-idx3-ubyte.gz").is_file():

    def test_real_truncated_file() -> None:
        path = SHARED / "broken-truncated-idx3-ubyte.gz"
        with pytest.raises(ValueError, match=f"^{path}: got a damaged gzip file"):
            data_files.read_idx(path, dims=3)
