"""The package really built: as `make` built it, with CPU kernels alone, and as pure Python."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mas_ext import _C

ROOT = Path(__file__).parent.parent
KERNELS = {source.stem for source in (ROOT / "csrc" / "cpu").glob("*.cpp")}
# What is built only to see that it can be is not optimised, which takes a minute for each instruction set.
QUICK = {
    "SKBUILD_CMAKE_BUILD_TYPE": "Debug",
    "MAS_EXT_REQUIRE_NATIVE": "1",
}
NO_NVCC = {"CUDACXX": "/nonexistent/nvcc"}
NO_COMPILER = {"CXX": "/nonexistent/g++"}


def run(*command: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """A child whose environment says nothing about how to build, except for env."""
    unset = {"CUDACXX", "CUDA_PATH", "CXX", "MAS_EXT_CUDA", "MAS_EXT_REQUIRE_NATIVE"}
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    return subprocess.run(command, cwd=cwd, env=kept | env, capture_output=True, text=True)


def install(tmp: Path, source: Path = ROOT, **env: str) -> str:
    """Build into tmp/build, install into tmp/site, and return what was printed."""
    pip = [sys.executable, "-m", "pip", "install", "--verbose", "--no-deps", "--no-build-isolation"]
    env["SKBUILD_BUILD_DIR"] = str(tmp / "build")
    done = run(*pip, "--target", tmp / "site", source, cwd=tmp, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def python(tmp: Path, code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run code with the package in tmp/site. -S keeps out the hook of an editable install."""
    path = os.pathsep.join([str(tmp / "site"), *sys.path])
    return run(sys.executable, "-S", "-c", code, cwd=tmp, PYTHONPATH=path, **env)


def check(tmp: Path, code: str, **env: str) -> None:
    """Run code, and see that the package is whole."""
    done = python(tmp, code, **env)
    assert done.returncode == 0, done.stderr
    assert (tmp / "site" / "mas_ext" / "py.typed").exists()
    assert (tmp / "site" / "mas_ext" / "_C.pyi").exists()


def nvcc_is_here() -> bool:
    """Whether there is an nvcc as new as CMakeLists.txt asks for."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return False
    release = re.search(r"release (\d+)\.(\d+)", run(nvcc, "--version", cwd=ROOT).stdout)
    return release is not None and (int(release[1]), int(release[2])) >= (12, 8)


def test_as_it_is() -> None:
    """What `make` built: the extension that all tests run with."""
    assert hasattr(_C, "cuda") == nvcc_is_here()
    needed = run("readelf", "--dynamic", _C.__file__, cwd=ROOT).stdout
    assert "libstdc++" in needed
    assert "libcuda" not in needed, "must be importable without a driver and without a toolkit"
    assert "torch" not in needed, "one build must serve every torch"


def test_without_nvcc(tmp_path: Path) -> None:
    """Built from a source distribution, which must therefore be complete."""
    sdist = f"from scikit_build_core.build import build_sdist; build_sdist({str(tmp_path)!r})"
    done = run(sys.executable, "-c", sdist, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    install(tmp_path, source=archive, **QUICK, **NO_NVCC)
    check(
        tmp_path,
        """
import mas_ext
from mas_ext import _C
assert not hasattr(_C, "cuda")
info = mas_ext.info()
assert info["backend"] == "native", info
assert not info["cuda_kernels"], info
assert "no nvcc" in info["why_not"][0], info
""",
        MAS_EXT_REQUIRE_NATIVE="1",
    )


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_instruction_sets_share_no_code(level: str) -> None:
    """Of a function that several objects define the linker keeps one copy: perhaps the one that an
    older processor can't run.
    """
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}-*"
    found = [*ROOT.glob(f"build/{tag}/CMakeFiles/cpu_{level}.dir/**/*.o")]
    objects = [o for o in found if o.name.split(".")[0] in KERNELS]
    assert len(objects) == len(KERNELS)
    listed = run("nm", "--defined-only", "--extern-only", "--demangle", *objects, cwd=ROOT)
    symbols = [line for line in listed.stdout.splitlines() if line and not line.endswith(":")]
    assert len(symbols) >= len(KERNELS)
    assert all(f" T mas::cpu::{level}::" in symbol for symbol in symbols), symbols


def test_without_compiler(tmp_path: Path) -> None:
    printed = install(tmp_path, **NO_COMPILER)
    assert "WITHOUT its compiled kernels" in printed
    check(
        tmp_path,
        """
import warnings, torch, mas_ext
info = mas_ext.info()
assert info["backend"] == "reference", info
missing = "the compiled extension is missing (No module named 'mas_ext._C')"
assert info["why_not"][0] == missing, info
model = torch.nn.Linear(3, 2)
penalty = mas_ext.FusedMASPenalty(model)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    penalty.consolidate([torch.randn(4, 3)])
    penalty()
assert [w.category for w in caught] == [RuntimeWarning], caught
assert "plain PyTorch" in str(caught[0].message), caught
""",
    )
    refused = python(tmp_path, "import mas_ext", MAS_EXT_REQUIRE_NATIVE="1")
    assert "ImportError: MAS_EXT_REQUIRE_NATIVE is 1, but" in refused.stderr


@pytest.mark.parametrize(
    ("value", "gpus", "built"),
    [
        ("", "", "75-virtual"),
        ("", "9.0 9.0 12.0", "90-real;120-real"),
        ("all", "9.0", "75-real;80-real;86-real;89-real;90-real;100-real;120"),
        ("off", "9.0", None),
    ],
)
def test_cuda_kernels_are_built_for(
    value: str, gpus: str, built: str | None, tmp_path: Path
) -> None:
    """The GPUs that are here, PTX without one, all, or none; "here" by a program that stands for nvidia-smi."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\n" + (f"printf '%s\\n' {gpus}" if gpus else "exit 9") + "\n")
    smi.chmod(0o755)
    cmake = ["cmake", "-S", ROOT, "-B", tmp_path / "build", f"-DPython_EXECUTABLE={sys.executable}"]
    pybind11 = run(sys.executable, "-m", "pybind11", "--cmakedir", cwd=ROOT).stdout.strip()
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    done = run(*cmake, f"-Dpybind11_DIR={pybind11}", cwd=tmp_path, PATH=path, MAS_EXT_CUDA=value)
    assert done.returncode == 0, done.stderr
    (said,) = re.findall("mas_ext: (.*)", done.stdout)
    if built is None or not nvcc_is_here():
        assert said.startswith("CPU kernels only")
    else:
        assert said == f"CPU and CUDA kernels, architectures {built}"


def test_an_unknown_choice_of_cuda_kernels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="MAS_EXT_CUDA: got '90', expected 'all' or 'off'"):
        install(tmp_path, MAS_EXT_CUDA="90")
    assert not (tmp_path / "site").exists()


@pytest.mark.parametrize("value", ["yes", "no"])
def test_what_is_required_is_told_by_0_or_1(value: str, tmp_path: Path) -> None:
    """While building, as when importing: no value is accepted by one of them alone."""
    message = f"MAS_EXT_REQUIRE_NATIVE: got '{value}', expected '0' or '1'"
    with pytest.raises(AssertionError, match=message):
        install(tmp_path, MAS_EXT_REQUIRE_NATIVE=value, **NO_NVCC)
    assert not (tmp_path / "site").exists()


def test_without_compiler_but_required(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="there is no fallback to plain PyTorch"):
        install(tmp_path, MAS_EXT_REQUIRE_NATIVE="1", **NO_COMPILER)
    assert not (tmp_path / "site").exists()
