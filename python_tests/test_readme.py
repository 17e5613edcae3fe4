"""The README's programs run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def data() -> TensorDataset:
    y = torch.arange(60) % 3
    return TensorDataset(torch.randn(60, 3) + 3 * torch.eye(3)[y], y)


@pytest.mark.usefixtures("one_thread")
def test_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    ten_lines, trainer = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(ten_lines, {})
    assert (tmp_path / "penalty.safetensors").exists()
    names: dict[str, Any] = {name: data() for name in ("train_a", "test_a", "train_b", "test_b")}
    exec(trainer, names)
    assert names["result"].accuracy.shape == (2, 2)
    assert str(names["result"].forgetting) in capsys.readouterr().out
