"""The directory of a run: files that are whole or not there, and lines that are there once."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mas_ext
from mas_ext.comparison import directory as files
from mas_ext.comparison.directory import Directory, Journal
from mas_ext.comparison.options import Config, read_toml
from mas_ext.comparison.results import Findings
from mas_ext.scenarios import Task, Tensors
from mas_ext.scenarios.named import make_scenario


def line(task: int, epoch: int | None, **more: Any) -> dict[str, Any]:
    return {
        "method": "mas",
        "seed": 0,
        "lam": 1.0,
        "purpose": "final",
        "task": task,
        "epoch": epoch,
        **more,
    }


def lines(path: Path) -> list[Any]:
    return [json.loads(each) for each in path.read_text().splitlines()]


def test_journal_has_no_line_twice(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    journal = Journal(path)
    assert journal.add(line(0, 1, loss=0.5))
    assert not journal.add(line(0, 1, loss=0.7))
    assert journal.add(line(0, None, accuracy=torch.tensor([0.25, math.nan])))
    journal.close()

    journal = Journal(path)
    assert not journal.add(line(0, 1, loss=0.5))
    assert not journal.add(line(0, None))
    for other in ({"method": "joint"}, {"seed": 1}, {"lam": 2.0}, {"purpose": "choose"}):
        assert journal.add({**line(0, 1), **other})
    journal.close()
    assert lines(path)[:2] == [line(0, 1, loss=0.5), line(0, None, accuracy=[0.25, None])]
    assert len(lines(path)) == 6


@pytest.mark.parametrize("kept", [0, 1, 30])
def test_journal_of_a_run_that_was_killed_while_writing(kept: int, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole, torn = json.dumps(line(0, 1)) + "\n", json.dumps(line(0, 2))
    path.write_text(whole + torn[:kept])
    journal = Journal(path)
    assert journal.add(line(0, 2))
    journal.close()
    assert lines(path) == [line(0, 1), line(0, 2)]


def test_a_file_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    files.write_json(path, {"a": torch.tensor([1.0, math.inf]), "b": (math.nan, "c", 1)})
    assert json.loads(path.read_text()) == {"a": [1.0, None], "b": [None, "c", 1]}

    def full(descriptor: int) -> None:
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", full)
    before = path.read_bytes()
    with pytest.raises(OSError, match="no space"):
        files.write_json(path, {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_matrix(tmp_path: Path) -> None:
    path = tmp_path / "accuracy.csv"
    matrix = torch.tensor([[1 / 3, math.nan], [0.1, 1.0]], dtype=torch.float64)
    files.write_matrix(path, matrix)
    assert path.read_text() == "0.3333333333333333,\n0.1,1.0\n"
    assert torch.equal(files.read_matrix(path).nan_to_num(-1), matrix.nan_to_num(-1))


@pytest.mark.parametrize("setting", ["task", "domain", "class"])
def test_confusion(setting: Any, tmp_path: Path) -> None:
    """Labels for places: in the class-incremental setting of all tasks, else of the task's own classes."""
    data = Tensors(torch.zeros(4, 1), torch.tensor([3, 5, 8, 9]))
    tasks = [Task("a", data, data, (3, 5)), Task("b", data, data, (8, 9), outputs=3)]
    wide = setting == "class"
    confusion = {
        0: torch.tensor([[7, 0, 0, 0, 0], [1, 2, 0, 3, 4]] if wide else [[7, 0], [1, 2]]),
        1: torch.tensor([[5, 0, 6, 0, 0], [0, 0, 0, 0, 9]] if wide else [[5, 6, 0], [0, 0, 9]]),
    }
    files.write_confusion(tmp_path / "file", confusion, tasks, setting)
    right = [(0, 3, 0, 3, 7), (0, 5, 0, 3, 1), (0, 5, 0, 5, 2)]
    if wide:
        right += [(0, 5, 1, 9, 3), (0, 5, 1, None, 4), (1, 8, 0, 3, 5), (1, 8, 1, 8, 6)]
    else:
        right += [(1, 8, 1, 8, 5), (1, 8, 1, 9, 6)]
    assert files.read_confusion(tmp_path / "file") == [*right, (1, 9, 1, None, 9)]
    files.write_confusion(tmp_path / "file", {}, tasks, setting)
    assert files.read_confusion(tmp_path / "file") == []


def test_begin(tmp_path: Path) -> None:
    out, config = tmp_path / "new" / "run", Config.read({"seeds": 2})
    directory = Directory(out)
    directory.check(config, resume=False)
    with pytest.raises(
        FileNotFoundError, match=r"run', where no run has begun; leave out --resume"
    ):
        directory.check(config, resume=True)
    with directory.begun(config):
        pass
    assert {path.name for path in out.iterdir()} == {"config.toml", "environment.json"}
    assert [path.name for path in out.parent.iterdir()] == ["run"]
    assert Config.read(read_toml(out / "config.toml")) == config == directory.config()

    directory.check(config, resume=True)
    directory.check(Config.read({"seeds": 2, "data": "elsewhere"}), resume=True)
    with pytest.raises(
        FileExistsError,
        match="which is a run already; --resume, in Python resume=True, goes on with it",
    ):
        directory.check(config, resume=False)
    with pytest.raises(ValueError, match="run' is another run: seeds was 2 and is 1"):
        directory.check(Config(), resume=True)

    (out / ".mas_ext.01234abf").mkdir()
    with directory.begun(config):
        pass
    assert {path.name for path in out.iterdir()} == {"config.toml", "environment.json"}
    first, second = json.loads((out / "environment.json").read_text())
    assert first["started"] <= second["started"]
    for environment in (first, second):
        assert environment["torch"] == torch.__version__
        assert environment["backend"] == mas_ext.info()["backend"]
        assert environment["cpu"]


