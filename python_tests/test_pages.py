"""The programs in README and documentation run as they stand, page by page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from mas_ext.comparison.options import OPTIONS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# Those of other libraries are run where these are, by integrations/test_pages.py.
OTHERS = DOCS / "integrations"
PAGES = [
    ROOT / "README.md",
    *sorted(page for page in DOCS.rglob("*.md") if OTHERS not in page.parents),
]
PROGRAMS = {
    str(page.relative_to(ROOT)): re.findall(
        r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL
    )
    for page in PAGES
}


def test_the_page_of_environment_variables_has_all_of_them() -> None:
    code = [*ROOT.glob("csrc/**/*.[ch]*"), *(ROOT / "mas_ext").rglob("*.py")]
    code += [
        *(ROOT / "python_tests").rglob("*.py"),
        ROOT / "CMakeLists.txt",
        ROOT / "pyproject.toml",
    ]
    read, told = (
        {name for file in files for name in re.findall(r"MAS_EXT_[A-Z_]+", file.read_text("utf-8"))}
        for files in (code, [DOCS / "how-to" / "environment.md"])
    )
    assert told == read


def test_the_page_of_mas_ext_run_has_all_options() -> None:
    page = (DOCS / "how-to" / "run.md").read_text("utf-8")
    assert set(re.findall(r"`--([a-z-]+)`", page)) == {name.replace("_", "-") for name in OPTIONS}


def data() -> TensorDataset:
    y = torch.arange(60) % 3
    return TensorDataset(torch.randn(60, 3) + 3 * torch.eye(3)[y], y)


def run(page: str) -> dict[str, Any]:
    """All programs of a page, one after the other, with what the README's reader has; what they left."""
    torch.manual_seed(0)
    names: dict[str, Any] = {name: data() for name in ("train_a", "test_a", "train_b", "test_b")}
    for program in PROGRAMS[page]:
        exec(program, names)
    return names


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("page", [page for page, found in PROGRAMS.items() if found])
def test_programs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = run(page)
    if page == "README.md":
        assert (tmp_path / "penalty.safetensors").exists()
        assert names["result"].accuracy.shape == (2, 2)
        assert str(names["result"].forgetting) in capsys.readouterr().out
