"""The page: what is in its tables, that it needs nothing else, and that it is made of any run."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from compare.test_results import WHY, make

from mas_ext.cli import main
from mas_ext.compare.directory import write_json
from mas_ext.compare.options import Config
from mas_ext.compare.report import report
from mas_ext.compare.results import Findings
from mas_ext.compare.tables import results
from mas_ext.state.replacing import write


class Page(HTMLParser):
    """Its tables, its text, its pictures, what it refers to, and whether all that opens closes."""

    ALONE = ("meta", "img")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.rows: list[list[str]] = []
        self.sources: list[str] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.sources += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag not in self.ALONE:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_a_page_that_needs_nothing_else(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    path = report(run)
    assert path == run / "report.html"
    page = Page(path)
    assert not {"script", "link", "iframe", "object"} & set(page.seen)
    assert not re.search(r"https?:|url\(|@import|\son\w+=", page.source)
    prefix = "data:image/png;base64,"
    assert all(source.startswith(prefix) for source in page.sources)
    pictures = [base64.b64decode(source.removeprefix(prefix)) for source in page.sources]
    names = ("lam", "accuracy", "matrices", "forgetting", "cost", "importance")
    assert pictures == [(run / f"{name}.png").read_bytes() for name in names]
    # What a run is called and says is text.
    assert ["data", "<script>alert(1)</script>"] in page.rows
    assert ["cpu", "A & B"] in page.rows
    assert f"mas diverged: {WHY}." in page.text
    assert (
        "joint is not finished: seed 1 before the end of its first task, seed 2 after 1 of 2 tasks."
        in page.text
    )
    assert "mas is not finished: seed 2 after 1 of 2 tasks." in page.text
    assert {path.suffix for path in run.iterdir() if path.is_file()} == {
        ".toml", ".json", ".jsonl", ".png", ".html",
    }  # fmt: skip


def test_table(tmp_path: Path) -> None:
    """By hand: Student's quantile for 2 degrees of freedom is 4.302653."""
    run = make(tmp_path / "run")
    rows = Page(report(run)).rows
    assert rows[:4] == results(Findings.read(run))
    assert rows[0] == [
        "method", "lam", "average accuracy, %", "forgetting, % points", "backward transfer, % points",
        "intransigence, % points", "ms per step", "MB held", "seeds",
    ]  # fmt: skip
    assert rows[1] == [
        "finetune", "-",
        "65.00 ± 24.84",  # 65, 55 and 75: standard deviation 10
        "30.00 ± 43.03",  # 40, 40 and 10: standard deviation 17.3205
        "-30.00 ± 43.03",
        "2.00 ± 2.48",  # 1, 2 and 3
        "3.00 ± 0.00", "3", "3",
    ]  # fmt: skip
    assert rows[2] == ["mas", "0.5", *6 * ["-"], "diverged, 1 of 3"]
    assert rows[3] == ["joint", "-", "95.00", "-1.00", "1.00", "1.00", "3.00", "3", "1 of 3"]


def test_what_is_not_defined(tmp_path: Path) -> None:
    """Forward transfer has a column where it is defined; joint training has no intransigence."""
    run = make(tmp_path / "run")
    for job, change in (
        ("finetune-seed0", {"forward_transfer": 0.25}),
        ("finetune-seed1", {"forward_transfer": 0.25}),
        ("finetune-seed2", {"forward_transfer": 0.25}),
        ("joint-seed0", {"forward_transfer": 0.125, "intransigence": None}),
    ):
        path = run / job / "result.json"
        write_json(path, {**json.loads(path.read_text()), **change})
    titles, finetune, _, joint = results(Findings.read(run))
    assert titles[5:7] == ["forward transfer, % points", "intransigence, % points"]
    assert finetune[5] == "25.00 ± 0.00"
    assert joint[5:7] == ["12.50", "-"]


def test_options_and_starts(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    values = {
        "methods": {"mas": {"lam": [1, 2], "mode": "proximal"}},
        "hidden": [8, 4],
        "amp": "float16",
    }
    write(run / "config.toml", Config.read(values).toml())
    starts = [{"started": "then", "gpu": None}, {"started": "later", "gpu": None, "cores": 2}]
    write_json(run / "environment.json", starts)
    rows = Page(report(run)).rows
    for expected in (
        ["methods.mas", "lam = 1, 2, mode = proximal"],
        ["hidden", "8, 4"],
        ["amp", "float16"],
        ["device", "cpu"],
        ["balanced", "no"],
        ["started", "then; later"],
        ["gpu", "none"],
    ):
        assert expected in rows


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    for path in (*run.glob("*/*"), run / "metrics.jsonl", run / "lam.json"):
        path.unlink()
    page = Page(report(run))
    assert page.rows[1] == ["finetune", "-", *2 * ["-"], "0 of 3"]
    assert "mas is not finished: seed 0 before the end of its first task" in page.text
    assert not page.sources


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = make(tmp_path / "run"), tmp_path / "some" / "where"
    before = sorted(run.iterdir())
    assert main(["report", str(run), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"report: {out / 'report.html'}\n"
    assert len(list(out.iterdir())) == 7
    assert sorted(run.iterdir()) == before

    page = (out / "report.html").read_bytes()
    (run / "lam.json").write_text("{")
    for words, message in (
        ([str(run), "--out", str(out)], f"{run / 'lam.json'}: got a damaged file"),
        ([str(tmp_path)], f"run: got '{tmp_path}', where no run has begun"),
    ):
        assert main(["report", *words]) == 1
        nothing, err = capsys.readouterr()
        assert not nothing
        assert err.startswith("mas-ext: error: ")
        assert message in err
        assert err.count("\n") == 1
    assert (out / "report.html").read_bytes() == page
