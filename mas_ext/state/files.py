"""Tensors in a file: safetensors, replaced atomically, with a checksum that finds flipped bits."""

from __future__ import annotations

import json
import os
import uuid
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


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
    path = Path(path)
    # Into new memory: a view of one element may claim to be contiguous with any stride.
    kept = {n: torch.empty(t.shape, dtype=t.dtype).copy_(t.detach()) for n, t in tensors.items()}
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with open(temporary, "xb") as file:
        mode = os.fstat(file.fileno()).st_mode
    try:
        text = json.dumps(about or {})
        metadata = {"mas_ext": text, "crc32": _checksum(kept, text)}
        safetensors.torch.save_file(kept, temporary, metadata=metadata)
        os.chmod(temporary, mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(f"{path}: could not be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the tensors; never runs code from the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, cut off, damaged or of another kind.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: got a damaged file, expected safetensors ({error})") from error
    if "crc32" not in metadata:
        raise ValueError(f"{path}: got no checksum, expected a file that mas_ext wrote")
    if metadata["crc32"] != _checksum(tensors, metadata.get("mas_ext", "")):
        raise ValueError(f"{path}: got a damaged file, its checksum does not fit its content")
    return tensors


def encode(content: Mapping[str, Any]) -> Tensor:
    """JSON in a tensor of bytes, for what belongs to a state but is no tensor."""
    return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)


def decode(
    name: str, encoded: Tensor | None, keys: Collection[str] | None = None
) -> dict[str, Any]:
    """What `encode` was given; a ValueError that calls it `name` unless it has exactly these keys, if any."""
    if encoded is None:
        raise ValueError(f"state: got no {name!r}, expected what mas_ext saved")
    try:
        content = json.loads(bytes(encoded.tolist()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"state: got a {name!r} that can't be read ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"state: got a {name!r} of {type(content).__name__}, expected a dict")
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
    """What `pack` was given."""

    def grown(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        ((kind, items),) = node.items()
        if kind == "tensor":
            return tensors[items]
        if kind == "dict":
            return {key: grown(item) for key, item in items}
        return (list if kind == "list" else tuple)(grown(item) for item in items)

    return grown(decode("tree", tensors.get("tree"), ("tree",))["tree"])
