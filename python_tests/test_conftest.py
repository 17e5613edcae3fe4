"""A test that is skipped without need fails the run."""

import subprocess
import sys
from pathlib import Path

import torch

SKIPS = """
import pytest

@pytest.mark.cuda
def test_needs_a_gpu():
    pass

def test_gives_up():
    pytest.skip("too hard")
"""


def test_only_cuda_tests_may_be_skipped(tmp_path: Path) -> None:
    here = Path(__file__).parent
    (tmp_path / "test_skips.py").write_text(SKIPS)
    (tmp_path / "conftest.py").symlink_to(here / "conftest.py")
    options = ["-c", here.parent / "pyproject.toml", "--rootdir", tmp_path, tmp_path]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "too hard\nOnly tests marked cuda may be skipped" in done.stdout
    assert " 1 failed, " in done.stdout
    said = "Tests marked cuda that were not run, no GPU here: 1" in done.stdout
    assert said == (not torch.cuda.is_available())
