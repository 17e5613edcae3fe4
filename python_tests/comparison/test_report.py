"""The page: what is in its tables, that it needs nothing else, and that it is made of any run."""

import base64
import csv
import html
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from comparison.test_results import ACCURACY, TAKEN, WHY, make, result

from mas_ext.cli import main
from mas_ext.comparison.charts import CHARTS
from mas_ext.comparison.directory import write_json
from mas_ext.comparison.formats import latex
from mas_ext.comparison.options import Config
from mas_ext.comparison.report import TEMPLATE, report
from mas_ext.comparison.results import Findings
from mas_ext.comparison.tables import notes, results, summary
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
    (path,) = report(run)
    assert path == run / "report.html"
    page = Page(path)
    assert not {"script", "link", "iframe", "object"} & set(page.seen)
    assert not re.search(r"https?:|url\(|@import|\son\w+=", page.source)
    prefix = "data:image/png;base64,"
    assert all(source.startswith(prefix) for source in page.sources)
    pictures = [base64.b64decode(source.removeprefix(prefix)) for source in page.sources]
    names = ("lam", "accuracy", "matrices", "confusion", "forgetting", "cost", "importance")
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


def page_of(run: Path) -> Page:
    return Page(report(run)[0])


def test_table(tmp_path: Path) -> None:
    """Three seeds are shown themselves."""
    run = make(tmp_path / "run")
    rows = page_of(run).rows
    assert rows[:4] == results(Findings.read(run))
    assert rows[0] == [
        "method", "lam", "average accuracy, %", "forgetting, % points", "backward transfer, % points",
        "intransigence, % points", "ms per step", "MB held", "seeds",
    ]  # fmt: skip
    assert rows[1] == [
        "finetune", "-",
        "65.0, 55.0, 75.0", "40.0, 40.0, 10.0", "-40.0, -40.0, -10.0", "1.0, 2.0, 3.0",
        "3.0, 3.0, 3.0", "3", "3",
    ]  # fmt: skip
    assert rows[2] == ["mas", "0.5", *6 * ["-"], "diverged, 1 of 3"]
    assert rows[3] == ["joint", "-", "95.00", "-1.00", "1.00", "1.00", "3.00", "3", "1 of 3"]


def of_seeds(run: Path, methods: dict[str, list[float]]) -> Findings:
    """A run with these average accuracies, of each seed of every method."""
    run.mkdir()
    seeds = max(map(len, methods.values()))
    write(run / "config.toml", Config.read({"methods": list(methods), "seeds": seeds}).toml())
    write_json(run / "environment.json", [])
    for method, values in methods.items():
        for seed, value in enumerate(values):
            (run / f"{method}-seed{seed}").mkdir()
            found = {**result([[0.9, None], [0.5, 0.8]], seed), "average_accuracy": value}
            write_json(run / f"{method}-seed{seed}" / "result.json", found)
    return Findings.read(run)


def test_four_seeds_have_an_interval(tmp_path: Path) -> None:
    """By hand: Student's quantile for 3 degrees of freedom is 3.182446."""
    found = of_seeds(tmp_path / "run", {"mas": [0.65, 0.55, 0.75, 0.65]})
    # Standard deviation 8.16497; divided by the square root of 4.
    assert results(found)[1][2] == "65.00 ± 12.99"
    assert "mean and 95 % interval over 4 seeds" in summary(found)


@pytest.mark.parametrize(
    ("methods", "told"),
    [
        ({"mas": [0.9], "si": [0.8]}, "One seed does not tell which method is better: results"),
        ({"mas": [0.9], "joint": [0.95]}, None),
        (
            {"mas": [0.9, 0.91], "si": [0.8, 0.81]},
            "of mas, the largest, and of si overlap: 2 seeds do",
        ),
        ({"mas": [0.9, 0.901], "si": [0.8, 0.801]}, None),
        (
            {"mas": [0.9] * 4, "si": [0.9] * 4},
            "of mas, the largest, and of si overlap: 4 seeds do not",
        ),
        (
            {
                "si": [0.8, 0.9, 0.8],
                "mas": [0.9, 0.8, 0.9],
                "lwf": [0.1, 0.11, 0.1],
                "ewc": [0.8] * 3,
            },
            "of mas, the largest, and of si, ewc overlap: 3 seeds do not tell which is better.",
        ),
        ({"mas": [0.9] * 3, "lwf": [0.8] * 3, "joint": [0.91, 0.9, 0.9]}, None),
    ],
)
def test_what_cannot_be_told_apart(
    methods: dict[str, list[float]], told: str | None, tmp_path: Path
) -> None:
    """By 95 % intervals of the average accuracy, in which joint training takes no part."""
    found = of_seeds(tmp_path / "run", methods)
    said = [note for note in notes(found) if "better" in note]
    if told is None:
        assert said == []
    else:
        (sentence,) = said
        assert told in sentence
        assert sentence in summary(found)
        assert sentence in page_of(tmp_path / "run").text


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
    assert finetune[5] == "25.0, 25.0, 25.0"
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
    rows = page_of(run).rows
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
    page = page_of(run)
    assert page.rows[1] == ["finetune", "-", *2 * ["-"], "0 of 3"]
    assert "mas is not finished: seed 0 before the end of its first task" in page.text
    assert not page.sources


