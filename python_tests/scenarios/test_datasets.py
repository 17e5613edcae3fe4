"""Data sets by name: folders made here, a stand-in for torchvision, and real files where they are at hand."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from image_files import SHARED, idx, write_idx_folder, write_npz

from mas_ext.scenarios import datasets as data


@pytest.mark.parametrize(
    ("dataset", "folder"),
    [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST"), ("kmnist", "KMNIST")],
)
def test_idx_folders(tmp_path: Path, dataset: str, folder: str) -> None:
    write_idx_folder(tmp_path / folder / "raw", zipped=True)
    train, test = data.load_dataset(dataset, tmp_path)
    assert train.x.flatten().tolist() == pytest.approx([i / 255 for i in range(36)])
    assert train.y.tolist() == [0, 1, 2, 3, 4, 5]
    assert test.y.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("dataset", "file"),
    [
        ("kmnist", "kmnist10k.npz"),
        ("notmnist", "notmnist10k.npz"),
        ("cifar100", "cifar100_subset.npz"),
    ],
)
def test_npz_files(tmp_path: Path, dataset: str, file: str) -> None:
    write_npz(tmp_path / file, 4, 4, 3)
    train, test = data.load_dataset(dataset, tmp_path)
    pixels = np.load(tmp_path / file)["x_test"]
    torch.testing.assert_close(test.x, torch.tensor(pixels).permute(0, 3, 1, 2) / 255)
    assert train.y.tolist() == [0, 1, 0, 1]


def test_the_full_data_set_comes_before_its_extract(tmp_path: Path) -> None:
    write_npz(tmp_path / "kmnist10k.npz", 28, 28)
    write_idx_folder(tmp_path / "KMNIST" / "raw")
    assert data.load_dataset("kmnist", tmp_path)[0].x.shape == (6, 1, 2, 3)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write_idx_folder(tmp_path / "MNIST" / "raw", zipped=True)
    missing = tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte.gz"
    missing.unlink()
    with pytest.raises(FileNotFoundError, match=f"^{missing} is missing: get it from https://"):
        data.load_dataset("mnist", tmp_path)


def test_search_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, here, env, given = (tmp_path / name for name in ("home", "here", "env", "given"))
    (here / "data").mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("MAS_EXT_DATA", str(env))
    env.mkdir()

    with pytest.raises(FileNotFoundError) as error:
        data.load_dataset("mnist")
    for expected in (str(env), "data", str(home / "data"), "https://", "--data", "MAS_EXT_DATA"):
        assert expected in str(error.value)

    # From the last place searched to the first: each hides the ones before it.
    for marker, folder in enumerate((home / "data", here / "data", env)):
        write_idx_folder(folder / "MNIST" / "raw")
        labels = folder / "MNIST" / "raw" / "train-labels-idx1-ubyte"
        labels.write_bytes(idx(bytes([marker] * 6), 6))
        assert data.load_dataset("mnist")[0].y.tolist() == [marker] * 6

    with pytest.raises(FileNotFoundError, match=f"^mnist is not in {given}: put MNIST/raw"):
        data.load_dataset("mnist", given)


def test_a_folder_of_the_environment_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not passed over: data of another folder would be taken for it."""
    monkeypatch.chdir(tmp_path)
    write_idx_folder(tmp_path / "data" / "MNIST" / "raw")
    (tmp_path / "file").touch()
    for wrong in (tmp_path / "dta", tmp_path / "file"):
        monkeypatch.setenv("MAS_EXT_DATA", str(wrong))
        with pytest.raises(
            FileNotFoundError, match=f"^MAS_EXT_DATA: got '{wrong}', expected a fol"
        ):
            data.load_dataset("mnist")
        assert data.load_dataset("mnist", tmp_path / "data")[0].x.shape == (6, 1, 2, 3)
        data.load_dataset("digits")
    monkeypatch.setenv("MAS_EXT_DATA", "")
    assert data.load_dataset("mnist")[0].x.shape == (6, 1, 2, 3)


def test_digits_are_all_there_and_always_the_same() -> None:
    (train, test), (again, _) = data.load_dataset("digits"), data.load_dataset("digits")
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
    with pytest.raises(ValueError, match=r"folder: got .* for the digits, expected none"):
        data.load_dataset("digits", tmp_path)


def test_unknown_dataset() -> None:
    with pytest.raises(ValueError, match="dataset: got 'kmnits', did you mean 'kmnist'"):
        data.load_dataset("kmnits")
    with pytest.raises(ValueError, match="got 'x', choose from digits, mnist, fashion-"):
        data.load_dataset("x")


def test_a_missing_extra_is_named() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"not_installed.*pip install 'mas-ext\[demo\]'"):
        data.import_extra("not_installed.at.all")


# torchvision, played by a stand-in: it isn't needed for anything else here


class Picture:
    """A grey image that knows what was done to it."""

    def __init__(self, *done: str) -> None:
        self.done = done

    def convert(self, mode: str) -> "Picture":
        return Picture(*self.done, mode)


class Made:
    """What data sets of torchvision have in common."""

    def __init__(self, root, transform=None, **part) -> None:
        if not Path(root).is_dir():
            raise RuntimeError("Dataset not found or corrupted.")
        self.root, self.transform, self.part = root, transform, part

    def __getitem__(self, i: int) -> tuple:
        return self.transform(Picture()), i