HOLDER = """
import sys, time
from mas_ext.comparison.directory import Directory
from mas_ext.comparison.options import Config
with Directory(sys.argv[1]).begun(Config()):
    print("here", flush=True)
    time.sleep(60)
"""


def test_one_process_at_a_time_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-c", HOLDER, str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"here\n"
        before = (out / "environment.json").read_bytes()
        with (
            pytest.raises(FileExistsError, match="another process works in"),
            Directory(out).begun(Config()),
        ):
            pass
        assert (out / "environment.json").read_bytes() == before
        other.kill()
    with Directory(out).begun(Config()):
        pass
    assert len(json.loads((out / "environment.json").read_text())) == 2


def test_of_two_fresh_runs_in_one_place_one_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one finds out when it puts its own in place, and takes it away again."""
    out, real = tmp_path / "run", Path.replace

    def later(self: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "replace", real)
        with Directory(out).begun(Config()):
            pass
        return real(self, target)

    monkeypatch.setattr(Path, "replace", later)
    with pytest.raises(FileExistsError, match="exists by now"), Directory(out).begun(Config()):
        pass
    assert os.listdir(tmp_path) == ["run"]
    assert len(json.loads((out / "environment.json").read_text())) == 1


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b"\xff"])
@pytest.mark.parametrize("name", ["config.toml", "environment.json", "result.json"])
def test_a_damaged_file_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    directory = Directory(tmp_path / "run")
    with directory.begun(Config()):
        pass
    cell: Any = {"method": "mas", "seed": 0, "lam": 1.0, "purpose": "final"}
    directory.folder(cell).mkdir()
    path = directory.folder(cell) / name if name == "result.json" else directory.path / name
    path.write_bytes(content)

    def read() -> None:
        if name == "config.toml":
            directory.config()
        elif name == "result.json":
            directory[cell]
        else:
            with directory.begun(Config()):
                pass

    fine = (name, content) in [("config.toml", b""), ("environment.json", b"[]")]
    if fine:
        read()
        return
    with pytest.raises(ValueError, match=name):
        read()


def test_a_damaged_line_of_metrics_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for content in (b"{\n", b"7\n", b"{}\n", b"\xff\n"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"metrics\.jsonl: got a damaged file"):
            Journal(path)


def test_a_directory_that_is_no_run(tmp_path: Path) -> None:
    Directory(tmp_path).check(Config(), resume=False)
    (tmp_path / "thesis.tex").touch()
    for out in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(FileExistsError, match="which exists; expected a new directory"):
            Directory(out).check(Config(), resume=False)
        with pytest.raises(FileNotFoundError, match="where no run has begun"):
            Directory(out).check(Config(), resume=True)
    (tmp_path / "thesis.tex").unlink()
    with Directory(tmp_path).begun(Config()):
        pass
    assert (tmp_path / "config.toml").exists()


def test_a_run_from_before_a_scenario_had_its_name(tmp_path: Path) -> None:
    """It is read, resumed and shown under the name of now, which nobody else can give any more."""
    config = Config.read({"scenario": "recognition", "tasks": 5})
    (tmp_path / "config.toml").write_text(
        config.toml().replace('scenario = "recognition"', 'scenario = "datasets"')
    )
    assert Directory(tmp_path).config() == config
    Directory(tmp_path).check(config, resume=True)
    files.write_json(tmp_path / "environment.json", [])
    assert Findings.read(tmp_path).values == config.values()
    with pytest.raises(ValueError, match="scenario: got 'datasets', expected 'recognition'"):
        Config.read({"scenario": "datasets"})
    with pytest.raises(ValueError, match="scenario: got 'datasets', expected 'recognition'"):
        make_scenario("datasets")


def test_cells(tmp_path: Path) -> None:
    """A folder for each: a choice of lam has one per lam, what counts one per method and seed."""
    directory = Directory(tmp_path)
    choose = {"method": "mas", "seed": 2, "lam": 1e-05, "purpose": "choose"}
    final = {"method": "mas", "seed": 0, "lam": 1e-05, "purpose": "final"}
    folders = {"choosing/mas-lam1e-05-seed2": choose, "mas-seed0": final}
    for folder, cell in folders.items():
        (tmp_path / folder).mkdir(parents=True)
        assert cell not in directory
        directory.add(cell, {"held_bytes": torch.tensor([math.nan, 2.0])}, 1.0)
        expected = {**cell, "held_bytes": [None, 2.0]}
        assert json.loads((tmp_path / folder / "result.json").read_text()) == expected
        assert directory[cell] == expected
        assert cell in directory


def test_a_run_from_before_lam_was_chosen_by_itself(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('scenario = "split-digits"\n[methods.mas]\n')
    directory = Directory(tmp_path)
    assert directory.values()["lam"] == []
    assert directory.config().lams("mas") == (1.0,)
    directory.check(Config.read({"methods": ["mas"], "lam": [], "lr": 0.001}), resume=True)
    with pytest.raises(ValueError, match=r"is another run: lam was \[\] and is auto"):
        directory.check(Config.read({"methods": ["mas"], "lr": 0.001}), resume=True)
