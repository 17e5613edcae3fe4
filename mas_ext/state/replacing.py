"""Files that take another one's place whole: the old one survives until the new one is complete on the disk."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = ".mas_ext."


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Where to write a file that takes the place of `path` at the end; after an error there is the old one.

    A symbolic link stays, and what it leads to is replaced. Permissions, and owner and group as far as allowed,
    are those of the old file, or those of any new one. Another hard link keeps the old content. What processes
    that were killed while they wrote have left in the folder is removed.

    Raises:
        OSError: it can't be written: a folder that is not there, a file that may not be written, no file.
    """
    place = Path(os.path.realpath(path))
    before = _regular(place)
    remove_leftovers(place.parent)
    folder, lock = _locked_folder(place.parent)
    try:
        new = folder / "new"
        with open(new, "xb") as file:
            mode = os.fstat(file.fileno()).st_mode
        yield new
        with open(new, "rb+") as file:
            if before is not None:
                mode = before.st_mode
                with suppress(PermissionError):
                    os.fchown(file.fileno(), before.st_uid, before.st_gid)
            os.fchmod(file.fileno(), stat.S_IMODE(mode))
            os.fsync(file.fileno())
        os.replace(new, place)
        sync_folder(place.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def write(path: Path, content: str | bytes) -> None:
    """Write a file, text as UTF-8; the one that was there before survives until the new one is complete."""
    with replacing(path) as new:
        new.write_bytes(content.encode() if isinstance(content, str) else content)


def remove_leftovers(folder: Path) -> None:
    """Remove what writers that were killed have left in a folder, and nothing that is being written now."""
    for left in folder.glob(f"{_PREFIX}*"):
        with suppress(OSError), open_folder(left) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; a process that ends, in whatever way, holds it no more.

    Raises:
        FileExistsError: another process holds it.
    """
    with open_folder(folder) as descriptor:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileExistsError(
                f"{folder}: got a folder that another process works in, expected to be alone"
            ) from error
        yield


@contextmanager
def open_folder(folder: Path) -> Iterator[int]:
    """A folder's descriptor."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder survive a power cut, where the file system can."""
    with open_folder(folder) as descriptor, suppress(OSError):
        os.fsync(descriptor)


def _regular(place: Path) -> os.stat_result | None:
    """What is known of a file that may be replaced; None if there is none."""
    if place.is_symlink():  # that leads to itself
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(place))
    try:
        found = os.stat(place)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found.st_mode):
        number = errno.EISDIR if stat.S_ISDIR(found.st_mode) else errno.EINVAL
        raise OSError(number, "got what is no regular file, expected one to replace", str(place))
    if not os.access(place, os.W_OK):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(place))
    return found


def _locked_folder(parent: Path) -> tuple[Path, int]:
    """A new folder for a file that is written, and the lock that tells others that its writer is alive."""
    while True:
        folder = parent / f"{_PREFIX}{uuid.uuid4().hex}"
        folder.mkdir(mode=0o700)
        with suppress(FileNotFoundError):
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            with suppress(OSError):  # where the file system has no locks, nothing is swept either
                fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists():  # not swept before it was locked
                return folder, lock
            os.close(lock)