class CIFAR100(Made):
    def __init__(self, root, train=True, transform=None) -> None:
        super().__init__(root, transform, train=train)
        self.data = np.full((4, 32, 32, 3), 51 if train else 255, np.uint8)
        self.targets = [3, 1, 99, 0]


class Flowers102(Made):
    def __init__(self, root, split="train", transform=None) -> None:
        super().__init__(root, transform, split=split)


class SUN397(Made):
    def __init__(self, root, transform=None) -> None:
        super().__init__(root, transform)


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(name: str) -> Callable:
        return lambda *size: lambda picture: Picture(*picture.done, name, *size)

    def compose(steps: list[Callable]) -> Callable:
        def run(picture: Picture) -> Picture:
            for step in steps:
                picture = step(picture)
            return picture

        return run

    package = ModuleType("torchvision")
    package.datasets, package.transforms = ModuleType("datasets"), ModuleType("transforms")
    for made in (CIFAR100, Flowers102, SUN397):
        setattr(package.datasets, made.__name__, made)
    package.transforms.Compose = compose
    for name in ("Resize", "CenterCrop", "ToTensor"):
        setattr(package.transforms, name, step(name))
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", package.datasets)
    monkeypatch.setitem(sys.modules, "torchvision.transforms", package.transforms)


@pytest.mark.usefixtures("torchvision")
def test_parts_and_images_of_torchvision(tmp_path: Path) -> None:
    train, test = data.torchvision_dataset("CIFAR100", tmp_path, 64)
    assert (train.part, test.part) == ({"train": True}, {"train": False})
    assert train.root == tmp_path
    done = ("RGB", "Resize", 64, "CenterCrop", 64, "ToTensor")
    assert train[0][0].done == done
    assert test[0][0].done == done
    train, test = data.torchvision_dataset("Flowers102", tmp_path, 64, splits=("trainval", "test"))
    assert (train.part, test.part) == ({"split": "trainval"}, {"split": "test"})


@pytest.mark.usefixtures("torchvision")
def test_what_torchvision_has_not(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="got 'Flowers103', which torchvision lacks, did you mean 'Flowers102'"
    ):
        data.torchvision_dataset("Flowers103", tmp_path, 64)
    with pytest.raises(ValueError, match="got 'SUN397', expected a data set with parts"):
        data.torchvision_dataset("SUN397", tmp_path, 64)
    missing = tmp_path / "missing"
    with pytest.raises(FileNotFoundError, match=f"^Flowers102 is not whole in {missing}: Dataset"):
        data.torchvision_dataset("Flowers102", missing, 64)


@pytest.mark.usefixtures("torchvision")
def test_cifars_pickles_are_left_to_torchvision(tmp_path: Path) -> None:
    (tmp_path / "cifar-100-python").mkdir()
    train, test = data.load_dataset("cifar100", tmp_path)
    assert torch.equal(train.x, torch.full((4, 3, 32, 32), 51 / 255))
    assert torch.equal(test.x, torch.ones(4, 3, 32, 32))
    assert train.y.tolist() == [3, 1, 99, 0]


def test_cifars_pickles_are_not_read_without_torchvision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(ModuleNotFoundError, match="run: pip install torchvision"):
        data.load_dataset("cifar10", tmp_path)


# Real files, where they are at hand. Defined conditionally, so that no test is ever skipped.

if (SHARED / "MNIST").is_dir():

    def test_real_mnist() -> None:
        train, test = data.load_dataset("mnist", SHARED)
        assert train.x.shape == (60000, 1, 28, 28)
        assert test.x.shape == (10000, 1, 28, 28)
        # Published: how often each digit occurs, the mean and the deviation of the pixels.
        counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
        assert train.y.bincount().tolist() == counts
        counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
        assert test.y.bincount().tolist() == counts
        assert float(train.x.mean()) == pytest.approx(0.1307, abs=1e-4)
        assert float(train.x.std()) == pytest.approx(0.3081, abs=1e-4)


if (SHARED / "FashionMNIST").is_dir():

    def test_real_fashion() -> None:
        train, test = data.load_dataset("fashion-mnist", SHARED)
        assert train.x.shape == (60000, 1, 28, 28)
        # Published: as many of every kind, the mean and the deviation of the pixels.
        assert train.y.bincount().tolist() == [6000] * 10
        assert test.y.bincount().tolist() == [1000] * 10
        assert float(train.x.mean()) == pytest.approx(0.2860, abs=1e-4)
        assert float(train.x.std()) == pytest.approx(0.3530, abs=1e-4)


if (SHARED / "kmnist10k.npz").is_file():

    @pytest.mark.parametrize(
        ("dataset", "counts", "shape"),
        [
            ("kmnist", (8000, 2000), (1, 28, 28)),
            ("notmnist", (8000, 2000), (1, 28, 28)),
            ("cifar100", (16000, 4000), (3, 32, 32)),
        ],
    )
    def test_real_npz(dataset: str, counts: tuple[int, int], shape: tuple[int, ...]) -> None:
        for images, count in zip(data.load_dataset(dataset, SHARED), counts, strict=True):
            assert images.x.shape == (count, *shape)
            assert images.x.min() == 0
            assert images.x.max() == 1
            assert images.y.unique().tolist() == list(range(100 if dataset == "cifar100" else 10))
