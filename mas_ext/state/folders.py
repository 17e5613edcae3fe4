"""A folder that one process holds, and whose names survive a power cut: on POSIX, and on Windows."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform == "win32":
    _ALREADY_EXISTS = 183

    @contextmanager
    def held(folder: Path) -> Iterator[None]:
        """Hold a folder for this process; a process that ends, in whatever way, holds it no more.

        By an object of the system that is named after the folder: a file in it that is open would keep it from
        being renamed and removed.

        Raises:
            BlockingIOError: another process, or this one, holds it.
            OSError: it can't be held: it is not there, or another user holds it.
        """
        found = folder.stat()
        windows = ctypes.WinDLL("kernel32", use_last_error=True)
        name = f"Global\\mas_ext-{found.st_dev}-{found.st_ino}"
        handle = windows.CreateMutexW(None, False, name)
        error = ctypes.get_last_error()
        if not handle:
            raise ctypes.WinError(error)
        try:
            if error == _ALREADY_EXISTS:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), str(folder))
            yield
        finally:
            windows.CloseHandle(handle)

    def sync(folder: Path) -> None:
        """Nothing: Windows has no call for it."""

else:
    import fcntl

    @contextmanager
    def held(folder: Path) -> Iterator[None]:
        """Hold a folder for this process; a process that ends, in whatever way, holds it no more.

        Raises:
            BlockingIOError: another process, or this one, holds it.
            OSError: it can't be held: it is not there, or its file system has no locks.
        """
        with _opened(folder) as descriptor:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield

    def sync(folder: Path) -> None:
        """Have the names in a folder survive a power cut, where the file system can."""
        with _opened(folder) as descriptor, suppress(OSError):
            os.fsync(descriptor)

    @contextmanager
    def _opened(folder: Path) -> Iterator[int]:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            yield descriptor
        finally:
            os.close(descriptor)
