"""The implementations of the kernels that tests compare: reference, CPU, CUDA sources on CPU threads, and
CUDA on a GPU.
"""

from __future__ import annotations

import importlib.util
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mas_ext.kernels import native

FOLDER = Path(os.environ.get("MAS_EXT_EMULATED", Path(__file__).parents[1] / "build" / "emulated"))
SANITIZED = "sanitized" in FOLDER.name


def load_emulated() -> Any:
    (path,) = FOLDER.glob("_C_emulated*.so")
    spec = importlib.util.spec_from_file_location("_C_emulated", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


EMULATED = load_emulated()


class Backend(NamedTuple):
    """What runs the kernels: the operators' last argument, and the device of the tensors."""

    native: bool
    device: str


def choose(name: str, monkeypatch: pytest.MonkeyPatch) -> Backend:
    monkeypatch.setattr(native, "_recent", [])
    if name == "emulated":
        monkeypatch.setattr(native, "_C", EMULATED)
        monkeypatch.setattr(
            native, "_device_kernels", lambda device: (EMULATED.cuda, 0, nullcontext())
        )
    elif name == "cpu" and SANITIZED:
        monkeypatch.setattr(native, "_C", EMULATED)
    return Backend(name != "reference", "cuda" if name == "cuda" else "cpu")