# -- for other programs ---------------------------------------------------------------------------------


def table(path: Path) -> list[list[str]]:
    with open(path, newline="") as file:
        return list(csv.reader(file))


def test_numbers_for_programs(tmp_path: Path) -> None:
    """Mean, half interval and seeds apart; nothing where nothing is known, and no mean of the lucky seeds."""
    run, out = make(tmp_path / "run"), tmp_path / "out"
    assert report(run, out, ["csv"]) == [out / "results.csv", out / "confusion.csv"]
    titles, *rows = table(out / "results.csv")
    assert titles[:7] == [
        *("method", "lam", "average accuracy, %: mean", "average accuracy, %: half interval"),
        *(f"average accuracy, %: seed {n}" for n in range(3)),
    ]
    by_method = {row[0]: dict(zip(titles, row, strict=True)) for row in rows}
    finetune, mas, joint = (by_method[name] for name in ("finetune", "mas", "joint"))
    got = [float(finetune[f"average accuracy, %: {part}"]) for part in ("mean", "half interval")]
    # Of 65, 55 and 75, whose standard deviation is 10; Student's quantile for 2 degrees of freedom.
    assert got == pytest.approx([65, 4.302653 * 10 / math.sqrt(3)], rel=1e-6)
    assert [float(finetune[f"average accuracy, %: seed {n}"]) for n in range(3)] == [65, 55, 75]
    assert (finetune["lam"], mas["lam"]) == ("", "0.5")
    assert [
        mas[f"average accuracy, %: {p}"] for p in ("mean", "half interval", "seed 0", "seed 1")
    ] == [*("", "", "77.5", "")]
    assert [joint[f"forgetting, % points: {p}"] for p in ("mean", "half interval", "seed 1")] == [
        *("-1", "", "")
    ]
    assert float(finetune["MB held: seed 2"]) == 3
    assert [row[-1] for row in rows] == ["3", "diverged, 1 of 3", "1 of 3"]


def test_matrices_with_the_names_of_the_tasks(tmp_path: Path) -> None:
    run, out = make(tmp_path / "run"), tmp_path / "out"
    before = (run / "finetune-seed0").stat()
    report(run, out, ["csv"])
    names = {path.name for path in (out / "accuracy").iterdir()}
    assert names == {
        *(f"{method}.csv" for method in ("finetune", "mas", "joint")),
        *(f"{method}-seed{seed}.csv" for method, seed in ACCURACY),
    }
    assert table(out / "accuracy" / "finetune-seed0.csv") == [
        ["accuracy in %", "0/1", "2/3"],
        ["after 0/1", "90", ""],
        ["after 2/3", "50", "80"],
    ]
    mean = table(out / "accuracy" / "finetune.csv")
    assert mean[2] == ["after 2/3", "60", "70"]
    # A seed diverged in the second task.
    assert table(out / "accuracy" / "mas.csv")[2] == ["after 2/3", "", ""]
    assert (run / "finetune-seed0").stat() == before


