"""The implementations of the kernels that tests compare: reference, CPU, CUDA sources on CPU threads, and
CUDA on a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from modules import loaded

from mas_ext.kernels import backends

ROOT = Path(__file__).parents[1]
FOLDER = Path(os.environ.get("MAS_EXT_EMULATED", ROOT / "build" / "emulated"))
SANITIZED = "sanitized" in FOLDER.name


def load_emulated(folder: Path) -> Any:
    path = folder / f"_C_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    # One built from older sources may have other signatures, and crash.
    sources = [*ROOT.glob("csrc/**/*.[ch]*"), *ROOT.glob("python_tests/emulation/*.[ch]*")]
    newest = max(file.stat().st_mtime for file in sources)
    if not path.exists() or path.stat().st_mtime < newest:
        pytest.fail(f"{path} is missing or older than its sources: run `make emulated`", False)
    return loaded("_C_emulated", path)


EMULATED = load_emulated(FOLDER)


class Backend(NamedTuple):
    """What runs the kernels: the state's `native`, and the device of the tensors."""

    native: bool
    device: str


def choose(name: str, monkeypatch: pytest.MonkeyPatch) -> Backend:
    if name == "emulated" or (name == "cpu" and SANITIZED):
        monkeypatch.setattr(backends, "_C", EMULATED)
    if name == "emulated":
        on_threads = (EMULATED.cuda, 0, nullcontext())
        monkeypatch.setattr(backends, "_device_kernels", lambda device: on_threads)
    return Backend(name != "reference", "cuda" if name == "cuda" else "cpu")


def refuse_other_bits(program: str) -> None:
    """The program prints its instruction set and a digest, and must print the same digest under all."""
    digests = {}
    for wish in ("baseline", "avx2", "avx512"):
        environment = {**os.environ, "MAS_EXT_INSTRUCTION_SET": wish}
        environment.pop("LD_PRELOAD", None)
        run = subprocess.run(
            [sys.executable, "-c", program],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        name, digest = run.stdout.split()
        digests[name] = digest
    assert "baseline" in digests
    assert len(set(digests.values())) == 1, digests
