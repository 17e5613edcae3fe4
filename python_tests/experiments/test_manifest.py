"""Data that experiments read: each file is named, and a missing or a different one is refused."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments import EXPERIMENTS, Experiment, Page, Results, manifest, reproduce
from experiments.manifest import DataError, check_data
from mas_ext.comparison.cells import Cell, Found
from mas_ext.comparison.options import read_toml

FILES = {"MNIST/raw/train": b"images", "MNIST/raw/test": b"other images"}


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with small files, one of them packed, of which there is a manifest."""
    folder = tmp_path / "data"
    (folder / "MNIST" / "raw").mkdir(parents=True)
    (folder / "MNIST/raw/train").write_bytes(FILES["MNIST/raw/train"])
    (folder / "MNIST/raw/test.gz").write_bytes(gzip.compress(FILES["MNIST/raw/test"]))
    (folder / "kmnist10k.npz").write_bytes(b"letters")
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
    lines = ['mnist.origin = "a museum"', 'kmnist.origin = "a shop"', "[mnist.sha256]"]
    lines += [f'"{name}" = "{each}"' for name, each in sums.items()]
    own = hashlib.sha256(b"letters").hexdigest()
    lines += ["[kmnist.sha256]", f'"kmnist10k.npz" = "{own}"']
    path = tmp_path / "data.toml"
    path.write_text("\n".join(lines))
    monkeypatch.setattr(manifest, "MANIFEST", path)
    return folder


def test_whole_data(data: Path) -> None:
    check_data(["mnist", "kmnist"], str(data))


def test_a_missing_file(data: Path) -> None:
    (data / "MNIST/raw/test.gz").unlink()
    with pytest.raises(DataError, match=r"^MNIST/raw/test is not in .*/data; it is from a museum$"):
        check_data(["kmnist", "mnist"], str(data))
    check_data(["kmnist"], str(data))


def test_a_changed_file(data: Path) -> None:
    content = bytearray(FILES["MNIST/raw/train"])
    content[2] ^= 1
    (data / "MNIST/raw/train").write_bytes(content)
    with pytest.raises(
        DataError, match=r"data/MNIST/raw/train: got content of SHA-256 \w{64}, exp"
    ):
        check_data(["mnist"], str(data))


def test_what_is_packed_otherwise_has_the_same_content(data: Path) -> None:
    (data / "MNIST/raw/test.gz").write_bytes(gzip.compress(FILES["MNIST/raw/test"], 1))
    check_data(["mnist"], str(data))
    # The plain file is the one that would be read.
    (data / "MNIST/raw/test").write_bytes(b"else")
    with pytest.raises(DataError, match="MNIST/raw/test: got content"):
        check_data(["mnist"], str(data))


def test_other_data_that_would_be_read_first(data: Path) -> None:
    (data / "KMNIST/raw").mkdir(parents=True)
    with pytest.raises(
        DataError, match=r"KMNIST/raw: would be read first, expected only kmnist10k.npz"
    ):
        check_data(["kmnist"], str(data))


class Copy(Experiment):
    """Measures a file."""

    title = "Copy"

    def data_sets(self) -> tuple[str, ...]:
        return ("kmnist",)

    def quick(self) -> Copy:
        return self

    def protocol(self) -> dict[str, Any]:
        return {}

    def plan(self, results: Results) -> Iterator[Cell]:
        yield {"file": "kmnist10k.npz"}

    def measure(self, cell: Cell) -> Found:
        return {"size": len((Path(str(self.data)) / cell["file"]).read_bytes())}

    def show(self, results: Results) -> Page:
        return Page(str(results.where()[0][1]["size"]))


def test_nothing_is_measured_on_other_data(data: Path, tmp_path: Path) -> None:
    experiment, path = Copy(data=str(data)), data / "kmnist10k.npz"
    path.write_bytes(b"longer letters")
    with pytest.raises(DataError, match=r"kmnist10k\.npz"):
        reproduce(experiment, "copy", tmp_path)
    assert not (tmp_path / "copy.json").exists()
    path.write_bytes(b"letters")
    assert reproduce(experiment, "copy", tmp_path).text == "7"
    # What was measured needs no data.
    path.unlink()
    assert reproduce(experiment, "copy", tmp_path).text == "7"


def test_digits_are_those_of_the_manifest() -> None:
    check_data(["digits"], None)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_data_set_is_in_the_manifest(name: str) -> None:
    """With origin, licence and checksums; what is quick needs no folder."""
    known = read_toml(manifest.MANIFEST)
    for data_set in EXPERIMENTS[name].data_sets():
        assert known[data_set]["origin"]
        assert known[data_set]["licence"]
        assert all(len(each) == 64 for each in known[data_set]["sha256"].values())
    assert set(EXPERIMENTS[name].quick().data_sets()) <= {"digits"}