def test_confusion_with_the_names_of_the_tasks(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    report(run, formats=["csv"])
    titles, *rows = table(run / "confusion.csv")
    assert titles == [
        *("method", "seed", "task", "class", "predicted task", "predicted class", "samples")
    ]
    names = ["0/1", "2/3"]
    assert rows == [
        ["finetune", str(seed), names[task], str(true), names[other], str(predicted), str(samples)]
        for seed, lines in TAKEN.items()
        for task, true, other, predicted, samples in lines
    ]


def test_a_table_for_a_paper(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    assert report(run, formats=["latex"]) == [run / "results.tex"]
    assert (run / "results.tex").read_text().splitlines() == [
        r"% needs \usepackage{booktabs}",
        f"% mas diverged: {WHY}.",
        "% mas is not finished: seed 2 after 1 of 2 tasks.",
        "% joint is not finished: seed 1 before the end of its first task, seed 2 after 1 of 2 tasks.",
        r"\begin{tabular}{llrrrrrrr}",
        r"\toprule",
        r"method & lam & average accuracy, \% & forgetting, \% points & backward transfer, \% points & "
        r"intransigence, \% points & ms per step & MB held & seeds \\",
        r"\midrule",
        r"finetune & -- & 65.0, 55.0, 75.0 & 40.0, 40.0, 10.0 & $-$40.0, $-$40.0, $-$10.0 & 1.0, 2.0, 3.0 & "
        r"3.0, 3.0, 3.0 & 3 & 3 \\",
        r"mas & 0.5 & -- & -- & -- & -- & -- & -- & diverged, 1 of 3 \\",
        r"joint & -- & 95.00 & $-$1.00 & 1.00 & 1.00 & 3.00 & 3 & 1 of 3 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]
    found = of_seeds(tmp_path / "four", {"mas-alpha": [0.65, 0.55, 0.75, 0.65]})
    assert r"mas-alpha & -- & 65.00 $\pm$ 12.99 & " in latex(results(found))


def test_a_table_in_markdown(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    assert report(run, formats=["markdown"]) == [run / "results.md"]
    lines = (run / "results.md").read_text().splitlines()
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line[:1] == "|"]
    assert [rows[0], *rows[2:]] == results(Findings.read(run))
    assert f"mas diverged: {WHY}." in lines


def test_only_what_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without matplotlib, too, where there are no pictures."""
    run = make(tmp_path / "run")
    words = ["--format", "html,csv", "--pictures", "pdf,svg", "--out", str(tmp_path / "all")]
    assert main(["report", str(run), *words]) == 0
    names = {path.name for path in (tmp_path / "all").iterdir()}
    assert names == {
        *(f"{name}.{kind}" for name in CHARTS for kind in ("pdf", "svg")),
        *("report.html", "results.csv", "confusion.csv", "accuracy"),
    }
    assert len(Page(tmp_path / "all" / "report.html").sources) == len(CHARTS)
    (alone,) = report(run, tmp_path / "alone", kinds=())
    assert [*(tmp_path / "alone").iterdir()] == [alone]
    assert len(Page(alone).sources) == len(CHARTS)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(run), "--format", "csv,latex", "--out", str(tmp_path / "few")]) == 0
    names = {path.name for path in (tmp_path / "few").iterdir()}
    assert names == {"results.csv", "confusion.csv", "accuracy", "results.tex"}


def test_formats_that_there_are_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option, wrong, message in (
        ("--format", "csv,latx", "argument --format: got 'latx', did you mean 'latex'?"),
        ("--format", "", "argument --format: got '', choose from html, csv, latex, markdown"),
        ("--pictures", "gif", "argument --pictures: got 'gif', choose from png, pdf, svg"),
    ):
        with pytest.raises(SystemExit):
            main(["report", str(make(tmp_path / (option + wrong))), option, wrong])
        assert message in capsys.readouterr().err


def test_nothing_goes_beyond_a_narrow_page() -> None:
    """Pictures are as wide as the page, at most; rows of numbers become lists, each with its title."""
    style = TEMPLATE.read_text(encoding="utf-8")
    assert "img { display: block; width: 100%; background: white; }" in style
    assert "min-width: " not in style
    assert ".numbers td:not(:first-child)::before { content: attr(data-title); }" in style


def test_every_number_has_its_title(tmp_path: Path) -> None:
    source = report(make(tmp_path / "run"))[0].read_text()
    cells = re.findall(r'<td data-title="(.*?)">(.*?)</td>', source)
    titles, *rows = results(Findings.read(tmp_path / "run"))
    assert cells == [(t, html.escape(c)) for row in rows for t, c in zip(titles, row, strict=True)]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = make(tmp_path / "run"), tmp_path / "some" / "where"
    before = sorted(run.iterdir())
    assert main(["report", str(run), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"report: {out / 'report.html'}\n"
    assert len(list(out.iterdir())) == 8
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
