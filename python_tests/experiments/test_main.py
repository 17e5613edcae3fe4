"""The command line of the experiments."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments import EXPERIMENTS, Results
from experiments.__main__ import ROOT, main, write_page


def test_what_is_there_is_shown_and_not_measured_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = EXPERIMENTS["split-mnist"].quick()
    results = Results(tmp_path / "split-mnist.json", quick.protocol())
    for cell in quick.plan(results):
        found = {"average_accuracy": 0.5, "forgetting": 0.25, "validation_accuracy": 0.5}
        results.add(cell, {**found, "chosen_lam": [None, 2.0]}, 1.0)
    written = results.path.read_bytes()
    assert main(["split-mnist", "--quick", "--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "# Split MNIST, as published\n" in out
    assert "| `finetune` | 50.00 | 93.46 | 25.00 |" in out
    assert not err
    assert results.path.read_bytes() == written


def test_an_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["spilt-mnist"])
    assert exit.value.code == 2
    assert "'spilt-mnist'" in capsys.readouterr().err


def test_without_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cost", "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    out, err = capsys.readouterr()
    assert not out
    where = f"MNIST/raw/train-images-idx3-ubyte is not in {tmp_path}; it is from https:"
    assert err.startswith(f"error: {where}")
    assert err.count("\n") == 1
    assert not list((tmp_path / "out").iterdir())


def test_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(self: object, cell: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(EXPERIMENTS["regression"]), "measure", interrupt)
    assert main(["regression", "--quick", "--out", str(tmp_path)]) == 130
    assert not capsys.readouterr().out


def test_the_page_is_written_from_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was in its place before is gone; pictures are found from the page."""
    committed = (ROOT / "docs" / "RESULTS.md").read_text(encoding="utf-8")
    row = next(line for line in committed.splitlines() if line.startswith("| `joint` | 0."))
    page = tmp_path / "RESULTS.md"
    page.write_text(committed.replace(row, "something else"), encoding="utf-8")
    few = {name: EXPERIMENTS[name] for name in ("cost", "regression", "importance-data")}
    monkeypatch.setattr("experiments.__main__.EXPERIMENTS", few)
    (tmp_path / "how-to").mkdir()
    other = tmp_path / "how-to" / "production.md"
    other.write_text("<!-- importance-data -->\n| old |\n<!-- /importance-data -->\nmore\n")
    write_page(tmp_path)
    assert page.read_text(encoding="utf-8") == committed
    assert "| images of the old task | as they were | 0.01 |" in other.read_text(encoding="utf-8")
    assert "| old |" not in other.read_text(encoding="utf-8")
    for name in ("cost", "regression"):
        assert f"](results/{name}.svg)" in committed
        assert (tmp_path / "results" / f"{name}.svg").read_bytes().startswith(b"<?xml")
