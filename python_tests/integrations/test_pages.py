"""The programs on the documentation's pages about other libraries run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGES = Path(__file__).parents[2] / "docs" / "integrations"


@pytest.mark.parametrize("page", ["avalanche", "lightning", "transformers"])
def test_programs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    text = (PAGES / f"{page}.md").read_text(encoding="utf-8")
    programs = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert programs
    names: dict[str, Any] = {"__name__": page}
    for program in programs:
        exec(program, names)
