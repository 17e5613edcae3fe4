"""The pages that scripts write: each says what the results say, and shows pictures that are there."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import all as everything
from benchmarks import language, performance, pictures, readme
from benchmarks.files import fill, load, load_all

ROOT = Path(__file__).parents[2]

LAM = load(performance.LAM)


def median(x: float) -> dict[str, float]:
    return {"low": 0.9 * x, "median": x, "high": 1.1 * x}


def row(name: str, tasks: int, seconds: float, held: int, moved: int | None) -> dict[str, Any]:
    return {
        "name": name,
        "tasks": tasks,
        "seconds": median(seconds),
        "extra": median(seconds / 0.1 - 1),
        "extra_seconds": median(seconds - 0.1),
        "held": held,
        "peak": 0,
        "extra_memory": held,
        "moved": moved,
        "fraction": None,
    }


def steps(attach: float) -> dict[str, Any]:
    """A step of 100 ms whose attach takes so many seconds; its 20 MB alone take 2 ms."""
    return {
        "machine": LAM["machine"],
        "model": "mlp",
        "optimizer": "sgd",
        "dtype": "float32",
        "parameters": 1_000_000,
        "shape": [128, 784],
        "device": "cpu",
        "threads": 2,
        "repeats": 5,
        "bandwidth": {"Tensor.copy_": 8e9, "streaming copy": 1e10},
        "forms": [
            row("no penalty", 0, 0.1, 0, None),
            row("attach", 1, attach, 8_000_000, 20_000_000),
            row("attach, proximal", 1, 0.102, 8_000_000, 16_000_000),
            row("add_grad_", 1, 0.104, 8_000_000, 20_000_000),
            row("penalty() in the loss", 1, 0.11, 8_000_000, 40_000_000),
            row("eager autograd", 1, 0.15, 20_000_000, None),
            row("attach", 10, 0.101, 8_000_000, 20_000_000),
        ],
    }


def test_pages_say_what_the_results_say(tmp_path: Path) -> None:
    pages = {ROOT / "README.md": readme.measured_tables(), performance.PAGE: performance.tables()}
    for page, tables in pages.items():
        again = Path(shutil.copy(page, tmp_path))
        fill(again, tables)
        assert again.read_text() == page.read_text(), f"{page.name}: make it anew by its script"


def test_pictures_are_there() -> None:
    text = performance.PAGE.read_text(encoding="utf-8")
    shown = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert "performance/lam.svg" in shown
    for path in shown:
        assert (performance.PAGE.parent / path).read_bytes().startswith(b"<?xml"), path


def test_fill_wants_each_mark_once(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a <!-- x -->\nold\n<!-- /x --> b")
    fill(page, {"x": r"\1"})
    assert page.read_text() == "a <!-- x -->\n\\1\n<!-- /x --> b"
    with pytest.raises(ValueError, match=r"page.md: got 0 places marked y, expected 1"):
        fill(page, {"y": "b"})


def test_words_about_steps_come_from_the_numbers() -> None:
    (line,) = [x for x in performance.step_tables([steps(0.11)]).splitlines() if "MLP" in x]
    cells = [cell.strip() for cell in line.strip("| ").split("|")]
    assert cells[:4] == [
        "MLP 784-400-400-10, 128 x 784",
        "sgd, float32",
        "100",
        "10.0 (9.0 to 11.0)",
    ]
    assert cells[7:] == ["50.0 (45.0 to 55.0)", "not installed", "2.0", "its bytes and 8 ms"]
    assert performance.step_limit(steps(0.102)) == "its bytes"
    assert performance.step_limit(steps(0.1005)).startswith("less than its bytes")
    assert performance.step_limit(steps(0.1)) == "nothing that can be told from chance"


def test_words_about_kernels_come_from_the_numbers() -> None:
    def of(fraction: float, seconds: float) -> dict[str, Any]:
        return {"fraction": fraction, "seconds": median(seconds)}

    limit = performance.kernel_limit
    assert limit(of(0.9, 1.0), of(0.9, 1.0)) == "memory"
    slow, cached = of(0.5, 1.0), of(2.0, 0.25)
    assert "4.0 times as fast from warm ones" in limit(slow, cached)
    assert "Python before the launch: 5.0 times" in limit(slow, cached, of(0.9, 0.2))
    assert "4.0 times as fast from warm ones" in limit(slow, cached, of(0.5, 0.9))
    assert "50 % of the time" in limit(slow, of(0.55, 0.9))


def test_memory_and_tasks() -> None:
    (line,) = [x for x in performance.memory_table([steps(0.11)]).splitlines() if "MLP" in x]
    assert line.endswith("| 8.0 | 8.0 | 8.0 | 8.0 | 20.0 | not installed |")
    lines = [x for x in performance.tasks_table([steps(0.11)]).splitlines() if "MLP" in x]
    assert [x.split("|")[2].strip() for x in lines] == ["1", "10"]
    assert lines[0].endswith("| 8 | 50.0 (45.0 to 55.0) | 20 |")
    assert lines[1].endswith("| 1.0 (0.9 to 1.1) | 8 | does not fit | does not fit |")


def test_strengths() -> None:
    """Every mean and every sentence against the runs themselves."""
    text = performance.lam_table(LAM)
    for optimizer in ("sgd", "adam"):
        for mode in ("gradient", "proximal"):
            runs = [r for r in LAM["runs"] if (r["optimizer"], r["mode"]) == (optimizer, mode)]
            means = {}
            lams = {r["lam"] for r in runs if r["lam"] > 0}
            for lam in lams:
                found = [r["accuracy"] for r in runs if r["lam"] == lam]
                if None not in found:
                    means[lam] = sum(100 * x for x in found) / len(found)
            best = max(means.values())
            near = [lam for lam, mean in means.items() if mean >= best - 1]
            kept = f"within 1 point of its best, {best:.2f}, for {len(near)} of {len(lams)} lam"
            assert f"{optimizer}, {mode}: {kept}" in text
    lines = {x.split("|")[1].strip(): x for x in text.splitlines() if x.startswith("| ")}
    diverged = {r["lam"] for r in LAM["runs"] if r["accuracy"] is None}
    assert all("diverged" in lines[f"{lam:g}"] for lam in diverged)


def test_pictures_can_be_drawn(tmp_path: Path) -> None:
    found = [steps(0.11), {**steps(0.12), "model": "gpt2"}, {**steps(0.11), "dtype": "bfloat16"}]
    pictures.steps(found, performance.FORMS, tmp_path / "steps.svg")
    pictures.tasks(found, tmp_path / "tasks.svg")
    pictures.roofline(load_all("penalty"), tmp_path / "roofline.svg")
    pictures.lam(LAM, tmp_path / "lam.svg")
    pictures.penalty(load("penalty_mlp_cpu"), tmp_path / "penalty.svg")
    pictures.importance(load("importance_mlp_cpu"), tmp_path / "importance.svg")
    assert len(list(tmp_path.glob("*.svg"))) == 6


def test_all_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[list[str]] = []

    def run(command: list[str]) -> bool:
        ran.append(command)
        Path(command[-1]).write_text("{}")
        return "gpt2" not in command

    monkeypatch.setattr(everything, "_ran", run)
    names = [name for name, _ in everything.jobs("cpu", quick=True)]
    assert len(set(names)) == len(names) == 3 + 10 + 5 * 2 * 2
    for done in names[:-2]:
        (tmp_path / f"{done}.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["all.py", "--quick", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as exit:
        everything.main()
    assert exit.value.code == 1
    assert [Path(command[-1]).stem for command in ran] == names[-2:]
    assert capsys.readouterr().out.splitlines()[-1].endswith(": " + ", ".join(names[-2:]))
    monkeypatch.setattr(sys, "argv", ["all.py", "--anew", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        everything.main()
    assert len(ran) == 2 + len(names)
    monkeypatch.setattr(
        sys, "argv", ["all.py", "--anew", "--only", "importance", "--out", str(tmp_path)]
    )
    with pytest.raises(SystemExit):
        everything.main()
    assert [command[0] for command in ran[2 + len(names) :]] == ["importance"] * 10


def test_the_page_of_language_models_says_what_was_measured() -> None:
    result = load("language_cpu")
    page = language.PAGE.read_text(encoding="utf-8")
    assert language.page(result) in page
    tokens = [found["tokens"]["0.1"] for found in result["seeds"]]
    means = [sum(each) / len(tokens) for each in zip(*tokens, strict=True)]
    row = next(line for line in page.splitlines() if line.startswith("| `tokens` |"))
    cell = row.split("|")[4]
    assert [part.split("±")[0].strip() for part in cell.split("/")] == [f"{m:.2f}" for m in means]
