"""Modules that are in no package, from their files."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any


def loaded(name: str, path: Path) -> Any:
    """The module in this file, under this name, and not among those that are imported."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
