"""info() tells the truth; without the extension plain PyTorch says so once and computes the same."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mas_ext

HIDDEN = "import sys; sys.modules['mas_ext._C'] = None\n"


def test_the_version_is_told_once() -> None:
    """In the package; what is installed and the citation say the same."""
    citation = (Path(__file__).parents[1] / "CITATION.cff").read_text(encoding="utf-8")
    told = re.findall(r"^version: (.*)$", citation, re.MULTILINE)
    assert [mas_ext.__version__] == told == [version("mas_ext")]


RUN = """
import json, warnings
import torch
from torch import nn
import mas_ext

def numbers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x = torch.randn(7, 5, dtype=torch.float64)
    penalty = mas_ext.FusedMASPenalty(model, lam=0.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    penalty.attach(optimizer, "proximal")
    found = []
    for task in range(2):
        for step in range(3):
            optimizer.zero_grad()
            (model(x + task).square().sum() + penalty()).backward()
            penalty.add_grad_()
            optimizer.step()
            found += [p.detach().flatten() for p in model.parameters()]
        penalty.consolidate([x[:4], x[4:]])
        found += [w.flatten().double() for w in penalty.omega.values()]
        found += [a.flatten() for a in penalty.anchor.values()]
    return torch.cat(found).tolist()
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,  # where `mas_ext` is the installed one
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_info_describes_this_process() -> None:
    info = mas_ext.info()
    assert info["mas_ext"] == version("mas_ext")
    assert info["torch"] == torch.__version__
    assert info["torch_cuda"] == torch.version.cuda
    assert info["python"] == platform.python_version()
    assert info["platform"] == platform.platform()
    assert info["backend"] == "native"
    assert info["cpu_instruction_set"] in ("baseline", "avx2", "avx512")
    assert isinstance(info["cuda_kernels"], bool)
    if info["cuda_kernels"]:
        assert re.fullmatch(r"(\d+(-real|-virtual)? ?)+", info["cuda_architectures"])
    assert (info["gpu"] is not None) == torch.cuda.is_available()
    assert (info["why_not"] == []) == (info["cuda_kernels"] and info["gpu"] is not None)
    assert all(isinstance(reason, str) for reason in info["why_not"])
    assert set(info) == {
        "mas_ext",
        "backend",
        "why_not",
        "cpu_instruction_set",
        "threads",
        "cuda_kernels",
        "cuda_architectures",
        "gpu",
        "torch",
        "torch_cuda",
        "python",
        "platform",
    }
    assert json.loads(json.dumps(info)) == info


def test_info_follows_the_number_of_threads() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert mas_ext.info()["threads"] == 1
    finally:
        torch.set_num_threads(threads)
    assert mas_ext.info()["threads"] == threads


def test_without_the_extension_plain_pytorch_says_so_once_and_computes_the_same() -> None:
    code = """
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    info = mas_ext.info()
    silent = len(caught)
    found = [numbers(), numbers()]
try:
    penalty = mas_ext.FusedMASPenalty(nn.Linear(2, 1), backend="native")
    penalty.consolidate([torch.ones(1, 2)])
except RuntimeError as error:
    refused = str(error)
print(json.dumps([info, silent, [[w.category.__name__, str(w.message)] for w in caught], found, refused]))
"""
    done = run(HIDDEN + RUN + code, MAS_EXT_REQUIRE_NATIVE="0")
    assert done.returncode == 0, done.stderr
    info, silent, caught, found, refused = json.loads(done.stdout)

    assert info["backend"] == "reference"
    assert info["cpu_instruction_set"] is None
    assert info["cuda_kernels"] is False
    assert info["cuda_architectures"] is None
    assert info["why_not"][0].startswith("the compiled extension is missing")
    assert silent == 0
    assert [category for category, _ in caught] == ["RuntimeWarning"]
    assert "mas_ext uses plain PyTorch" in caught[0][1]
    assert "the compiled extension is missing" in caught[0][1]
    assert 'backend: got "native", but the compiled extension is missing' in refused

    here: dict[str, Any] = {}
    exec(RUN, here)
    assert mas_ext.info()["backend"] == "native"
    native = here["numbers"]()
    assert len(native) == 2 * (3 + 2) * (5 * 4 + 4 + 4 * 3 + 3)
    for reference in found:
        np.testing.assert_allclose(reference, native, rtol=1e-12, atol=1e-14)


def test_the_fallback_is_announced_by_estimate_importance_too() -> None:
    code = """
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        mas_ext.estimate_importance(nn.Linear(2, 1), [torch.ones(1, 2)])
print(json.dumps([str(w.message) for w in caught]))
"""
    done = run(HIDDEN + RUN + code, MAS_EXT_REQUIRE_NATIVE="0")
    assert done.returncode == 0, done.stderr
    (message,) = json.loads(done.stdout)
    assert "mas_ext uses plain PyTorch" in message


def test_without_the_extension_require_native_refuses_to_import() -> None:
    done = run(HIDDEN + "import mas_ext", MAS_EXT_REQUIRE_NATIVE="1")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "ImportError: MAS_EXT_REQUIRE_NATIVE is 1, but the compiled extension is"
    )


@pytest.mark.parametrize("value", ["", "0", "1"])
def test_with_the_extension_require_native_changes_nothing(value: str) -> None:
    done = run("import mas_ext; print(mas_ext.info()['backend'])", MAS_EXT_REQUIRE_NATIVE=value)
    assert (done.stdout, done.returncode) == ("native\n", 0)


@pytest.mark.parametrize("value", ["yes", "true", "2", " 1"])
def test_require_native_is_0_or_1(value: str) -> None:
    for code in ("import mas_ext", HIDDEN + "import mas_ext"):
        done = run(code, MAS_EXT_REQUIRE_NATIVE=value)
        assert done.returncode == 1
        last = done.stderr.strip().splitlines()[-1]
        assert last == f"ValueError: MAS_EXT_REQUIRE_NATIVE: got {value!r}, expected '0' or '1'"


def test_an_unknown_instruction_set_is_refused() -> None:
    program = "from mas_ext.kernels import backends; backends.instruction_set()"
    found = run(program, MAS_EXT_INSTRUCTION_SET="sse9")
    assert found.returncode == 1
    assert "MAS_EXT_INSTRUCTION_SET: got 'sse9', expected one of baseline" in found.stderr
