"""What reads files, each as a function of any bytes: it succeeds, or raises the errors that are documented.

Inputs that begin with "{" are trees in JSON, from which the file, the state or the directory is made, so that
mutations reach what a checksum or a length would hide.
"""

from __future__ import annotations

import json
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from typing import Any
from unittest import mock

import safetensors.torch
import torch
from torch import Tensor, nn

from mas_ext import FusedMASPenalty
from mas_ext.comparison.options import Config, _toml, read_toml
from mas_ext.comparison.report import page, written
from mas_ext.comparison.results import Findings
from mas_ext.scenarios.files import read_idx, read_npz
from mas_ext.state import files

# Of a run directory, what the "run" tree may hold.
RUN_FILES = (
    "config.toml",
    "environment.json",
    "lam.json",
    "metrics.jsonl",
    "mas-seed0/result.json",
    "mas-seed0/confusion.csv",
    "mas-seed0/checkpoint.safetensors",
)


@contextmanager
def documented(*errors: type[Exception]) -> Iterator[None]:
    """Nothing but these errors, each with a message."""
    try:
        yield
    except errors as error:
        if not str(error).strip("'\" "):
            raise AssertionError("an error without a message") from error


def tree_of(data: bytes) -> dict[str, Any] | None:
    """The JSON that the input is, None where it is none."""
    if data[:1] != b"{":
        return None
    with suppress(ValueError, RecursionError):
        found: dict[str, Any] = json.loads(data)
        return found
    return None


def tensor_of(node: Any) -> Tensor:
    """A tensor from [dtype, shape, numbers], where numbers are repeated; of anything else as JSON in bytes."""
    with suppress(
        TypeError, ValueError, AttributeError, RuntimeError, OverflowError, ZeroDivisionError
    ):
        dtype, shape, numbers = node
        if all(type(size) is int for size in shape) and prod(shape) <= 4096:
            values = torch.tensor(numbers, dtype=torch.float64)
            return (
                values.repeat(prod(shape) // len(values) + 1)[: prod(shape)]
                .to(getattr(torch, dtype))
                .reshape(shape)
            )
    return files.encode(node)


class Held(nn.Module):
    """Two parameters, one of them of half the precision."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(2, 3))
        self.b = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.a.T + self.b


def state(data: bytes) -> None:
    """`FusedMASPenalty.load` and `load_state_dict`, whatever the checksum says."""
    checksum = files._checksum

    def any_checksum(tensors: dict[str, Tensor], about: str) -> str:
        checksum(tensors, about)
        return "any"

    tree = tree_of(data)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder, "state.safetensors")
        if tree is None:
            path.write_bytes(data)
        else:
            tensors = {name: tensor_of(node) for name, node in tree.items()}
            with documented(ValueError, KeyError):
                FusedMASPenalty(Held()).load_state_dict(tensors)
            try:
                safetensors.torch.save_file(tensors, path, metadata={"crc32": "any"})
            except (ValueError, KeyError, RuntimeError, safetensors.SafetensorError):
                return  # what no such file can hold
        with mock.patch.object(files, "_checksum", any_checksum):
            with documented(ValueError):
                files.unpack(files.load(path))
            with documented(ValueError, KeyError):
                penalty = FusedMASPenalty.load(path, Held())
                penalty()
                penalty.load_state_dict(penalty.state_dict())


def idx(data: bytes) -> None:
    """`read_idx`, of images and labels, plain and gzip."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("plain", "zipped.gz"):
            path = Path(folder, name)
            path.write_bytes(data)
            for dims in (1, 3):
                with documented(ValueError):
                    assert read_idx(path, dims).dim() == dims


def npz(data: bytes) -> None:
    """`read_npz`; what is no zip file is put into one as each of its arrays."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "images.npz")
        if data[:2] == b"PK":
            path.write_bytes(data)
        else:
            with zipfile.ZipFile(path, "w") as archive:
                for name in ("x_train", "y_train", "x_test", "y_test"):
                    archive.writestr(f"{name}.npy", data)
        with documented(ValueError):
            for images in read_npz(path):
                assert images.x.dim() == 4


def toml_of(tree: dict[str, Any]) -> str:
    """The tree as TOML."""
    return "".join(f"{_toml(str(name))} = {_toml(value)}\n" for name, value in tree.items())


def toml(data: bytes) -> None:
    """`Config.read` of a file; what it takes comes back from what it writes."""
    tree = tree_of(data)
    text = data if tree is None else toml_of(tree).encode(errors="surrogatepass")
    if b":" in text:
        return  # module:function imports what it names, and calls it
    with tempfile.TemporaryDirectory() as folder, documented(ValueError):
        path = Path(folder, "config.toml")
        path.write_bytes(text)
        config = Config.read(read_toml(path))
        path.write_text(config.toml(), encoding="utf-8")
        assert Config.read(read_toml(path)).values() == config.values()


def run(data: bytes) -> None:
    """`Findings.read` of a directory, and all that a report tells of it but pictures."""
    tree = tree_of(data)
    if tree is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in RUN_FILES:
            if name in tree:
                path = Path(folder, name)
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(text_of(name, tree[name]).encode(errors="surrogatepass"))
        with documented(ValueError, FileNotFoundError):
            found = Findings.read(folder)
            for _ in written(found, ["csv", "latex", "markdown"], {}):
                pass
            page(found, {})
            for learned in found.learned.values():
                for each in learned:
                    each.layers()


def text_of(name: str, content: Any) -> str:
    """A file's text from a string, or from what it holds."""
    if isinstance(content, str):
        return content
    if name.endswith(".toml") and isinstance(content, dict):
        return toml_of(content)
    if name.endswith(".jsonl") and isinstance(content, list):
        return "".join(json.dumps(line) + "\n" for line in content)
    return json.dumps(content)


TARGETS: dict[str, Callable[[bytes], None]] = {
    each.__name__: each for each in (state, idx, npz, toml, run)
}
