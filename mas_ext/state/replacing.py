"""Files that take another one's place whole: the old one survives until the new one is complete on the disk."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from mas_ext.state import folders

_PREFIX = ".mas_ext."


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Where to write a file that takes the place of `path` at the end; after an error there is the old one.

    A symbolic link stays, and what it leads to is replaced. Permissions, and owner and group as far as allowed,
    are those of the old file, or those of any new one. Another hard link keeps the old content. What processes
    that were killed while they wrote have left in the folder is removed.

    Raises:
        OSError: it can't be written: a folder that is not there, a file that may not be written, no file; on
            Windows also a file that somebody has open.
    """
    place = Path(os.path.realpath(path))
    before = _regular(place)
    remove_leftovers(place.parent)
    with _new_folder(place.parent) as folder:
        new = folder / "new"
        with open(new, "xb") as file:
            mode = os.fstat(file.fileno()).st_mode
        yield new
        with open(new, "rb+") as file:
            if before is not None:
                mode = before.st_mode
                if sys.platform != "win32":  # where they follow from the folder
                    with suppress(PermissionError):
                        os.chown(new, before.st_uid, before.st_gid)
            new.chmod(stat.S_IMODE(mode))
            os.fsync(file.fileno())
        os.replace(new, place)
        folders.sync(place.parent)


def write(path: Path, content: str | bytes) -> None:
    """Write a file, text as UTF-8; the one that was there before survives until the new one is complete."""
    with replacing(path) as new:
        new.write_bytes(content.encode() if isinstance(content, str) else content)


def remove_leftovers(folder: Path) -> None:
    """Remove what writers that were killed have left in a folder, and nothing that is being written now."""
    for left in folder.glob(f"{_PREFIX}*"):
        with suppress(OSError), folders.held(left):
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; a process that ends, in whatever way, holds it no more.

    Raises:
        FileExistsError: another process holds it.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(folders.held(folder))
        except BlockingIOError as error:
            raise FileExistsError(
                f"{folder}: got a folder that another process works in, expected to be alone"
            ) from error
        yield


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


@contextmanager
def _new_folder(parent: Path) -> Iterator[Path]:
    """A folder for a file that is written, held so that others see that its writer is alive."""
    with ExitStack() as stack:
        while True:
            folder = parent / f"{_PREFIX}{uuid.uuid4().hex}"
            folder.mkdir(mode=0o700)
            try:
                stack.enter_context(folders.held(folder))
            except (BlockingIOError, FileNotFoundError):  # is being swept, or was
                continue
            except OSError:  # where the file system has no locks, nothing is swept either
                break
            if folder.exists():  # not swept before it was held
                break
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
