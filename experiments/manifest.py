"""The data that results were measured on: files by name and checksum, compared before anything is measured."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Iterable
from pathlib import Path

from mas_ext.compare.options import read_toml
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
    manifest = read_toml(MANIFEST)
    for name in names:
        for file, expected in manifest[name]["sha256"].items():
            path = find(name, file, folder)
            if path is None:
                origin = manifest[name]["origin"]
                raise DataError(f"{file} is missing; it is from {origin}")
            packed = path.read_bytes()
            content = gzip.decompress(packed) if path.suffix == ".gz" else packed
            found = hashlib.sha256(content).hexdigest()
            if found != expected:
                raise DataError(f"{path}: got content of SHA-256 {found}, expected {expected}")


def find(name: str, file: str, folder: str | None) -> Path | None:
    """Where a file of a data set will be read from, plain or as .gz; None if it is missing."""
    places = folders(folder)
    if name == "digits":
        places = [Path(import_extra("sklearn.datasets").__path__[0]) / "data"]
    for place in places:
        sources = [each.path for each in SOURCES.get(name, ()) if (place / each.path).exists()]
        if sources and not file.startswith(sources[0]):
            raise DataError(f"{place / sources[0]}: would be read first, expected only {file}")
        for path in (place / file, place / f"{file}.gz"):
            if path.exists():
                return path
    return None
