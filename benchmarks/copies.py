"""Plain copies of memory: how fast this machine moves bytes, which no kernel that reads and writes can beat."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

STREAMING_COPY = """
#include <emmintrin.h>
void copy(float *to, const float *from, long size) {
  for (long i = 0; i < size; i += 4) _mm_stream_ps(to + i, _mm_load_ps(from + i));
  _mm_sfence();
}
"""


def plain_copies(
    size: int, device: str, pool: ThreadPoolExecutor, skipped: dict[str, str]
) -> dict[str, Callable[[], object]]:
    """Copies that read and write `size` bytes in all, on as many threads as torch uses."""
    threads = torch.get_num_threads()
    part = size // 8 // threads // 4 * 4
    # Written to, because untouched pages are all one page, which stays in the cache.
    source, target = (torch.ones(part * threads, device=device) for _ in range(2))
    found: dict[str, Callable[[], object]] = {"Tensor.copy_": partial(target.copy_, source)}
    if device == "cpu":
        try:
            stream = _streaming_copy()
        except (OSError, subprocess.CalledProcessError) as error:
            skipped["streaming copy"] = str(error)
        else:

            def move(i: int) -> None:
                begin = 4 * part * i
                stream(target.data_ptr() + begin, source.data_ptr() + begin, part)

            found["streaming copy"] = lambda: [*pool.map(move, range(threads))]
    return found


def _streaming_copy() -> Callable[[int, int, int], None]:
    """copy(to, from, floats) past the caches, which no library at hand does: compiled here."""
    with tempfile.TemporaryDirectory() as folder:
        library = os.path.join(folder, "copy.so")
        compiler = [os.environ.get("CC", "cc"), "-O2", "-shared", "-fPIC", "-x", "c", "-"]
        subprocess.run(
            [*compiler, "-o", library],
            input=STREAMING_COPY,
            text=True,
            check=True,
            capture_output=True,
        )
        copy = ctypes.CDLL(library).copy
    copy.argtypes, copy.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long), None
    return copy
