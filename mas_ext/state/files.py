"""Tensors in a file: safetensors, replaced atomically, with a checksum that finds flipped bits."""

from __future__ import annotations

import json
import os
import sys
import zlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mas_ext.state.replacing import replacing

# On Windows a file can't be replaced while it is open.
_KEPT_WHILE_OPEN = sys.platform == "win32"


def _checksum(tensors: Mapping[str, Tensor], about: str) -> str:
    crc = zlib.crc32(about.encode())
    for name in sorted(tensors):
        t = tensors[name]
        crc = zlib.crc32(f"{name} {t.dtype} {tuple(t.shape)}".encode(), crc)
        # As bytes through a view: numpy knows no bfloat16.
        crc = zlib.crc32(t.reshape(-1).view(torch.uint8).numpy().tobytes(), crc)
    return f"{crc:08x}"


def save(
    tensors: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write the tensors; the file that was there before survives until the new one is complete.

    about: JSON for readers without this library, as the file's metadata "mas_ext"; `load` ignores it.

    Raises:
        OSError: the file can't be written; the old one is as it was.
    """
    # Into new memory: a view of one element may claim to be contiguous with any stride.
    kept = {n: torch.empty(t.shape, dtype=t.dtype).copy_(t.detach()) for n, t in tensors.items()}
    text = json.dumps(about or {})
    metadata = {"mas_ext": text, "crc32": _checksum(kept, text)}
    with replacing(path) as new:
        try:
            safetensors.torch.save_file(kept, new, metadata=metadata)
        except SafetensorError as error:
            raise OSError(f"{path}: could not be written ({error})") from error


def load(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the tensors; never runs code from the file.

    A file that is replaced meanwhile is the old one, or the new one; on Windows it can't be replaced meanwhile.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, cut off, damaged or of another kind.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: got what is no regular file, expected safetensors")
    try:
        # By its descriptor: safetensors opens a path more than once.
        with open(path, "rb") as opened, safe_open(_again(opened), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: _own(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: got a damaged file, expected safetensors ({error})") from error
    if "crc32" not in metadata:
        raise ValueError(f"{path}: got no checksum, expected a file that mas_ext wrote")
    if metadata["crc32"] != _checksum(tensors, metadata.get("mas_ext", "")):
        raise ValueError(f"{path}: got a damaged file, its checksum does not fit its content")
    return tensors


def _again(file: BinaryIO) -> str:
    """A path that opens the same file, whatever its own path leads to by now."""
    return file.name if _KEPT_WHILE_OPEN else f"/dev/fd/{file.fileno()}"


def _own(tensor: Tensor) -> Tensor:
    """A tensor that does not keep its file open: safetensors maps the file into memory."""
    return tensor.clone() if _KEPT_WHILE_OPEN else tensor


def encode(content: Mapping[str, Any]) -> Tensor:
    """JSON in a tensor of bytes, for what belongs to a state but is no tensor."""
    return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)


def decode(
    name: str,
    encoded: Tensor | None,
    keys: Collection[str] | None = None,
    upgraded: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> dict[str, Any]:
    """What `encode` was given, or what `upgraded` makes of that.

    Raises:
        ValueError: it is damaged, or has not exactly these keys, if any; `name` is what it is called.
    """
    if encoded is None:
        raise ValueError(f"state: got no {name!r}, expected what mas_ext saved")
    if encoded.dtype != torch.uint8 or encoded.dim() != 1:
        raise ValueError(
            f"state: got a {name!r} of {encoded.dtype}, shape {tuple(encoded.shape)}, expected bytes"
        )
    try:
        content = json.loads(encoded.cpu().numpy().tobytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"state: got a {name!r} that can't be read ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"state: got a {name!r} of {type(content).__name__}, expected a dict")
    content = upgraded(content)
    if keys is not None and set(content) != set(keys):
        raise ValueError(f"state: got a {name!r} with {sorted(content)}, expected {sorted(keys)}")
    return content


def pack(tree: Any) -> dict[str, Tensor]:
    """Nested dicts, lists and tuples of tensors, numbers, strings and None as named tensors, for `save`.

    Raises:
        TypeError: something else is in it.
    """
    tensors: dict[str, Tensor] = {}

    def skeleton(node: Any, path: str) -> Any:
        if isinstance(node, Tensor):
            tensors[path] = node
            return {"tensor": path}
        if isinstance(node, Mapping):
            # As pairs: JSON would make strings of an optimizer's numbers.
            return {"dict": [[key, skeleton(item, f"{path}/{key}")] for key, item in node.items()]}
        if isinstance(node, (list, tuple)):
            kind = "list" if isinstance(node, list) else "tuple"
            return {kind: [skeleton(item, f"{path}/{i}") for i, item in enumerate(node)]}
        if node is None or isinstance(node, (bool, int, float, str)):
            return node
        raise TypeError(f"state, {path}: got {type(node).__name__}, which can't be saved")

    return {"tree": encode({"tree": skeleton(tree, "")}), **tensors}


def unpack(tensors: Mapping[str, Tensor]) -> Any:
    """What `pack` was given; a ValueError for what it can't have been."""

    def grown(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        ((kind, items),) = node.items()
        if kind == "tensor":
            return tensors[items]
        if kind == "dict":
            return {key: grown(item) for key, item in items}
        return (list if kind == "list" else tuple)(grown(item) for item in items)

    tree = decode("tree", tensors.get("tree"), ("tree",))["tree"]
    try:
        return grown(tree)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"state: got a 'tree' that can't be read ({error!r})") from error
