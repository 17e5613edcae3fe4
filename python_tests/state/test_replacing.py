"""Files are replaced as people expect of a save, whoever else reads, writes or is killed meanwhile."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from times import TIMES
from torch import Tensor, nn

from mas_ext import FusedMASPenalty
from mas_ext.state import files as checkpoint
from mas_ext.state import folders, replacing
from mas_ext.state.replacing import write

KILLS = 5 * TIMES


def content(path: Path) -> str:
    return path.read_text(encoding="utf-8")


# -- what people expect ----------------------------------------------------------------------------


@pytest.mark.parametrize("relative", [False, True])
def test_a_symbolic_link_stays_and_its_target_is_replaced(tmp_path: Path, relative: bool) -> None:
    (tmp_path / "real").mkdir()
    target, link, second = tmp_path / "real" / "file", tmp_path / "link", tmp_path / "second"
    target.write_text("old")
    link.symlink_to("real/file" if relative else target)
    second.symlink_to(link)
    write(second, "new")
    assert link.is_symlink()
    assert second.is_symlink()
    assert content(target) == content(link) == "new"
    assert not target.is_symlink()
    assert {p.name for p in tmp_path.rglob("*")} == {"real", "file", "link", "second"}


def test_a_link_to_nothing_yet_makes_its_target(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("later")
    write(link, "new")
    assert content(tmp_path / "later") == "new"
    assert link.is_symlink()


def test_a_link_to_itself_is_an_error(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("link")
    with pytest.raises(OSError, match="symbolic links"):
        write(link, "new")
    assert link.is_symlink()


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666, 0o755, 0o2664])
def test_permissions_stay(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(mode)
    for _ in range(2):
        write(path, "new")
        assert stat.S_IMODE(path.stat().st_mode) == mode
    checkpoint.save({"a": torch.zeros(3)}, path)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_owner_and_group_stay(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    if os.getuid() == 0:
        os.chown(path, 1234, 2345)
    before = path.stat()
    write(path, "new")
    assert (path.stat().st_uid, path.stat().st_gid) == (before.st_uid, before.st_gid)


def test_a_new_file_is_as_the_umask_says(tmp_path: Path) -> None:
    for mask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        before = os.umask(mask)
        try:
            write(tmp_path / f"{mask}", "new")
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / f"{mask}").stat().st_mode) == mode


def test_another_hard_link_keeps_the_old_content(tmp_path: Path) -> None:
    path, backup = tmp_path / "file", tmp_path / "backup"
    path.write_text("old")
    backup.hardlink_to(path)
    write(path, "new")
    assert (content(path), content(backup)) == ("new", "old")


def test_a_file_that_may_not_be_written_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(0o444)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write it
    with pytest.raises(PermissionError, match="file"):
        write(path, "new")
    assert content(path) == "old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_file_stays(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "place"
    if kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    with pytest.raises(OSError, match="no regular file"):
        write(path, "new")
    with pytest.raises(ValueError, match="no regular file"):
        checkpoint.load(path)
    assert os.listdir(tmp_path) == ["place"]


@pytest.mark.parametrize("length", [1, 221, 222, 255])
def test_a_name_as_long_as_names_may_be(tmp_path: Path, length: int) -> None:
    path = tmp_path / ("n" * length)
    for k in range(2):
        checkpoint.save({"a": torch.full((3,), k)}, path)
        assert checkpoint.load(path)["a"].tolist() == [k] * 3
    with pytest.raises(OSError, match="name too long"):
        checkpoint.save({}, tmp_path / ("n" * 256))
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("length", [221, 1000, 100_000])
def test_parameters_with_long_names(tmp_path: Path, length: int) -> None:
    name = "layer_" * (length // 6)
    model = nn.ModuleDict({name: nn.Linear(3, 2)})

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        output: Tensor = model[name](x)  # type: ignore[index]
        return output

    penalty = FusedMASPenalty(model, forward=forward)
    penalty.consolidate([torch.rand(4, 3)])
    penalty.save(tmp_path / "file")
    loaded = FusedMASPenalty.load(tmp_path / "file", model, forward=forward)
    assert set(loaded.omega) == {f"{name}.weight", f"{name}.bias"}
    assert torch.equal(loaded.omega[f"{name}.weight"], penalty.omega[f"{name}.weight"])


def test_the_file_and_then_its_name_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, done = tmp_path / "file", []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def renamed(*paths: Any) -> None:
        done.append("name")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    checkpoint.save({"a": torch.zeros(3)}, path)
    assert done == ["file", "name", "folder"]


# -- others beside it ------------------------------------------------------------------------------

WRITER = """
import sys, torch
from mas_ext.state import files
who, path = int(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
k = 0
while True:
    k += 1
    files.save({"a": torch.full((100 * (1 + k % 7),), who), "k": torch.tensor(k)}, path)
"""


def writer(who: int, path: Path) -> Any:
    command = [sys.executable, "-c", WRITER, str(who), str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


@pytest.fixture
def writers(tmp_path: Path) -> Iterator[list[Any]]:
    started: list[Any] = []
    yield started
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def leftovers(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(".mas_ext.")]


def test_a_file_that_two_replace_is_always_a_whole_one(tmp_path: Path, writers: list[Any]) -> None:
    path = tmp_path / "file"
    checkpoint.save({"a": torch.full((100,), 1), "k": torch.tensor(0)}, path)
    writers += [writer(who, path) for who in (1, 2)]
    seen = set()
    for _ in range(200 * KILLS):
        found = checkpoint.load(path)["a"]
        assert len(found) % 100 == 0
        seen.add(int(found[0]))
        assert (found == found[0]).all()
    assert seen == {1, 2}
    assert all(process.poll() is None for process in writers), "neither took the other's file away"


def test_a_killed_save_leaves_the_old_file_or_the_new_and_the_next_one_nothing_else(
    tmp_path: Path, writers: list[Any]
) -> None:
    """Killed wherever it happens to be, many times; another file's save in the folder tidies up, too."""
    path, left = tmp_path / "file", 0
    for k in range(KILLS):
        process = writer(k, path)
        writers.append(process)
        for _ in range(1 + 3 * k % 20):
            write(tmp_path / "other", "beside")
        process.send_signal(signal.SIGKILL)
        process.wait()
        left += len(leftovers(tmp_path))
        if path.exists():
            found = checkpoint.load(path)["a"]
            assert (found == found[0]).all()
        write(tmp_path / "other", "after")
        assert leftovers(tmp_path) == []
    assert left > 0, "never killed in the middle"


def test_what_is_being_written_is_no_leftover(tmp_path: Path) -> None:
    with replacing.replacing(tmp_path / "slow") as new:
        new.write_text("slow")
        write(tmp_path / "fast", "fast")
        replacing.remove_leftovers(tmp_path)
        assert len(leftovers(tmp_path)) == 1
    assert content(tmp_path / "slow") == "slow"
    assert sorted(os.listdir(tmp_path)) == ["fast", "slow"]


@pytest.mark.parametrize("gone", [True, False])
def test_a_folder_swept_before_it_was_held_is_made_again(
    gone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the moment between its making and its being held, it looks like a leftover."""
    real, swept, sweeper = Path.mkdir, [], ExitStack()

    def mkdir(self: Path, *args: Any, **named: Any) -> None:
        real(self, *args, **named)
        if not swept:
            swept.append(self.name)
            if gone:
                replacing.remove_leftovers(tmp_path)
            else:
                sweeper.enter_context(folders.held(self))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with sweeper:
        write(tmp_path / "file", "new")
    assert content(tmp_path / "file") == "new"
    assert sorted(os.listdir(tmp_path)) == (["file"] if gone else [swept[0], "file"])


def test_a_folder_is_held_until_the_end_also_by_an_error(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        with suppress(ArithmeticError), replacing.alone_in(tmp_path):
            second = replacing.alone_in(tmp_path)
            with pytest.raises(FileExistsError, match="another process works in"):
                second.__enter__()
            raise ArithmeticError
    assert len(os.listdir("/proc/self/fd")) == before


def test_other_files_of_the_folder_stay(tmp_path: Path) -> None:
    for name in (".mas_ext", ".hidden", ".mas_extra.1", "mas_ext.1"):
        (tmp_path / name).touch()
    (tmp_path / ".mas_ext.0123").mkdir()
    (tmp_path / ".mas_ext.0123" / "half").write_text("half")
    write(tmp_path / "file", "new")
    expected = [".hidden", ".mas_ext", ".mas_extra.1", "file", "mas_ext.1"]
    assert sorted(os.listdir(tmp_path)) == expected
